"""One function per operator: how an affine map that comes after it passes backward through it.

A rule is given the node and the map that follows its first output. It answers with a `Step`
(what becomes of the node, and which map is left for the producer of one of its inputs) or with a
`Refusal`. To teach pybn another operator, write its rule and add it to `BACKWARD`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from pybn.folding.affine import Affine, Array, Float64, is_supported, round_to
from pybn.folding.graph import Facts, attribute, unavailable
from pybn.folding.reasons import Reason, Refusal
from pybn.folding.weights import map_bias, scale_axis, scale_transposed_conv


@dataclass(frozen=True)
class Rewrite:
    """What becomes of one node: new constants, by input position, and its new form."""

    node: ir.Node
    constants: Mapping[int, Array]
    op_type: str
    dropped_attributes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One step of a map backward through the graph.

    Attributes
    ----------
    rewrite : Rewrite or None
        None if the node stays as it is.
    carry : Affine or None
        The map left for the producer of the node's data input; None if nothing is left.
    """

    rewrite: Rewrite | None
    carry: Affine | None


Rule = Callable[[ir.Node, Affine, Facts], Step | Refusal]


def data_input(node: ir.Node, facts: Facts) -> int:
    """Return which input of a node of the table holds the data, the others being constants."""
    constant_first = len(node.inputs) == 2 and facts.constant(node.inputs[0]) is not None
    if node.op_type == "Add" and constant_first and facts.constant(node.inputs[1]) is None:
        return 1
    return 0


