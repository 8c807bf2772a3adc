"""Every forward rule: the operator on ``a x + b`` against the rewritten one on ``x``, by two runtimes.

The rules are asked one by one. What a rule carries on is applied to the outputs here.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from fold_models import ONNX_TYPE, batch_norm, batch_norms, bn_node, model, runtime, value
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from pybn.folding.affine import Affine
from pybn.folding.editor import Editor
from pybn.folding.forward import FORWARD
from pybn.folding.graph import Facts
from pybn.folding.onnx import fold_onnx
from pybn.folding.reasons import FoldError, Reason, Refusal
from pybn.folding.steps import Step

SEEDS = st.integers(0, 10**6)
# An example runs two models, one of them twice: a third of the profile's number of examples.
some = settings(max_examples=settings().max_examples // 3)
DTYPES = st.sampled_from(["float64", "float64", "float32"])
TOLERANCE = {"float64": 1e-11, "float32": 1e-4, "float16": 3e-2}


def one_node(op_type, shape, inputs=(), *, outputs=1, dtype="float64", opset=17, others=(), **attributes):
    """A model of one operator, whose data is "x".

    `inputs` are arrays, or None for an absent one; `others` are the names and shapes of inputs that are not constants.
    """
    constants = {f"k{number}": array for number, array in enumerate(inputs) if array is not None}
    names = ["x", *(name for name, _ in others)]
    names += ["" if array is None else f"k{number}" for number, array in enumerate(inputs)]
    results = ["y", *(f"y{number}" for number in range(1, outputs))]
    node = helper.make_node(op_type, names, results, **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, ONNX_TYPE[dtype], dims) for name, dims in [("x", shape), *others]],
        [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in results],
        [ir.to_proto(ir.tensor(np.asarray(array), name=name)) for name, array in constants.items()],
    )
    for output in graph.output:
        output.ClearField("type")
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    for output, known in zip(proto.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    return proto


def ask(proto, affine, index=0):
    """The model, and what the rule of its only node answers."""
    model = ir.from_proto(proto)
    node = model.graph[0]
    try:
        return model, FORWARD[node.op_type](node, index, affine, Facts(model))
    except FoldError as error:
        return model, Refusal(error.reason, str(error))


def rewritten(proto, affine, index=0):
    """The model with its node rewritten, the maps left at its outputs, and the step."""
    model, step = ask(proto, affine, index)
    assert isinstance(step, Step), step
    return (*apply_step(model, step), step)


def apply_step(model, step):
    Editor(model).apply(step.rewrites, ())
    result = ir.to_proto(model)
    onnx.checker.check_model(result, full_check=True)
    return result, dict(step.carries)


def refusal(proto, affine, index=0):
    _, answer = ask(proto, affine, index)
    assert isinstance(answer, Refusal), answer
    assert answer.detail
    return answer.reason


def mapped(affine, x):
    if affine is None:
        return x
    if affine.axis is None:
        return (affine.scale[0] * x + affine.shift[0]).astype(x.dtype)
    along = [1] * x.ndim
    along[affine.axis] = -1
    return (affine.scale.reshape(along) * x + affine.shift.reshape(along)).astype(x.dtype)


def reference(proto, **feeds):
    return ReferenceEvaluator(proto).run(None, feeds)


def assert_passes(proto, affine, x, *, run=reference, index=0, tolerance=None, **others):
    """The rewritten model on x, its outputs mapped as the step says, is the original on the mapped x."""
    folded, carries, step = rewritten(proto, affine, index)
    assert_equal(proto, folded, carries, affine, x, run, tolerance, **others)
    return folded, carries, step


def assert_equal(proto, folded, carries, affine, x, run, tolerance=None, **others):
    expected = run(proto, x=mapped(affine, x), **others)
    actual = [mapped(carries.get(at), output) for at, output in enumerate(run(folded, x=x, **others))]
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        size = max(1.0, float(np.abs(theirs).max(initial=0.0)), float(np.abs(x).max(initial=0.0)))
        bound = TOLERANCE[x.dtype.name] if tolerance is None else tolerance
        np.testing.assert_allclose(mine.astype(float), theirs.astype(float), rtol=0, atol=bound * size)


def random_affine(rng, channels, axis=1, *, signs="all", shift=True):
    scale = rng.uniform(0.3, 2, channels)
    if signs in ("all", "nonzero"):
        scale *= rng.choice([-1, 1], channels)
    if signs in ("all", "not negative"):
        scale[rng.random(channels) < 0.2] = 0
    return Affine(scale, rng.normal(size=channels) * shift, axis)


def operators(proto):
    return [node.op_type for node in proto.graph.node]


# Linear operators


@some
@given(
    seed=SEEDS,
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    depthwise=st.booleans(),
    bias=st.sampled_from([True, False, "empty"]),
    padding=st.sampled_from(["none", "explicit", "explicit", "SAME_UPPER", "SAME_LOWER", "VALID"]),
    dtype=DTYPES,
    shift=st.sampled_from([True, True, False]),
)
def test_conv(seed, dims, groups, depthwise, bias, padding, dtype, shift):
    rng = np.random.default_rng(seed)
    per_group = 1 if depthwise else int(rng.integers(1, 4))
    channels, outputs = groups * per_group, groups * int(rng.integers(1, 4))
    kernel = [int(k) for k in rng.integers(1, 4, dims)]
    attributes = {
        "group": groups,
        "strides": [int(s) for s in rng.integers(1, 4, dims)],
        "dilations": [int(d) for d in rng.integers(1, 3, dims)],
    }
    if padding == "explicit":
        attributes["pads"] = [int(p) for p in rng.integers(0, 3, 2 * dims)]
    elif padding != "none":
        attributes["auto_pad"] = padding
    inputs = [rng.normal(size=(outputs, per_group, *kernel)).astype(dtype)]
    if bias is True:
        inputs.append(rng.normal(size=outputs).astype(dtype))
    elif bias == "empty":
        inputs.append(None)
    x = rng.normal(size=(2, channels, *(int(n) for n in rng.integers(5, 8, dims)))).astype(dtype)
    proto = one_node("Conv", x.shape, inputs, dtype=dtype, **attributes)
    folded, carries, step = assert_passes(proto, random_affine(rng, channels, shift=shift), x)
    assert not carries
    assert step.cost == len(operators(folded)) - 1
    if padding in ("none", "VALID") or not shift:
        assert operators(folded) == ["Conv"]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padded_conv_in_onnxruntime(dims):
    rng = np.random.default_rng(dims)
    weight = rng.normal(size=(4, 2, *([3] * dims))).astype("float32")
    x = rng.normal(size=(2, 4, *([6] * dims))).astype("float32")
    pads = [int(p) for p in rng.integers(1, 3, 2 * dims)]
    proto = one_node("Conv", x.shape, [weight], dtype="float32", group=2, pads=pads)
    folded, _, step = assert_passes(proto, random_affine(rng, 4), x, run=runtime)
    assert operators(folded) == ["Conv", "Add"]
    assert step.cost == 1


def test_conv_padded_along_one_axis_needs_only_the_length_of_that():
    rng = np.random.default_rng(0)
    proto = one_node("Conv", ["N", 3, 6, "W"], [rng.normal(size=(2, 3, 3, 3))], pads=[1, 0, 1, 0])
    for shape in ((1, 3, 6, 4), (2, 3, 6, 9)):
        folded, _, _ = assert_passes(proto, random_affine(rng, 3), rng.normal(size=shape))
    assert max(t.dims for t in folded.graph.initializer if len(t.dims) == 4 and t.dims[0] == 1) == [1, 2, 6, 1]


@pytest.mark.parametrize("attributes", [{"pads": [1, 1, 1, 1]}, {"auto_pad": "SAME_UPPER"}])
def test_padded_conv_of_unknown_size_takes_a_scale_but_no_shift(attributes):
    rng = np.random.default_rng(0)
    proto = one_node("Conv", ["N", 3, "H", "W"], [rng.normal(size=(2, 3, 3, 3))], **attributes)
    affine = random_affine(rng, 3)
    assert refusal(proto, affine) is Reason.PADDING
    assert_passes(proto, affine.only_scale(), rng.normal(size=(1, 3, 5, 4)))


def test_conv_leaves_a_bias_alone_that_it_does_not_need():
    rng = np.random.default_rng(0)
    proto = one_node("Conv", [1, 2, 5], [rng.normal(size=(3, 2, 3))], others=[])
    proto.graph.node[0].input.append("c")
    proto.graph.input.append(helper.make_tensor_value_info("c", onnx.TensorProto.DOUBLE, [3]))
    affine, c = random_affine(rng, 2), rng.normal(size=3)
    assert refusal(proto, affine) is Reason.WEIGHT_NOT_CONSTANT
    assert_passes(proto, affine.only_scale(), rng.normal(size=(1, 2, 5)), c=c)
    proto.graph.node[0].attribute.append(helper.make_attribute("pads", [1, 0]))
    del proto.graph.output[0].type.tensor_type.shape.dim[2]
    proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 4
    assert_passes(proto, affine, rng.normal(size=(1, 2, 5)), c=c)


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_a_shift_leaves_the_weight_alone(op_type):
    rng = np.random.default_rng(0)
    shape = (2, 3) if op_type in ("Gemm", "MatMul") else (2, 3, 4)
    proto = one_node(op_type, shape, [rng.normal(size=(3, 3, *shape[2:]))])
    affine = random_affine(rng, 3).only_shift()
    _, _, step = assert_passes(proto, affine, rng.normal(size=shape))
    assert 1 not in step.rewrites[0].constants


def convolve_transposed(proto, x):
    """The only node of a model, in torch: onnx.reference is wrong for several output channels per group."""
    arrays = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in proto.graph.initializer}
    node, *more = proto.graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    weight, bias = ([arrays.get(name) for name in node.input[1:]] + [None])[:2]
    dims = weight.ndim - 2
    result = getattr(torch.nn.functional, f"conv_transpose{dims}d")(
        torch.from_numpy(x),
        weight,
        bias,
        stride=attributes["strides"],
        padding=attributes["pads"][:dims],
        output_padding=attributes["output_padding"],
        groups=attributes["group"],
        dilation=attributes["dilations"],
    )
    for add in more:
        assert add.op_type == "Add"
        result = result + arrays[add.input[1]]
    return [result.numpy()]


@some
@given(seed=SEEDS, dims=st.integers(1, 3), groups=st.sampled_from([1, 2, 3]), bias=st.booleans(), shift=st.booleans())
def test_conv_transpose(seed, dims, groups, bias, shift):
    rng = np.random.default_rng(seed)
    channels, per_group = groups * int(rng.integers(1, 4)), int(rng.integers(1, 4))
    strides = [int(s) for s in rng.integers(1, 4, dims)]
    kernel = [int(k) for k in rng.integers(1, 4, dims)]
    pads = [int(rng.integers(0, 2)) if k > 1 else 0 for k in kernel]
    inputs = [rng.normal(size=(channels, per_group, *kernel))]
    if bias:
        inputs.append(rng.normal(size=groups * per_group))
    x = rng.normal(size=(2, channels, *(int(n) for n in rng.integers(3, 6, dims))))
    proto = one_node(
        "ConvTranspose",
        x.shape,
        inputs,
        group=groups,
        strides=strides,
        dilations=[int(d) for d in rng.integers(1, 3, dims)],
        pads=pads + pads,
        output_padding=[int(s > 1 and rng.random() < 0.5) for s in strides],
    )
    folded, _, _ = assert_passes(
        proto, random_affine(rng, channels, shift=shift), x, run=lambda model, x: convolve_transposed(model, x)
    )
    if not shift:
        assert operators(folded) == ["ConvTranspose"]


@pytest.mark.parametrize("dims", [1, 2])
def test_conv_transpose_in_onnxruntime(dims):
    rng = np.random.default_rng(dims)
    pads = [int(p) for p in rng.integers(0, 2, 2 * dims)]
    x = rng.normal(size=(1, 4, *([5] * dims))).astype("float32")
    weight = rng.normal(size=(4, 3, *([3] * dims))).astype("float32")
    proto = one_node("ConvTranspose", x.shape, [weight], dtype="float32", group=2, strides=[2] * dims, pads=pads)
    folded, _, _ = assert_passes(proto, random_affine(rng, 4), x, run=runtime)
    assert operators(folded) == ["ConvTranspose", "Add"]


@pytest.mark.parametrize(
    "attributes",
    [
        {"output_shape": [9, 11]},
        {"output_shape": [8, 10], "output_padding": [1, 1]},
        {"auto_pad": "SAME_UPPER", "strides": [1, 1]},
        {"auto_pad": "SAME_LOWER", "strides": [1, 3]},
    ],
)
def test_conv_transpose_of_a_given_output_loses_as_much_on_either_side(attributes):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1, 4, 5, 5)).astype("float32")
    weight = rng.normal(size=(4, 3, 3, 3)).astype("float32")
    proto = one_node("ConvTranspose", x.shape, [weight], dtype="float32", group=2, **{"strides": [2, 2], **attributes})
    folded, _, _ = assert_passes(proto, random_affine(rng, 4), x, run=runtime)
    assert operators(folded) == ["ConvTranspose", "Add"]


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ([1, 4, 5], {"output_shape": [10]}),  # 11 less 1, on one side or the other
        ([1, 4, 5], {"output_shape": [12]}),
        ([1, 4, 5], {"auto_pad": "SAME_UPPER"}),
        (["N", 4, "L"], {}),
    ],
)
def test_conv_transpose_whose_output_is_not_known_takes_a_scale_only(shape, attributes):
    rng = np.random.default_rng(0)
    proto = one_node("ConvTranspose", shape, [rng.normal(size=(4, 3, 3))], strides=[2], **attributes)
    affine = random_affine(rng, 4)
    assert refusal(proto, affine) is Reason.PADDING
    _, step = ask(proto, affine.only_scale())
    assert isinstance(step, Step)


@some
@given(
    seed=SEEDS,
    trans_a=st.booleans(),
    trans_b=st.booleans(),
    alpha=st.sampled_from([None, 0.5, -2.0]),
    beta=st.sampled_from([None, 0.25, 0.0]),
    bias=st.sampled_from([None, "empty", (), (1,), "N", "1N", "M1", "MN"]),
    dtype=DTYPES,
)
def test_gemm(seed, trans_a, trans_b, alpha, beta, bias, dtype):
    rng = np.random.default_rng(seed)
    rows, inner, features = (int(n) for n in rng.integers(1, 6, 3))
    attributes = {"transA": int(trans_a), "transB": int(trans_b), "alpha": alpha, "beta": beta}
    inputs = [rng.normal(size=(features, inner) if trans_b else (inner, features)).astype(dtype)]
    if bias == "empty":
        inputs.append(None)
    elif bias is not None:
        shapes = {"N": (features,), "1N": (1, features), "M1": (rows, 1), "MN": (rows, features)}
        inputs.append(rng.normal(size=shapes.get(bias, bias)).astype(dtype))
    x = rng.normal(size=(inner, rows) if trans_a else (rows, inner)).astype(dtype)
    attributes = {name: value for name, value in attributes.items() if value is not None}
    proto = one_node("Gemm", x.shape, inputs, dtype=dtype, **attributes)
    folded, carries, step = assert_passes(proto, random_affine(rng, inner, 0 if trans_a else 1), x)
    assert operators(folded) == ["Gemm"]
    assert not carries
    assert step.cost == 0


@some
@given(seed=SEEDS, rank=st.integers(2, 4), dtype=DTYPES)
def test_matmul_takes_the_scale_and_carries_the_shift(seed, rank, dtype):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(1, 5, rank))
    features = int(rng.integers(1, 5))
    x = rng.normal(size=shape).astype(dtype)
    proto = one_node("MatMul", shape, [rng.normal(size=(shape[-1], features)).astype(dtype)], dtype=dtype)
    affine = random_affine(rng, shape[-1], rank - 1)
    folded, carries, step = assert_passes(proto, affine, x)
    assert operators(folded) == ["MatMul"]
    assert carries[0].keeps_scale
    assert step.cost == 0
    model, step = ask(proto, affine)
    folded, carries = apply_step(model, step.otherwise)
    assert_equal(proto, folded, carries, affine, x, reference)
    assert operators(folded) == (["Gemm"] if rank == 2 else ["MatMul", "Add"])
    assert not carries


@pytest.mark.parametrize(
    ("op_type", "shape", "weight", "axis", "reason"),
    [
        ("Gemm", [2, 3], (3, 4), 0, Reason.CHANNEL_AXIS),
        ("MatMul", [2, 3], (3, 4), 0, Reason.CHANNEL_AXIS),
        ("MatMul", [2, 3, 3], (3, 4), 1, Reason.CHANNEL_AXIS),
        ("MatMul", [2, 3, 3], (2, 3, 4), 2, Reason.PARAMETER_SHAPE),
        ("MatMul", [3], (3, 4), 0, Reason.PARAMETER_SHAPE),
        ("MatMul", [2, 3], (3,), 1, Reason.PARAMETER_SHAPE),
        ("MatMul", None, (3, 4), 1, Reason.CHANNEL_AXIS_UNPROVEN),
        ("Conv", [2, 3, 3], (3, 3, 1), 2, Reason.CHANNEL_AXIS),
        ("ConvTranspose", [2, 3, 3], (3, 3, 1), 2, Reason.CHANNEL_AXIS),
    ],
)
def test_linear_operators_refuse_other_axes_than_the_one_they_sum_over(op_type, shape, weight, axis, reason):
    rng = np.random.default_rng(0)
    proto = one_node(op_type, shape, [rng.normal(size=weight)])
    size = shape[axis] if shape else 3
    assert refusal(proto, random_affine(rng, size, axis)) is reason


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose", "Gemm", "MatMul"])
def test_a_map_of_the_weight_is_refused(op_type):
    shape = [3, 3] if op_type in ("Gemm", "MatMul") else [3, 3, 3]
    proto = one_node(op_type, shape, others=[("w", shape)])
    affine = random_affine(np.random.default_rng(0), 3)
    assert refusal(proto, affine, index=1) is Reason.NO_LINEAR_CONSUMER
    assert refusal(proto, affine) is Reason.WEIGHT_NOT_CONSTANT


def test_weights_that_would_overflow_are_refused():
    proto = one_node("Gemm", [1, 2], [np.full((2, 2), 3e4, np.float16)], dtype="float16")
    assert refusal(proto, Affine(np.full(2, 3.0), np.zeros(2))) is Reason.OUTSIDE_DTYPE


# Activations


@some
@given(seed=SEEDS, signs=st.sampled_from(["all", "nonzero", "positive", "not negative", "negative"]), dtype=DTYPES)
def test_relu(seed, signs, dtype):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4, 5, 6)).astype(dtype)
    affine = random_affine(rng, 5, signs=signs)
    if signs == "negative":
        affine = Affine(-np.abs(affine.scale), affine.shift, 1)
    proto = one_node("Relu", x.shape, dtype=dtype)
    folded, _, step = assert_passes(proto, affine, x, run=reference)
    kinds = [kind for kind, there in (("Max", (affine.scale > 0).any()), ("Min", (affine.scale < 0).any())) if there]
    assert operators(folded) == (kinds or ["Relu"])
    assert step.cost == len(kinds)


@pytest.mark.parametrize("scale", [0.5, -2.0])
@pytest.mark.parametrize("opset", [8, 13])
def test_relu_whose_bound_is_the_same_for_all_channels_becomes_clip(scale, opset):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    proto = one_node("Relu", x.shape, dtype="float32", opset=opset)
    for affine in (Affine.everywhere(scale, 0.25), Affine(np.full(3, scale), np.full(3, 0.25))):
        folded, _, step = assert_passes(proto, affine, x, run=runtime)
        if opset >= 13:
            assert (operators(folded), step.cost) == (["Clip"], 0)
        else:
            assert (operators(folded), step.cost) == (["Max" if scale > 0 else "Min"], 1)


def test_relu_in_onnxruntime_for_every_type():
    rng = np.random.default_rng(0)
    affine = random_affine(rng, 5)
    assert {True, False} <= {bool(sign) for sign in np.sign(affine.scale) > 0}
    for dtype, opset in itertools.product(["float16", "float32", "float64"], [8, 12, 17, 21]):
        x = rng.normal(size=(2, 5, 3)).astype(dtype)
        proto = one_node("Relu", x.shape, dtype=dtype, opset=opset)
        assert_passes(proto, affine, x, run=runtime)


@pytest.mark.parametrize(("op_type", "attributes"), [("Relu", {}), ("LeakyRelu", {"alpha": 0.3}), ("PRelu", {})])
def test_a_positive_scale_passes_relu_and_the_like(op_type, attributes):
    rng = np.random.default_rng(3)
    inputs = [rng.normal(size=(5, 1))] if op_type == "PRelu" else []
    x = rng.normal(size=(2, 5, 6))
    proto = one_node(op_type, x.shape, inputs, **attributes)
    folded, carries, step = assert_passes(proto, random_affine(rng, 5, signs="not negative", shift=False), x)
    assert operators(folded) == [op_type]
    assert step.cost == 0
    assert carries[0].keeps_zero


@pytest.mark.parametrize("op_type", ["LeakyRelu", "PRelu"])
def test_leaky_relu_and_prelu_refuse_what_is_not_a_positive_scale(op_type):
    inputs = [np.full((3, 1), 0.1)] if op_type == "PRelu" else []
    proto = one_node(op_type, [2, 3, 4], inputs)
    ones, shift = np.ones(3), np.array([1.0, 0.0, 0.0])
    assert refusal(proto, Affine(ones, shift)) is Reason.SHIFT_STAYS
    assert refusal(proto, Affine(-ones, np.zeros(3))) is Reason.NEGATIVE_SCALE
    if op_type == "PRelu":
        assert refusal(proto, Affine(ones, shift), index=1) is Reason.NO_LINEAR_CONSUMER
        assert refusal(proto, Affine(np.zeros(3), -shift)) is Reason.SHIFT_STAYS


@pytest.mark.parametrize("op_type", ["Relu", "LeakyRelu", "PRelu", "Clip"])
def test_constant_channels_stay_constant(op_type):
    inputs = {"PRelu": [np.full((3, 1), 0.25)], "Clip": [np.array(-0.5), np.array(1.0)]}.get(op_type, [])
    shift = np.array([2.0, 0.5, 0.0 if op_type == "PRelu" else -2.0])
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    proto = one_node(op_type, x.shape, inputs)
    folded, carries, step = assert_passes(proto, Affine(np.zeros(3), shift), x)
    assert not carries[0].scale.any()
    assert step.cost == 0
    assert operators(folded) == [op_type]


@some
@given(
    seed=SEEDS,
    bounds=st.sampled_from([(0.0, 6.0), (-1.0, 1.0), (None, 0.5), (-0.5, None), (None, None), (0.25, 0.25)]),
    same=st.booleans(),
    opset=st.sampled_from([8, 10, 11, 17]),
    dtype=DTYPES,
)
def test_clip(seed, bounds, same, opset, dtype):
    rng = np.random.default_rng(seed)
    dtype = "float32" if opset < 12 else dtype
    x = (3 * rng.normal(size=(4, 5, 6))).astype(dtype)
    affine = random_affine(rng, 5)
    if same:
        affine = Affine(np.repeat(rng.normal(size=1), 5), np.repeat(rng.normal(size=1), 5))
    if opset >= 11:
        proto = one_node(
            "Clip", x.shape, [None if b is None else np.array(b, dtype) for b in bounds], opset=opset, dtype=dtype
        )
    else:
        attributes = {name: b for name, b in zip(("min", "max"), bounds, strict=True) if b is not None}
        proto = one_node("Clip", x.shape, opset=opset, dtype=dtype, **attributes)
    folded, _, step = assert_passes(proto, affine, x, run=runtime)
    if bounds == (None, None):
        assert operators(folded) == ["Identity"]
    elif same and opset >= 11:
        assert operators(folded) == ["Clip"]
        assert step.cost == 0
    assert set(operators(folded)) <= {"Clip", "Max", "Min", "Identity"}
    assert step.cost == sum(kind in ("Max", "Min") for kind in operators(folded))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("bound", [-1e30, 1e30])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("op_type", ["Relu", "Clip"])
def test_bounds_that_no_number_reaches(op_type, sign, bound, alone):
    # The bound is -shift / scale, far beyond float32: either never reached, or always.
    affine = Affine(np.array([sign * 1e-20, 1.0]), np.array([-sign * 1e-20 * bound * 1e20, 0.5]))
    inputs = [np.array(0, "float32"), np.array(6, "float32")] if op_type == "Clip" else []
    x = np.array([[[-1e30, -1, 0, 1, 1e30], [-2, -1, 0, 1, 2]]], "float32")
    if alone:
        affine, x = affine.part(0, 1), x[:, :1]
    proto = one_node(op_type, x.shape, inputs, dtype="float32")
    folded, carries, _ = rewritten(proto, affine)
    expected = runtime(proto, x=mapped(affine, x.astype(float)).astype("float32"))[0]
    actual = mapped(carries[0], runtime(folded, x=x)[0].astype(float))
    np.testing.assert_allclose(actual[:, 0], expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(actual[:, 1:], expected[:, 1:], atol=1e-6)


def test_clip_with_bounds_in_the_wrong_order_is_refused():
    proto = one_node("Clip", [1, 2, 3], [np.array(1.0), np.array(-1.0)])
    assert refusal(proto, Affine(np.ones(2), np.ones(2))) is Reason.NOT_FINITE


# Pooling and resampling


@some
@given(
    seed=SEEDS,
    dims=st.integers(1, 3),
    kind=st.sampled_from(["MaxPool", "AveragePool", "AveragePool"]),
    counts=st.booleans(),
    ceil=st.booleans(),
    padding=st.sampled_from(["none", "explicit", "SAME_UPPER", "VALID"]),
    shift=st.booleans(),
)
def test_pooling(seed, dims, kind, counts, ceil, padding, shift):
    rng = np.random.default_rng(seed)
    kernel = [int(k) for k in rng.integers(1, 4, dims)]
    attributes = {"kernel_shape": kernel, "strides": [int(s) for s in rng.integers(1, 4, dims)]}
    if padding == "explicit":
        attributes["pads"] = [int(rng.integers(0, k)) for k in kernel + kernel]
    elif padding != "none":
        attributes["auto_pad"] = padding
        # With larger strides SAME would have to cut, which onnxruntime does not.
        attributes["strides"] = [min(s, k) for s, k in zip(attributes["strides"], kernel, strict=True)]
    if ceil and padding in ("none", "explicit"):
        attributes["ceil_mode"] = 1
    if counts and kind == "AveragePool":
        attributes["count_include_pad"] = 1
    signs = "not negative" if kind == "MaxPool" else "nonzero"
    affine = random_affine(rng, 3, signs=signs, shift=shift)
    x = rng.normal(size=(2, 3, *(int(n) for n in rng.integers(4, 8, dims)))).astype("float32")
    proto = one_node(kind, x.shape, dtype="float32", **attributes)
    model, answer = ask(proto, affine)
    if isinstance(answer, Refusal):
        assert answer.reason is Reason.PADDING
        assert "ceil_mode" in attributes
        return
    folded, carries = apply_step(model, answer)
    assert_equal(proto, folded, carries, affine, x, runtime)
    if "count_include_pad" not in attributes or not shift:
        assert operators(folded) == [kind]


def test_average_that_counts_its_padding_needs_a_map_and_a_scale_that_is_not_zero():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 2, 5, 4)).astype("float32")
    attributes = {"kernel_shape": [3, 3], "pads": [1, 0, 1, 0], "count_include_pad": 1}
    proto = one_node("AveragePool", x.shape, dtype="float32", **attributes)
    affine = Affine(np.array([2.0, -1.0]), np.array([1.0, 3.0]))
    folded, _, step = assert_passes(proto, affine, x, run=runtime)
    assert operators(folded) == ["AveragePool", "Add"]
    assert step.cost == 1
    assert refusal(proto, Affine(np.array([2.0, 0.0]), affine.shift)) is Reason.SHIFT_STAYS
    unknown = one_node("AveragePool", [1, 2, "H", 4], dtype="float32", **attributes)
    assert refusal(unknown, affine) is Reason.PADDING


def test_max_pool_refuses_negative_scales_and_indices():
    x = np.random.default_rng(0).normal(size=(1, 2, 6)).astype("float32")
    proto = one_node("MaxPool", x.shape, dtype="float32", kernel_shape=[2])
    assert refusal(proto, Affine(np.array([1.0, -1.0]), np.zeros(2))) is Reason.NEGATIVE_SCALE
    proto = one_node("MaxPool", x.shape, dtype="float32", kernel_shape=[2], outputs=2)
    assert refusal(proto, Affine(np.ones(2), np.ones(2))) is Reason.EXTRA_OUTPUTS


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2], "dilations": [3], "pads": [1, 0]},
        {"kernel_shape": [2], "pads": [2, 0]},
        {"kernel_shape": [2], "pads": [0, 1], "strides": [2], "ceil_mode": 1},
    ],
)
def test_windows_that_may_hold_nothing_but_padding_are_refused(attributes):
    proto = one_node("MaxPool", [1, 2, 5], dtype="float32", **attributes)
    assert refusal(proto, Affine(np.ones(2), np.ones(2))) is Reason.PADDING


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
def test_pooling_refuses_a_map_along_space(op_type):
    attributes = {"kernel_shape": [2]} if not op_type.startswith("Global") else {}
    assert refusal(one_node(op_type, [2, 3, 4], **attributes), Affine(np.ones(4), np.ones(4), 2)) is Reason.CHANNEL_AXIS


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pooling(op_type):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5))
    assert_passes(one_node(op_type, x.shape), random_affine(rng, 3, signs="not negative"), x)


@pytest.mark.parametrize("op_type", ["ReduceMean", "ReduceMax", "ReduceMin"])
@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("listed", [[2, 3], [-1], [0, 2], [0]])
def test_reductions_beside_the_channels(op_type, opset, keepdims, listed):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5))
    if opset >= 18:
        proto = one_node(op_type, x.shape, [np.array(listed)], opset=opset, keepdims=keepdims)
    else:
        proto = one_node(op_type, x.shape, opset=opset, keepdims=keepdims, axes=listed)
    assert_passes(proto, random_affine(rng, 3, signs="not negative"), x)


@pytest.mark.parametrize("listed", [[1], [-3, 2], None])
def test_reductions_over_the_channels_are_refused(listed):
    inputs = [] if listed is None else [np.array(listed)]
    proto = one_node("ReduceMean", [2, 3, 4, 5], inputs, opset=18)
    affine = random_affine(np.random.default_rng(0), 3)
    assert refusal(proto, affine) is Reason.CHANNEL_AXIS
    everywhere = Affine.everywhere(-2.0, 3.0)
    assert_passes(proto, everywhere, np.random.default_rng(1).normal(size=(2, 3, 4, 5)))


def test_a_reduction_without_axes_may_be_none_at_all():
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    proto = one_node("ReduceMean", x.shape, opset=18, noop_with_empty_axes=1)
    assert_passes(proto, random_affine(np.random.default_rng(1), 3), x)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners", "asymmetric"])
@pytest.mark.parametrize("by", ["scales", "sizes"])
def test_resize(mode, coordinates, by):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3, 4, 5)).astype("float32")
    inputs = [None, np.array([1, 1, 1.5, 2], "float32")]
    if by == "sizes":
        inputs = [None, None, np.array([1, 3, 7, 3])]
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
    proto = one_node("Resize", x.shape, inputs, dtype="float32", **attributes)
    assert_passes(proto, random_affine(rng, 3), x, run=runtime)


@pytest.mark.parametrize(
    ("inputs", "attributes"),
    [
        ([None, np.array([1, 1.2, 1, 1], "float32")], {}),
        ([np.array([0, 0, 0, 0, 1, 1, 1.5, 1], "float32"), np.array([1, 1, 2, 2], "float32")],
         {"coordinate_transformation_mode": "tf_crop_and_resize"}),
        ([None, None, np.array([1, 3, 8, 2])], {"keep_aspect_ratio_policy": "not_larger", "opset": 18}),
    ],
)  # fmt: skip
def test_resize_that_touches_the_channels_or_extrapolates_is_refused(inputs, attributes):
    proto = one_node("Resize", [1, 3, 4, 4], inputs, dtype="float32", **attributes)
    assert refusal(proto, random_affine(np.random.default_rng(0), 3)) in (Reason.CHANNEL_AXIS_UNPROVEN, Reason.PADDING)


def test_resize_by_scales_that_only_a_run_knows_is_refused():
    proto = one_node("Resize", [1, 3, 4, 4], [None, np.ones(4, "float32")], dtype="float32")
    del proto.graph.initializer[:]
    proto.graph.input.append(helper.make_tensor_value_info("k1", onnx.TensorProto.FLOAT, [4]))
    # A scale of 1.2 would leave three channels, too.
    assert proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 3
    assert refusal(proto, random_affine(np.random.default_rng(0), 3)) is Reason.CHANNEL_AXIS_UNPROVEN


# Joining and cutting


@pytest.mark.parametrize("axis", [1, -2])
@pytest.mark.parametrize("index", [0, 1])
def test_concat_goes_on_over_the_channels_of_one_operand(axis, index):
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 2, 4))
    affine = random_affine(rng, 3)
    proto = one_node("Concat", x.shape, others=[("z", other.shape)], axis=axis)
    if index == 1:
        proto.graph.node[0].input[:] = ["z", "x"]
    _, carries, _ = assert_passes(proto, affine, x, index=index, z=other)
    identity = slice(3, 5) if index == 0 else slice(0, 2)
    assert carries[0].scale[identity].tolist() == [1, 1]
    assert carries[0].shift[identity].tolist() == [0, 0]


def test_concat_along_another_axis_or_of_unknown_size_is_refused():
    affine = random_affine(np.random.default_rng(0), 3)
    assert refusal(one_node("Concat", [2, 3, 4], others=[("z", [2, 3, 1])], axis=2), affine) is Reason.CHANNEL_AXIS
    unknown = one_node("Concat", [2, 3, 4], others=[("z", [2, "C", 4])], axis=1)
    assert refusal(unknown, affine) is Reason.CHANNEL_AXIS_UNPROVEN


@pytest.mark.parametrize(("axis", "sizes"), [(1, [2, 3]), (-2, [4, 1]), (2, [1, 3]), (0, [1, 1])])
@pytest.mark.parametrize("opset", [11, 13])
def test_split(axis, sizes, opset):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 4))
    if opset >= 13:
        proto = one_node("Split", x.shape, [np.array(sizes)], outputs=2, axis=axis, opset=opset)
    else:
        proto = one_node("Split", x.shape, outputs=2, axis=axis, split=sizes, opset=opset)
    assert_passes(proto, random_affine(rng, 5), x)


@some
@given(seed=SEEDS, opset=st.sampled_from([9, 13]), explicit=st.booleans())
def test_slice(seed, opset, explicit):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 6, 5))
    axes_ = [int(axis) for axis in rng.permutation(3)[: int(rng.integers(1, 4))]]
    axes_ = axes_ if explicit else list(range(len(axes_)))
    axes_ = sorted(axes_) if opset < 10 else axes_  # in another order shape inference gives up
    starts = [int(rng.integers(-8, 8)) for _ in axes_]
    ends = [int(rng.choice([-(2**31), -3, -1, 2, 4, 100, 2**31 - 1])) for _ in axes_]
    steps = [int(rng.choice([1, 1, 2, -1, -2])) if opset >= 10 else 1 for _ in axes_]
    kept = np.zeros(0)
    for axis, start, end, step in zip(axes_, starts, ends, steps, strict=True):
        kept = np.arange(x.shape[axis])[start:end:step]
        if kept.size == 0:
            return  # shape inference and the runtimes disagree on what is empty
    if opset >= 10:
        lists = [starts, ends, axes_ if explicit else None, steps]
        proto = one_node("Slice", x.shape, [None if v is None else np.array(v) for v in lists], opset=opset)
    else:
        attributes = {"axes": axes_} if explicit else {}
        proto = one_node("Slice", x.shape, opset=opset, starts=starts, ends=ends, **attributes)
    affine = random_affine(rng, 6)
    assert_passes(proto, affine, x)


def test_slice_that_only_a_run_knows_is_refused():
    proto = one_node("Slice", [2, 6, 5], [np.array([0]), np.array([1])])
    del proto.graph.initializer[1]
    proto.graph.input.append(helper.make_tensor_value_info("k1", onnx.TensorProto.INT64, [1]))
    assert refusal(proto, random_affine(np.random.default_rng(0), 6)) is Reason.CHANNEL_AXIS_UNPROVEN


@pytest.mark.parametrize(
    "lists", [([0], [4], [1], [0]), ([0, 1], [4], [1], [1]), ([0], [4], [1, 2], [1]), ([0], [4], [1], [1, 1])]
)
def test_slice_that_contradicts_itself_is_refused(lists):
    proto = one_node("Slice", [2, 6, 5], [np.array([0]), np.array([4]), np.array([1]), np.array([1])])
    for tensor, numbers in zip(proto.graph.initializer, lists, strict=True):  # what inference would reject
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(numbers), tensor.name))
    assert refusal(proto, random_affine(np.random.default_rng(0), 6)) is Reason.PARAMETER_SHAPE


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
@pytest.mark.parametrize("opset", [10, 13])
def test_pad(mode, opset):
    rng = np.random.default_rng(0)
    x, pads = rng.normal(size=(2, 3, 4, 5)), [0, 0, 1, 2, 0, 0, 0, 1]
    if opset >= 11:
        proto = one_node("Pad", x.shape, [np.array(pads)], mode=mode, opset=opset)
    else:
        proto = one_node("Pad", x.shape, pads=pads, mode=mode, opset=opset)
    affine = random_affine(rng, 3)
    assert_passes(proto, affine.only_scale(), x)
    if mode == "constant":
        assert refusal(proto, affine) is Reason.PADDING
    else:
        assert_passes(proto, affine, x)


def test_pad_with_more_channels_or_another_value_is_refused():
    affine = random_affine(np.random.default_rng(0), 3, shift=False)
    channels = one_node("Pad", [2, 3, 4], [np.array([0, 1, 0, 0, 0, 0])])
    assert refusal(channels, affine) is Reason.CHANNEL_AXIS
    ones = one_node("Pad", [2, 3, 4], [np.array([0, 0, 1, 0, 0, 0]), np.array(1.0)])
    assert refusal(ones, affine) is Reason.PADDING


@pytest.mark.parametrize("other", [(2, 3, 4), (1, 3, 1), (4,), (5, 2, 3, 4)])
@pytest.mark.parametrize("index", [0, 1])
def test_a_shift_passes_add(other, index):
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 3, 4)), rng.normal(size=other)
    proto = one_node("Add", x.shape, others=[("z", other)])
    if index == 1:
        proto.graph.node[0].input[:] = ["z", "x"]
    affine = random_affine(rng, 3).only_shift()
    assert_passes(proto, affine, x, index=index, z=z)
    assert refusal(proto, random_affine(rng, 3), index=index) is Reason.NO_LINEAR_CONSUMER


def test_a_shift_passes_sub_with_its_sign():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 2, 3, 4))
    affine = random_affine(rng, 3).only_shift()
    for index, names in enumerate((["x", "z"], ["z", "x"])):
        proto = one_node("Sub", x.shape, others=[("z", z.shape)])
        proto.graph.node[0].input[:] = names
        _, carries, _ = assert_passes(proto, affine, x, index=index, z=z)
        assert carries[0].shift.tolist() == (affine.shift if index == 0 else -affine.shift).tolist()


def test_a_channel_that_add_makes_many_of_is_refused():
    proto = one_node("Add", [2, 1, 4], others=[("z", [2, 3, 4])])
    assert refusal(proto, Affine(np.ones(1), np.ones(1))) is Reason.CHANNEL_AXIS_UNPROVEN


# What changes nothing


@pytest.mark.parametrize("opset", [7, 12, 17])
@pytest.mark.parametrize("op_type", ["Identity", "Dropout"])
def test_identity_and_dropout(op_type, opset):
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    assert_passes(one_node(op_type, x.shape, opset=opset), random_affine(np.random.default_rng(1), 3), x)


def test_dropout_in_training_mode_is_refused():
    proto = one_node("Dropout", [2, 3, 4], [np.array(0.5), np.array(True)])
    assert refusal(proto, random_affine(np.random.default_rng(0), 3)) is Reason.DROPOUT_TRAINING


def test_cast_to_a_wider_type_passes_and_to_a_narrower_one_does_not():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    affine = random_affine(np.random.default_rng(1), 3)
    wider = one_node("Cast", x.shape, dtype="float32", to=onnx.TensorProto.DOUBLE)
    folded, carries, _ = rewritten(wider, affine)
    np.testing.assert_allclose(
        mapped(carries[0], reference(folded, x=x)[0]), mapped(affine, x.astype(float)), rtol=1e-12
    )
    for to in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        assert refusal(one_node("Cast", x.shape, dtype="float32", to=to), affine) is Reason.NARROWER_TYPE
    integers = one_node("Cast", x.shape, dtype="float32", to=onnx.TensorProto.INT32)
    assert refusal(integers, affine) is Reason.NARROWER_TYPE


def test_no_rule_for_what_is_not_piecewise_linear():
    assert not FORWARD.keys() & {"Sigmoid", "Tanh", "Softmax", "Elu", "Gelu", "HardSwish", "Exp", "Erf", "Sqrt", "Pow"}


# Whole models: batch norms that no operator before them can take


class Chain:
    """A model under construction, of operators with random parameters."""

    def __init__(self, seed, dtype):
        self.rng, self.dtype = np.random.default_rng(seed), dtype
        self.nodes, self.constants = [], {}

    def node(self, op_type, *inputs, **attributes):
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"{op_type}_{output}", **attributes))
        return output

    def constant(self, array):
        name = f"k{len(self.constants)}"
        self.constants[name] = array.astype(self.dtype)
        return name

    def conv(self, x, channels, outputs, kernel, stride=1):
        weight = self.rng.normal(size=(outputs, channels, kernel, kernel)) / np.sqrt(channels * kernel**2)
        pads = [kernel // 2] * 4
        return self.node("Conv", x, self.constant(weight), pads=pads, strides=[stride, stride])

    def bn_relu(self, x, channels):
        parameters = batch_norm(self.rng, channels)
        norm = self.node("BatchNormalization", x, *(self.constant(array) for array in parameters.values()))
        return self.node("Relu", norm)

    def gemm(self, x, channels, outputs):
        weight = self.constant(self.rng.normal(size=(outputs, channels)))
        return self.node("Gemm", x, weight, self.constant(self.rng.normal(size=outputs)), transB=1)

    def model(self, output, x, y):
        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        return model(self.nodes, self.constants, x, y, dtype=self.dtype)


def preactivation_resnet(dtype):
    """Blocks as in He et al. 2016: the first Relu of a block that strides goes to two convolutions."""
    net = Chain(1, dtype)
    x, channels = net.conv("x", 3, 4, 3), 4
    for outputs, stride in ((4, 1), (8, 2), (8, 1)):
        active = net.bn_relu(x, channels)
        shortcut = x if stride == 1 else net.conv(active, channels, outputs, 1, stride)
        inner = net.bn_relu(net.conv(active, channels, outputs, 3, stride), outputs)
        x, channels = net.node("Add", net.conv(inner, outputs, outputs, 3), shortcut), outputs
    pooled = net.node("Flatten", net.node("GlobalAveragePool", net.bn_relu(x, channels)))
    return net.model(net.gemm(pooled, channels, 5), ["N", 3, 12, 10], ["N", 5])


def densenet(dtype):
    """Layers and transitions as in Huang et al. 2017."""
    net = Chain(2, dtype)
    x, channels = net.node("MaxPool", net.bn_relu(net.conv("x", 3, 6, 3), 6), kernel_shape=[3, 3], pads=[1] * 4), 6
    for block in range(2):
        for _ in range(3):
            inner = net.conv(net.bn_relu(x, channels), channels, 8, 1)
            x = net.node("Concat", x, net.conv(net.bn_relu(inner, 8), 8, 4, 3), axis=1)
            channels += 4
        if block == 0:
            x = net.conv(net.bn_relu(x, channels), channels, channels // 2, 1)
            x, channels = net.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]), channels // 2
    pooled = net.node("Flatten", net.node("GlobalAveragePool", net.bn_relu(x, channels)))
    return net.model(net.gemm(pooled, channels, 5), ["N", 3, 12, 10], ["N", 5])


@pytest.mark.parametrize(("dtype", "run"), [("float64", reference), ("float32", runtime)])
@pytest.mark.parametrize(("build", "has_borders"), [(preactivation_resnet, True), (densenet, False)])
def test_a_network_whose_batch_norms_precede_convolutions_ends_without_any(build, has_borders, dtype, run):
    proto = build(dtype)
    x = np.random.default_rng(0).normal(size=(2, 3, 12, 10)).astype(dtype)
    expected = run(proto, x=x)[0]
    by_default, aggressive = fold_onnx(proto), fold_onnx(proto, aggressive=True)
    assert 0 < batch_norms(by_default.model) < batch_norms(proto)
    assert len(by_default.model.graph.node) < len(proto.graph.node)
    assert batch_norms(aggressive.model) == 0, aggressive.report
    for result in (by_default, aggressive):
        onnx.checker.check_model(result.model, full_check=True)
        bound = (1e-12 if dtype == "float64" else 2e-5) * np.abs(expected).max()
        np.testing.assert_allclose(run(result.model, x=x)[0], expected, rtol=0, atol=bound)
    maps = [t for t in aggressive.model.graph.initializer if len(t.dims) == 4 and t.dims[0] == 1 and t.dims[2] > 1]
    assert bool(maps) == has_borders
    for result, options in ((by_default, {}), (aggressive, {"aggressive": True})):
        again = fold_onnx(result.model, **options)
        assert again.model.SerializeToString() == result.model.SerializeToString()


def test_a_relu_before_two_padded_convolutions():
    net = Chain(3, "float64")
    active = net.bn_relu("x", 4)
    one, two = net.conv(active, 4, 3, 3), net.conv(active, 4, 3, 5)
    proto = net.model(net.node("Add", one, two), ["N", 4, 7, 6], ["N", 3, 7, 6])
    assert fold_onnx(proto).model == proto
    folded = fold_onnx(proto, aggressive=True).model
    assert sorted(operators(folded)) == ["Add", "Add", "Add", "Conv", "Conv", "Identity", "Max", "Min"]
    x = np.random.default_rng(0).normal(size=(2, 4, 7, 6))
    np.testing.assert_allclose(reference(folded, x=x)[0], reference(proto, x=x)[0], rtol=0, atol=1e-12)


def test_without_aggressive_no_operator_is_traded_for_another():
    proto = densenet("float32")
    before, after = operators(proto), operators(fold_onnx(proto).model)
    assert {kind: before.count(kind) - after.count(kind) for kind in {*before, *after}} == {
        **dict.fromkeys({*before, *after}, 0),
        "BatchNormalization": 7,
    }


@pytest.mark.parametrize("then", ["Relu", "Conv"])
def test_what_needs_to_broadcast_stays_in_opsets_that_do_not(then):
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(3, 3, 3)), **batch_norm(rng, 3, "float64")}
    norm = bn_node("x", "n", is_test=1)
    inputs, attributes = {"Conv": (["w"], {"pads": [1, 1]}), "Relu": ([], {})}[then]
    nodes = [norm, helper.make_node(then, ["n", *inputs], ["r"], **attributes)]
    nodes += [helper.make_node("Conv", ["r", "w"], ["y"])]
    proto = model(
        nodes,
        constants,
        ["N", 3, 6],
        ["N", 3, 4],
        dtype="float64",
        opset=6,
        ir_version=3,
        inputs=[value(name, array.shape, "float64") for name, array in constants.items()],
    )
    assert fold_onnx(proto, aggressive=True).model == proto


def test_a_linear_layer_of_sequences_keeps_its_matmul_and_add():
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(5, 4)),
        "k": rng.normal(size=4),
        "m": rng.normal(size=5),
        "a": rng.normal(size=5),
    }
    nodes = [
        helper.make_node("Mul", ["x", "m"], ["scaled"]),
        helper.make_node("Add", ["scaled", "a"], ["shifted"]),
        helper.make_node("MatMul", ["shifted", "w"], ["product"]),
        helper.make_node("Add", ["k", "product"], ["y"]),
    ]
    proto = model(nodes, constants, ["N", "T", 5], ["N", "T", 4], dtype="float64")
    folded = fold_onnx(proto).model
    assert operators(folded) == ["MatMul", "Add"]
    x = rng.normal(size=(2, 3, 5))
    np.testing.assert_allclose(reference(folded, x=x)[0], reference(proto, x=x)[0], rtol=0, atol=1e-12)


def test_a_matmul_becomes_gemm_where_its_shift_would_cost_more_further_on():
    rng = np.random.default_rng(0)
    constants = {"v": rng.normal(size=(4, 3)), "w": rng.normal(size=(3, 2)), **batch_norm(rng, 4, "float64")}
    nodes = [
        bn_node("x", "n"),
        helper.make_node("MatMul", ["n", "v"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    proto = model(nodes, constants, ["N", 4], ["N", 2], dtype="float64")
    x = rng.normal(size=(5, 4))
    for aggressive in (False, True):
        folded = fold_onnx(proto, aggressive=aggressive).model
        assert operators(folded) == ["Gemm", "Relu", "MatMul"]
        np.testing.assert_allclose(reference(folded, x=x)[0], reference(proto, x=x)[0], rtol=0, atol=1e-12)


def test_a_batch_norm_after_a_linear_layer_of_sequences_goes_into_it():
    # The bias could merge into the batch norm instead, which would then stay.
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(5, 4)), "k": rng.normal(size=4), **batch_norm(rng, 4, "float64")}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["k", "m"], ["a"]),
        helper.make_node("Transpose", ["a"], ["t"], perm=[0, 2, 1]),
        bn_node("t", "y"),
    ]
    proto = model(nodes, constants, ["N", 6, 5], ["N", 4, 6], dtype="float64")
    folded = fold_onnx(proto).model
    assert operators(folded) == ["MatMul", "Add", "Transpose"]
    x = rng.normal(size=(2, 6, 5))
    np.testing.assert_allclose(reference(folded, x=x)[0], reference(proto, x=x)[0], rtol=0, atol=1e-12)
