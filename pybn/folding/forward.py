"""One function per operator: how a map that comes before it passes forward through it.

The operator was given ``a x + b`` at one input and is to be given ``x`` there. Linear operators
absorb the map into their weights. Others let it pass: what they make of ``x`` is then followed by a
map again. `steps` says what a rule may rely on. To teach pybn another operator, write its rule and
add it to `FORWARD`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from pybn.folding import axes, backward
from pybn.folding.affine import Affine, Array, Float64, is_supported, require_size, round_to
from pybn.folding.graph import Facts, attribute, input_of, unavailable
from pybn.folding.reasons import Reason, Refusal
from pybn.folding.sources import chain_constant
from pybn.folding.steps import AttributeValue, Insert, Rewrite, Rule, Step
from pybn.folding.weights_forward import (
    Window,
    absorb_conv,
    absorb_conv_transpose,
    absorb_matrix,
    conv_reach,
    conv_transpose_reach,
    data_share,
    same_padding,
)

# ONNX stores attributes as float32, so this is the slope of a LeakyRelu that does not name one.
DEFAULT_SLOPE = float(np.float32(0.01))

# Since these opsets the bias of Gemm broadcasts as in NumPy, and Max and Min take bfloat16.
BROADCASTING_GEMM = 7
BFLOAT16_MAX = 13

# Since this opset SAME means that the output of ConvTranspose is as many times longer as its stride says.
TRANSPOSED_SAME = 11

# Since opset 11 the bounds of Clip are inputs, since 12 it takes every type that Relu does but bfloat16, since 13 all.
CLIP_WITH_INPUTS = {"Clip": 11, "Relu": 13}


# Linear operators


def conv(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Conv: ``W'[o, i] = a[i] W[o, i]``, ``c' = c + sum W b``, or a map of the borders if it is padded."""
    operands = _kernel_and_groups(node, index, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, groups = operands
    affine = affine.over(weight.shape[1] * groups, 1)
    reaches = _conv_reaches(node, weight.shape[2:], affine, facts)
    if isinstance(reaches, Refusal):
        return reaches
    scaled, added = absorb_conv(weight, affine, groups, reaches)
    return _with_added(node, _scaled_weight(weight, scaled, affine), weight, added, facts)


def conv_transpose(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """ConvTranspose: as Conv; it is as if padded with zeros, so a shift needs a map of the output."""
    operands = _kernel_and_groups(node, index, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, groups = operands
    affine = affine.over(weight.shape[0], 1)
    reaches = _conv_transpose_reaches(node, weight.shape[2:], affine, facts)
    if isinstance(reaches, Refusal):
        return reaches
    scaled, added = absorb_conv_transpose(weight, affine, groups, reaches)
    return _with_added(node, _scaled_weight(weight, scaled, affine), weight, added, facts)


def _conv_reaches(node: ir.Node, kernel: Sequence[int], affine: Affine, facts: Facts) -> list[Float64] | Refusal:
    if affine.keeps_zero:  # whatever is padded
        return [conv_reach(Window(taps), None) for taps in kernel]
    windows = _windows(node, kernel, facts)
    if isinstance(windows, Refusal):
        return windows
    sizes = _spatial_sizes(node.inputs[0], len(kernel), facts)
    for axis, window in enumerate(windows):
        if window.is_padded and sizes[axis] is None:
            return _unknown_border(node, axis)
    return [conv_reach(window, size) for window, size in zip(windows, sizes, strict=True)]


def _conv_transpose_reaches(
    node: ir.Node, kernel: Sequence[int], affine: Affine, facts: Facts
) -> list[Float64] | Refusal:
    if affine.keeps_zero:
        return [conv_reach(Window(taps), None) for taps in kernel]
    rank = len(kernel)
    geometry = _geometry(node, kernel)
    if isinstance(geometry, Refusal):
        return geometry
    strides, dilations, pads = geometry
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    wanted = attribute(node, "output_shape", None)
    more = [int(number) for number in attribute(node, "output_padding", [0] * rank)]
    if len(more) != rank or (wanted is not None and len(wanted) != rank):
        return _contradiction(node)
    if auto_pad.startswith("SAME") and facts.opset(node) < TRANSPOSED_SAME:
        return Refusal(Reason.OLD_OPSET, f"ConvTranspose of opset {facts.opset(node)} does not say what SAME means")
    reaches = []
    for axis, size in enumerate(_spatial_sizes(node.inputs[0], rank, facts)):
        window = Window(int(kernel[axis]), strides[axis], dilations[axis])
        is_free = auto_pad in ("NOTSET", "", "VALID") and wanted is None
        if is_free and auto_pad != "VALID":
            window = replace(window, begin=pads[axis], end=pads[rank + axis])
        if is_free and window == Window(1) and not more[axis]:  # nothing happens along this axis
            reaches.append(np.ones((1, 1)))
            continue
        if size is None:
            return _unknown_border(node, axis)
        if not is_free:
            outputs = size * window.stride if wanted is None else int(wanted[axis])
            cut = window.stride * (size - 1) + more[axis] + window.extent - outputs
            if cut < 0 or cut % 2:
                return Refusal(Reason.PADDING, "runtimes differ in where ConvTranspose loses an odd number of outputs")
            window = replace(window, begin=cut // 2, end=cut // 2)
        reaches.append(conv_transpose_reach(window, size, more[axis]))
    return reaches


def gemm(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Gemm, ``alpha A B + beta C``: ``B' = a B``, ``C' = beta C + alpha b^T B``, and beta becomes 1."""
    weight = _weight(node, index, facts)
    if isinstance(weight, Refusal):
        return weight
    if weight.ndim != 2:
        return _wrong_weight(node, weight)
    axis = 1 if attribute(node, "transB", 0) else 0
    affine = affine.over(weight.shape[axis], 0 if attribute(node, "transA", 0) else 1)
    scaled, added = absorb_matrix(weight, affine, axis)
    constants = _scaled_weight(weight, scaled, affine)
    if not added.any():
        return Step((Rewrite(node, constants),))
    if facts.opset(node) < BROADCASTING_GEMM:
        return Refusal(Reason.OLD_OPSET, f"Gemm of opset {facts.opset(node)} broadcasts its bias in another way")
    bias = backward.bias_of(node, weight, facts)
    if isinstance(bias, Refusal):
        return bias
    if not backward.is_per_channel(bias, added.size) or (bias is not None and bias.ndim > 2):
        return backward.wrong_bias(node, bias)
    total = float(attribute(node, "alpha", 1.0)) * added
    if bias is not None:
        total = float(attribute(node, "beta", 1.0)) * bias.astype(np.float64) + total
    constants[2] = round_to(total, weight.dtype, "the folded bias")
    return Step((Rewrite(node, constants, attributes={"beta": None}),))


def matmul(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """MatMul with a constant matrix: ``W' = a W``; the shift ``b W`` travels on, to the Add of a linear layer."""
    weight = _weight(node, index, facts)
    if isinstance(weight, Refusal):
        return weight
    rank = facts.rank(node.inputs[0])
    if weight.ndim != 2 or (rank is not None and rank < 2):
        return _wrong_weight(node, weight)
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of MatMul's left operand is unknown")
    affine = affine.over(weight.shape[0], rank - 1)
    scaled, added = absorb_matrix(weight, affine, 0)
    constants = _scaled_weight(weight, scaled, affine)
    if not added.any():
        return Step((Rewrite(node, constants),))
    bias = round_to(added, weight.dtype, "the folded bias")
    if rank == 2 and facts.opset(node) >= BROADCASTING_GEMM:
        otherwise = Step((Rewrite(node, {**constants, 2: bias}, op_type="Gemm"),))
    else:
        otherwise = Step((Rewrite(node, constants, after=(Insert("Add", (bias,)),)),))
    onward = Affine(np.ones_like(added), added, rank - 1)
    return Step((Rewrite(node, constants),), ((0, onward),), otherwise=otherwise)


# Activations


def relu(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Relu: a positive scale passes; any map does if Relu becomes Max, or Min where the scale is negative."""
    if affine.keeps_zero and (affine.scale >= 0).all():
        return Step(carries=((0, affine),))
    return _bounded(node, affine, 0.0, math.inf, facts)


def clip(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Clip: with bounds mapped back, as long as they are the same for every channel; else Max and Min."""
    if index != 0:
        return _not_data(node)
    bounds = _clip_bounds(node, facts)
    if isinstance(bounds, Refusal):
        return bounds
    return _bounded(node, affine, *bounds, facts)


def leaky_relu(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """LeakyRelu: a positive scale passes; a channel of scale 0 is a constant."""
    slope = float(attribute(node, "alpha", DEFAULT_SLOPE))
    value = np.where(affine.shift >= 0, affine.shift, slope * affine.shift)
    return _positive_scale_only(
        node, Affine(affine.scale, np.where(affine.scale == 0, value, affine.shift), affine.axis)
    )


def prelu(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """PRelu: a positive scale passes, whatever the slopes; a channel of scale 0 if it is not negative."""
    if index != 0:
        return _not_data(node)
    if ((affine.scale == 0) & (affine.shift < 0)).any():
        return Refusal(Reason.SHIFT_STAYS, "a negative constant channel does not pass PRelu")
    return _positive_scale_only(node, affine)


def _positive_scale_only(node: ir.Node, affine: Affine) -> Step | Refusal:
    if (affine.scale < 0).any():
        return Refusal(Reason.NEGATIVE_SCALE, f"only positive scales pass {node.op_type}")
    if affine.shift[affine.scale != 0].any():
        return Refusal(Reason.SHIFT_STAYS, f"only a scale passes {node.op_type}")
    return Step(carries=((0, affine),))


def _bounded(node: ir.Node, affine: Affine, low: float, high: float, facts: Facts) -> Step | Refusal:
    """Pass a clamp to ``[low, high]``: ``clamp(a x + b) = a clamp'(x) + b``, the bounds mapped back by the map.

    Where ``a < 0`` the bounds change places; where ``a = 0`` the output is a constant.
    """
    dtype = facts.dtype(node.inputs[0])
    if dtype is None or not is_supported(dtype):
        return Refusal(Reason.TYPE_MISMATCH, f"the type of {node.op_type}'s data is unknown")
    largest = float(ir.DataType.from_numpy(dtype).max)
    negative, constant = affine.scale < 0, affine.scale == 0
    with np.errstate(over="ignore"):  # beyond what the type can hold is dealt with below
        divisor = np.where(constant, 1.0, affine.scale)
        from_low, from_high = (low - affine.shift) / divisor, (high - affine.shift) / divisor
    lower, upper = np.where(negative, from_high, from_low), np.where(negative, from_low, from_high)
    # A bound that no number of the type reaches leaves a constant on one side, and is none on the other.
    always_lower, always_upper = ~constant & (lower > largest), ~constant & (upper < -largest)
    scale = np.where(always_lower | always_upper, 0.0, affine.scale)
    shift = np.where(constant, np.clip(affine.shift, low, high), affine.shift)
    shift = np.where(always_lower, np.where(negative, high, low), shift)
    shift = np.where(always_upper, np.where(negative, low, high), shift)
    onward = Affine(scale, shift, affine.axis)
    # A constant channel needs no bounds.
    lower = np.where(scale == 0, -largest, np.clip(lower, -largest, largest))
    upper = np.where(scale == 0, largest, np.clip(upper, -largest, largest))
    return _clamp(node, onward, lower, upper, largest, dtype, facts)


def _clamp(
    node: ir.Node, onward: Affine, lower: Float64, upper: Float64, largest: float, dtype: np.dtype[Any], facts: Facts
) -> Step | Refusal:
    """Make a Relu or Clip one with these bounds per channel."""
    lower, upper = (round_to(bound, dtype, "a bound").astype(np.float64) for bound in (lower, upper))
    carries = ((0, onward),)
    opset = facts.opset(node)
    # Max and Min take the data and one constant, Clip up to two, which have to go.
    rest = dict.fromkeys(range(1, len(node.inputs)))
    without_bounds: dict[str, AttributeValue] = {name: None for name in ("min", "max") if name in node.attributes}
    needed = [
        (op_type, bound)
        for op_type, bound, absent in (("Max", lower, -largest), ("Min", upper, largest))
        if (bound != absent).any()
    ]
    if not needed:
        if not onward.scale.any():  # all channels are constants
            return Step(carries=carries)
        return Step((Rewrite(node, rest, op_type="Identity", attributes=without_bounds),), carries)
    if opset >= CLIP_WITH_INPUTS[node.op_type] and all((bound == bound[0]).all() for _, bound in needed):
        bounds = {{"Max": 1, "Min": 2}[op_type]: np.asarray(bound[0], dtype) for op_type, bound in needed}
        return Step((Rewrite(node, {**rest, **bounds}, op_type="Clip"),), carries)
    if opset < BFLOAT16_MAX and dtype.name == "bfloat16":
        return Refusal(Reason.OLD_OPSET, f"{needed[0][0]} of opset {opset} does not take bfloat16")
    rank = facts.rank(node.inputs[0])
    (op_type, constant), *more = ((kind, chain_constant(bound, onward, rank, dtype)) for kind, bound in needed)
    after = tuple(Insert(other, (bound,)) for other, bound in more)
    rewrite = Rewrite(node, {**rest, 1: constant}, op_type=op_type, attributes=without_bounds, after=after)
    return Step((rewrite,), carries, extra=1)


def _clip_bounds(node: ir.Node, facts: Facts) -> tuple[float, float] | Refusal:
    """Read the bounds, which are attributes before opset 11 and inputs since."""
    bounds = []
    for position, (name, absent) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        value = input_of(node, position)
        if value is None:
            bounds.append(float(attribute(node, name, absent)))
            continue
        constant = facts.constant(value)
        if constant is None:
            return unavailable(facts, value, "a bound of Clip", parameter=False)
        if constant.size != 1:
            return Refusal(Reason.PARAMETER_SHAPE, f"a bound of Clip has shape {constant.shape}")
        bounds.append(float(constant.reshape(())))
    low, high = bounds
    if not low <= high:  # nor if one is NaN
        return Refusal(Reason.NOT_FINITE, f"the bounds of Clip are {low} and {high}")
    return low, high


# Pooling and resampling: averages of the data with weights that sum to 1, or the largest of it


def max_pool(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """MaxPool: ``max(a x + b) = a max(x) + b`` for ``a >= 0``. Its padding is smaller than any data."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return Refusal(Reason.EXTRA_OUTPUTS, "the indices that MaxPool returns are used")
    if (affine.scale < 0).any():
        return Refusal(Reason.NEGATIVE_SCALE, "MaxPool keeps the order only of positive scales")
    return _over_windows(node, affine)


def average_pool(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """AveragePool: every map passes; if it counts its padding, which stays 0, a shift needs a map of the borders."""
    if not attribute(node, "count_include_pad", 0) or affine.keeps_zero:
        return _over_windows(node, affine)
    windows = _windows(node, attribute(node, "kernel_shape", ()), facts)
    if isinstance(windows, Refusal):
        return windows
    if attribute(node, "ceil_mode", 0):
        # Implementations differ in whether they count what lies beyond the padding.
        return Refusal(Reason.PADDING, "AveragePool rounds its size up and counts its padding")
    if not any(window.is_padded for window in windows):
        return _over_windows(node, affine)
    if affine.shift[affine.scale == 0].any():
        return Refusal(Reason.SHIFT_STAYS, "a constant channel does not pass the padding of AveragePool")
    passed = _over_windows(node, affine)
    dtype, channels = facts.dtype(node.inputs[0]), facts.size(node.inputs[0], 1)
    if isinstance(passed, Refusal):
        return passed
    if dtype is None or not is_supported(dtype) or channels is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the type or channels of AveragePool's data are unknown")
    sizes = _spatial_sizes(node.inputs[0], len(windows), facts)
    unknown = [axis for axis, window in enumerate(windows) if window.is_padded and sizes[axis] is None]
    if unknown:
        return _unknown_border(node, unknown[0])
    # a (avg(x) + share b / a), where share is how much of a window is data.
    affine = affine.over(channels, 1)
    added = affine.shift / np.where(affine.scale == 0, 1.0, affine.scale)
    for window, size in zip(windows, sizes, strict=True):
        share = data_share(window, size)
        require_size(added.size * share.size, "the map of the borders")
        added = np.multiply.outer(added, share)
    border = round_to(added[None], dtype, "the map of the borders")
    return Step((Rewrite(node, after=(Insert("Add", (border,)),)),), ((0, affine.only_scale()),))


def reduce_mean(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """ReduceMean: every map passes, unless the mean is over its channels."""
    if index != 0:
        return _not_data(node)
    moved = _after_reduction(node, affine, facts)
    return moved if isinstance(moved, Refusal) else Step(carries=((0, moved),))


def reduce_max(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """ReduceMax and ReduceMin: as ReduceMean, for ``a >= 0``."""
    if (affine.scale < 0).any():
        return Refusal(Reason.NEGATIVE_SCALE, f"{node.op_type} keeps the order only of positive scales")
    return reduce_mean(node, index, affine, facts)


def _after_reduction(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    """Find the channel axis among those that the reduction leaves."""
    if affine.axis is None:
        return affine
    rank = facts.rank(node.inputs[0])
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the rank of {node.op_type}'s data is unknown")
    reduced = backward.reduced_axes(node, rank, facts)
    if affine.axis in reduced:
        return Refusal(Reason.CHANNEL_AXIS, f"{node.op_type} is over axis {affine.axis}, which holds the channels")
    removed = 0 if attribute(node, "keepdims", 1) else sum(axis < affine.axis for axis in reduced)
    return affine.along(affine.axis - removed)


def _over_windows(node: ir.Node, affine: Affine) -> Step | Refusal:
    """Pass a map over the channels of a pooling operator, if there is data in every window."""
    if affine.axis not in (None, 0, 1):
        return _wrong_axis(node, affine)
    kernels = attribute(node, "kernel_shape", ())
    geometry = _geometry(node, kernels)
    if isinstance(geometry, Refusal):
        return geometry
    strides, dilations, pads = geometry
    for axis, kernel in enumerate(kernels):
        begin, end = pads[axis], pads[len(kernels) + axis]
        # A dilated kernel may hold the data between two of its taps, and one that is rounded up may begin after it.
        skips = dilations[axis] > 1 and (
            begin or end or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        )
        beyond = begin >= kernel or end >= kernel or (attribute(node, "ceil_mode", 0) and end + strides[axis] > kernel)
        if skips or beyond:
            return Refusal(Reason.PADDING, f"a window of {node.op_type} may hold nothing but padding")
    return Step(carries=((0, affine),))


# Joining and cutting


def concat(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Concat along the channels: the map goes on over those of this operand, and the others stay as they are."""
    rank = facts.rank(node.outputs[0])
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of Concat's result is unknown")
    axis = int(attribute(node, "axis", 1)) % rank
    if affine.axis not in (None, axis):
        return Refusal(Reason.CHANNEL_AXIS, f"Concat joins along axis {axis}, the channels are in axis {affine.axis}")
    sizes = [facts.size(value, axis) for value in node.inputs]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "not all operands of Concat have a known number of channels")
    parts = [affine if position == index else Affine.everywhere(1.0) for position in range(len(sizes))]
    return Step(carries=((0, Affine.joined(parts, known, axis)),))


def split(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Split along the channels: each output gets its part of the map."""
    if index != 0:
        return _not_data(node)
    rank = facts.rank(node.inputs[0])
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of Split's data is unknown")
    axis = int(attribute(node, "axis", 0)) % rank
    if affine.axis != axis:
        return Step(carries=tuple((position, affine) for position in range(len(node.outputs))))
    sizes = [facts.size(output, axis) for output in node.outputs]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or sum(known) != affine.scale.size:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the outputs of Split are not known to share the channels")
    parts = (affine.part(sum(known[:at]), sum(known[: at + 1])) for at in range(len(known)))
    return Step(carries=tuple(enumerate(parts)))


def slice_(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Slice: the map is cut as the data is."""
    if index != 0:
        return _not_data(node)
    if affine.axis is None:
        return Step(carries=((0, affine),))
    rank, channels = facts.rank(node.inputs[0]), affine.scale.size
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of Slice's data is unknown")
    cut = backward.slices(node, rank, facts).get(affine.axis)
    if cut is None:
        return Step(carries=((0, affine),))
    kept = Affine(affine.scale[cut], affine.shift[cut], affine.axis)
    if facts.size(node.inputs[0], affine.axis) != channels or kept.scale.size == 0:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"which of the {channels} channels Slice takes is not proven")
    return Step(carries=((0, kept),))


def add(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Add and Sub of two operands: a shift of one is a shift of the result."""
    if not affine.keeps_scale:
        return Refusal(Reason.NO_LINEAR_CONSUMER, f"only a shift of one operand passes {node.op_type}")
    if node.op_type == "Sub" and index == 1:
        affine = Affine(affine.scale, -affine.shift, affine.axis)
    if affine.axis is None:
        return Step(carries=((0, affine),))
    rank, result_rank = facts.rank(node.inputs[index]), facts.rank(node.outputs[0])
    if rank is None or result_rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the ranks of {node.op_type}'s operands are unknown")
    axis = affine.axis + result_rank - rank
    if facts.size(node.outputs[0], axis) != affine.scale.size:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"axis {axis} of {node.op_type} is not proven to be the channels")
    return Step(carries=((0, affine.along(axis)),))


def cast(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Cast to a wider float type: every map passes."""
    before, after = facts.dtype(node.inputs[0]), facts.dtype(node.outputs[0])
    if before is None or after is None:
        return Refusal(Reason.TYPE_MISMATCH, "the types of Cast are unknown")
    if before.name not in backward.HOLDS.get(after.name, ()):
        # What comes before a map may be far larger than what comes after it.
        return Refusal(Reason.NARROWER_TYPE, f"Cast goes from {before.name} to {after.name}")
    return Step(carries=((0, affine),))


def _either_way(rule: Rule) -> Rule:
    """Make a forward rule of a backward one that leaves the node and the map as they are."""

    def forward(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
        return rule(node, 0, affine, facts) if index == 0 else _not_data(node)

    return forward


FORWARD: dict[str, Rule] = {
    "Add": add,
    "AveragePool": average_pool,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Dropout": _either_way(backward.dropout),
    "Gemm": gemm,
    "GlobalAveragePool": _either_way(backward.global_average_pool),
    "GlobalMaxPool": _either_way(backward.max_pool),
    "Identity": _either_way(backward.same),
    "LeakyRelu": leaky_relu,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "PRelu": prelu,
    "Pad": _either_way(backward.pad),
    "ReduceMax": reduce_max,
    "ReduceMean": reduce_mean,
    "ReduceMin": reduce_max,
    "Relu": relu,
    "Resize": _either_way(backward.resize),
    "Slice": slice_,
    "Split": split,
    "Sub": add,
    "Upsample": _either_way(backward.resize),
    **axes.FORWARD,
}


# Reading nodes


def _weight(node: ir.Node, index: int, facts: Facts) -> Array | Refusal:
    """Read the weight of a linear operator whose data is its first input."""
    if index != 0:
        return _not_data(node)
    return backward.weight_of(node, facts)


def _kernel_and_groups(node: ir.Node, index: int, facts: Facts) -> tuple[Array, int] | Refusal:
    """Read the weight and the number of groups of a convolution; the groups divide the weight's first axis."""
    weight = _weight(node, index, facts)
    if isinstance(weight, Refusal):
        return weight
    groups = int(attribute(node, "group", 1))
    if weight.ndim < 3 or groups < 1 or weight.shape[0] % groups:
        return _wrong_weight(node, weight)
    return weight, groups


def _scaled_weight(weight: Array, scaled: Float64, affine: Affine) -> dict[int, Array]:
    """Round the scaled weight; one that stays as it is also stays shared with whoever else uses it."""
    return {} if affine.keeps_scale else {1: round_to(scaled, weight.dtype, "the folded weight")}


def _with_added(
    node: ir.Node, constants: dict[int, Array], weight: Array, added: Float64, facts: Facts
) -> Step | Refusal:
    """Give a convolution its new weight, and what is to be added to its output: a bias or a map."""
    if not added.any():
        return Step((Rewrite(node, constants),))
    if added.size > added.shape[0]:
        sizes = _spatial_sizes(node.outputs[0], added.ndim - 1, facts)
        if any(size > 1 and known not in (None, size) for size, known in zip(added.shape[1:], sizes, strict=True)):
            return Refusal(Reason.PADDING, f"the output of {node.op_type} has another size than its padding makes")
        border = round_to(added[None], weight.dtype, "the map of the borders")
        return Step((Rewrite(node, constants, after=(Insert("Add", (border,)),)),))
    bias = backward.bias_of(node, weight, facts)
    if isinstance(bias, Refusal):
        return bias
    total = added.reshape(-1)
    if bias is not None:
        if bias.shape != total.shape:
            return backward.wrong_bias(node, bias)
        total = total + bias.astype(np.float64)
    return Step((Rewrite(node, {**constants, 2: round_to(total, weight.dtype, "the folded bias")}),))


def _windows(node: ir.Node, kernel: Sequence[int], facts: Facts) -> list[Window] | Refusal:
    """Read how a convolution or pooling operator walks along its spatial axes, and how it is padded."""
    rank = len(kernel)
    geometry = _geometry(node, kernel)
    if isinstance(geometry, Refusal):
        return geometry
    strides, dilations, pads = geometry
    auto_pad = attribute(node, "auto_pad", "NOTSET")
    windows = []
    for axis, size in enumerate(_spatial_sizes(node.inputs[0], rank, facts)):
        window = Window(int(kernel[axis]), int(strides[axis]), int(dilations[axis]))
        begin, end = (pads[axis], pads[rank + axis]) if auto_pad in ("NOTSET", "") else (0, 0)
        if auto_pad.startswith("SAME") and window.extent > 1:
            if size is None:
                return _unknown_border(node, axis)
            begin, end = same_padding(size, window, upper=auto_pad == "SAME_UPPER")
        windows.append(Window(window.kernel, window.stride, window.dilation, int(begin), int(end)))
    return windows


def _geometry(node: ir.Node, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]] | Refusal:
    """Read the strides, dilations and pads of a convolution or pooling operator."""
    rank = len(kernel)
    strides, dilations, pads = (
        [int(number) for number in attribute(node, name, [default] * count)]
        for name, default, count in (("strides", 1, rank), ("dilations", 1, rank), ("pads", 0, 2 * rank))
    )
    lengths_fit = (len(strides), len(dilations), len(pads)) == (rank, rank, 2 * rank)
    is_kernel = tuple(attribute(node, "kernel_shape", kernel)) == tuple(kernel)
    if not (lengths_fit and is_kernel) or min(*strides, *dilations, 1) < 1 or min(pads, default=0) < 0:
        return _contradiction(node)
    require_size(max(*strides, *dilations, *pads, 1), f"a window of {node.op_type}")
    return strides, dilations, pads


def _spatial_sizes(value: ir.Value | None, rank: int, facts: Facts) -> list[int | None]:
    """Return the lengths of the axes after batch and channels, None where they are not proven."""
    return [facts.size(value, 2 + axis) for axis in range(rank)]


# Refusals


def _not_data(node: ir.Node) -> Refusal:
    return Refusal(Reason.NO_LINEAR_CONSUMER, f"it is not the data of {node.op_type}, but one of its parameters")


def _contradiction(node: ir.Node) -> Refusal:
    return Refusal(Reason.PARAMETER_SHAPE, f"the attributes of {node.op_type} contradict its weight or each other")


def _wrong_weight(node: ir.Node, weight: Array) -> Refusal:
    return Refusal(Reason.PARAMETER_SHAPE, f"the weight of {node.op_type} has shape {weight.shape}")


def _wrong_axis(node: ir.Node, affine: Affine) -> Refusal:
    return Refusal(Reason.CHANNEL_AXIS, f"{node.op_type} works along axis {affine.axis}, which holds the channels")


def _unknown_border(node: ir.Node, axis: int) -> Refusal:
    return Refusal(
        Reason.PADDING,
        f"{node.op_type} pads spatial axis {axis} with zeros, which a shift does not keep, and its length is not known",
    )