def conv(node: ir.Node, affine: Affine, facts: Facts) -> Step | Refusal:
    """Conv: ``W' = a[o] W``, ``c' = a c + b``. Groups divide the inputs, so they do not matter."""
    operands = _weight_and_bias(node, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, bias = operands
    mismatch = _channel_mismatch(affine, weight.shape[0], bias)
    if mismatch is not None:
        return mismatch
    return _absorb(node, affine, weight, scale_axis(weight, affine.scale, 0), bias)


def conv_transpose(node: ir.Node, affine: Affine, facts: Facts) -> Step | Refusal:
    """ConvTranspose: as Conv, with the output channels numbered group by group along axis 1."""
    operands = _weight_and_bias(node, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, bias = operands
    groups = int(attribute(node, "group", 1))
    if groups < 1 or weight.shape[0] % groups:
        return Refusal(Reason.PARAMETER_SHAPE, f"group={groups} does not divide the weight")
    mismatch = _channel_mismatch(affine, weight.shape[1] * groups, bias)
    if mismatch is not None:
        return mismatch
    scaled = scale_transposed_conv(weight, affine.scale, groups)
    return _absorb(node, affine, weight, scaled, bias)


def gemm(node: ir.Node, affine: Affine, facts: Facts) -> Step | Refusal:
    """Gemm, ``alpha A B + beta C``: ``B' = a B``, ``C' = a beta C + b``, and beta becomes 1."""
    operands = _weight_and_bias(node, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, bias = operands
    if weight.ndim != 2 or (bias is not None and bias.ndim > 2):
        return Refusal(Reason.PARAMETER_SHAPE, "the weight or bias of Gemm has the wrong rank")
    output_axis = 0 if attribute(node, "transB", 0) else 1
    beta = float(attribute(node, "beta", 1.0))
    features = weight.shape[output_axis]
    if features != affine.scale.size or (bias is not None and bias.shape[-1:] not in ((), (1,), (features,))):
        return _wrong_channels(affine, features)
    scaled = scale_axis(weight, affine.scale, output_axis)
    return _absorb(node, affine, weight, scaled, bias, gain=beta, dropped_attributes=("beta",))


def matmul(node: ir.Node, affine: Affine, facts: Facts) -> Step | Refusal:
    """MatMul with a constant right operand: ``B' = a B``; a shift needs the bias that Gemm has."""
    operands = _weight_and_bias(node, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, _ = operands
    data = node.inputs[0]
    shape = None if data is None else facts.shape(data)
    if shape is None:
        return Refusal(
            Reason.CHANNEL_AXIS_UNPROVEN,
            f"the rank of MatMul's left operand {_name(data)} is unknown",
        )
    # The product has its features last. They are the channels, at axis 1, only in a matrix.
    if len(shape) != 2 or weight.ndim != 2:
        rank = max(len(shape), weight.ndim)
        return Refusal(
            Reason.CHANNEL_AXIS,
            f"MatMul has rank {rank} and its features in the last axis, "
            f"but the channels of the batch norm are in axis {affine.axis}",
        )
    if weight.shape[1] != affine.scale.size:
        return _wrong_channels(affine, weight.shape[1])
    scaled = scale_axis(weight, affine.scale, 1)
    op_type = "Gemm" if affine.shift.any() else "MatMul"
    return _absorb(node, affine, weight, scaled, None, op_type=op_type)


def add(node: ir.Node, affine: Affine, facts: Facts) -> Step | Refusal:
    """Add of a constant ``k``: ``a (x + k) + b = a x + (a k + b)``; only a scale travels on."""
    data_index = data_input(node, facts)
    data, other = node.inputs[data_index], node.inputs[1 - data_index]
    constant = facts.constant(other)
    if constant is None:
        return unavailable(facts, other, "the other operand of Add", parameter=False)
    if not is_supported(constant.dtype):
        return _unsupported(constant, "the constant of Add")
    shape = None if data is None else facts.shape(data)
    if shape is None or len(shape) <= affine.axis:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the shape of Add's operand {_name(data)} is unknown")
    channels = affine.scale.size
    if shape[affine.axis] != channels:
        # A single channel would be broadcast here, and the producer has no place for the scale.
        return Refusal(
            Reason.CHANNEL_AXIS_UNPROVEN,
            f"axis {affine.axis} of Add's operand {_name(data)} is not proven to be {channels}",
        )
    # Constants align with the data from the right: (C,) is the last axis, not the channels.
    along_channels = [1] * len(shape)
    along_channels[affine.axis] = channels
    aligned = (1,) * (len(shape) - constant.ndim) + constant.shape
    is_scalar = constant.size == 1 and constant.ndim <= len(shape)
    if not is_scalar and aligned != tuple(along_channels):
        return Refusal(
            Reason.AMBIGUOUS_BROADCAST,
            f"the constant of Add has shape {constant.shape}, which is not one value per channel",
        )
    mapped = map_bias(np.broadcast_to(constant.reshape(-1), (channels,)), affine)
    rounded = round_to(mapped, constant.dtype, "the folded constant")
    rewrite = Rewrite(node, {1 - data_index: rounded.reshape(along_channels)}, node.op_type)
    return Step(rewrite, affine.without_shift())


def identity(node: ir.Node, affine: Affine, facts: Facts) -> Step | Refusal:
    """Identity: every map passes."""
    return Step(None, affine)


def dropout(node: ir.Node, affine: Affine, facts: Facts) -> Step | Refusal:
    """Dropout in evaluation mode is the identity."""
    # Since opset 12 the mode is an input; from 7 to 11 the operator is for inference only.
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is not None:
        value = facts.constant(mode)
        if value is None or value.size != 1 or bool(value.reshape(-1)[0]):
            return Refusal(Reason.DROPOUT_TRAINING, "Dropout is, or may be, in training mode")
    return Step(None, affine)


BACKWARD: dict[str, Rule] = {
    "Add": add,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Dropout": dropout,
    "Gemm": gemm,
    "Identity": identity,
    "MatMul": matmul,
}


def _weight_and_bias(node: ir.Node, facts: Facts) -> tuple[Array, Array | None] | Refusal:
    """Read inputs 1 and 2. An absent bias is a missing input, or one with an empty name."""
    inputs: list[ir.Value | None] = [*node.inputs, None, None]
    weight = facts.constant(inputs[1])
    if weight is None:
        return unavailable(facts, inputs[1], f"the weight of {node.op_type}", parameter=False)
    if not is_supported(weight.dtype):
        return _unsupported(weight, f"the weight of {node.op_type}")
    if weight.ndim < 2:
        return Refusal(Reason.PARAMETER_SHAPE, f"the weight of {node.op_type} is not a matrix")
    if inputs[2] is None:
        return weight, None
    bias = facts.constant(inputs[2])
    if bias is None:
        return unavailable(facts, inputs[2], f"the bias of {node.op_type}", parameter=False)
    if bias.dtype != weight.dtype:
        return Refusal(Reason.TYPE_MISMATCH, f"the weight is {weight.dtype} but the bias is {bias.dtype}")
    return weight, bias


def _absorb(
    node: ir.Node,
    affine: Affine,
    weight: Array,
    scaled: Float64,
    bias: Array | None,
    *,
    gain: float = 1.0,
    op_type: str | None = None,
    dropped_attributes: tuple[str, ...] = (),
) -> Step:
    """Make the step in which a linear operator takes up the whole map."""
    constants = {1: round_to(scaled, weight.dtype, "the folded weight")}
    if bias is not None or affine.shift.any():
        mapped = map_bias(bias, affine, gain)
        constants[2] = round_to(mapped, weight.dtype, "the folded bias")
    return Step(Rewrite(node, constants, op_type or node.op_type, dropped_attributes), None)


def _channel_mismatch(affine: Affine, channels: int, bias: Array | None) -> Refusal | None:
    if channels != affine.scale.size or (bias is not None and bias.shape != (channels,)):
        return _wrong_channels(affine, channels)
    return None


def _wrong_channels(affine: Affine, channels: int) -> Refusal:
    return Refusal(
        Reason.PARAMETER_SHAPE,
        f"the batch norm has {affine.scale.size} channels, the operator or its bias {channels}",
    )


def _unsupported(array: Array, what: str) -> Refusal:
    return Refusal(Reason.UNSUPPORTED_DTYPE, f"{what} is {array.dtype}")


def _name(value: Any) -> str:
    return repr(value.name) if value is not None and value.name else "(unnamed)"
