"""Every rule on random shapes, attributes and parameters, against onnx.reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from fold_models import batch_norm, batch_norms, bn_node, model, reference, runtime
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from pybn.folding import Reason
from pybn.folding.onnx import fold_onnx

SEEDS = st.integers(0, 10**6)
# Relative to the largest value: float64 exactly, half precision by its own rounding.
TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "float16": 4e-2, "bfloat16": 3e-1}


def assert_same(proto: onnx.ModelProto, x: np.ndarray, tolerance: float | None = None) -> None:
    """Fold, check that nothing is left, and compare with the original."""
    result = fold_onnx(proto)
    assert batch_norms(result.model) == 0, result.report.left
    onnx.checker.check_model(result.model, full_check=True)
    expected = reference(proto, x=x)[0].astype(np.float64)
    actual = reference(result.model, x=x)[0].astype(np.float64)
    assert actual.shape == expected.shape
    bound = TOLERANCE[x.dtype.name] if tolerance is None else tolerance
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * scale * 10)


@given(
    seed=SEEDS,
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    depthwise=st.booleans(),
    has_bias=st.sampled_from([True, False, "empty"]),
    pads=st.sampled_from(["explicit", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    dilation=st.integers(1, 2),
    dtype=st.sampled_from(["float64", "float64", "float32", "float16"]),
)
def test_conv(seed, dims, groups, depthwise, has_bias, pads, dilation, dtype):
    rng = np.random.default_rng(seed)
    per_group = 1 if depthwise else int(rng.integers(1, 4))
    inputs, outputs = groups * per_group, groups * int(rng.integers(1, 4))
    kernel = [int(k) for k in rng.integers(1, 4, dims)]
    attributes = {
        "group": groups,
        "kernel_shape": kernel,
        "strides": [int(s) for s in rng.integers(1, 3, dims)],
        "dilations": [dilation] * dims,
    }
    if pads == "explicit":
        attributes["pads"] = [int(p) for p in rng.integers(0, 2, 2 * dims)]
    else:
        attributes["auto_pad"] = pads
    constants = {
        "w": rng.normal(size=(outputs, per_group, *kernel)).astype(dtype),
        **batch_norm(rng, outputs, dtype),
    }
    names = ["x", "w"]
    if has_bias is True:
        constants["c0"] = rng.normal(size=outputs).astype(dtype)
        names.append("c0")
    elif has_bias == "empty":
        names.append("")
    nodes = [helper.make_node("Conv", names, ["c"], **attributes), bn_node("c", "y")]
    x = rng.normal(size=(2, inputs, *([7] * dims))).astype(dtype)
    assert_same(model(nodes, constants, x.shape, [None] * x.ndim, dtype=dtype), x)


@given(
    seed=SEEDS,
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    has_bias=st.booleans(),
)
def test_conv_transpose(seed, dims, groups, has_bias):
    # The oracle is torch: onnx.reference is wrong for several output channels per group.
    rng = np.random.default_rng(seed)
    inputs, per_group = groups * int(rng.integers(1, 4)), int(rng.integers(1, 4))
    outputs = groups * per_group
    kernel = [int(k) for k in rng.integers(1, 4, dims)]
    strides = [int(s) for s in rng.integers(1, 3, dims)]
    constants = {
        "w": rng.normal(size=(inputs, per_group, *kernel)),
        **batch_norm(rng, outputs, "float64"),
    }
    names = ["x", "w"]
    if has_bias:
        constants["c0"] = rng.normal(size=outputs)
        names.append("c0")
    nodes = [
        helper.make_node("ConvTranspose", names, ["c"], group=groups, strides=strides),
        bn_node("c", "y"),
    ]
    x = rng.normal(size=(2, inputs, *([4] * dims)))
    folded = fold_onnx(model(nodes, constants, x.shape, [None] * x.ndim, dtype="float64")).model
    assert [node.op_type for node in folded.graph.node] == ["ConvTranspose"]
    arrays = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in folded.graph.initializer}
    weight, bias = (arrays[name] for name in folded.graph.node[0].input[1:])

    convolve = getattr(torch.nn.functional, f"conv_transpose{dims}d")
    tensors = {name: torch.from_numpy(array) for name, array in constants.items()}
    plain = convolve(torch.from_numpy(x), tensors["w"], tensors.get("c0"), stride=strides, groups=groups)
    expected = torch.nn.functional.batch_norm(
        plain,
        *(tensors[name] for name in ("mean", "var", "gamma", "beta")),
        eps=float(np.float32(1e-5)),
    )
    actual = convolve(torch.from_numpy(x), weight, bias, stride=strides, groups=groups)
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_transpose_as_onnxruntime_runs_it(groups, dims):
    # A second oracle: the mistake of other tools is to scale a grouped one along the wrong axis.
    rng = np.random.default_rng(groups * 10 + dims)
    constants = {
        "w": rng.normal(size=(4, 2, *([3] * dims))).astype("float32"),
        "c0": rng.normal(size=2 * groups).astype("float32"),
        **batch_norm(rng, 2 * groups),
    }
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w", "c0"], ["c"], group=groups),
        bn_node("c", "y"),
    ]
    proto = model(nodes, constants, ["N", 4, *([4] * dims)], [None] * (dims + 2))
    x = rng.normal(size=(2, 4, *([4] * dims))).astype("float32")
    folded = fold_onnx(proto).model
    assert batch_norms(folded) == 0
    np.testing.assert_allclose(runtime(folded, x=x)[0], runtime(proto, x=x)[0], rtol=1e-4, atol=1e-4)


@given(
    seed=SEEDS,
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from([None, 0.5, -2.0]),
    beta=st.sampled_from([None, 0.25, -3.0, 0.0]),
    bias=st.sampled_from([None, "empty", (), (1,), "N", "1N", "M1", "MN", (1, 1)]),
    dtype=st.sampled_from(["float64", "float64", "float32", "float16"]),
)
def test_gemm(seed, trans_a, trans_b, alpha, beta, bias, dtype):
    rng = np.random.default_rng(seed)
    rows, inner, features = (int(n) for n in rng.integers(1, 6, 3))
    attributes = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha, "beta": beta}
    attributes = {name: v for name, v in attributes.items() if v is not None}
    shape = (features, inner) if trans_b else (inner, features)
    constants = {"w": rng.normal(size=shape).astype(dtype), **batch_norm(rng, features, dtype)}
    names = ["x", "w"]
    if bias == "empty":
        names.append("")
    elif bias is not None:
        shapes = {"N": (features,), "1N": (1, features), "M1": (rows, 1), "MN": (rows, features)}
        constants["c0"] = rng.normal(size=shapes.get(bias, bias)).astype(dtype)
        names.append("c0")
    nodes = [helper.make_node("Gemm", names, ["g"], **attributes), bn_node("g", "y")]
    x = rng.normal(size=(inner, rows) if trans_a else (rows, inner)).astype(dtype)
    assert_same(model(nodes, constants, x.shape, [rows, features], dtype=dtype), x)


@given(
    seed=SEEDS,
    addend=st.sampled_from([None, "right", "left"]),
    shape=st.sampled_from([(), (1,), "N", "1N", (1, 1)]),
    dtype=st.sampled_from(["float64", "float32", "float16"]),
)
def test_matmul_and_add(seed, addend, shape, dtype):
    rng = np.random.default_rng(seed)
    inner, features = (int(n) for n in rng.integers(1, 6, 2))
    constants = {
        "w": rng.normal(size=(inner, features)).astype(dtype),
        **batch_norm(rng, features, dtype),
    }
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="linear")]
    last = "m"
    # With one row, (N,) and (1, N) say the same; with one feature, all of them do.
    if addend is not None:
        shapes = {"N": (features,), "1N": (1, features)}
        constants["k"] = rng.normal(size=shapes.get(shape, shape)).astype(dtype)
        names = ["m", "k"] if addend == "right" else ["k", "m"]
        nodes.append(helper.make_node("Add", names, ["s"]))
        last = "s"
    nodes.append(bn_node(last, "y"))
    x = rng.normal(size=(3, inner)).astype(dtype)
    assert_same(model(nodes, constants, ["N", inner], ["N", features], dtype=dtype), x)


def test_matmul_becomes_gemm_only_when_it_needs_a_bias():
    rng = np.random.default_rng(0)
    parameters = batch_norm(rng, 4, "float64")
    weights = {"w": rng.normal(size=(3, 4))}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), bn_node("m", "y")]
    shapes = ["N", 3], ["N", 4]
    folded = fold_onnx(model(nodes, {**weights, **parameters}, *shapes, dtype="float64")).model
    assert [node.op_type for node in folded.graph.node] == ["Gemm"]
    parameters["mean"] = parameters["beta"] = np.zeros(4)
    folded = fold_onnx(model(nodes, {**weights, **parameters}, *shapes, dtype="float64")).model
    assert [node.op_type for node in folded.graph.node] == ["MatMul"]


def test_exporters_linear_layer_becomes_one_gemm():
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(3, 4)),
        "k": rng.normal(size=4),
        **batch_norm(rng, 4, "float64"),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="mm"),
        helper.make_node("Add", ["k", "m"], ["s"], name="add"),
        bn_node("s", "y"),
    ]
    result = fold_onnx(model(nodes, constants, ["N", 3], ["N", 4], dtype="float64"))
    assert [node.op_type for node in result.model.graph.node] == ["Gemm"]
    assert [(fold.into, fold.route) for fold in result.report.folds] == [(("mm",), ("MatMul",)), (("mm",), ("Gemm",))]


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (), (1, 1)])
def test_constant_added_after_conv(shape):
    rng = np.random.default_rng(5)
    constants = {
        "w": rng.normal(size=(4, 3, 1, 1)),
        "k": rng.normal(size=shape),
        **batch_norm(rng, 4, "float64"),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Add", ["c", "k"], ["s"]),
        bn_node("s", "y"),
    ]
    x = rng.normal(size=(2, 3, 5, 4))
    assert_same(model(nodes, constants, x.shape, [2, 4, 5, 4], dtype="float64"), x)


@pytest.mark.parametrize("opset", [7, 10, 12, 17, 22])
def test_identity_and_dropout_pass(opset):
    rng = np.random.default_rng(6)
    constants = {"w": rng.normal(size=(4, 3, 1)), **batch_norm(rng, 4, "float64")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Identity", ["c"], ["i"]),
        helper.make_node("Dropout", ["i"], ["d"]),
        bn_node("d", "y"),
    ]
    x = rng.normal(size=(2, 3, 5))
    proto = model(nodes, constants, x.shape, [2, 4, 5], dtype="float64", opset=opset)
    result = fold_onnx(proto)
    assert [n.op_type for n in result.model.graph.node] == ["Conv", "Identity", "Dropout"]
    assert result.report.folds[0].route == ("Dropout", "Identity", "Conv")
    # The original runs at opset 17: below 14, onnx.reference runs batch norm in training mode.
    modern = model(nodes, constants, x.shape, [2, 4, 5], dtype="float64", opset=17)
    np.testing.assert_allclose(reference(result.model, x=x)[0], reference(modern, x=x)[0], rtol=1e-11, atol=1e-12)


def test_dropout_with_training_mode_false_passes():
    rng = np.random.default_rng(6)
    constants = {
        "w": rng.normal(size=(4, 3, 1)),
        "ratio": np.array(0.5, dtype="float32"),
        "training": np.array(False),
        **batch_norm(rng, 4, "float64"),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Dropout", ["c", "ratio", "training"], ["d"]),
        bn_node("d", "y"),
    ]
    x = rng.normal(size=(2, 3, 5))
    assert_same(model(nodes, constants, x.shape, [2, 4, 5], dtype="float64"), x)


def test_two_batch_norms_go_into_one_conv():
    rng = np.random.default_rng(8)
    constants = {
        "w": rng.normal(size=(4, 3, 1)),
        **batch_norm(rng, 4, "float64"),
        **{"2" + name: array for name, array in batch_norm(rng, 4, "float64").items()},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        bn_node("c", "n"),
        bn_node("n", "y", "2"),
    ]
    x = rng.normal(size=(2, 3, 5))
    assert_same(model(nodes, constants, x.shape, [2, 4, 5], dtype="float64"), x)


def test_bfloat16():
    rng = np.random.default_rng(9)
    wide = {"w": rng.normal(size=(4, 3, 1, 1)), **batch_norm(rng, 4, "float64")}
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in wide.items()}
    wide = {name: array.astype("float64") for name, array in narrow.items()}
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), bn_node("c", "y")]
    shapes = [1, 3, 2, 2], [1, 4, 2, 2]
    exact, rounded = (
        [
            onnx.numpy_helper.to_array(t).astype("float64")
            for t in fold_onnx(
                model(nodes, constants, *shapes, dtype=dtype, opset=22, ir_version=10)
            ).model.graph.initializer
        ]
        for constants, dtype in ((wide, "float64"), (narrow, "bfloat16"))
    )
    proto = model(nodes, narrow, *shapes, dtype="bfloat16", opset=22, ir_version=10)
    assert_same(proto, rng.normal(size=(1, 3, 2, 2)).astype(ml_dtypes.bfloat16))
    # Sharper than the outputs can be: every weight is within half a unit of float64's.
    for ours, theirs in zip(rounded, exact, strict=True):
        assert np.all(np.abs(ours - theirs) <= np.abs(theirs) * 2.0**-8)
        assert np.any(ours != theirs)


def quantized_conv(bias, *, several_scales, shifts, values=None):
    """A convolution whose int8 weight, and maybe int32 bias, is behind a DequantizeLinear, and a batch norm."""
    rng = np.random.default_rng(11)
    constants = {
        "q": rng.integers(-127, 128, (4, 3, 3, 3)).astype("int8") if values is None else values,
        "s": rng.uniform(0.01, 0.03, 4).astype("float32") if several_scales else np.float32(0.02),
        **batch_norm(rng, 4),
    }
    constants["gamma"][:2] = [-1.5, 0.5]
    if not shifts:
        constants["beta"] = constants["mean"] = np.zeros(4, dtype="float32")
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0)]
    names = ["x", "w"]
    if bias == "int32":
        constants["qb"] = rng.integers(-1000, 1000, 4).astype("int32")
        constants["sb"] = rng.uniform(0.001, 0.002, 4).astype("float32")
        nodes.append(helper.make_node("DequantizeLinear", ["qb", "sb"], ["b"], axis=0))
        names.append("b")
    elif bias == "float32":
        constants["b"] = rng.normal(size=4).astype("float32")
        names.append("b")
    nodes += [helper.make_node("Conv", names, ["c"]), bn_node("c", "y")]
    return model(nodes, constants, ["N", 3, 8, 8], ["N", 4, 6, 6], opset=19, ir_version=9)


@pytest.mark.parametrize("bias", [None, "int32", "float32"])
@pytest.mark.parametrize("several_scales", [True, False])
@pytest.mark.parametrize("shifts", [True, False])
def test_quantized_weight_takes_the_map_by_its_scales(bias, several_scales, shifts):
    proto = quantized_conv(bias, several_scales=several_scales, shifts=shifts)
    folded = fold_onnx(proto).model
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("float32")
    np.testing.assert_allclose(runtime(folded, x=x)[0], runtime(proto, x=x)[0], rtol=1e-5, atol=1e-4)
    # A shift is not a multiple of the bias's unit, so that bias becomes a float; otherwise it stays an integer.
    kept = 2 if bias == "int32" and not shifts else 1
    assert [node.op_type for node in folded.graph.node] == ["DequantizeLinear"] * kept + ["Conv"]
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in folded.graph.initializer}
    assert arrays["q"].dtype == np.int8
    assert (arrays["s"] >= 0).all()
    assert fold_onnx(folded).model == folded


def test_quantized_weight_without_an_opposite_is_a_reason():
    values = np.full((4, 3, 3, 3), -128, dtype="int8")
    (left,) = fold_onnx(quantized_conv(None, several_scales=True, shifts=False, values=values)).report.left
    assert left.reason is Reason.QUANTIZATION
