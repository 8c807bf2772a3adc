"""Networks with something wrong in them: attributes, shapes, types and edges that do not fit one another.

The folder may refuse such a model, or leave its nodes alone; it must not fail in any other way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import strategies as s
from fold_models import tensor
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from oracles import fold
from strategies import examples
from test_random_graphs import networks

from pybn.folding.files import ModelError

Damage = Callable[[s.Draw, onnx.ModelProto], None]

NUMBERS = st.sampled_from([-(2**63), -7, -2, -1, 0, 1, 2, 3, 5, 1000, 2**31, 2**63 - 1])
ODD_SHAPES = st.lists(st.integers(0, 4), max_size=5)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


def change_number(draw: s.Draw, model: onnx.ModelProto) -> None:
    """Another number in an attribute, or fewer or more of them."""
    attributes = [a for node in nodes_of(model.graph) for a in node.attribute if a.ints or a.HasField("i")]
    if not attributes:
        return
    attribute = draw(st.sampled_from(attributes))
    if attribute.HasField("i"):
        attribute.i = draw(NUMBERS)
    elif draw(st.booleans()):
        attribute.ints[draw(st.integers(0, len(attribute.ints) - 1))] = draw(NUMBERS)
    elif draw(st.booleans()):
        del attribute.ints[-1]
    else:
        attribute.ints.append(draw(NUMBERS))


def drop_attribute(draw: s.Draw, model: onnx.ModelProto) -> None:
    nodes = [node for node in nodes_of(model.graph) if node.attribute]
    if nodes:
        node = draw(st.sampled_from(nodes))
        del node.attribute[draw(st.integers(0, len(node.attribute) - 1))]


def change_constant(draw: s.Draw, model: onnx.ModelProto) -> None:
    """Another shape, type or value of a weight, a parameter or a list of axes."""
    initializers = list(model.graph.initializer)
    if not initializers:
        return
    chosen = draw(st.sampled_from(initializers))
    array = numpy_helper.to_array(chosen)
    kind = draw(st.sampled_from(["shape", "shape", "value", "type", "transposed"]))
    if kind == "shape":
        shape = draw(st.permutations(array.shape)) if draw(st.booleans()) else draw(ODD_SHAPES)
        array = np.resize(array, tuple(shape))
    elif kind == "value" and array.size:
        numbers = NUMBERS if array.dtype.kind == "i" else st.sampled_from([0.0, np.nan, np.inf, -1e300, 1e-320])
        array = array.copy()
        array.reshape(-1)[draw(st.integers(0, array.size - 1))] = draw(numbers)
    elif kind == "type":
        array = array.astype(draw(st.sampled_from(["float16", "float32", "int8", "int64", "bool"])))
    else:
        array = array.T
    chosen.CopyFrom(tensor(chosen.name, array))


def rewire(draw: s.Draw, model: onnx.ModelProto) -> None:
    """Another value as an input of a node; it stays behind what computes it."""
    position = draw(st.integers(0, len(model.graph.node) - 1))
    node = model.graph.node[position]
    if not node.input:
        return
    before = [name for other in model.graph.node[:position] for name in other.output]
    values = [*before, *(info.name for info in model.graph.input), *(t.name for t in model.graph.initializer), ""]
    node.input[draw(st.integers(0, len(node.input) - 1))] = draw(st.sampled_from(values))


def drop_input(draw: s.Draw, model: onnx.ModelProto) -> None:
    nodes = [node for node in nodes_of(model.graph) if node.input]
    if nodes:
        del draw(st.sampled_from(nodes)).input[-1]


def change_operator(draw: s.Draw, model: onnx.ModelProto) -> None:
    types = sorted({node.op_type for node in nodes_of(model.graph)} | {"Identity", "DequantizeLinear", "Mul"})
    draw(st.sampled_from(list(nodes_of(model.graph)))).op_type = draw(st.sampled_from(types))


def change_input(draw: s.Draw, model: onnx.ModelProto) -> None:
    """Another declared shape of an input: absurdly large, of another rank, or none."""
    info = draw(st.sampled_from(list(model.graph.input)))
    shape: list[Any] | None = [dim.dim_value or None for dim in info.type.tensor_type.shape.dim]
    kind = draw(st.sampled_from(["size", "size", "rank", "none"]))
    if kind == "size" and shape:
        shape[draw(st.integers(0, len(shape) - 1))] = draw(NUMBERS.filter(lambda n: n >= 0))
    elif kind == "rank":
        shape = draw(ODD_SHAPES)
    elif kind == "none":
        shape = None
    info.CopyFrom(helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, shape))


def change_opset(draw: s.Draw, model: onnx.ModelProto) -> None:
    model.opset_import[0].version = draw(st.integers(1, s.NEWEST))


DAMAGE: tuple[Damage, ...] = (
    change_number, change_number, drop_attribute, change_constant, change_constant, rewire, drop_input,
    change_operator, change_input, change_opset,
)  # fmt: skip


@examples(0.1)
@given(data=st.data(), aggressive=st.booleans())
def test_damaged_model_is_refused_or_folded_and_never_an_exception(data, aggressive):
    model = data.draw(networks(most=8)).model
    for damage in data.draw(st.lists(st.sampled_from(DAMAGE), min_size=1, max_size=3)):
        damage(data.draw, model)
    with contextlib.suppress(ModelError):
        fold(model, aggressive)
