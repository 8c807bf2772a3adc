"""The check of models folded by hand: right ones of every kind pass, wrong ones fail where they are wrong."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from fold_models import batch_norm, bn_node, model, value
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from pybn.folding import runtime
from pybn.folding.inputs import random_inputs
from pybn.folding.report import Fold, FoldReport
from pybn.folding.verify import verify

C = 4


@pytest.fixture(autouse=True)
def quick_timing(monkeypatch):
    monkeypatch.setattr(runtime, "TIMING_RUNS", (1, 1))


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def fold_row(name, *outputs, graph="main"):
    return Fold(name, "BatchNormalization", outputs[0], graph, "backward", (), (), outputs, 0, (0.0, 0.0))


def check(before, after, *rows, count=2):
    return verify(before, after, FoldReport(rows), random_inputs(before, count))


def failures(result):
    return [(fold.output, fold.folds) for fold in result.folds if not fold.passed]


def constants(rng, dtype="float32"):
    values = {
        "w": rng.normal(size=(C, 3, 3, 3)),
        "s": rng.uniform(0.3, 3, (C, 1, 1)),
        "k": rng.normal(size=(C, 1, 1)),
        "p": rng.normal(size=(C, 1, 1)),
    }
    return {name: array.astype(dtype) for name, array in values.items()}


def scaled(weight, scale, axis=0):
    shape = [1] * weight.ndim
    shape[axis] = -1
    return (weight.astype(np.float64) * np.asarray(scale, np.float64).reshape(shape)).astype(weight.dtype)


# What a positive scale passes: nodes from "c" to "r", and the scale of the channels of "c" that has the same effect as
# one value per channel, `s`, on "r".
SAME = lambda s: s  # noqa: E731
PASSED = {
    "Relu": ([node("Relu", "c", "r")], SAME),
    "LeakyRelu": ([node("LeakyRelu", "c", "r", alpha=0.2)], SAME),
    "PRelu": ([node("PRelu", "c p", "r")], SAME),
    "MaxPool": ([node("MaxPool", "c", "r", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)], SAME),
    "AveragePool": ([node("AveragePool", "c", "r", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], SAME),
    "GlobalAveragePool": ([node("GlobalAveragePool", "c", "r")], SAME),
    "ReduceMean": ([node("ReduceMean", "c", "r", axes=[2, 3])], SAME),
    "Resize nearest": ([helper.make_node("Resize", ["c", "", "twice"], ["r"], mode="nearest")], SAME),
    "Resize linear": ([helper.make_node("Resize", ["c", "", "enlarge"], ["r"], mode="linear")], SAME),
    "Resize cubic": ([helper.make_node("Resize", ["c", "", "enlarge"], ["r"], mode="cubic")], SAME),
    "Identity and Dropout": ([node("Identity", "c", "i"), node("Dropout", "i", "r")], SAME),
    "Pad": ([node("Pad", "c pads", "r")], SAME),
    "Cast": ([node("Cast", "c", "d", to=onnx.TensorProto.DOUBLE), node("Cast", "d", "r", to=1)], SAME),
    "Transpose": (
        [node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Transpose", "t", "r", perm=[0, 3, 1, 2])],
        SAME,
    ),
    "Reshape of its shape": (
        [node("Shape", "c", "n"), node("Relu", "c", "e"), node("Reshape", "e n", "r")],
        SAME,
    ),
    "Unsqueeze, Expand, Squeeze": (
        [node("Unsqueeze", "c axis", "u"), node("Expand", "u big", "e"), node("Slice", "e nil axis axis", "f"),
         node("Squeeze", "f axis", "r")],
        SAME,
    ),
    "Concat and Slice": (
        [node("Concat", "c c", "t", axis=1), node("Slice", "t start end axis", "r")],
        lambda s: np.concatenate([s[2:], s[:2]]),
    ),
    "Split and Concat": (
        [node("Split", "c halves", "h l", axis=1), node("Concat", "l h", "r", axis=1)],
        lambda s: np.concatenate([s[2:], s[:2]]),
    ),
    "DepthToSpace DCR": (
        [node("SpaceToDepth", "c", "z", blocksize=2), node("DepthToSpace", "z", "r", blocksize=2)],
        SAME,
    ),
    "Max and Min": ([node("Max", "c zero", "h"), node("Min", "h infinite", "r")], SAME),
}  # fmt: skip

OPERANDS = {
    "twice": np.array([1, 1, 2, 2], "float32"),
    "enlarge": np.array([1, 1, 2.5, 1.3], "float32"),
    "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2]),
    "axis": np.array([1]),
    "big": np.array([1, 2, 1, 1, 1]),
    "nil": np.array([0]),
    "start": np.array([2]),
    "end": np.array([6]),
    "halves": np.array([2, 2]),
    "zero": np.array(0, "float32"),
    "infinite": np.array(np.inf, "float32"),
}


def passed_pair(kind, change=lambda s: s, rng=None, magnitude=1.0):
    nodes, along = PASSED[kind]
    arrays = constants(rng or np.random.default_rng(0))
    arrays["w"] = arrays["w"] * np.float32(magnitude)
    arrays["s"] = arrays["s"] / np.float32(magnitude)
    used = {name: array for name, array in {**OPERANDS, **arrays}.items() if any(name in item.input for item in nodes)}
    conv = node("Conv", "x w", "c")
    shape = ["N", 3, 8, 8]
    before = model(
        [conv, *nodes, node("Mul", "r s", "y")], {"w": arrays["w"], "s": arrays["s"], **used}, shape, [None] * 4
    )
    # Inner names change, because their data does; the last node gives the output.
    renamed = [onnx.NodeProto.FromString(item.SerializeToString()) for item in (conv, *nodes)]
    data = {name for item in renamed for name in item.output}
    for item in renamed:
        for names in (item.input, item.output):
            names[:] = ["y" if name == "r" else f"{name}.folded" if name in data else name for name in names]
    weight = scaled(arrays["w"], change(along(arrays["s"].ravel())))
    return before, model(renamed, {"w": weight, **used}, shape, [None] * 4)


@pytest.mark.parametrize("kind", PASSED)
def test_scales_pass_every_operator_of_the_table(kind):
    result = check(*passed_pair(kind), fold_row("mul", "y"))
    assert result.passed
    [fold] = result.folds
    assert fold.folds == ("mul",)
    assert 0 < fold.error <= fold.bound < 1e-3


@pytest.mark.parametrize("kind", PASSED)
def test_scales_of_other_channels_are_caught(kind):
    result = check(*passed_pair(kind, lambda s: np.roll(s, 1)), fold_row("other", "c"), fold_row("mul", "y"))
    assert failures(result) == [("y", ("mul",))]


EPSILON = float(np.float32(1e-5))


def affine_of(parameters):
    wide = {name: array.astype(np.float64) for name, array in parameters.items()}
    scale = wide["gamma"] / np.sqrt(wide["var"] + EPSILON)
    return scale, wide["beta"] - scale * wide["mean"]


def forward_pair(pads, border_map=False):
    """BN, Conv: the shift does not reach a border of zeros, unless a map of it is added."""
    rng = np.random.default_rng(1)
    parameters = batch_norm(rng, 3)
    weight, bias = rng.normal(size=(C, 3, 3, 3)).astype("float32"), rng.normal(size=C).astype("float32")
    nodes = [node("Relu", "x", "r"), bn_node("r", "n"), node("Conv", "n w c", "y", pads=pads), node("Relu", "y", "z")]
    a, b = affine_of(parameters)
    before = model(nodes, {"w": weight, "c": bias, **parameters}, ["N", 3, 6, 6], outputs=[value("z", [None] * 4)])
    folded = [node("Relu", "x", "r"), node("Conv", "r w c", "y", pads=pads), node("Relu", "y", "z")]
    shift = np.einsum("oihw,i->o", weight.astype(float), b)
    arrays = {"w": scaled(weight, a, 1), "c": (bias + shift).astype("float32")}
    if border_map:
        ones = np.pad(np.ones((6, 6)), 1)
        windows = np.lib.stride_tricks.sliding_window_view(ones, (3, 3))
        arrays["c"] = bias
        arrays["map"] = np.einsum("yxhw,oihw,i->oyx", windows, weight.astype(float), b).astype("float32")
        folded[1:2] = [node("Conv", "r w c", "y.folded", pads=pads), node("Add", "y.folded map", "y")]
    return before, model(folded, arrays, ["N", 3, 6, 6], outputs=[value("z", [None] * 4)])


def test_a_shift_into_a_convolution_without_padding_passes():
    assert check(*forward_pair([0, 0, 0, 0]), fold_row("bn", "y")).passed


def test_a_shift_over_a_border_of_zeros_is_caught():
    result = check(*forward_pair([1, 1, 1, 1]), fold_row("bn", "y"))
    assert failures(result) == [("y", ("bn",))]


def test_a_border_map_passes():
    assert check(*forward_pair([1, 1, 1, 1], border_map=True), fold_row("bn", "y")).passed


def grouped_pair(order, dtype="float32"):
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(6, 2, 3, 3)).astype(dtype)
    parameters = batch_norm(rng, 4, dtype)
    nodes = [node("ConvTranspose", "x w", "c", group=2), bn_node("c", "y")]
    a, b = affine_of(parameters)
    before = model(nodes, {"w": weight, **parameters}, ["N", 6, 4, 4], [None] * 4, dtype=dtype)
    by_group = weight.reshape(2, 3, 2, 3, 3) * a.reshape((2, 2), order=order).reshape(2, 1, 2, 1, 1)
    arrays = {"w": by_group.reshape(weight.shape).astype(dtype), "c": b.astype(dtype)}
    return before, model(
        [node("ConvTranspose", "x w c", "y", group=2)], arrays, ["N", 6, 4, 4], [None] * 4, dtype=dtype
    )


def test_a_grouped_transposed_convolution_scaled_on_the_wrong_axis_is_caught():
    assert check(*grouped_pair("C"), fold_row("bn", "y")).passed
    assert failures(check(*grouped_pair("F"), fold_row("bn", "y"))) == [("y", ("bn",))]


def preactivation_pair(lose_sign=False):
    """BN, Relu, Conv: ``relu(a x + b) = a max(x, -b/a) + b`` for a > 0, with the minimum for a < 0."""
    rng = np.random.default_rng(3)
    parameters = batch_norm(rng, 3)
    parameters["gamma"] = np.array([0.7, -1.3, 2.0], "float32")
    weight = rng.normal(size=(C, 3, 3, 3)).astype("float32")
    nodes = [bn_node("x", "n"), node("Relu", "n", "r"), node("Conv", "r w", "y")]
    before = model(nodes, {"w": weight, **parameters}, ["N", 3, 6, 6], [None] * 4)
    a, b = affine_of(parameters)
    low = np.where(a > 0, -b / a, -np.inf)
    high = np.where(a > 0, np.inf, -b / a)
    if lose_sign:
        low, high = -b / a, np.full(3, np.inf)
    arrays = {
        "low": low.reshape(3, 1, 1).astype("float32"),
        "high": high.reshape(3, 1, 1).astype("float32"),
        "w": scaled(weight, a, 1),
        "c": np.einsum("oihw,i->o", weight.astype(float), b).astype("float32"),
    }
    folded = [node("Max", "x low", "m"), node("Min", "m high", "h"), node("Conv", "h w c", "y")]
    return before, model(folded, arrays, ["N", 3, 6, 6], [None] * 4)


def test_max_and_min_instead_of_a_batch_norm_and_relu_pass():
    assert check(*preactivation_pair(), fold_row("bn", "y")).passed


def test_a_lost_sign_is_caught():
    assert failures(check(*preactivation_pair(lose_sign=True), fold_row("bn", "y"))) == [("y", ("bn",))]


def clip_pair(swap=False):
    rng = np.random.default_rng(4)
    arrays = constants(rng)
    bounds = {"low": np.array(0, "float32"), "high": np.array(6, "float32")}
    s = arrays["s"].copy()
    s[1] *= -1
    nodes = [node("Conv", "x w", "c"), node("Clip", "c low high", "r"), node("Mul", "r s", "y")]
    before = model(nodes, {"w": arrays["w"], "s": s, **bounds}, ["N", 3, 8, 8], [None] * 4)
    ends = np.sort([np.zeros_like(s), 6 * s], axis=0) if not swap else np.array([np.zeros_like(s), 6 * s])
    arrays = {"w": scaled(arrays["w"], s), "low": ends[0], "high": ends[1]}
    folded = [node("Conv", "x w", "c.folded"), node("Max", "c.folded low", "m"), node("Min", "m high", "y")]
    return before, model(folded, arrays, ["N", 3, 8, 8], [None] * 4)


def test_bounds_per_channel_pass_and_swapped_ones_are_caught():
    assert check(*clip_pair(), fold_row("mul", "y")).passed
    assert failures(check(*clip_pair(swap=True), fold_row("mul", "y"))) == [("y", ("mul",))]


def residual_pair(shifts=1):
    rng = np.random.default_rng(5)
    one, two = (rng.normal(size=(C, 3, 1, 1)).astype("float32") for _ in range(2))
    parameters = batch_norm(rng, C)
    a, b = affine_of(parameters)
    nodes = [node("Conv", "x v", "c"), node("Conv", "x w", "d"), node("Add", "c d", "e"), bn_node("e", "n"),
             node("Relu", "n", "y")]  # fmt: skip
    before = model(nodes, {"v": one, "w": two, **parameters}, ["N", 3, 5, 5], [None] * 4)
    folded = [node("Conv", "x v b", "c2"), node("Conv", "x w b" if shifts == 2 else "x w", "d2"),
              node("Add", "c2 d2", "n"), node("Relu", "n", "y")]  # fmt: skip
    arrays = {"v": scaled(one, a), "w": scaled(two, a), "b": b.astype("float32")}
    return before, model(folded, arrays, ["N", 3, 5, 5], [None] * 4)


def test_a_residual_sum_passes_with_one_shift_not_with_two():
    right = check(*residual_pair(), fold_row("bn", "n"))
    assert right.passed
    assert [fold.output for fold in right.folds] == ["n"]
    assert failures(check(*residual_pair(shifts=2), fold_row("bn", "n"))) == [("n", ("bn",))]


# Types


def typed_pair(dtype, off=1.0):
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(C, 3, 3, 3)).astype(dtype)
    parameters = batch_norm(rng, C, dtype)
    a, b = affine_of(parameters)
    nodes = [node("Conv", "x w", "c", pads=[1, 1, 1, 1]), bn_node("c", "n"), node("Relu", "n", "y")]
    name = np.dtype(dtype).name
    before = model(nodes, {"w": weight, **parameters}, ["N", 3, 5, 5], [None] * 4, dtype=name)
    arrays = {"w": scaled(weight, a * off), "c": b.astype(dtype)}
    folded = [node("Conv", "x w c", "n", pads=[1, 1, 1, 1]), node("Relu", "n", "y")]
    return before, model(folded, arrays, ["N", 3, 5, 5], [None] * 4, dtype=name)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float16", 0.2), (ml_dtypes.bfloat16, 3), ("float32", 3e-4), ("float64", 1e-12)]
)
def test_every_type_is_held_to_its_own_precision(dtype, bound):
    result = check(*typed_pair(dtype), fold_row("bn", "n"))
    assert result.passed
    [fold] = result.folds
    assert 0 < fold.error <= fold.bound < bound
    assert [output.derived for output in result.outputs] == [True]
    # onnxruntime cannot convolve in float64; how long onnx.reference takes says nothing.
    assert (result.timing is None) == (dtype == "float64")
    assert not check(*typed_pair(dtype, off=1 + 4 * bound), count=1).passed


def test_float16_where_kernels_would_sum_in_float16(monkeypatch):
    monkeypatch.setattr("pybn.folding.widening.NARROW", {onnx.TensorProto.FLOAT16})
    result = check(*typed_pair("float16"), fold_row("bn", "n"))
    assert result.passed
    assert all(0 < fold.error <= fold.bound < 0.2 for fold in result.folds)
    assert failures(check(*typed_pair("float16", off=1.5), fold_row("bn", "n"))) == [("n", ("bn",))]


def test_grouped_transposed_convolutions_in_float64():
    before, after = grouped_pair("C", "float64")
    result = check(before, after, fold_row("bn", "y"))
    assert result.passed
    assert all(0 < fold.bound < 1e-12 for fold in result.folds)
    # And they are what torch computes.
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(6, 2, 3, 3)), "b": rng.normal(size=4)}
    x = rng.normal(size=(2, 6, 4, 4))
    conv = node("ConvTranspose", "x w b", "y", group=2)
    session = runtime.Session(model([conv], arrays, x.shape, [None] * 4, dtype="float64"), "the model")
    assert not session.is_onnxruntime
    tensors = [torch.from_numpy(array) for array in (x, *arrays.values())]
    expected = torch.nn.functional.conv_transpose2d(*tensors, groups=2).numpy()
    np.testing.assert_allclose(session.run({"x": x})[0], expected, rtol=1e-10, atol=1e-12)


def test_parameters_in_another_type_than_the_data():
    rng = np.random.default_rng(7)
    weight, parameters = rng.normal(size=(C, 3, 1, 1)).astype("float16"), batch_norm(rng, C)
    a, b = affine_of(parameters)
    nodes = [node("Conv", "x w", "c"), bn_node("c", "y")]
    before = model(nodes, {"w": weight, **parameters}, ["N", 3, 2, 2], [None] * 4, dtype="float16")
    arrays = {"w": scaled(weight, a), "c": b.astype("float16")}
    after = model([node("Conv", "x w c", "y")], arrays, ["N", 3, 2, 2], [None] * 4, dtype="float16")
    assert check(before, after).passed


def test_the_coarsest_type_on_the_way_counts():
    def casts(value):
        return [node("Cast", value, "h", to=onnx.TensorProto.FLOAT16), node("Cast", "h", "f", to=1)]

    arrays = constants(np.random.default_rng(13))
    nodes = [node("Conv", "x w", "c"), *casts("c"), node("Mul", "f s", "y")]
    before = model(nodes, {"w": arrays["w"], "s": arrays["s"]}, ["N", 3, 5, 5], [None] * 4)
    nodes = [node("Conv", "x w", "d"), *casts("d")]
    nodes[1].output[0] = nodes[2].input[0] = "k"
    nodes[2].output[0] = "y"
    after = model(nodes, {"w": scaled(arrays["w"], arrays["s"])}, ["N", 3, 5, 5], [None] * 4)
    [fold] = check(before, after).folds
    assert fold.passed
    assert 1e-4 < fold.error <= fold.bound < 0.3


def test_an_int8_weight_takes_a_map_into_its_scale():
    rng = np.random.default_rng(8)
    arrays = {
        "q": rng.integers(-127, 128, (C, 3, 1, 1)).astype("int8"),
        "d": rng.uniform(0.01, 0.02, C).astype("float32"),
        "z": np.zeros(C, "int8"),
        "s": rng.uniform(0.5, 2, (C, 1, 1)).astype("float32"),
    }
    nodes = [node("DequantizeLinear", "q d z", "w", axis=0), node("Conv", "x w", "c"), node("Mul", "c s", "y")]
    before = model(nodes, arrays, ["N", 3, 4, 4], [None] * 4)
    scale = {"d": arrays["d"] * arrays["s"].ravel()}
    nodes = [node("DequantizeLinear", "q d z", "w", axis=0), node("Conv", "x w", "y")]
    after = model(nodes, {"q": arrays["q"], "z": arrays["z"], **scale}, ["N", 3, 4, 4], [None] * 4)
    result = check(before, after, fold_row("mul", "y"))
    assert result.passed
    assert [fold.output for fold in result.folds] == ["y"]


# What cannot be compared is not passed over


def test_an_operator_without_a_bound_fails_and_is_named():
    nodes = [node("Softmax", "x", "y", axis=axis) for axis in (1, 2)]
    before, after = (model([item], {}, ["N", 3, 4], [None] * 3) for item in nodes)
    [fold] = check(before, after).folds
    assert not fold.passed
    assert fold.detail == "no bound is derived for the operator ai.onnx::Softmax"


def test_another_shape_or_type_is_an_error_of_its_own():
    before = model([node("Conv", "x w", "y")], {"w": np.ones((2, 3, 1, 1), "float32")}, ["N", 3, 4, 4], [None] * 4)
    after = model([node("Conv", "x w", "y")], {"w": np.ones((1, 3, 1, 1), "float32")}, ["N", 3, 4, 4], [None] * 4)
    [fold] = check(before, after, count=1).folds
    assert not fold.passed
    assert "gives float32 of shape (1, 1, 4, 4), expected float32 of shape (1, 2, 4, 4)" in fold.detail


def test_integers_must_be_equal():
    def shapes(axis):
        nodes = [node("Concat", "x x", "j", axis=axis), node("Shape", "j", "s"), node("Reshape", "j s", "y")]
        nodes[0].output[0] = nodes[1].input[0] = nodes[2].input[0] = f"j{axis}"
        return model(
            nodes, {}, ["N", 3, 4], outputs=[helper.make_tensor_value_info("s", 7, [3]), value("y", [None] * 3)]
        )

    assert failures(check(shapes(1), shapes(1))) == []
    assert ("s", ()) in failures(check(shapes(1), shapes(2)))


# The runtime's own optimiser


@pytest.fixture
def wrong_optimiser(monkeypatch):
    """The runtime takes a batch norm past the Transpose before it, as onnxruntime did until 1.32."""
    load = runtime._onnxruntime

    def load_wrongly(model, optimise, *options):
        if optimise:
            model = onnx.ModelProto.FromString(model.SerializeToString())
            *others, transpose, norm = list(model.graph.node)
            if (transpose.op_type, norm.op_type) == ("Transpose", "BatchNormalization"):
                norm.input[0], transpose.input[0] = transpose.input[0], transpose.output[0]
                norm.output[0], transpose.output[0] = transpose.output[0], norm.output[0]
                reordered = onnx.GraphProto(node=[*others, norm, transpose])
                model.graph.ClearField("node")
                model.graph.node.extend(reordered.node)
        return load(model, optimise, *options)

    monkeypatch.setattr(runtime, "_onnxruntime", load_wrongly)


def transposed_matmul(folded):
    """MatMul, Transpose, BN: what a wrong optimiser scales is the columns of the matrix, which are not the channels."""
    rng = np.random.default_rng(9)
    parameters = batch_norm(rng, C)
    a, b = affine_of(parameters)
    arrays = {"w": rng.normal(size=(C, C)).astype("float32"), **parameters}
    nodes = [node("MatMul", "x w", "m"), node("Transpose", "m", "t", perm=[1, 0]), bn_node("t", "y")]
    if folded:
        arrays = {"w": arrays["w"], "a": a.astype("float32"), "b": b.astype("float32")}
        nodes[2:] = [node("Mul", "t a", "s"), node("Add", "s b", "y")]
    return model(nodes, arrays, [C, C], [C, C])


@pytest.mark.usefixtures("wrong_optimiser")
def test_a_wrong_optimiser_of_the_runtime_is_found_and_the_fold_is_not_blamed():
    result = check(transposed_matmul(False), transposed_matmul(True), fold_row("bn", "y"))
    assert result.passed
    assert not result.runtime_agrees
    assert result.runtime_at_fault == ("original",)


@pytest.mark.usefixtures("wrong_optimiser")
def test_the_optimiser_may_be_wrong_on_the_folded_model_only():
    assert check(transposed_matmul(True), transposed_matmul(False)).runtime_at_fault == ("folded",)


@pytest.mark.usefixtures("wrong_optimiser")
def test_the_optimiser_may_be_wrong_on_both():
    result = check(transposed_matmul(False), transposed_matmul(False))
    assert result.folds == ()
    assert result.passed
    assert result.runtime_at_fault == ("original", "folded")


# What cannot be seen from outside


def block(scale, opset=17, attribute=False):
    """A function of Conv and Mul; its input has no declared shape."""
    arrays = constants(np.random.default_rng(10))
    nodes = [node("Constant", "", "w", value=onnx.numpy_helper.from_array(scaled(arrays["w"], scale)))]
    if np.ndim(scale):
        nodes.append(node("Conv", "a w", "b"))
    else:
        nodes += [
            node("Constant", "", "s", value=onnx.numpy_helper.from_array(arrays["s"])),
            node("Conv", "a w", "c"),
            node("Mul", "c s", "b"),
        ]
    if attribute:
        slope = node("LeakyRelu", "b", "d")
        slope.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
        nodes.append(slope)
    parameters = ["slope"] if attribute else []
    last = "d" if attribute else "b"
    return helper.make_function("local", "Block", ["a"], [last], nodes, [helper.make_opsetid("", opset)], parameters)


def called(function, opset=17, **attributes):
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    nodes = [
        node("Relu", "x", "r"),
        helper.make_node("Block", ["r"], ["h"], domain="local", **attributes),
        helper.make_node("Block", ["x"], ["k"], domain="local", **attributes),
        node("Add", "h k", "y"),
    ]
    return model(nodes, {}, ["N", 3, 6, 6], [None] * 4, functions=[function], opset_imports=imports)


@pytest.mark.parametrize("opset", [17, 16])
def test_a_fold_in_a_function_is_proven_whether_or_not_it_can_be_inlined(opset):
    right = constants(np.random.default_rng(10))["s"].ravel()
    row = fold_row("mul", "b", graph="function local::Block")
    before = called(block(1.0), opset)
    result = check(before, called(block(right), opset), row)
    assert result.passed
    # Inlined, each call is compared on its own activations; otherwise the function, on random ones.
    assert [fold.output for fold in result.folds] == (["h", "k"] if opset == 17 else ["b"])
    assert {fold.folds for fold in result.folds} == {("mul",)}
    assert all(0 < fold.error <= fold.bound < 1e-3 for fold in result.folds)
    assert [output.derived for output in result.outputs] == [opset == 17]
    wrong = check(before, called(block(np.roll(right, 1)), opset), row)
    assert {folds for _, folds in failures(wrong)} == {("mul",)}


def test_parameters_of_functions_have_their_values_in_the_check():
    right = constants(np.random.default_rng(10))["s"].ravel()
    before, after = (called(block(scale, attribute=True), slope=0.3) for scale in (1.0, right))
    result = check(before, after)
    assert result.passed
    assert len(result.folds) == 2


def looped(folded=False, roll=0):
    """A Loop whose body convolves what it carries from one turn to the next."""
    rng = np.random.default_rng(11)
    arrays = {
        "w": rng.normal(size=(3, 3, 1, 1)).astype("float32"),
        "s": rng.uniform(0.2, 1, (3, 1, 1)).astype("float32"),
    }
    nodes = [node("Identity", "go", "on"), node("Conv", "v w", "c"), node("Mul", "c s", "t")]
    if folded:
        arrays = {"w": scaled(arrays["w"], np.roll(arrays["s"].ravel(), roll))}
        nodes[1:] = [node("Conv", "v w", "t")]
    counter = helper.make_tensor_value_info("i", onnx.TensorProto.INT64, [])
    goes, on = (helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []) for name in ("go", "on"))
    carried = [value("v", ["N", 3, None, None]), value("t", None)]
    body = helper.make_graph(nodes, "body", [counter, goes, carried[0]], [on, carried[1]])
    loop = helper.make_node("Loop", ["turns", "", "x"], ["y"], name="loop", body=body)
    return model([loop], {"turns": np.array(2), **arrays}, ["N", 3, 4, 4], [None] * 4)


def test_a_fold_in_the_body_of_a_loop_is_compared_on_random_activations():
    row = fold_row("mul", "t", graph="main/loop.body")
    result = check(looped(), looped(folded=True), row)
    assert result.passed
    [fold] = result.folds
    assert (fold.output, fold.graph, fold.folds) == ("t", "main/loop.body", ("mul",))
    assert 0 < fold.error <= fold.bound < 1e-3
    assert failures(check(looped(), looped(folded=True, roll=1), row)) == [("t", ("mul",))]


def test_what_cannot_be_run_by_itself_is_left_to_the_comparison_of_the_models():
    def pooled(inner):
        nodes = [node("AveragePool", "a", inner, kernel_shape=[2, 2]), node("Neg", inner, "d")]
        nodes[1:1] = [] if inner == "b" else [node("Identity", inner, "e")]
        nodes[-1].input[0] = "b" if inner == "b" else "e"
        function = helper.make_function("local", "Block", ["a"], ["d"], nodes, [helper.make_opsetid("", 16)])
        return called(function)

    result = check(pooled("b"), pooled("c"))
    assert result.passed
    [fold] = result.folds
    assert "not compared by itself, only within the model: the type of 'a' is unknown" in fold.detail
    assert [output.derived for output in result.outputs] == [False]


# Old opsets


@pytest.mark.parametrize("opset", [6, 7, 9, 10, 11, 13, 15])
def test_opsets_back_to_those_that_onnxruntime_does_not_run(opset):
    rng = np.random.default_rng(12)
    weight = rng.normal(size=(C, 3, 3, 3)).astype("float32")
    parameters = batch_norm(rng, C)
    a, b = affine_of(parameters)
    mode = {"is_test": 1} if opset < 7 else {}
    limits = {"min": 0.0, "max": 6.0} if opset < 11 else {}
    operands = {} if limits else {"low": np.array(0, "float32"), "high": np.array(6, "float32")}
    clip = node("Clip", "n" if limits else "n low high", "y", **limits)
    nodes = [node("Conv", "x w", "c"), bn_node("c", "n", **mode), clip]
    before = model(nodes, {"w": weight, **parameters, **operands}, ["N", 3, 5, 5], [None] * 4, opset=opset)
    arrays = {"w": scaled(weight, a), "c": b.astype("float32"), **operands}
    after = model([node("Conv", "x w c", "n"), clip], arrays, ["N", 3, 5, 5], [None] * 4, opset=opset)
    result = check(before, after, fold_row("bn", "n"))
    assert result.passed
    assert (result.timing is None) == (opset == 6)
    [fold] = result.folds
    assert 0 < fold.error <= fold.bound < 1e-3


# The bound


@given(kind=st.sampled_from(sorted(PASSED)), seed=st.integers(0, 10**6), exponent=st.integers(-37, 34))
@settings(max_examples=settings.default.max_examples // 5)
def test_right_folds_pass_at_every_magnitude(kind, seed, exponent):
    before, after = passed_pair(kind, rng=np.random.default_rng(seed), magnitude=10.0**exponent)
    assert check(before, after, count=1).passed


# Large models


def with_table(proto, rows):
    """Add a lookup in a table of 1 kB a row, which is in a file."""
    table = proto.graph.initializer.add(name="table", data_type=onnx.TensorProto.FLOAT, dims=[rows, 256])
    table.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in (("location", "table.bin"), ("offset", "0"), ("length", str(rows * 1024))):
        table.external_data.add(key=key, value=entry)
    proto.graph.input.append(helper.make_tensor_value_info("row", onnx.TensorProto.INT64, [1]))
    proto.graph.node.append(node("Gather", "table row", "found"))
    proto.graph.output.append(value("found", [1, 256]))
    return proto


def test_a_model_of_more_than_two_gigabytes_is_checked_from_its_files(tmp_path):
    rows = 2_200_000
    with (tmp_path / "table.bin").open("wb") as file:
        file.truncate(rows * 1024)  # sparse: it takes no space
    before, after = (with_table(proto, rows) for proto in typed_pair("float32"))
    inputs = random_inputs(before, 1, folder=tmp_path)
    result = verify(before, after, FoldReport((fold_row("bn", "n"),)), inputs, folder=tmp_path)
    assert result.passed
    assert [fold.output for fold in result.folds] == ["n"]
    wrong = typed_pair("float32", off=1.01)[1]
    result = verify(before, with_table(wrong, rows), FoldReport((fold_row("bn", "n"),)), inputs, folder=tmp_path)
    assert failures(result) == [("n", ("bn",))]


def test_a_model_too_large_for_one_message_is_run_from_a_file(monkeypatch):
    monkeypatch.setattr("pybn.folding.verify.LARGE", 100)
    right = check(*typed_pair("float32"), fold_row("bn", "n"))
    assert right.passed
    assert [fold.folds for fold in right.folds] == [("bn",)]
    assert failures(check(*typed_pair("float32", off=1.01), fold_row("bn", "n"))) == [("n", ("bn",))]
