"""Channels followed through operators that move data, against where onnx.reference moves each element."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from fold_models import model, runtime, value
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from pybn.folding import axes
from pybn.folding.affine import Affine
from pybn.folding.axes import reshaped
from pybn.folding.graph import Facts
from pybn.folding.onnx import fold_onnx
from pybn.folding.reasons import FoldError, Reason, Refusal
from pybn.folding.steps import Step

SEEDS = st.integers(0, 10**6)
some = settings(max_examples=settings().max_examples // 2)
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "backward"])


def one_node(op_type, shape, inputs=None, *, opset=17, declared=None, **attributes):
    """A model of one operator on data of the given shape."""
    names = ["x", *(inputs or {})]
    node = helper.make_node(op_type, names, ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, declared or shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)],
        [onnx.numpy_helper.from_array(np.array(array, np.int64), name) for name, array in (inputs or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ask(proto, direction, affine):
    """The map that the rule finds on the other side, or its refusal."""
    model = ir.from_proto(proto)
    table = axes.FORWARD if direction == "forward" else axes.BACKWARD
    node = model.graph[0]
    try:
        answer = table[node.op_type](node, 0, affine, Facts(model))
    except FoldError as error:  # which a rule may leave to the walk
        return Refusal(error.reason, str(error))
    if isinstance(answer, Refusal):
        return answer
    assert isinstance(answer, Step)
    assert not answer.rewrites
    ((index, moved),) = answer.carries
    assert index == 0
    return moved


def field(affine, shape):
    """The map's scale and shift at every element of data of that shape."""
    if affine.axis is None:
        return np.full(shape, affine.scale[0]), np.full(shape, affine.shift[0])
    along = [1] * len(shape)
    along[affine.axis] = -1
    return tuple(np.broadcast_to(values.reshape(along), shape) for values in (affine.scale, affine.shift))


def only_along(values, axis):
    flat = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return bool((flat == flat[:, :1]).all())


def check(proto, shape, direction, affine_of, ends=None):
    """The rule finds the map, along one of the axes `ends` or any, and refuses only if there is none.

    Of a map with repetitions, which by chance line up with what the operator does, it may refuse one.
    """
    source = np.arange(np.prod(shape)).reshape(shape)
    origin = ReferenceEvaluator(proto).run(None, {"x": source.astype(float)})[0].astype(int)
    start, end = (shape, origin.shape) if direction == "forward" else (origin.shape, shape)
    affine = affine_of(start)
    moved = ask(proto, direction, affine)
    code = affine.scale + 1j * affine.shift  # so that one array says both
    values = field(Affine(code, np.zeros_like(code), affine.axis), start)[0]
    if direction == "forward":
        expected = values.reshape(-1)[origin]
        exists = True
    else:
        expected = np.empty(source.size, complex)
        expected[origin.reshape(-1)] = values.reshape(-1)
        exists = bool((expected[origin] == values).all())
        expected = expected.reshape(shape)
    if isinstance(moved, Refusal):
        assert moved.reason is Reason.CHANNEL_AXIS
        has_repetitions = np.unique(code).size < code.size
        assert (
            has_repetitions
            or not exists
            or not any(only_along(expected, axis) for axis in ends or range(expected.ndim))
        )
        return
    assert exists
    scale, shift = field(moved, end)
    np.testing.assert_array_equal(scale, expected.real)
    np.testing.assert_array_equal(shift, expected.imag)


