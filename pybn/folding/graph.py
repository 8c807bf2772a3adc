"""What a rule may ask of an ONNX graph: constants and shapes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pybn.folding import protos
from pybn.folding.affine import FLOATS, is_supported
from pybn.folding.reasons import FoldError, Reason, Refusal

STANDARD_DOMAINS = ("", "ai.onnx")

# Of what DequantizeLinear takes, the types that NumPy has.
INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32"})

# More axes than these are an error, not a tensor.
MOST_AXES = 64

# Operators that have weights.
LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")

# Before IR version 4 an initializer had to be listed among the graph inputs; it is a constant all
# the same. Since then a listed one is a default that the caller may override.
OVERRIDABLE_SINCE_IR = 4


@dataclass(frozen=True)
class Scope:
    """A graph of a model, where it is, and the opset it is written in."""

    label: str
    graph: ir.Graph
    opset: int

    @property
    def is_main(self) -> bool:
        return self.label == MAIN


MAIN = "main"


def scopes(model: ir.Model) -> Iterator[Scope]:
    """Walk the main graph, the local functions and all their subgraphs, in file order."""
    yield from _nested(MAIN, model.graph, _standard_opset(model.opset_imports))
    for function in model.functions.values():
        overload = f":{function.overload}" if function.overload else ""
        label = f"function {function.domain}::{function.name}{overload}"
        yield from _nested(label, function.graph, _standard_opset(function.opset_imports))


def _nested(label: str, graph: ir.Graph, opset: int) -> Iterator[Scope]:
    yield Scope(label, graph, opset)
    names = Counter(node.name for node in graph)
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                inside = [attribute.as_graph()]
            elif attribute.type == ir.AttributeType.GRAPHS:
                inside = list(attribute.as_graphs())
            else:
                continue
            for subgraph in inside:
                # Nodes may lack names or share them; what they produce has a name of its own.
                name = node.name if node.name and names[node.name] == 1 else display_output(node)
                yield from _nested(f"{label}/{name}.{attribute.name}", subgraph, opset)


def _standard_opset(imports: dict[str, int]) -> int:
    return max((imports.get(domain, 0) for domain in STANDARD_DOMAINS), default=0)


def standard_type(node: ir.Node, model: ir.Model) -> str | None:
    """Return the operator type if it is one of the standard domain, else None."""
    # A local function may take the name of a standard operator; then it is not that operator.
    if node.domain not in STANDARD_DOMAINS or node.op_identifier() in model.functions:
        return None
    return node.op_type


@dataclass(frozen=True)
class Dequantized:
    """A constant behind a DequantizeLinear: ``(values - zero_point) * scale``.

    Attributes
    ----------
    values : ndarray of integers
        Any shape.
    scale : ndarray of floats
        A single value, or one per slice of `values` along `axis`.
    zero_point : ndarray or None
        As `scale`; None stands for zeros.
    axis : int
        Counted from the front.
    """

    values: npt.NDArray[Any]
    scale: npt.NDArray[Any]
    zero_point: npt.NDArray[Any] | None
    axis: int

    @property
    def array(self) -> npt.NDArray[Any]:
        """The numbers that the constant stands for, in float64."""
        shape = [1] * self.values.ndim
        if self.scale.size > 1:
            shape[self.axis] = -1
        zero = 0.0 if self.zero_point is None else self.zero_point.astype(np.float64).reshape(shape)
        result: npt.NDArray[Any] = (self.values.astype(np.float64) - zero) * self.scale.astype(np.float64).reshape(
            shape
        )
        return result


class Facts:
    """Answers about the values of one model: is it a constant, which shape and type has it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._opsets = {id(scope.graph): scope.opset for scope in scopes(model)}
        self._inferred: dict[ir.Value, ir.Value] | None = None
        # What `sources.read` found: a long walk meets the same nodes again and again.
        self.readings: dict[ir.Node, Any] = {}

    def opset(self, node: ir.Node) -> int:
        """Return the version of the standard operators that the node is written in."""
        return self._opsets[id(node.graph)]

    def constant(self, value: ir.Value | None) -> npt.NDArray[Any] | None:
        """Return the array of a value that no run of the model can change, else None.

        It may be an initializer, a Constant or a ConstantOfShape, and pass Identity, Cast, Transpose,
        Unsqueeze, Squeeze and Reshape.
        """
        source = constant_source(value)
        if value is None or source is None or self.is_overridable(source):
            return None
        producer = source.producer()
        if producer is not None:
            array = _constant_node_array(producer)
        else:
            array = None if source.const_value is None else source.const_value.numpy()
        for node in reversed(_constant_path(value)):
            array = None if array is None else self._evaluate(node, array)
        return array

    def _evaluate(self, node: ir.Node, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """Apply one of the operators that constants pass; None where its meaning is in doubt."""
        if any(item.is_ref() for item in node.attributes.values()):
            return None
        if node.op_type not in _RESHAPED_BY:
            return _evaluate(node, array)
        # The axes are an input since opset 13, the shape since 5.
        given = self.constant(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes", None)
        if given is None:
            return None
        sizes = [int(size) for size in given]
        try:
            if node.op_type == "Reshape":
                copied = not attribute(node, "allowzero", 0)
                return array.reshape([array.shape[i] if copied and not n else n for i, n in enumerate(sizes)])
            return (np.expand_dims if node.op_type == "Unsqueeze" else np.squeeze)(array, tuple(sizes))
        except (ValueError, IndexError):  # what does not fit the array
            return None

    def dequantized(self, value: ir.Value | None) -> Dequantized | None:
        """Return the integers and scales of a constant behind a DequantizeLinear, else None."""
        node = None if value is None else value.producer()
        if node is None or standard_type(node, self.model) != "DequantizeLinear" or len(node.inputs) < 2:
            return None
        values, scale = (self.constant(item) for item in node.inputs[:2])
        has_zero = len(node.inputs) > 2 and node.inputs[2] is not None
        zero_point = self.constant(node.inputs[2]) if has_zero else None
        if values is None or scale is None or (has_zero and zero_point is None):
            return None
        # Before opset 13 there is one scale; since 21 there may be blocks, which have no place here.
        axis = int(attribute(node, "axis", 1)) % max(values.ndim, 1) if scale.size > 1 else 0
        plain = not attribute(node, "block_size", 0) and not attribute(node, "output_dtype", 0)
        one_each = scale.ndim < 2 and (scale.size == 1 or scale.shape == values.shape[axis : axis + 1])
        if not (plain and one_each and is_supported(scale.dtype)) or values.dtype.name not in INTEGERS:
            return None
        if zero_point is not None and zero_point.size != scale.size:
            return None
        return Dequantized(values, scale, zero_point, axis)

    def is_overridable(self, value: ir.Value | None) -> bool:
        """Say whether the value is a default that the caller of the model may override."""
        source = constant_source(value)
        if source is None or not source.is_graph_input():
            return False
        return self.model.ir_version >= OVERRIDABLE_SINCE_IR or source.graph is not self.model.graph

    def shape(self, value: ir.Value | None) -> ir.Shape | None:
        """Return the shape that ONNX shape inference finds, else the declared one; None if they contradict."""
        if value is None:
            return None
        inferred = self._inference(value)
        if inferred is None or inferred.shape is None or value.shape is None:
            return value.shape if inferred is None or inferred.shape is None else inferred.shape
        return inferred.shape if _agree(inferred.shape, value.shape) else None

    def rank(self, value: ir.Value | None) -> int | None:
        """Return the number of axes, or None if that is not proven."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        """Return the length of an axis, or None if that is not proven to be one number."""
        shape = self.shape(value)
        if shape is None or not -len(shape) <= axis < len(shape):
            return None
        size = shape[axis]
        return size if isinstance(size, int) else None

    def dtype(self, value: ir.Value | None) -> np.dtype[Any] | None:
        """Return the type of the elements, or None if it is not proven, or declared otherwise than it is."""
        if value is None:
            return None
        inferred = self._inference(value)
        types = {item.dtype for item in (value, inferred) if item is not None and item.dtype is not None}
        if len(types) != 1:
            return None
        try:
            return types.pop().numpy()
        except TypeError:  # a type that NumPy does not have, such as strings
            return None

    def is_float(self, value: ir.Value | None) -> bool:
        """Say whether the elements are proven to be of one of the float types that can be folded."""
        dtype = self.dtype(value)
        return dtype is not None and is_supported(dtype)

    def forget(self) -> None:
        """Forget what was read of nodes, because the graph has changed."""
        self.readings.clear()

    def adopt(self, value: ir.Value, like: ir.Value) -> None:
        """Take over for a new value what is known of one of the same type and shape."""
        known = self._inference(like)
        if known is not None and self._inferred is not None:
            self._inferred[value] = known

    def _inference(self, value: ir.Value) -> ir.Value | None:
        if value.producer() is None:
            return None
        if self._inferred is None:
            self._inferred = _infer(self.model)
        return self._inferred.get(value)


def _agree(a: ir.Shape, b: ir.Shape) -> bool:
    return len(a) == len(b) and all(
        m == n for m, n in zip(a, b, strict=True) if isinstance(m, int) and isinstance(n, int)
    )


# Operators that a constant may pass before it is used.
_RESHAPED_BY = ("Unsqueeze", "Squeeze", "Reshape")
PASSED_BY_CONSTANTS = ("Identity", "Cast", "Transpose", "ConstantOfShape", *_RESHAPED_BY)
# A ConstantOfShape of a hostile model may be of any size.
_LARGEST_OF_SHAPE = 2**28


def constant_source(value: ir.Value | None) -> ir.Value | None:
    """Follow operators that constants pass up to an initializer or the output of a Constant node.

    That of a ConstantOfShape is its shape.
    """
    while value is not None:
        producer = value.producer()
        if producer is None:
            return value if value.is_initializer() else None
        if producer.domain not in STANDARD_DOMAINS:
            return None
        if producer.op_type == "Constant":
            return value
        if producer.op_type not in PASSED_BY_CONSTANTS or not producer.inputs:
            return None
        value = producer.inputs[0]
    return None


def _constant_path(value: ir.Value) -> list[ir.Node]:
    """List the nodes between a value and its `constant_source`, nearest to the value first."""
    nodes: list[ir.Node] = []
    at: ir.Value | None = value
    while at is not None and (producer := at.producer()) is not None and producer.op_type != "Constant":
        nodes.append(producer)
        at = producer.inputs[0]
    return nodes


def _evaluate(node: ir.Node, array: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Apply an Identity, Cast, Transpose or ConstantOfShape to a constant; None where its meaning is in doubt."""
    if node.op_type == "Transpose":
        permutation = attribute(node, "perm", tuple(reversed(range(array.ndim))))
        if sorted(permutation) != list(range(array.ndim)):
            return None
        return np.transpose(array, permutation)
    if node.op_type == "ConstantOfShape":
        value = attribute(node, "value", None)
        filling = np.zeros(1, np.float32) if value is None else value.numpy()
        if array.dtype != np.int64 or array.ndim != 1 or filling.size != 1 or (array < 0).any():
            return None
        if math.prod(map(int, array)) > _LARGEST_OF_SHAPE:
            return None
        return np.full(array, filling.reshape(()), filling.dtype)
    if node.op_type == "Cast":
        target = ir.DataType(attribute(node, "to", 0)).numpy()
        # Between floats only, and not from float64 to bfloat16, where runtimes round once or twice.
        if {array.dtype.name, target.name} - set(FLOATS) or (array.dtype.name, target.name) == ("float64", "bfloat16"):
            return None
        with np.errstate(over="ignore"):  # infinite values are refused by whoever uses them
            return array.astype(target)
    return array


def _constant_node_array(node: ir.Node) -> npt.NDArray[Any] | None:
    for name, item in node.attributes.items():
        if item.is_ref():
            return None
        if name == "value":
            return item.as_tensor().numpy()
        if name in ("value_float", "value_floats"):
            return np.array(item.value, dtype=np.float32)
        if name in ("value_int", "value_ints"):
            return np.array(item.value, dtype=np.int64)
    return None


def _infer(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """Infer shapes and types: by each value of the model, a copy that knows them."""
    try:
        inferred = ir.from_proto(_inferred(_bare(model)))
    except Exception:  # whatever inference dislikes: a shape that is not proven is a refusal
        return {}
    # Names are unique only within one graph: the branches of an If may repeat them.
    copies = {
        (scope.label, output.name): output
        for scope in scopes(inferred)
        for node in scope.graph
        for output in node.outputs
    }
    return {
        output: copies[scope.label, output.name]
        for scope in scopes(model)
        for node in scope.graph
        for output in node.outputs
        if (scope.label, output.name) in copies
    }


def _inferred(bare: onnx.ModelProto) -> onnx.ModelProto:
    """Infer shapes, and with the ranks that this shows, more."""
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    while _declare_ranks(bare.graph, inferred.graph, {}):
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    return inferred


def _declare_ranks(graph: onnx.GraphProto, known: onnx.GraphProto, outer: Mapping[str, onnx.TypeProto.Tensor]) -> bool:
    """Declare of what rank a Reshape to a computed shape is: as many axes as the shape has sizes, which onnx overlooks.

    Returns
    -------
    bool
        Whether there was anything to declare.
    """
    found = False
    declared = {info.name for info in (*graph.output, *graph.value_info)}
    infos = (*known.input, *known.output, *known.value_info)
    types = {**outer, **{info.name: info.type.tensor_type for info in infos}}
    for node, same in zip(list(graph.node), known.node, strict=True):
        for inside, inside_known in zip(protos.subgraphs(node), protos.subgraphs(same), strict=True):
            found = _declare_ranks(inside, inside_known, types) or found
        if node.op_type != "Reshape" or node.domain not in STANDARD_DOMAINS or len(node.input) < 2:
            continue
        data, shape = types.get(node.input[0]), types.get(node.input[1])
        name, output = node.output[0], types.get(node.output[0])
        if name in declared or data is None or shape is None or (output is not None and output.HasField("shape")):
            continue
        sizes = shape.shape.dim
        if len(sizes) == 1 and sizes[0].HasField("dim_value") and 0 <= sizes[0].dim_value <= MOST_AXES:
            rank = [None] * sizes[0].dim_value
            graph.value_info.append(onnx.helper.make_tensor_value_info(name, data.elem_type, rank))
            found = True
    return found


# Larger tensors hold weights; smaller ones may hold shapes, which inference reads.
_LARGEST_SHAPE = 1024


def _bare(model: ir.Model) -> onnx.ModelProto:
    """Return a model without the data of its weights, and without what it declares of its inner values."""
    bare = model.clone()
    for scope in scopes(bare):
        for value in scope.graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _without_data(value.const_value)
        for node in scope.graph:
            item = node.attributes.get("value") if node.op_type == "Constant" else None
            if item is not None and not item.is_ref():
                node.attributes["value"] = ir.AttrTensor("value", _without_data(item.as_tensor()))
            for output in node.outputs:
                # Inference would take it for granted.
                if not output.is_graph_output():
                    output.type = output.shape = None
    return ir.to_proto(bare)


def _without_data(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.size <= _LARGEST_SHAPE:
        return ir.tensor(tensor.numpy(), name=tensor.name) if isinstance(tensor, ir.ExternalTensor) else tensor
    stub = onnx.TensorProto(name=tensor.name or "", data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    return ir.TensorProtoTensor(stub)


class AttributeNotConstant(Exception):
    """An attribute refers to a parameter of the local function, and so has no value yet."""


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return the value of an attribute, or the default if it is absent.

    Raises
    ------
    AttributeNotConstant
        If it refers to a parameter of the local function that the node is in.
    """
    found = node.attributes.get(name)
    if found is None:
        return default
    if found.is_ref():
        raise AttributeNotConstant(name)
    return found.value


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """Return an input; None if it is absent: left empty, or beyond the last one."""
    return node.inputs[position] if position < len(node.inputs) else None


def integers(node: ir.Node, name: str, position: int, facts: Facts) -> list[int] | None:
    """Return numbers that are an attribute in early opsets and an input in later ones; None if absent.

    Raises
    ------
    FoldError
        If they are not constant.
    """
    values = attribute(node, name, None)
    given = input_of(node, position)
    if values is None and given is not None:
        values = facts.constant(given)
        if values is None:
            raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, f"{name!r} of {node.op_type} is not a constant")
    return None if values is None else [int(value) for value in np.ravel(values)]


def display_name(node: ir.Node) -> str:
    """Name a node for people: its name, or its first output's."""
    return node.name or display_output(node)


def display_output(node: ir.Node) -> str:
    """Name a node by its first output, or, if it has none, by its operator."""
    return next((output.name for output in node.outputs if output.name), node.op_type)


def unavailable(facts: Facts, value: ir.Value | None, what: str, *, parameter: bool) -> Refusal:
    """Explain why `Facts.constant` returned None for a parameter or a weight."""
    if facts.is_overridable(value):
        reason = Reason.PARAMETER_OVERRIDABLE if parameter else Reason.WEIGHT_OVERRIDABLE
        return Refusal(reason, f"{what} is also a graph input, which the caller may override")
    reason = Reason.PARAMETER_NOT_CONSTANT if parameter else Reason.WEIGHT_NOT_CONSTANT
    return Refusal(reason, f"{what} is not a constant")
