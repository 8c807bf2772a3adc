"""Every rule of the folding table, backward and forward: what must fold folds, and nothing is ever wrong.

Each row is an operator and the maps that must pass it. The tests put an affine map on one side of it and an operator
that absorbs maps on the other, with everything else drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import strategies as s
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import (
    affines,
    assert_left,
    assert_oracle_agrees_with_onnxruntime,
    describe,
    survive,
    survive_rounding,
)
from strategies import Net, examples

from pybn.folding import backward, forward

Operator = Callable[[Net, str], str]

SCALE = {"shift": False}
POSITIVE = {"sign": "positive", "shift": False}
UNIFORM = {"sign": "positive", "uniform": True}


@dataclass(frozen=True)
class Row:
    """An operator of the table.

    Attributes
    ----------
    operator : callable
        Appends it to a graph.
    source : callable
        Appends a graph input that it can have.
    backward, forward : dict or None
        Limits of the maps that must pass; None if none must.
    aggressive : dict or None
        Limits of the maps that must pass forward with ``aggressive``.
    since, until : int
        The opsets that have the operator, from 7.
    """

    operator: Operator
    source: Callable[[Net], str] = s.images
    backward: dict[str, Any] | None = field(default_factory=dict)
    forward: dict[str, Any] | None = field(default_factory=dict)
    aggressive: dict[str, Any] | None = None
    since: int = 7
    until: int = s.NEWEST


def either(net: Net) -> str:
    return net.draw(st.sampled_from([s.images, s.rows]))(net)


def static(net: Net) -> str:
    return s.images(net, static=True)


def planes(net: Net) -> str:
    return s.images(net, 2)


def last_single(net: Net) -> str:
    """(N, C, L, 1)."""
    return net.input((2, net.draw(st.integers(1, 3)), 4, 1))


def even(channels: int) -> Callable[[Net], str]:
    def source(net: Net) -> str:
        return net.input((net.draw(st.integers(1, 2)), channels * net.draw(st.integers(1, 2)), 4, 2))

    return source


def several(net: Net) -> str:
    return s.images(net, channels=net.draw(st.integers(2, 4)))


def pooled(net: Net) -> str:
    """(N, C, 1, 1)."""
    return net.input((2, net.draw(st.integers(1, 4)), 1, 1), net.draw(st.sampled_from([(), (0,)])))


def to_channels_last(net: Net, x: str) -> str:
    """(N, C, ...) to (N, ..., C) and back."""
    rank = net.rank(x)
    there = s.transpose(net, x, [0, *range(2, rank), 1])
    return s.transpose(net, there, [0, rank - 1, *range(1, rank - 1)])


def split_rows(net: Net, x: str) -> str:
    """(N, F) to (N, F, 1) by Reshape."""
    return s.reshape(net, x, [0, net.shape(x)[1], -1])


def extreme(op_type: str) -> Operator:
    return lambda net, x: s.reduce(net, x, op_type)


def concat_with_itself(net: Net, x: str) -> str:
    """Two uses of one value, of which one goes through Relu: its map needs two slices."""
    return net.node("Concat", x, s.identity(net, x), axis=1)


# The operators with one data input. Those with more, and those that absorb, have tests of their own below.
ROWS = {
    "Relu": Row(s.relu, either, POSITIVE, POSITIVE, {}),
    "LeakyRelu": Row(s.leaky_relu, either, POSITIVE, POSITIVE),
    "PRelu": Row(s.prelu, either, POSITIVE, POSITIVE),
    # Before opset 11 the bounds are float32, in which those of float64 data cannot be scaled exactly.
    "Clip": Row(s.clip, either, UNIFORM, UNIFORM, {}, since=11),
    "Clip by attributes": Row(s.clip, either, None, None),
    # Where the size is unknown, a window may hold nothing but padding.
    "MaxPool": Row(s.max_pool, static, {"sign": "nonnegative"}, {"sign": "nonnegative"}),
    "GlobalMaxPool": Row(s.global_max_pool, backward={"sign": "nonnegative"}, forward={"sign": "nonnegative"}),
    "AveragePool": Row(lambda net, x: s.average_pool(net, x, counted=False)),
    "AveragePool, padding counted": Row(lambda net, x: s.average_pool(net, x, counted=True), s.images, SCALE, SCALE),
    "GlobalAveragePool": Row(s.global_average_pool),
    "ReduceMean": Row(s.reduce),
    "ReduceMax": Row(extreme("ReduceMax"), s.images, {"sign": "nonnegative"}, {"sign": "nonnegative"}),
    "ReduceMin": Row(extreme("ReduceMin"), s.images, {"sign": "nonnegative"}, {"sign": "nonnegative"}),
    "Resize": Row(s.resize, planes, since=11),
    "Upsample": Row(s.upsample, planes, until=9),
    "Slice": Row(lambda net, x: s.slice_axes(net, x, net.draw(st.integers(1, net.rank(x) - 1)))),
    "Split": Row(lambda net, x: s.split(net, x)[0], several),
    "Concat": Row(concat_with_itself, s.images, None, None),
    "Transpose": Row(s.transpose),
    "Transpose of the channels": Row(to_channels_last),
    "Reshape": Row(s.join_space),
    "Reshape of a matrix": Row(split_rows, s.rows),
    "Flatten": Row(s.flatten, pooled),
    "Flatten of planes": Row(s.flatten, static, UNIFORM, {}),
    "Squeeze": Row(lambda net, x: s.squeeze(net, x, [3]), last_single),
    "Unsqueeze": Row(lambda net, x: s.unsqueeze(net, x, [net.rank(x)]), lambda net: s.images(net, 2)),
    "Expand": Row(s.expand, last_single, since=8),
    "DepthToSpace": Row(s.depth_to_space, even(4), {}, UNIFORM),
    "SpaceToDepth": Row(s.space_to_depth, even(1), UNIFORM, {}),
    "Pad": Row(s.pad, s.images, SCALE, SCALE),
    "Identity": Row(s.identity, either),
    "Dropout": Row(s.dropout, either),
    "Cast": Row(s.cast, either),
}


def rows_with(direction: str) -> Any:
    return pytest.mark.parametrize("row", [name for name, row in ROWS.items() if getattr(row, direction) is not None])


def feed(net: Net, x: str, row: Row) -> str:
    """An absorbing operator before an operator of the table, which leaves the shape fit for it."""
    if net.rank(x) == 2:
        return s.matmul(net, x, net.shape(x)[1]) if net.draw(st.booleans()) else s.gemm(net, x)
    return pointwise(net, x, net.shape(x)[1])


def pointwise(net: Net, x: str, outputs: int) -> str:
    """A linear operator that keeps all sizes but the number of channels."""
    if net.rank(x) == 2:
        return s.matmul(net, x, outputs)
    weight = net.normal(outputs, net.shape(x)[1], *[1] * (net.rank(x) - 2))
    return net.node("Conv", x, weight, s.bias_name(net, outputs))


@rows_with("backward")
@examples(0.0134)
@given(data=st.data())
def test_map_behind_an_operator_goes_into_what_comes_before(row, data):
    row = ROWS[row]
    net = Net(data.draw, row.since, row.until)
    y = row.operator(net, feed(net, row.source(net), row))
    case = net.case(s.affine(net, y, wide=True, **row.backward))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@rows_with("forward")
@examples(0.0134)
@given(data=st.data())
def test_map_before_an_operator_goes_into_what_comes_behind(row, data):
    row = ROWS[row]
    net = Net(data.draw, row.since, row.until)
    x = s.affine(net, row.source(net), wide=True, **row.forward)
    case = net.case(s.absorber(net, row.operator(net, x)))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@rows_with("aggressive")
@examples(0.0134)
@given(data=st.data())
def test_map_before_an_operator_is_traded_if_asked_for(row, data):
    row = ROWS[row]
    net = Net(data.draw, max(8, row.since))  # Max does not broadcast before
    x = s.batch_norm(net, row.source(net), **row.aggressive)
    case = net.case(s.absorber(net, row.operator(net, x)))
    result = survive(case.model, case.feeds, aggressive=True)
    assert_left(case.model, result)


@pytest.mark.parametrize("row", ROWS)
@examples(0.02)
@given(data=st.data(), aggressive=st.booleans())
def test_no_map_is_folded_wrongly(row, data, aggressive):
    """Any map, whether or not there is anything to absorb it."""
    row = ROWS[row]
    net = Net(data.draw, row.since, row.until)
    x = row.source(net)
    if data.draw(st.booleans()):
        x = feed(net, x, row)
    before, after = data.draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    x = s.affine(net, x) if before else x
    y = row.operator(net, x)
    y = s.affine(net, y) if after else y
    ends = data.draw(st.sampled_from([[], [s.absorber], [s.tanh], [s.absorber, s.tanh]]))
    outputs = [end(net, y) for end in ends] or [y]
    case = net.case(*outputs)
    survive(case.model, case.feeds, aggressive=aggressive)


@pytest.mark.parametrize("row", ROWS)
@examples(0.0134)
@given(data=st.data(), dtype=st.sampled_from(["float32", "float32", "float16", "bfloat16"]), forward=st.booleans())
def test_narrow_types_stay_within_the_bound(row, data, dtype, forward):
    # The operators of convolutional networks know bfloat16 since opset 22.
    row = ROWS[row]
    assume(dtype != "bfloat16" or row.until >= 22)
    net = Net(data.draw, 22 if dtype == "bfloat16" else row.since, row.until)
    x = row.source(net)
    if forward:
        y = s.absorber(net, row.operator(net, s.affine(net, x, **(row.forward or {}))))
    else:
        y = s.affine(net, row.operator(net, feed(net, x, row)), **(row.backward or {}))
    case = net.case(y)
    survive_rounding(case.model, case.feeds, dtype)


# Operators that absorb


ABSORBERS: dict[str, tuple[Callable[[Net], str], Operator]] = {
    "Conv": (s.images, s.conv),
    "ConvTranspose": (s.images, s.conv_transpose),
    "Gemm": (s.rows, s.gemm),
    "Gemm of a transposed matrix": (s.rows, lambda net, x: s.gemm(net, x, transposed=True)),
    "MatMul": (s.rows, s.matmul),
}


@pytest.mark.parametrize("kind", ABSORBERS)
@examples(0.04)
@given(data=st.data())
def test_operator_absorbs_the_map_behind_it(kind, data):
    net = Net(data.draw)
    source, operator = ABSORBERS[kind]
    case = net.case(s.affine(net, operator(net, source(net)), wide=True))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)
    assert len(result.model.graph.node) == 1


@pytest.mark.parametrize("kind", ABSORBERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@examples(0.0134)
@given(data=st.data())
def test_operator_of_narrow_type_absorbs_within_the_bound(kind, dtype, data):
    net = Net(data.draw, 22 if dtype == "bfloat16" else 7)
    source, operator = ABSORBERS[kind]
    case = net.case(s.affine(net, operator(net, source(net))))
    result = survive_rounding(case.model, case.feeds, dtype)
    assert_left(case.model, result)


def unpadded_conv(net: Net, x: str) -> str:
    return s.conv(net, x, padding="none")


TAKES_WHOLE_MAPS = {
    "Conv without padding": (s.images, unpadded_conv),
    "Gemm": (s.rows, s.gemm),
    "MatMul": (s.rows, s.matmul),
}
TAKES_SCALES = {
    "Conv": (s.images, s.conv),
    "ConvTranspose": (s.images, s.conv_transpose),
}


@pytest.mark.parametrize("kind", TAKES_WHOLE_MAPS)
@examples(0.04)
@given(data=st.data())
def test_operator_absorbs_the_map_before_it(kind, data):
    net = Net(data.draw)
    source, operator = TAKES_WHOLE_MAPS[kind]
    case = net.case(operator(net, s.affine(net, source(net), wide=True)))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)
    assert len(result.model.graph.node) == 1


@pytest.mark.parametrize("kind", TAKES_SCALES)
@examples(0.04)
@given(data=st.data())
def test_padded_operator_absorbs_the_scale_before_it(kind, data):
    net = Net(data.draw)
    source, operator = TAKES_SCALES[kind]
    case = net.case(operator(net, s.affine(net, source(net), shift=False, wide=True)))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@pytest.mark.parametrize("operator", [s.conv, s.conv_transpose])
@examples(0.04)
@given(data=st.data())
def test_shift_before_a_padded_operator_becomes_a_border_map_if_asked_for(operator, data):
    """The padding of ConvTranspose must be given, because runtimes differ in what auto_pad means there."""
    net = Net(data.draw)
    case = net.case(operator(net, s.batch_norm(net, static(net))))
    result = survive(case.model, case.feeds, aggressive=True)
    assert_left(case.model, result, {"Add": 1})


@pytest.mark.parametrize("kind", [*TAKES_WHOLE_MAPS, *TAKES_SCALES])
@pytest.mark.parametrize("aggressive", [False, True])
@examples(0.02)
@given(data=st.data())
def test_operator_never_takes_the_map_before_it_wrongly(kind, aggressive, data):
    net = Net(data.draw)
    source, operator = {**TAKES_WHOLE_MAPS, **TAKES_SCALES}[kind]
    case = net.case(operator(net, s.affine(net, source(net))))
    survive(case.model, case.feeds, aggressive=aggressive)


@examples(0.027)
@given(data=st.data())
def test_contracted_rows_of_a_transposed_gemm_absorb_the_map_of_the_first_axis(data):
    net = Net(data.draw)
    x = s.chain(net, s.rows(net, static=True), axis=0)
    case = net.case(s.gemm(net, x, transposed=True))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


# MatMul over more than two axes


def sequences(net: Net) -> str:
    """(N, L, F)."""
    draw = net.draw
    length, features = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return net.input((2, length, features), draw(st.sampled_from([(), (0,), (0, 1)])))


@examples(0.027)
@given(data=st.data())
def test_matmul_of_sequences_absorbs_scales_of_its_features_from_both_sides(data):
    net = Net(data.draw)
    x = s.chain(net, sequences(net), axis=-1, shift=False)
    case = net.case(s.chain(net, s.matmul(net, x), axis=-1, shift=False, least=0))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@examples(0.027)
@given(data=st.data())
def test_batch_norm_behind_a_linear_layer_and_a_transpose_goes_into_matmul_and_its_bias(data):
    net = Net(data.draw)
    y = s.matmul(net, sequences(net))
    y = net.node("Add", y, net.normal(net.shape(y)[-1]))
    case = net.case(s.affine(net, s.transpose(net, y, [0, 2, 1])))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result, {"Add": 1})


@examples(0.027)
@given(data=st.data())
def test_batch_norm_behind_matrix_reshape_and_transpose_goes_into_the_matrix(data):
    """(N*L, F), Gemm or MatMul, (N, L, C), (N, C, L): the wrong axis has the same size if L equals C."""
    net = Net(data.draw)
    length = data.draw(st.integers(1, 4))
    x = net.input((2 * length, 3))
    y = data.draw(st.sampled_from([s.gemm, s.matmul]))(net, x)
    y = s.reshape(net, y, [data.draw(st.sampled_from([2, -1])), length, net.shape(y)[1]])
    case = net.case(s.affine(net, s.transpose(net, y, [0, 2, 1])))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@examples(0.027)
@given(data=st.data())
def test_map_of_another_axis_never_goes_into_matmul_wrongly(data):
    net = Net(data.draw)
    y = s.matmul(net, sequences(net), data.draw(st.integers(1, 4)))
    steps = [
        lambda y: s.transpose(net, y, data.draw(st.permutations(range(3)))),
        lambda y: s.chain(net, y, axis=data.draw(st.integers(0, 2))),
        lambda y: s.batch_norm(net, y),
        lambda y: s.reshape(net, y, data.draw(st.permutations(net.shape(y)))),
    ]
    for step in data.draw(st.lists(st.sampled_from(range(len(steps))), min_size=1, max_size=5)):
        y = steps[step](y)
    if data.draw(st.booleans()):
        y = s.matmul(net, y)
    case = net.case(y)
    survive(case.model, case.feeds, aggressive=data.draw(st.booleans()))


# Operators with several inputs or outputs


def branches(net: Net, count: int, outputs: int | None = None) -> list[str]:
    """Linear operators on one input, of the same sizes but for the number of channels unless it is given."""
    x = either(net)
    return [pointwise(net, x, outputs or net.draw(st.integers(1, 3))) for _ in range(count)]


@examples(0.027)
@given(data=st.data())
def test_map_behind_a_concat_goes_into_every_branch(data):
    net = Net(data.draw)
    parts = branches(net, data.draw(st.integers(1, 3)))
    case = net.case(s.affine(net, net.node("Concat", *parts, axis=1), wide=True))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@examples(0.027)
@given(data=st.data())
def test_maps_before_a_concat_go_into_what_comes_behind(data):
    net = Net(data.draw)
    shape = (2, 3, 4, 4)
    parts = [net.input(shape) for _ in range(data.draw(st.integers(1, 3)))]
    mapped = [s.affine(net, part) if i == 0 or data.draw(st.booleans()) else part for i, part in enumerate(parts)]
    case = net.case(unpadded_conv(net, net.node("Concat", *mapped, axis=1)))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Sum"])
@examples(0.0134)
@given(data=st.data())
def test_map_behind_a_residual_goes_into_every_branch(op_type, data):
    net = Net(data.draw, 8 if op_type == "Sum" else 7)
    count = data.draw(st.integers(1, 3)) if op_type == "Sum" else 2
    parts = branches(net, count, outputs=data.draw(st.integers(1, 3)))
    case = net.case(s.affine(net, net.node(op_type, *parts), wide=True))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@pytest.mark.parametrize("op_type", ["Mul", "Div"])
@examples(0.0134)
@given(data=st.data())
def test_scale_behind_a_product_goes_into_a_factor(op_type, data):
    net = Net(data.draw)
    x = either(net)
    part = pointwise(net, x, net.shape(x)[1])
    gate = net.node("Exp", s.tanh(net, x))
    pair = [gate, part] if op_type == "Mul" and data.draw(st.booleans()) else [part, gate]
    case = net.case(s.affine(net, net.node(op_type, *pair), shift=False))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@examples(0.027)
@given(data=st.data())
def test_maps_behind_the_parts_of_a_split_go_into_what_comes_before(data):
    net = Net(data.draw)
    x = either(net)
    parts = s.split(net, pointwise(net, x, data.draw(st.integers(2, 4))))
    case = net.case(s.affine(net, parts[0]), s.affine(net, parts[1]) if data.draw(st.booleans()) else parts[1])
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@examples(0.027)
@given(data=st.data())
def test_map_before_a_split_goes_into_every_consumer(data):
    net = Net(data.draw)
    parts = s.split(net, s.affine(net, several(net)))
    case = net.case(*(s.absorber(net, part) for part in parts))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@examples(0.027)
@given(data=st.data())
def test_map_with_several_consumers_goes_into_all_or_none(data):
    net = Net(data.draw)
    x = s.batch_norm(net, s.images(net))
    ends = [unpadded_conv(net, x) for _ in range(data.draw(st.integers(1, 3)))]
    wall = data.draw(st.booleans())
    case = net.case(*ends, *([s.tanh(net, x)] if wall else []))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result, {"BatchNormalization": wall})


@examples(0.027)
@given(data=st.data())
def test_consecutive_maps_between_walls_become_one(data):
    net = Net(data.draw)
    x = s.tanh(net, s.images(net))
    for _ in range(data.draw(st.integers(2, 3))):
        x = s.batch_norm(net, x)
    case = net.case(s.tanh(net, x))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result, {"BatchNormalization": 1}, {"Mul": 1, "Add": 1})


@examples(0.027)
@given(data=st.data())
def test_arithmetic_beside_a_batch_norm_merges_into_it(data):
    net = Net(data.draw)
    x = s.tanh(net, s.images(net))
    first, second = data.draw(st.sampled_from([(s.batch_norm, s.chain), (s.chain, s.batch_norm)]))
    case = net.case(s.tanh(net, second(net, first(net, x))))
    result = survive(case.model, case.feeds)
    assert affines(result.model).total() <= 2, describe(case.model, result)


# Weights that are not plain initializers


def behind(net: Net, weight: str, how: str) -> str:
    """The same weight, as the output of a node that a run of the model cannot change."""
    array = net.constants[weight]
    if how == "Identity":
        return net.node("Identity", weight)
    if how == "Cast":
        return net.node("Cast", weight, to=s.DOUBLE)
    if how == "Transpose":
        rank = net.rank(weight)
        turned = net.constant(onnx_array(array).T)
        return net.node("Transpose", turned, perm=list(range(rank))[::-1])
    if how == "Constant":
        return net.node("Constant", value=array)
    return weight


def onnx_array(proto: Any) -> np.ndarray:
    return s.onnx.numpy_helper.to_array(proto)


@pytest.mark.parametrize("how", ["Identity", "Cast", "Transpose", "Constant"])
@examples(0.02)
@given(data=st.data(), forward=st.booleans())
def test_weights_behind_operators_are_found(how, data, forward):
    net = Net(data.draw)
    x = either(net)
    x = s.affine(net, x) if forward else x
    outputs = data.draw(st.integers(1, 3))
    if net.rank(x) == 2:
        weight = behind(net, net.normal(net.shape(x)[1], outputs), how)
        y = net.node("MatMul", x, weight)
    else:
        weight = behind(net, net.normal(outputs, net.shape(x)[1], *[2] * (net.rank(x) - 2)), how)
        y = net.node("Conv", x, weight, s.bias_name(net, outputs))
    case = net.case(y if forward else s.affine(net, y))
    result = survive(case.model, case.feeds)
    assert_left(case.model, result)


@examples(0.034)
@given(data=st.data())
def test_map_goes_into_the_scale_of_a_quantized_weight(data):
    net = Net(data.draw, 13)
    x = s.images(net)
    shape = (data.draw(st.integers(1, 4)), net.shape(x)[1], *[2] * (net.rank(x) - 2))
    weight = net.constant(net.rng.integers(-127, 128, shape).astype("int8"))
    per_channel = data.draw(st.booleans())
    scale = net.rng.uniform(0.01, 0.1, shape[0] if per_channel else ()).astype("float32")
    zero = data.draw(st.sampled_from(["", "zero"]))
    zero = zero and net.constant(np.zeros(scale.shape, "int8"))
    real = net.node("DequantizeLinear", weight, net.constant(scale), zero, axis=0)
    # Its result is float32, so that the graph is double only from here on.
    net.nodes[-1].output[0] = f"{real}.single"
    net.nodes.append(s.helper.make_node("Cast", [f"{real}.single"], [real], to=s.DOUBLE))
    net.types[real] = s.helper.make_tensor_type_proto(s.DOUBLE, shape)
    y = net.node("Conv", x, real, s.bias_name(net, shape[0]))
    case = net.case(s.affine(net, y))
    survive(case.model, case.feeds)


@pytest.mark.parametrize("kind", [*ROWS, *ABSORBERS])
@examples(0.0134)
@given(data=st.data())
def test_oracle_agrees_with_onnxruntime(kind, data):
    """What the folds are compared with is itself compared, with another's optimisations off."""
    if kind in ROWS:
        row = ROWS[kind]
        net = Net(data.draw, row.since, row.until)
        y = row.operator(net, feed(net, row.source(net), row))
    else:
        source, operator = ABSORBERS[kind]
        net = Net(data.draw)
        y = operator(net, source(net))
    case = net.case(s.affine(net, y))
    assert_oracle_agrees_with_onnxruntime(case.model, case.feeds)


def test_rows_cover_every_operator_that_has_a_rule():
    """A rule without a row here is a rule without a proof."""
    tested = {name.split(",")[0].split(" ")[0] for name in (*ROWS, *ABSORBERS)}
    tested |= {"Add", "Sub", "Sum", "Mul", "Div"}
    assert set(backward.BACKWARD) | set(forward.FORWARD) <= tested