def random_map(rng):
    """Some map along some axis; often one with repetitions, which may pass where others may not."""

    def make(shape):
        if not shape:
            return Affine.everywhere(*rng.normal(size=2))
        axis = int(rng.integers(len(shape)))
        channels = shape[axis]
        kind = rng.integers(4)
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        period = int(rng.choice(divisors))
        scale, shift = rng.normal(size=(2, channels))
        if kind == 1:
            scale, shift = (np.tile(v[:period], channels // period) for v in (scale, shift))
        elif kind == 2:
            scale, shift = (np.repeat(v[:period], channels // period) for v in (scale, shift))
        elif kind == 3:
            scale = np.full(channels, scale[0])
        return Affine(scale, shift, axis)

    return make


def random_shape(rng, rank):
    return tuple(int(n) for n in rng.choice([1, 2, 3, 4, 6], rank))


def random_factors(rng, shape):
    """Another shape with as many elements."""
    primes = [p for n in shape for p in {1: [], 2: [2], 3: [3], 4: [2, 2], 6: [2, 3]}[n]]
    if rng.random() < 0.5:
        primes = list(rng.permutation(primes)) if primes else []
    result = [1] * int(rng.integers(1, 5))
    cuts = np.sort(rng.integers(0, len(result), len(primes)))
    for at, prime in zip(cuts, primes, strict=True):
        result[at] *= int(prime)
    return tuple(result)


@DIRECTIONS
@some
@given(seed=SEEDS, how=st.sampled_from(["reshape", "reshape", "reshape", "flatten"]))
def test_reshape_and_flatten(direction, seed, how):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng, int(rng.integers(1, 5)))
    if how == "flatten":
        proto = one_node("Flatten", shape, axis=int(rng.integers(-len(shape), len(shape) + 1)))
    else:
        proto = one_node("Reshape", shape, {"shape": random_factors(rng, shape)})
    check(proto, shape, direction, random_map(rng))


@DIRECTIONS
@some
@given(seed=SEEDS, has_order=st.booleans())
def test_transpose(direction, seed, has_order):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng, int(rng.integers(1, 5)))
    attributes = {"perm": [int(axis) for axis in rng.permutation(len(shape))]} if has_order else {}
    check(one_node("Transpose", shape, **attributes), shape, direction, random_map(rng))


@DIRECTIONS
@some
@given(
    seed=SEEDS, opset=st.sampled_from([11, 17]), negative=st.booleans(), inverse=st.booleans(), all_ones=st.booleans()
)
def test_squeeze_and_unsqueeze(direction, seed, opset, negative, inverse, all_ones):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng, int(rng.integers(2, 4)))
    rank = len(shape) + 2
    listed = sorted(int(axis) for axis in rng.choice(rank, 2, replace=False))
    if not inverse:
        long = list(shape)
        for axis in listed:
            long.insert(axis, 1)
        shape = tuple(long)
    if negative and opset >= 13:  # before, onnx.reference takes several negative axes one after the other
        listed = [axis - rank for axis in listed]
    op_type = "Unsqueeze" if inverse else "Squeeze"
    if all_ones and not inverse:
        proto = one_node(op_type, shape, opset=opset)
    elif opset >= 13:
        proto = one_node(op_type, shape, {"axes": listed}, opset=opset)
    else:
        proto = one_node(op_type, shape, opset=opset, axes=listed)
    check(proto, shape, direction, random_map(rng))


@DIRECTIONS
@some
@given(seed=SEEDS)
def test_expand(direction, seed):
    rng = np.random.default_rng(seed)
    shape = random_shape(rng, int(rng.integers(1, 4)))
    wider = [int(rng.integers(1, 4)) if n == 1 or rng.random() < 0.3 else n for n in shape]
    wider = [n if m == 1 else rng.choice([1, m]) for n, m in zip(wider, shape, strict=True)]
    target = [*rng.integers(1, 4, int(rng.integers(0, 3))), *wider]
    check(one_node("Expand", shape, {"shape": target}), shape, direction, random_map(rng))


@DIRECTIONS
@some
@given(seed=SEEDS, mode=st.sampled_from(["DCR", "CRD", None, "inverse"]), block=st.integers(1, 3))
def test_depth_to_space_and_back(direction, seed, mode, block):
    rng = np.random.default_rng(seed)
    n, c, h, w = (int(k) for k in rng.integers(1, 4, 4))
    shape = (n, c, h * block, w * block) if mode == "inverse" else (n, c * block * block, h, w)
    attributes = {"mode": mode} if mode in ("DCR", "CRD") else {}
    proto = one_node("SpaceToDepth" if mode == "inverse" else "DepthToSpace", shape, blocksize=block, **attributes)
    make = random_map(rng)

    def channels_only(start):
        while True:
            affine = make(start)
            if affine.axis == 1:
                return affine

    check(proto, shape, direction, channels_only, ends=[1])


@DIRECTIONS
@pytest.mark.parametrize("axis", [0, 2])
def test_depth_to_space_refuses_other_axes_than_channels(direction, axis):
    proto = one_node("DepthToSpace", (4, 4, 4, 4), blocksize=2)
    start = (4, 4, 4, 4) if direction == "forward" else (4, 1, 8, 8)
    affine = Affine(np.arange(1.0, start[axis] + 1), np.zeros(start[axis]), axis)
    assert ask(proto, direction, affine).reason is Reason.CHANNEL_AXIS


CHANNELS = Affine(np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0]), 1)


@pytest.mark.parametrize(
    ("before", "after", "axis", "scale"),
    [
        (("N", 3, "H", "W"), ("N", 3, None), 1, [1, 2, 3]),  # (0, 0, -1)
        (("N", 3, "H", "W"), (None, 3, "H", "W"), 1, [1, 2, 3]),
        ((None, 3, 2, 1), (None, 6), 1, [1, 1, 2, 2, 3, 3]),  # Flatten of a batch of unknown size
        ((None, 3, 1, 1), (None, 3), 1, [1, 2, 3]),
        ((None, 3, "H", "W"), (None, 1, 3, "H", "W"), 2, [1, 2, 3]),
        ((2, 3, "H", "W"), (6, "H", "W"), 0, [1, 2, 3, 1, 2, 3]),
        (("N", 3, "H", "W"), ("N", None), None, None),  # Flatten of planes of unknown size
        ((None, 3, "H", "W"), (None, 3, None), None, None),  # both batches might differ
        (("N", 3, None), ("N", None, 3), None, None),
        (("N", 3, 2), ("N", 2, 3), None, None),
        ((None, 3, 0), (None, 3), None, None),
    ],
)
def test_shapes_that_are_partly_unknown(before, after, axis, scale):
    moved = reshaped(CHANNELS, before, after)
    if axis is None:
        assert moved is None
    else:
        assert (moved.axis, moved.scale.tolist()) == (axis, scale)


