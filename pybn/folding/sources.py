"""Reading a node as the map that it is, and writing another map into it.

A batch norm in evaluation mode is an `Affine`, and so is an Add, Sub, Mul or Div with a constant of
one value per channel, or of one value altogether; also ``k - x`` and Neg, but not ``k / x``. Such
nodes are what is folded, and they also absorb: a batch norm takes any map that comes before or
after it, an Add takes a shift, a Mul a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from pybn.folding.affine import Affine, Array, Float64, is_supported, round_to
from pybn.folding.graph import AttributeNotConstant, Facts, attribute, standard_type, unavailable
from pybn.folding.reasons import FoldError, Reason, Refusal
from pybn.folding.steps import Rewrite, Rule, Step

# ONNX stores attributes as float32, so this is the epsilon of a batch norm that does not name one.
DEFAULT_EPSILON = float(np.float32(1e-5))

CHAIN_TYPES = ("Add", "Sub", "Mul", "Div", "Neg")


@dataclass(frozen=True)
class Source:
    """A node that computes ``affine(x)``.

    Attributes
    ----------
    node : ir.Node
        A BatchNormalization, or one of `CHAIN_TYPES`.
    affine : Affine
        The map.
    data : int
        The position of ``x`` among its inputs.
    """

    node: ir.Node
    affine: Affine
    data: int = 0

    @property
    def is_batch_norm(self) -> bool:
        """Whether it is a batch norm."""
        return self.node.op_type == "BatchNormalization"


def read(node: ir.Node, facts: Facts) -> Source | Refusal | None:
    """Read a node as a map; None if it is no kind of map at all."""
    if node not in facts.readings:
        facts.readings[node] = _read(node, facts)
    found: Source | Refusal | None = facts.readings[node]
    return found


def _read(node: ir.Node, facts: Facts) -> Source | Refusal | None:
    op_type = standard_type(node, facts.model)
    try:
        if op_type == "BatchNormalization":
            return _read_batch_norm(node, facts)
        # Before opset 7 these operators had another kind of broadcasting.
        if op_type in CHAIN_TYPES and facts.opset(node) >= 7:
            return _read_chain(node, facts)
    except FoldError as error:
        return Refusal(error.reason, str(error))
    except AttributeNotConstant as error:
        return Refusal(Reason.ATTRIBUTE_NOT_CONSTANT, f"{error} is a parameter of the local function")
    return None


def rule(node: ir.Node, facts: Facts, *, backward: bool) -> Rule | None:
    """Return the rule by which a node that is itself a map takes up another; None if it is none."""
    found = read(node, facts)
    if isinstance(found, Source):
        return absorb_after if backward else absorb_before
    if isinstance(found, Refusal) and node.op_type == "BatchNormalization":
        refusal = Refusal(found.reason, f"it meets another batch norm: {found.detail}")
        return lambda *_: refusal
    return None


def absorb_after(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """A map after a map, ``a (s x + t) + b``: a batch norm takes all of it, others what they can."""
    source = read(node, facts)
    assert isinstance(source, Source)
    apart = _axes_apart(source, affine)
    if apart is not None:
        return apart
    own, total = source.affine, source.affine.then(affine)
    if source.is_batch_norm:
        return Step((_batch_norm_with(source, total, facts),))
    if own.keeps_zero:
        # s x becomes a s (x + b / (a s)).
        scaled = _chain_with(source, total.only_scale(), facts)
        if affine.keeps_zero:
            return Step((scaled,))
        if not total.scale.all():
            return Refusal(Reason.SHIFT_STAYS, f"a channel of {node.op_type} is scaled to 0, and a shift would be lost")
        inner = _shift(total.shift / total.scale, total.axis)
        require_room(inner, facts.dtype(node.inputs[source.data]))
        return Step((scaled,), ((source.data, inner),))
    # t + s x, with s = 1 or -1, becomes (a t + b) + s (a x).
    shifted = Affine(np.broadcast_to(own.scale, total.scale.shape), total.shift, total.axis)
    return Step((_chain_with(source, shifted, facts),), ((source.data, affine.only_scale()),))


def absorb_before(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """A map before a map, ``s (a x + b) + t``."""
    source = read(node, facts)
    assert isinstance(source, Source)
    if index != source.data:
        return Refusal(Reason.NO_LINEAR_CONSUMER, f"it is a parameter of {node.op_type}")
    apart = _axes_apart(source, affine)
    if apart is not None:
        return apart
    own, total = source.affine, affine.then(source.affine)
    if source.is_batch_norm:
        return Step((_batch_norm_with(source, total, facts),))
    if own.keeps_zero:
        # (s a) x, and the shift s b travels on.
        return Step((_chain_with(source, total.only_scale(), facts),), ((0, _shift(total.shift, total.axis)),))
    # s (a x + b) + t, with s = 1 or -1, becomes a (s x + (s b + t) / a).
    if not affine.scale.all():
        return Refusal(Reason.SHIFT_STAYS, f"a scale of 0 cannot pass the shift of {node.op_type}")
    sign = np.broadcast_to(own.scale, total.scale.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # round_to reports what is not finite
        shifted = Affine(sign, total.shift / (sign * total.scale), total.axis)
    require_room(shifted, facts.dtype(node.inputs[index]))
    return Step((_chain_with(source, shifted, facts),), ((0, affine.only_scale()),))


# How large a shift may become in float16 on its way; the largest number is 65504.
MOST_SHIFT_FLOAT16 = 4096.0


def require_room(affine: Affine, dtype: np.dtype[Any] | None) -> None:
    """Raise FoldError if a shift that was divided by a scale may make data overflow that did not before."""
    largest = float(np.abs(affine.shift).max(initial=0.0))
    if (dtype is None or dtype.name == "float16") and not largest <= MOST_SHIFT_FLOAT16:
        raise FoldError(Reason.OUTSIDE_DTYPE, f"a shift would reach {largest:.4g} before it is scaled down, in float16")


def _axes_apart(source: Source, affine: Affine) -> Refusal | None:
    if None in (source.affine.axis, affine.axis) or source.affine.axis == affine.axis:
        return None
    return Refusal(
        Reason.AMBIGUOUS_BROADCAST,
        f"the constant of {source.node.op_type} is along axis {source.affine.axis}, the map along {affine.axis}",
    )


def _shift(shift: Float64, axis: int | None) -> Affine:
    return Affine(np.ones_like(shift), shift, axis)


@dataclass(frozen=True)
class Remainder:
    """A part of a map as an operator of its own: ``op_type(x, constant)``."""

    op_type: str
    constant: Array


def remainder(source: Source, affine: Affine, facts: Facts) -> Remainder:
    """Write a map that is only a scale or only a shift as the Mul or Add that takes a node's place.

    Raises
    ------
    FoldError
        If the constant overflows, or the type or rank of the data is unknown.
    """
    value = source.node.inputs[source.data]
    dtype, opset = facts.dtype(value), facts.opset(source.node)
    if opset < 7:
        raise FoldError(Reason.OLD_OPSET, f"Add and Mul of opset {opset} broadcast in another way")
    if dtype is None:
        raise FoldError(Reason.TYPE_MISMATCH, f"the type of {source.node.op_type}'s data is unknown")
    values = affine.shift if affine.keeps_scale else affine.scale
    constant = chain_constant(values, affine, facts.rank(value), dtype)
    return Remainder("Add" if affine.keeps_scale else "Mul", constant)


def chain_constant(values: Float64, affine: Affine, rank: int | None, dtype: np.dtype[Any]) -> Array:
    """Give one value per channel the shape in which it broadcasts against data of this rank."""
    rounded = round_to(values, dtype, "the folded constant")
    if affine.axis is None:
        return rounded.reshape(())
    if rank is None or rank <= affine.axis:
        raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of the data is unknown")
    shape = [1] * rank
    shape[affine.axis] = -1
    return rounded.reshape(shape)


def _read_batch_norm(node: ir.Node, facts: Facts) -> Source | Refusal:
    """Read a BatchNormalization as the affine map that it is in evaluation mode."""
    not_evaluation = _not_evaluation_mode(node, facts.opset(node))
    if not_evaluation is not None:
        return not_evaluation
    if facts.rank(node.inputs[0]) == 1:
        # Such data counts as one channel, and has no axis of channels.
        return Refusal(Reason.CHANNEL_AXIS, "its data has one axis only")
    epsilon = float(attribute(node, "epsilon", DEFAULT_EPSILON))
    arrays: list[Array] = []
    names = ("scale", "B", "input_mean", "input_var")
    inputs: list[ir.Value | None] = [*node.inputs, None, None, None, None]
    for what, value in zip(names, inputs[1:5], strict=True):
        array = facts.constant(value)
        if array is None:
            return unavailable(facts, value, what, parameter=True)
        if not is_supported(array.dtype):
            return Refusal(Reason.UNSUPPORTED_DTYPE, f"{what} is {array.dtype}")
        arrays.append(array)
    gamma, beta, mean, variance = arrays
    for what, array in zip(names, arrays, strict=True):
        if array.ndim != 1 or array.shape != gamma.shape:
            return Refusal(Reason.PARAMETER_SHAPE, f"{what} has shape {array.shape}, scale {gamma.shape}")
    return Source(node, Affine.from_batch_norm(mean, variance, gamma, beta, epsilon))


def _not_evaluation_mode(node: ir.Node, opset: int) -> Refusal | None:
    """Refuse what is not the evaluation mode of its opset; the operator changed at 7, 9 and 14."""
    if opset < 7 and not attribute(node, "is_test", 0):
        return Refusal(Reason.TRAINING_MODE, f"is_test is 0, which at opset {opset} means training mode")
    if opset >= 14 and attribute(node, "training_mode", 0):
        return Refusal(Reason.TRAINING_MODE, "training_mode is 1, so Y depends on the batch")
    extra = [output for output in node.outputs[1:] if output.name]
    if opset < 14 and extra:
        # Before opset 14 the number of outputs is the mode: more than Y means training.
        return Refusal(
            Reason.TRAINING_MODE,
            f"it has the output {extra[0].name!r}, which at opset {opset} means training mode",
        )
    used = [output for output in extra if output.uses() or output.is_graph_output()]
    if used:
        return Refusal(Reason.EXTRA_OUTPUTS, f"its output {used[0].name!r} is used")
    if opset < 9 and not attribute(node, "spatial", 1):
        return Refusal(Reason.SPATIAL_ZERO, "spatial=0 normalises every element by itself")
    return None


def _read_chain(node: ir.Node, facts: Facts) -> Source | Refusal | None:
    """Read an Add, Sub, Mul, Div or Neg of something computed and a constant."""
    if facts.constant(node.inputs[0]) is not None and len(node.inputs) == 1:
        return None
    if node.op_type == "Neg":
        return Source(node, Affine.everywhere(-1.0)) if facts.is_float(node.inputs[0]) else None
    arrays = [facts.constant(value) for value in node.inputs]
    if (arrays[0] is None) == (arrays[1] is None):
        return None
    data = 0 if arrays[0] is None else 1
    array = arrays[1 - data]
    assert array is not None
    if not is_supported(array.dtype) or (node.op_type == "Div" and data == 1):
        return None
    axis = _channel_axis(array, node.inputs[data], facts)
    if isinstance(axis, Refusal) or (axis is None and array.size != 1):
        return axis
    values = array.astype(np.float64).reshape(-1)
    if not np.isfinite(values).all() or (node.op_type == "Div" and not values.all()):
        return Refusal(Reason.NOT_FINITE, f"the constant of {node.op_type} makes NaN or infinite values")
    ones, zeros = np.ones_like(values), np.zeros_like(values)
    scale, shift = {
        "Add": (ones, values),
        "Sub": (ones, -values) if data == 0 else (-ones, values),
        "Mul": (values, zeros),
        "Div": (1.0 / np.where(values == 0, 1.0, values), zeros),
    }[node.op_type]
    return Source(node, Affine(scale, shift, axis), data)


def _channel_axis(array: Array, data: ir.Value | None, facts: Facts) -> int | Refusal | None:
    """Find the axis of the data that a constant is along; None: along none, or along several."""
    if array.ndim == 0 or array.size == 0:
        return None
    rank = facts.rank(data)
    name = data.name if data is not None else ""
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the rank of {name!r} is unknown")
    # Constants align with the data from the right: (C,) is along the last axis.
    along = [axis for axis, size in enumerate(array.shape, start=rank - array.ndim) if size != 1]
    if array.ndim > rank:
        return Refusal(
            Reason.AMBIGUOUS_BROADCAST, f"the constant has shape {array.shape}, but the data {name!r} only {rank} axes"
        )
    if not along:
        return None
    if len(along) > 1:
        return None
    size = facts.size(data, along[0])
    if size != array.size:
        # A single channel would be broadcast here, and what makes it has no place for several.
        return Refusal(
            Reason.CHANNEL_AXIS_UNPROVEN, f"axis {along[0]} of {name!r} is not proven to be {array.size} long"
        )
    return along[0]


def _batch_norm_with(source: Source, affine: Affine, facts: Facts) -> Rewrite:
    """Write a map into a batch norm; its statistics stay."""
    node = source.node
    gamma, beta, mean, variance = (facts.constant(value) for value in node.inputs[1:5])
    assert gamma is not None
    assert beta is not None
    assert mean is not None
    assert variance is not None
    data = facts.dtype(node.inputs[0])
    if data is not None and data.itemsize > min(gamma.itemsize, beta.itemsize):
        raise FoldError(Reason.NARROWER_TYPE, f"the parameters are {gamma.dtype}, the data {data}")
    epsilon = float(attribute(node, "epsilon", DEFAULT_EPSILON))
    total = affine.over(gamma.size, 1)
    with np.errstate(over="ignore", invalid="ignore"):  # round_to reports what is not finite
        scale = total.scale * np.sqrt(variance.astype(np.float64) + epsilon)
        shift = total.shift + total.scale * mean.astype(np.float64)
    return Rewrite(
        node,
        {
            1: round_to(scale, gamma.dtype, "the folded scale"),
            2: round_to(shift, beta.dtype, "the folded B"),
        },
    )


def _chain_with(source: Source, affine: Affine, facts: Facts) -> Rewrite:
    """Write a map that is only a scale, or only a shift of x or -x, into an operator with a constant."""
    node, data = source.node, source.data
    old = facts.constant(node.inputs[1 - data]) if len(node.inputs) > 1 else None
    dtype = facts.dtype(node.inputs[data]) if old is None else old.dtype
    if dtype is None:
        raise FoldError(Reason.TYPE_MISMATCH, f"the type of {node.op_type}'s data is unknown")
    if affine.keeps_zero:
        op_type, values = "Mul", affine.scale
    elif affine.keeps_scale:
        op_type, values = "Add", affine.shift
    else:
        assert data == 1  # -x + t is written with its constant first
        op_type, values = "Sub", affine.shift
    if old is not None and old.size == values.size:
        constant = round_to(values, dtype, "the folded constant").reshape(old.shape)
    else:
        constant = chain_constant(values, affine, facts.rank(node.inputs[data]), dtype)
    return Rewrite(node, {1 - data: constant}, op_type)
