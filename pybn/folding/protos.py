"""ONNX messages: their graphs and tensors, how large these are, and copies of messages without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

# The most that one protobuf message can hold.
MAX_BYTES = 2**31 - 1
# An error message quotes names of the model, which may be of any length.
LONGEST_LINE = 400


class ModelError(ValueError):
    """A model cannot be read, is invalid, or cannot be written. The message is one line."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = next((line for line in lines if line), type(error).__name__)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Walk all tensors of a model, those in attributes, subgraphs and functions included."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _attribute_tensors(function.attribute_proto)
        for node in function.node:
            yield from _attribute_tensors(node.attribute)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Walk a graph and all that are inside it."""
    yield graph
    for node in graph.node:
        for inside in subgraphs(node):
            yield from graphs(inside)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Return the graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def is_external(tensor: onnx.TensorProto) -> bool:
    """Say whether the tensor's data are in a file of their own."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def size(tensor: onnx.TensorProto) -> int:
    """Return the number of elements that a tensor's shape asks for."""
    return math.prod(int(dim) for dim in tensor.dims)


def packed_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes that a tensor's shape and type ask for; 0 for strings."""
    try:
        data_type = ir.DataType(tensor.data_type)
        bits = 0 if data_type == ir.DataType.STRING else int(data_type.bitwidth)
    except (ValueError, TypeError) as error:
        raise ModelError(f"invalid model: tensor {tensor.name!r} has the unknown type {tensor.data_type}") from error
    if min(tensor.dims, default=0) < 0:
        raise ModelError(f"invalid model: tensor {tensor.name!r} has a negative dimension")
    # Integer arithmetic: absurd dimensions must not overflow a float.
    return -(-size(tensor) * bits // 8)


def without_data(
    proto: onnx.ModelProto, is_left_out: Callable[[onnx.TensorProto], bool]
) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, onnx.TensorProto]]]:
    """Copy a model, but not the raw data of the initializers that `is_left_out` picks.

    Returns
    -------
    copy : onnx.ModelProto
    left_out : list of (copy, original)
        The tensors without data, in the model's order.
    """
    # A plain copy with the data cleared afterwards would hold them all twice in memory.
    copy = onnx.ModelProto()
    left_out = []
    _copy_fields(proto, copy, but="graph")
    _copy_fields(proto.graph, copy.graph, but="initializer")
    for tensor in proto.graph.initializer:
        new = copy.graph.initializer.add()
        if is_left_out(tensor):
            _copy_fields(tensor, new, but="raw_data")
            left_out.append((new, tensor))
        else:
            new.CopyFrom(tensor)
    return copy, left_out


def _copy_fields(source: Message, target: Message, *, but: str) -> None:
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, Message):
            getattr(target, field.name).CopyFrom(value)
        elif isinstance(value, (int, float, str, bytes)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).extend(value)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)