@DIRECTIONS
@pytest.mark.parametrize("op_type", sorted(axes.FORWARD))
def test_a_map_that_is_the_same_everywhere_passes_whatever_the_shape(direction, op_type):
    attributes = {"DepthToSpace": {"blocksize": 2}, "SpaceToDepth": {"blocksize": 2}}.get(op_type, {})
    inputs = {"Reshape": {"shape": [-1]}, "Expand": {"shape": [2, 1, 1]}, "Unsqueeze": {"axes": [0]}}.get(op_type)
    proto = one_node(op_type, None, inputs, **attributes)
    everywhere = Affine.everywhere(2.0, 3.0)
    assert ask(proto, direction, everywhere) == everywhere


@DIRECTIONS
@pytest.mark.parametrize(
    ("op_type", "inputs"),
    [
        ("Transpose", None),
        ("Flatten", None),
        ("Reshape", {"shape": [0, 0, -1]}),
        ("Squeeze", {"axes": [2]}),
        ("Squeeze", None),
        ("Unsqueeze", {"axes": [0]}),
        ("Expand", {"shape": [2, 1, 1]}),
    ],
)
def test_an_unknown_rank_is_refused(direction, op_type, inputs):
    graph_input = helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, None)
    proto = one_node(op_type, (1, 1, 1), inputs)
    proto.graph.input[0].CopyFrom(graph_input)
    assert ask(proto, direction, CHANNELS).reason is Reason.CHANNEL_AXIS_UNPROVEN


@DIRECTIONS
def test_axes_that_only_a_run_knows_are_refused(direction):
    nodes = [helper.make_node("Squeeze", ["x", "axes"], ["y"])]
    infos = [
        helper.make_tensor_value_info("x", onnx.TensorProto.DOUBLE, [2, 3, 1]),
        helper.make_tensor_value_info("axes", onnx.TensorProto.INT64, [1]),
    ]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, None)]
    proto = helper.make_model(helper.make_graph(nodes, "graph", infos, outputs))
    assert ask(proto, direction, CHANNELS).reason is Reason.CHANNEL_AXIS_UNPROVEN


def test_a_channel_that_an_expand_makes_many_of_is_the_same_everywhere():
    proto = one_node("Expand", (2, 1, 3), {"shape": [2, 5, 3]})
    moved = ask(proto, "forward", Affine(np.array([2.0]), np.array([3.0]), 1))
    assert (moved.axis, moved.scale.tolist(), moved.shift.tolist()) == (None, [2.0], [3.0])


@DIRECTIONS
def test_channels_that_are_all_the_same_are_along_any_axis(direction):
    # Both shapes have an axis of three; which one the next operator takes for its channels is not known here.
    proto = one_node("Reshape", (1, 1, 3), {"shape": [1, 3]})
    axis = 2 if direction == "forward" else 1
    moved = ask(proto, direction, Affine(np.full(3, 2.0), np.full(3, 1.0), axis))
    assert (moved.axis, moved.scale.tolist(), moved.shift.tolist()) == (None, [2.0], [1.0])


@pytest.mark.parametrize("inside", [False, True])
def test_the_rank_of_what_is_reshaped_to_a_computed_shape_is_known(inside):
    """As many axes as the shape has sizes: with them, what MatMul makes of its last axis has channels."""
    rng = np.random.default_rng(0)
    constants = {
        "four": np.array([4]), "m": rng.normal(size=(4, 3)).astype("float32"), "k": rng.normal(size=3).astype("float32")
    }  # fmt: skip
    nodes = [
        helper.make_node("Concat", ["rows", "columns", "four"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["l"]),
        helper.make_node("Mul", ["l", "k"], ["y"]),
    ]
    if inside:
        branches = [helper.make_graph(nodes, "branch", [], [value("y", [None] * 3)])] * 2
        nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1])]
        constants["yes"] = np.array(True)
    sizes = [helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [1]) for name in ("rows", "columns")]
    result = fold_onnx(model(nodes, constants, [None] * 4, [None] * 3, inputs=sizes))
    assert [fold.op_type for fold in result.report.folds] == ["Mul"] * (1 + inside)
    feeds = {"x": rng.normal(size=(2, 3, 4, 1)).astype("float32"), "rows": np.array([2]), "columns": np.array([3])}
    np.testing.assert_allclose(
        runtime(result.model, **feeds)[0], (feeds["x"].reshape(2, 3, 4) @ constants["m"]) * constants["k"], rtol=1e-5
    )
