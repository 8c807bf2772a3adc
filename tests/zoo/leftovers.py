"""What a folder has left in a model: batch norms, and affine nodes that it could have folded.

The definition is the same for all folders, and knows nothing of pybn's engine. It is narrow on
purpose: only what stands beside a linear operator counts, not what would have to pass activations,
pools or branches first.

An *affine node* is a Mul, Add, Sub, Div or Neg of which one operand is a constant (never the
numerator of Div), a number or one value per channel, and the other is not. It has a scale, a shift,
or both (``k - x``). A *chain* is a path of affine nodes and batch norms whose values have one use
each and are no graph outputs. A *linear operator* is a Conv, ConvTranspose, Gemm or MatMul (also
onnxruntime's fused ones) with constant weights; its channels are axis 1 of a Conv or ConvTranspose,
and the last axis of a Gemm or MatMul. An affine node is *foldable* if

- a chain leads from a linear operator to it, which then absorbs it: anything, but a MatMul, which
  has no bias, a shift only if its result is a matrix (a Gemm can take its place); or
- a chain leads from it to a linear operator: a scale always, a shift only into Gemm and into a Conv
  without padding; or
- it comes directly after a batch norm or an affine node of its own kind and merges with that, or
  directly before a batch norm.

A constant per channel counts only along the channels of that linear operator. Subgraphs and local
functions are not looked into.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

STANDARD = ("", "ai.onnx")
LINEAR = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul"}
AFFINE = {"Mul", "Add", "Sub", "Div", "Neg"}


@dataclass(frozen=True)
class Leftovers:
    """How many batch norms and foldable affine nodes a model has."""

    batch_norms: int
    affines: int

    def __str__(self) -> str:
        return f"{self.batch_norms}/{self.affines}"


def leftovers(model: onnx.ModelProto, ir_version: int | None = None) -> Leftovers:
    """Count what is left in the main graph.

    `ir_version` is that of the original: before 4, initializers listed among the inputs were
    constants, which they do not cease to be when a tool writes a later one.
    """
    graph = _Graph(model, ir_version or model.ir_version)
    batch_norms = sum(_is(node, "BatchNormalization") for node in model.graph.node)
    return Leftovers(batch_norms, sum(graph.is_foldable(node) for node in model.graph.node))


@dataclass(frozen=True)
class _Affine:
    """An affine node: its data operand, what it does, and the axis (from the right) that its constant lies along."""

    data: str
    scales: bool
    shifts: bool
    axis: int | None


class _Graph:
    """A graph with its values' producers, uses, constants and shapes."""

    def __init__(self, model: onnx.ModelProto, ir_version: int) -> None:
        graph = model.graph
        self.nodes = graph.node
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.uses: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.uses[name].append(node)
        self.outputs = {output.name for output in graph.output}
        self.constants = {tensor.name for tensor in graph.initializer}
        if ir_version >= 4:  # since then a caller may override those that are listed as inputs
            self.constants -= {info.name for info in graph.input}
        # In topological order. Some tools leave the arithmetic of their folds to the runtime, as nodes.
        for node in graph.node:
            of_constants = bool(node.input) and all(name in self.constants for name in node.input if name)
            if _is(node, "Constant") or (of_constants and not node.op_type.startswith("Random")):
                self.constants.update(node.output)
        self.shapes = _shapes(model)

    def is_foldable(self, node: onnx.NodeProto) -> bool:
        affine = self.affine(node)
        return affine is not None and (
            self.absorbed_backward(affine, node) or self.absorbed_forward(affine, node) or self.merges(affine, node)
        )

    def affine(self, node: onnx.NodeProto) -> _Affine | None:
        """Read a node as an affine node."""
        if not _is(node, *AFFINE):
            return None
        if node.op_type == "Neg":
            return None if node.input[0] in self.constants else _Affine(node.input[0], True, False, None)
        constant = [name in self.constants for name in node.input]
        if sum(constant) != 1 or (node.op_type == "Div" and constant[0]):
            return None
        name, data = node.input[constant.index(True)], node.input[constant.index(False)]
        shape = self.shapes.get(name)
        if shape is None:
            return None
        wide = [axis for axis, size in enumerate(shape) if size != 1]
        if len(wide) > 1:
            return None
        scales = node.op_type in ("Mul", "Div") or (node.op_type == "Sub" and constant[0])
        shifts = node.op_type in ("Add", "Sub")
        return _Affine(data, scales, shifts, len(shape) - wide[0] if wide else None)

    def absorbed_backward(self, affine: _Affine, node: onnx.NodeProto) -> bool:
        """Say whether a linear operator before the node, behind a chain, can absorb it."""
        value = affine.data
        while True:
            producer = self.producers.get(value)
            if producer is None or len(self.uses[value]) != 1 or value in self.outputs:
                return False
            if _is(producer, *LINEAR):
                break
            passed = self.affine(producer)
            if passed is None and not _is(producer, "BatchNormalization"):
                return False
            value = producer.input[0] if passed is None else passed.data
        if not self.has_constant_weight(producer) or not self.fits(affine, producer, value):
            return False
        return not affine.shifts or producer.op_type != "MatMul" or len(self.shapes.get(value, ())) == 2

    def absorbed_forward(self, affine: _Affine, node: onnx.NodeProto) -> bool:
        """Say whether a linear operator after the node, behind a chain, can absorb it."""
        value = node.output[0]
        while True:
            if len(self.uses[value]) != 1 or value in self.outputs:
                return False
            consumer = self.uses[value][0]
            if consumer.input[0] == value and linear_type(consumer):
                break
            if self.affine(consumer) is None and not _is(consumer, "BatchNormalization"):
                return False
            value = consumer.output[0]
        if not self.has_constant_weight(consumer) or not self.fits(affine, consumer, value):
            return False
        kind = linear_type(consumer)
        return not affine.shifts or kind == "Gemm" or (kind == "Conv" and not _is_padded(consumer))

    def merges(self, affine: _Affine, node: onnx.NodeProto) -> bool:
        """Say whether the node is one with a neighbour: a batch norm, or an affine node of its kind before it."""
        value = affine.data
        if value in self.producers and len(self.uses[value]) == 1 and value not in self.outputs:
            before = self.producers[value]
            earlier = self.affine(before)
            if _is(before, "BatchNormalization"):
                return True
            if earlier is not None and (earlier.scales, earlier.shifts) == (affine.scales, affine.shifts):
                return True
        after = self.uses[node.output[0]]
        return len(after) == 1 and node.output[0] not in self.outputs and _is(after[0], "BatchNormalization")

    def has_constant_weight(self, node: onnx.NodeProto) -> bool:
        return len(node.input) > 1 and all(name in self.constants for name in node.input[1:] if name)

    def fits(self, affine: _Affine, linear: onnx.NodeProto, value: str) -> bool:
        """Say whether the constant lies along the channels, by axes counted from the right."""
        if affine.axis is None:
            return True
        if linear_type(linear) in ("Gemm", "MatMul"):
            return affine.axis == 1
        weight = self.shapes.get(linear.input[1])
        return weight is not None and affine.axis == len(weight) - 1


def linear_type(node: onnx.NodeProto) -> str | None:
    """Return the linear operator that a node is, or that it begins with."""
    if _is(node, *LINEAR):
        return node.op_type
    return FUSED.get(node.op_type) if node.domain == "com.microsoft" else None


def _is(node: onnx.NodeProto, *op_types: str) -> bool:
    return node.domain in STANDARD and node.op_type in op_types


def _is_padded(node: onnx.NodeProto) -> bool:
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return any(attributes.get("pads", ())) or attributes.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")


def _shapes(model: onnx.ModelProto) -> dict[str, Sequence[int]]:
    """Return the shapes of initializers, and what inference finds; unknown sizes are 0."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # operators of other domains, or beyond 2 GB: constants have shapes all the same
        graph = model.graph
    shapes: dict[str, Sequence[int]] = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*graph.value_info, *graph.input, *graph.output)
        if info.type.tensor_type.HasField("shape")
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        for item in node.attribute:
            if node.op_type == "Constant" and item.name == "value":
                shapes[node.output[0]] = list(item.t.dims)
    return shapes
