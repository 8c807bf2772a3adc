"""Networks put together at random from the operators of the folding table, folded in every way.

Nothing is expected to fold here. Whatever is folded must leave a valid model that computes the same, at every value
whose name it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx
import strategies as s
from hypothesis import given
from hypothesis import strategies as st
from oracles import fold, survive, survive_rounding
from strategies import Case, Net, examples

# Values grow no larger than this, so that an example stays cheap.
MOST_ELEMENTS = 2000

MOSTLY = st.sampled_from([True] * 4 + [False])
SELDOM = st.sampled_from([False] * 15 + [True])


class Network(Net):
    """A graph that grows by random operators on random values, weights used again and again."""

    def __init__(self, draw: s.Draw, since: int = 7) -> None:
        super().__init__(draw, since)
        self.values: list[str] = []

    def normal(self, *shape: int) -> str:
        """A weight; one of the same shape may be used again."""
        same = [name for name in self.constants if self.shape(name) == shape and self.is_float(name)]
        if same and self.draw(st.booleans()):
            return self.draw(st.sampled_from(same))
        return super().normal(*shape)

    def is_float(self, name: str) -> bool:
        return self.types[name].tensor_type.elem_type == s.DOUBLE

    def pick(self, fits: Callable[[tuple[int, ...]], bool] = lambda shape: True) -> str | None:
        """One of the values, the newest more often than others; None if none fits."""
        fitting = [name for name in self.values if fits(self.shape(name))]
        if not fitting:
            return None
        return fitting[-1] if self.draw(MOSTLY) else self.draw(st.sampled_from(fitting))

    def grow(self, names: Iterable[str] | None = None) -> None:
        """Append an operator that fits a value, one of `names` if they are given."""
        x = self.pick()
        fitting = [
            name
            for name in names or OPERATORS
            if self.opset >= OPERATORS[name][1] and OPERATORS[name][0](self.shape(x))
        ]
        if fitting:
            made = OPERATORS[self.draw(st.sampled_from(fitting))][2](self, x)
            self.values += [y for y in ([made] if isinstance(made, str) else made) if self.is_small(y)]

    def is_small(self, name: str) -> bool:
        return 0 < math.prod(self.shape(name)) <= MOST_ELEMENTS

    def finish(self) -> Case:
        """What nothing uses becomes an output, half of it by way of what absorbs maps; so do values in the middle."""
        used = {name for node in self.nodes for name in node.input}
        made = [name for node in self.nodes for name in node.output]
        outputs = []
        for name in made:
            if (
                name not in used
                and self.rank(name) in (2, 3, 4, 5)
                and self.is_small(name)
                and self.draw(st.booleans())
            ):
                outputs.append(s.absorber(self, name))
            elif name not in used or self.draw(SELDOM):
                outputs.append(name)
        return self.case(*outputs)


def has_rank(*ranks: int) -> Callable[[tuple[int, ...]], bool]:
    return lambda shape: len(shape) in ranks


def is_spatial(shape: tuple[int, ...]) -> bool:
    return len(shape) in (3, 4, 5)


def is_even(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[2] % 2 == 0 and shape[3] % 2 == 0


def residual(net: Network, x: str) -> str:
    other = net.pick(lambda shape: shape == net.shape(x))
    return net.node(
        net.draw(st.sampled_from(["Add", "Add", "Sub", "Mul", "Max"])) if net.opset >= 8 else "Add", x, other
    )


def concat(net: Network, x: str) -> str:
    shape = net.shape(x)
    axis = net.draw(st.integers(0, len(shape) - 1)) if net.draw(st.booleans()) else 1
    others = [
        net.pick(lambda other: len(other) == len(shape) and all(
            m == n for i, (m, n) in enumerate(zip(other, shape, strict=True)) if i != axis
        ))
        for _ in range(net.draw(st.integers(1, 2)))
    ]  # fmt: skip
    return net.node("Concat", x, *others, axis=axis)


def any_transpose(net: Network, x: str) -> str:
    return s.transpose(net, x, net.draw(st.permutations(range(net.rank(x)))))


def any_reshape(net: Network, x: str) -> str:
    """To the shape of the axes in another order, two of them joined, or one split off."""
    shape = list(net.draw(st.permutations(net.shape(x))))
    if len(shape) > 2 and net.draw(st.booleans()):
        at = net.draw(st.integers(0, len(shape) - 2))
        shape[at : at + 2] = [shape[at] * shape[at + 1]]
    elif net.draw(st.booleans()):
        shape.insert(net.draw(st.integers(0, len(shape))), 1)
    return s.reshape(net, x, shape)


def any_chain(net: Network, x: str) -> str:
    return s.chain(net, x, axis=net.draw(st.integers(0, net.rank(x) - 1)))


def block(net: Network, x: str) -> str:
    """What networks are made of: convolution, batch norm, activation."""
    y = s.conv(net, x)
    y = s.batch_norm(net, y) if net.draw(st.booleans()) else s.affine(net, y)
    return net.draw(st.sampled_from([s.relu, s.identity, s.leaky_relu, s.max_pool]))(net, y)


def preactivation(net: Network, x: str) -> str:
    """The other order: batch norm, activation, convolution; and a residual around it."""
    y = s.relu(net, s.batch_norm(net, x))
    y = s.conv(net, y, net.shape(x)[1])
    return net.node("Add", x, y) if net.shape(y) == net.shape(x) else y


def conditional(net: Network, x: str) -> str:
    """An If whose branches use values, and weights, of the graph around it."""
    branches = []
    for side in ("then", "else"):
        inner = Network.__new__(Network)
        inner.__dict__.update(net.__dict__)
        inner.prefix, inner.nodes, inner.constants = net.name(side), [], dict(net.constants)
        inner.values = [name for name in net.values if net.shape(name) == net.shape(x)]
        y = x
        for operator in net.draw(st.lists(st.sampled_from([s.batch_norm, any_chain, s.relu, s.identity]), max_size=3)):
            y = operator(inner, y)
        if net.draw(st.booleans()):
            y = inner.node("Add", y, inner.pick())
        y = s.identity(inner, y)
        own = [] if net.draw(st.booleans()) else [name for name in inner.constants if name not in net.constants]
        net.constants |= {name: t for name, t in inner.constants.items() if name not in own}
        constants = [inner.constants[name] for name in own]
        branches.append(onnx.helper.make_graph(inner.nodes, side, [], [net.described(y)], constants))
        net._count = inner._count
    condition = net.constant(np.array(net.draw(st.booleans())))
    output = net.name("if")
    node = onnx.helper.make_node(
        "If", [condition], [output], name=output, then_branch=branches[0], else_branch=branches[1]
    )
    net.nodes.append(node)
    net.types[output] = net.types[x]
    return output


OPERATORS: dict[str, tuple[Callable[[tuple[int, ...]], bool], int, Callable[[Network, str], str | list[str]]]] = {
    "BatchNormalization": (has_rank(2, 3, 4, 5), 7, s.batch_norm),
    "BatchNormalization, positive": (has_rank(2, 3, 4), 7, lambda net, x: s.batch_norm(net, x, sign="positive")),
    "affine": (has_rank(2, 3, 4, 5), 7, s.affine),
    "scale": (has_rank(2, 3, 4, 5), 7, lambda net, x: s.affine(net, x, sign="positive", shift=False)),
    "chain": (has_rank(1, 2, 3, 4, 5), 7, any_chain),
    "block": (is_spatial, 7, block),
    "preactivation": (is_spatial, 7, preactivation),
    "Conv": (is_spatial, 7, s.conv),
    "Conv without padding": (is_spatial, 7, lambda net, x: s.conv(net, x, padding="none")),
    "ConvTranspose": (is_spatial, 7, s.conv_transpose),
    "Gemm": (has_rank(2), 7, lambda net, x: s.gemm(net, x, transposed=net.draw(st.booleans()))),
    "MatMul": (has_rank(2, 3, 4), 7, s.matmul),
    "Relu": (has_rank(2, 3, 4, 5), 7, s.relu),
    "LeakyRelu": (has_rank(2, 3, 4, 5), 7, s.leaky_relu),
    "PRelu": (has_rank(2, 3, 4, 5), 7, s.prelu),
    "Clip": (has_rank(2, 3, 4, 5), 7, s.clip),
    "MaxPool": (is_spatial, 7, s.max_pool),
    "AveragePool": (is_spatial, 7, s.average_pool),
    "GlobalAveragePool": (is_spatial, 7, s.global_average_pool),
    "GlobalMaxPool": (is_spatial, 7, s.global_max_pool),
    "ReduceMean": (has_rank(3, 4, 5), 7, s.reduce),
    "Resize": (has_rank(4), 11, s.resize),
    "Concat": (has_rank(2, 3, 4, 5), 7, concat),
    "Split": (lambda shape: len(shape) > 1 and shape[1] > 1, 7, s.split),
    "Slice": (has_rank(2, 3, 4, 5), 7, lambda net, x: s.slice_axes(net, x, net.draw(st.integers(0, net.rank(x) - 1)))),
    "residual": (has_rank(2, 3, 4, 5), 7, residual),
    "residual again": (has_rank(2, 3, 4, 5), 7, residual),
    "Transpose": (has_rank(2, 3, 4, 5), 7, any_transpose),
    "Reshape": (has_rank(2, 3, 4, 5), 7, any_reshape),
    "Flatten": (has_rank(2, 3, 4, 5), 7, s.flatten),
    "Squeeze": (
        lambda shape: shape[-1] == 1 and len(shape) > 2,
        7,
        lambda net, x: s.squeeze(net, x, [net.rank(x) - 1]),
    ),
    "Unsqueeze": (has_rank(2, 3, 4), 7, lambda net, x: s.unsqueeze(net, x, [net.draw(st.integers(0, net.rank(x)))])),
    "Expand": (has_rank(2, 3, 4), 8, s.expand),
    "DepthToSpace": (lambda shape: len(shape) == 4 and shape[1] % 4 == 0, 7, s.depth_to_space),
    "SpaceToDepth": (is_even, 7, s.space_to_depth),
    "Pad": (has_rank(3, 4, 5), 7, lambda net, x: s.pad(net, x, value=net.draw(st.sampled_from([None, 0.0, 0.5])))),
    "Pad by reflection": (
        has_rank(3, 4),
        7,
        lambda net, x: s.pad(net, x, net.draw(st.sampled_from(["reflect", "edge"]))),
    ),
    "Identity": (has_rank(2, 3, 4, 5), 7, s.identity),
    "Dropout": (has_rank(2, 3, 4, 5), 7, s.dropout),
    "Cast": (has_rank(2, 3, 4, 5), 7, s.cast),
    "Tanh": (has_rank(2, 3, 4, 5), 7, s.tanh),
    "If": (has_rank(2, 3, 4), 11, conditional),
}


# Half of what is drawn: what maps come from, what takes them up, and what they pass.
FREQUENT = ("affine", "scale", "BatchNormalization", "block", "preactivation", "Gemm", "MatMul", "Conv without padding",
            "Relu", "residual", "Concat", "Split", "Transpose", "Reshape", "MaxPool", "AveragePool")  # fmt: skip
ABSORBING = ("Conv without padding", "Conv", "Gemm", "MatMul")


@st.composite
def networks(draw: s.Draw, since: int = 7, most: int = 14) -> Case:
    """A network of one or two inputs and up to `most` random operators."""
    net = Network(draw, since)
    net.values.append(draw(st.sampled_from([s.images, s.images, s.rows]))(net))
    if draw(st.booleans()):
        net.values.append(net.input(net.shape(net.values[0])))
    if draw(st.booleans()):
        net.grow(ABSORBING)
    for _ in range(draw(st.integers(3, most))):
        net.grow(draw(st.sampled_from([None, FREQUENT])))
    if draw(st.booleans()):
        net.grow(ABSORBING)
    if not net.nodes:
        net.values.append(s.relu(net, net.values[0]))
    return net.finish()


@examples(0.08)
@given(case=networks())
def test_folded_network_computes_the_same(case):
    survive(case.model, case.feeds)


@examples(0.06)
@given(case=networks())
def test_aggressively_folded_network_computes_the_same(case):
    survive(case.model, case.feeds, aggressive=True)


@examples(0.02)
@given(case=networks())
def test_folding_is_deterministic(case):
    content = fold(case.model, True).model.SerializeToString(deterministic=True)
    assert fold(case.model, True).model.SerializeToString(deterministic=True) == content


@examples(0.02)
@given(case=networks(most=30))
def test_deep_network_computes_the_same(case):
    survive(case.model, case.feeds, aggressive=True)


@examples(0.03)
@given(data=st.data(), dtype=st.sampled_from(["float32", "float32", "float16", "bfloat16"]), aggressive=st.booleans())
def test_folded_network_of_narrow_type_stays_within_the_bound(data, dtype, aggressive):
    case = data.draw(networks(since=22 if dtype == "bfloat16" else 7, most=8))
    survive_rounding(case.model, case.feeds, dtype, aggressive=aggressive)


@examples(0.02)
@given(case=networks())
def test_aggressive_after_default_is_as_good_as_aggressive(case):
    """What was folded by default does not stand in the way of more."""
    twice = fold(fold(case.model).model, aggressive=True)
    once = fold(case.model, aggressive=True)
    assert len(twice.report.left) <= len(once.report.left)


@examples(0.02)
@given(case=networks())
def test_skipped_batch_norms_stay_and_the_others_do_not_mind(case):
    """Whatever subset is folded, the network computes the same."""
    norms = [node.name for node in case.model.graph.node if node.op_type == "BatchNormalization"]
    skipped = norms[::2]
    result = fold(case.model, skip=skipped)
    left = {row.name: row.reason.value for row in result.report.left}
    assert all(left[name] == "skipped" for name in skipped)
    assert set(skipped) <= {node.name for node in result.model.graph.node}
