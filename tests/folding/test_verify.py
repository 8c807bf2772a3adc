"""The proof: it passes for right folds, catches and names wrong ones, and its bound is honest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from fold_models import batch_norm, batch_norms, bn_node, conv_model, model, net_model, value
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from pybn.folding import backward, runtime
from pybn.folding.inputs import load_inputs, random_inputs
from pybn.folding.onnx import fold_onnx
from pybn.folding.runtime import CheckError
from pybn.folding.verify import verify


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(runtime, "TIMING_RUNS", (1, 2))


def check(proto, count=2, **options):
    result = fold_onnx(proto)
    inputs = options.pop("inputs", None) or random_inputs(proto, count)
    return verify(proto, result.model, result.report, inputs, **options)


def wrong(rule, change):
    """A rule whose weights are off by `change`."""

    def changed(node, index, affine, facts):
        step = rule(node, index, affine, facts)
        (rewrite,) = step.rewrites
        constants = {i: change(i, array) for i, array in rewrite.constants.items()}
        return replace(step, rewrites=(replace(rewrite, constants=constants),))

    return changed


@pytest.mark.parametrize("make", [conv_model, net_model])
def test_right_folds_pass(make):
    result = check(make())
    assert result.passed
    assert result.runtime_agrees
    assert result.inputs == 2
    assert all(0 < fold.error <= fold.bound for fold in result.folds)
    # The bound is of the size of rounding, not a blank cheque.
    assert all(fold.bound < 1e-3 for fold in result.folds)
    assert all(output.derived and output.bound < 1e-2 for output in result.outputs)
    assert result.timing.runs >= 1
    assert result.timing.plain_before > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda i, array: array * np.float32(1.001),
        lambda i, array: array + np.float32(1e-3) if i == 2 else array,
        lambda i, array: np.roll(array, 1, axis=0),
        lambda i, array: -array,
        lambda i, array: array * np.float32(np.nan),
    ],
)
def test_a_wrong_rule_is_caught_and_named(monkeypatch, change):
    monkeypatch.setitem(backward.BACKWARD, "Conv", wrong(backward.conv, change))
    result = check(net_model())
    assert not result.passed
    assert [fold.folds for fold in result.folds if not fold.passed] == [("bn_n",)]


def test_a_wrong_linear_rule_is_named_too(monkeypatch):
    broken = wrong(backward.matmul, lambda i, array: array * np.float32(1.01))
    monkeypatch.setitem(backward.BACKWARD, "MatMul", broken)
    result = check(net_model())
    assert [fold.folds for fold in result.folds if not fold.passed] == [("bn_y",)]


def test_damage_outside_the_folds_is_caught_and_no_fold_is_blamed():
    proto = net_model()
    result = fold_onnx(proto)
    relu = next(node for node in result.model.graph.node if node.op_type == "Relu")
    relu.op_type = "Abs"
    checked = verify(proto, result.model, result.report, random_inputs(proto, 2))
    assert [(fold.output, fold.folds) for fold in checked.folds if not fold.passed] == [("r", ())]
    assert [output.passed for output in checked.outputs] == [False]
    assert not checked.passed


# A run of models takes a hundred times as long as other examples.
@settings(max_examples=settings.default.max_examples // 5)
@given(
    seed=st.integers(0, 10**6),
    inner=st.sampled_from([1, 7, 300]),
    magnitude=st.sampled_from([1e-3, 1.0, 1e4]),
    variance=st.sampled_from([1e-6, 1.0, 1e4]),
    dtype=st.sampled_from(["float32", "float64", "float16"]),
)
def test_bound_holds_under_cancellation(seed, inner, magnitude, variance, dtype):
    # Means far from zero cancel in the batch norm, and not at all in the folded bias.
    rng = np.random.default_rng(seed)
    if dtype == "float16":
        magnitude, variance = min(magnitude, 10.0), max(variance, 1.0)
    parameters = batch_norm(rng, 5, "float64")
    parameters["mean"] = parameters["mean"] * magnitude
    parameters["var"] = parameters["var"] * variance
    constants = {"w": rng.normal(size=(5, inner)), "c0": rng.normal(size=5) * magnitude}
    constants = {name: a.astype(dtype) for name, a in {**constants, **parameters}.items()}
    nodes = [
        helper.make_node("Gemm", ["x", "w", "c0"], ["g"], transB=1, beta=0.5, alpha=-2.0),
        bn_node("g", "y"),
    ]
    proto = model(nodes, constants, ["N", inner], ["N", 5], dtype=dtype)
    assert check(proto).passed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_chains_through_add_dropout_and_a_second_batch_norm(dtype):
    rng = np.random.default_rng(4)
    constants = {
        "w": rng.normal(size=(4, 3, 3)).astype(dtype),
        "k": rng.normal(size=(4, 1)).astype(dtype),
        **batch_norm(rng, 4, dtype),
        **{"2" + name: array for name, array in batch_norm(rng, 4, dtype).items()},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Add", ["k", "c"], ["s"]),
        helper.make_node("Dropout", ["s"], ["d"]),
        bn_node("d", "n"),
        bn_node("n", "y", "2"),
    ]
    proto = model(nodes, constants, ["N", 3, 9], ["N", 4, 7], dtype=dtype)
    result = check(proto)
    assert result.passed
    # All three maps went into one convolution.
    assert [fold.folds for fold in result.folds] == [("s", "bn_n", "bn_y")]


def nested_model():
    rng = np.random.default_rng(5)
    constants = {"w": rng.normal(size=(2, 2, 3, 1)).astype("float32"), **batch_norm(rng, 4)}
    then = helper.make_graph(
        [helper.make_node("ConvTranspose", ["x", "w"], ["c"], group=2), bn_node("c", "t")],
        "then",
        [],
        [value("t", [None] * 4)],
    )
    other = helper.make_graph(
        [helper.make_node("Concat", ["x", "x"], ["e"], axis=1)],
        "else",
        [],
        [value("e", [None] * 4)],
    )
    nodes = [helper.make_node("If", ["cond"], ["y"], name="if", then_branch=then, else_branch=other)]
    condition = helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, [])
    return model(nodes, constants, ["N", 2, 5, 5], [None] * 4, inputs=[condition])


def test_fold_inside_a_subgraph_is_proven_by_itself(monkeypatch):
    proto = nested_model()
    never = {"x": np.zeros((1, 2, 5, 5), "float32"), "cond": np.array(False)}
    result = check(proto, inputs=[never])
    assert result.passed
    assert [output.derived for output in result.outputs] == [False]
    # Even though no input takes the branch, a wrong fold in it is found.
    broken = wrong(backward.conv_transpose, lambda i, array: array * np.float32(1.01))
    monkeypatch.setitem(backward.BACKWARD, "ConvTranspose", broken)
    result = check(proto, inputs=[never])
    assert [fold.passed for fold in result.folds] == [False]


@pytest.mark.parametrize("attributes", [{}, {"transA": 1, "transB": 1}, {"transB": 1}])
def test_linear_operators_inside_a_function_are_proven(attributes):
    rng = np.random.default_rng(6)
    shape = (4, 3) if attributes.get("transB") else (3, 4)
    constants = {
        "w": rng.normal(size=shape).astype("float32"),
        "k": rng.normal(size=(5, 1)).astype("float32"),
        **batch_norm(rng, 4),
    }
    nodes = [helper.make_node("Constant", [], [n], value=onnx.numpy_helper.from_array(a)) for n, a in constants.items()]
    nodes += [helper.make_node("Gemm", ["x", "w", "k"], ["g"], **attributes), bn_node("g", "y")]
    function = helper.make_function("local", "Block", ["x"], ["y"], nodes, [helper.make_opsetid("", 17)])
    proto = model(
        [helper.make_node("Block", ["x"], ["y"], domain="local")],
        {},
        [3, 5] if attributes.get("transA") else [5, 3],
        [5, 4],
        functions=[function],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
    )
    assert batch_norms(fold_onnx(proto).model) == 0
    assert check(proto).passed


def test_integer_outputs_are_counted_not_judged():
    proto = net_model()
    proto.graph.node.append(helper.make_node("ArgMax", ["y"], ["class"], axis=1))
    proto.graph.output.append(helper.make_tensor_value_info("class", onnx.TensorProto.INT64, ["N", 1]))
    result = check(proto)
    assert result.passed
    assert result.outputs[1].bound is None
    assert result.outputs[1].changed == 0


def test_model_without_folds():
    result = check(model([helper.make_node("Softmax", ["x"], ["y"])], {}, ["N", 4], ["N", 4]))
    assert result.passed
    assert result.runtime_agrees
    assert result.folds == ()


def test_activations_that_overflow_prove_nothing():
    proto = conv_model()
    x = np.full((1, 3, 8, 8), 3e38, dtype="float32")
    result = check(proto, inputs=[{"x": x}])
    assert not result.passed
    assert "no finite activation" in result.folds[0].detail


def test_labels_give_accuracy():
    proto = net_model()
    inputs = random_inputs(proto, 3)
    labels = np.zeros(sum(len(feeds["x"]) for feeds in inputs), dtype="int64")
    seen = check(proto, inputs=inputs, labels=labels).predictions
    assert seen.samples == 6
    assert seen.changed == 0
    assert 0 <= seen.accuracy_before == seen.accuracy_after <= 1


def test_runtime_failures_are_one_line():
    proto = net_model()
    with pytest.raises(CheckError, match=r"cannot run the original model on x \(2, 9\)") as caught:
        check(proto, inputs=[{"x": np.zeros((2, 9), "float32")}])
    assert "\n" not in str(caught.value)
    result = fold_onnx(proto)
    with pytest.raises(CheckError, match="no inputs"):
        verify(proto, result.model, result.report, [])


# Inputs


def many_inputs():
    infos = [
        helper.make_tensor_value_info(name, element, shape)
        for name, element, shape in (
            ("f", onnx.TensorProto.FLOAT, ["batch", 3, "side", None]),
            ("u", onnx.TensorProto.UINT8, ["batch", "side"]),
            ("i", onnx.TensorProto.INT64, [4, "length"]),
            ("b", onnx.TensorProto.BOOL, []),
        )
    ]
    graph = helper.make_graph([helper.make_node("Identity", ["f"], ["y"])], "g", infos, [value("y", [None] * 4)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_random_inputs_fit_the_model_and_are_seeded():
    draws = random_inputs(many_inputs(), 6)
    again = random_inputs(many_inputs(), 6)
    assert {len(feeds["f"]) for feeds in draws} == {1, 2, 3}
    for feeds, same in zip(draws, again, strict=True):
        assert feeds["f"].dtype == np.float32
        # One name is one size.
        assert feeds["u"].shape == (feeds["f"].shape[0], feeds["f"].shape[2])
        assert feeds["i"].shape[0] == 4
        assert feeds["i"].max() < 10
        assert feeds["b"].dtype == np.bool_
        assert feeds["b"].shape == ()
        for name, array in feeds.items():
            np.testing.assert_array_equal(array, same[name])
    assert max(feeds["u"].max() for feeds in draws) > 200


def test_sizes_that_the_model_rejects_are_not_drawn():
    # Two poolings and an upsampling, added: only multiples of 4 fit. And a batch that is always 1.
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[8, 8], strides=[32, 32], ceil_mode=1),
        helper.make_node("Resize", ["p", "", "scales"], ["u"]),
        helper.make_node("Add", ["x", "u"], ["a"]),
        helper.make_node("Reshape", ["a", "shape"], ["y"]),
    ]
    constants = {"scales": np.array([1, 1, 32, 32], "float32"), "shape": np.array([1, 3, -1])}
    proto = model(nodes, constants, ["N", 3, "H", "W"], [None] * 3)
    draws = random_inputs(proto, 6)
    assert {feeds["x"].shape for feeds in draws} == {(n, 3, s, s) for n, s in ((1, 32), (2, 64), (3, 96))}
    # What no size satisfies is drawn all the same, and the check says what is wrong with it.
    constants["shape"] = np.array([7, 7, 7])
    impossible = model(nodes, constants, ["N", 3, "H", "W"], [None] * 3)
    assert random_inputs(impossible, 1)[0]["x"].shape == (1, 3, 32, 32)
    with pytest.raises(CheckError, match=r"cannot run the original model on x \(1, 3, 32, 32\)"):
        check(impossible, 1)


def test_inputs_that_are_not_tensors_are_named():
    proto = many_inputs()
    proto.graph.input[0].type.Clear()
    proto.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1
    with pytest.raises(CheckError, match="input 'f' is not a tensor"):
        random_inputs(proto, 1)


def test_data_is_run_in_chunks(tmp_path):
    path = tmp_path / "d.npz"
    x = np.zeros((230, 3, 8, 8), "float32")
    np.savez(path, x=x, labels=np.arange(230))
    chunks, labels = load_inputs(conv_model(), path)
    assert [len(chunk["x"]) for chunk in chunks] == [100, 100, 30]
    assert labels.shape == (230,)
    fixed = model([helper.make_node("Relu", ["x"], ["y"])], {}, [10, 3, 8, 8], [10, 3, 8, 8])
    chunks, _ = load_inputs(fixed, path)
    assert {len(chunk["x"]) for chunk in chunks} == {10}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros(3)}, "no array 'x', expected one for each input: x"),
        ({"x": np.zeros((2, 3, 8, 8))}, "'x' is float64, expected float32"),
        ({"x": np.zeros((2, 3, 8), "float32")}, r"shape \(2, 3, 8\), expected \(N, 3, 8, 8\)"),
        ({"x": np.zeros((2, 1, 8, 8), "float32")}, r"expected \(N, 3, 8, 8\)"),
        ({"x": np.zeros((0, 3, 8, 8), "float32")}, "samples"),
        (
            {"x": np.zeros((2, 3, 8, 8), "float32"), "labels": np.zeros(3, int)},
            r"labels is int64 of shape \(3,\), expected integers of shape \(2,\)",
        ),
        ({"x": np.zeros((2, 3, 8, 8), "float32"), "labels": np.zeros(2)}, "labels is float64"),
    ],
)
def test_bad_data_is_a_one_line_error(tmp_path, arrays, message):
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    with pytest.raises(CheckError, match=message) as caught:
        load_inputs(conv_model(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04broken"])
def test_files_that_are_not_npz(tmp_path, content):
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    with pytest.raises(CheckError, match=r"d\.npz"):
        load_inputs(conv_model(), path)


def test_missing_and_single_array_files(tmp_path):
    with pytest.raises(CheckError, match="No such file"):
        load_inputs(conv_model(), tmp_path / "none.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(CheckError, match="not a readable"):
        load_inputs(conv_model(), tmp_path / "one.npy")
