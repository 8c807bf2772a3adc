"""One function per operator: how a map that comes after it passes backward through it.

`pybn.folding.steps` says what a rule is. To teach pybn another operator, write its rule and add it
to `BACKWARD`. The operators that are maps themselves, batch norms and the like, are in `sources`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from pybn.folding import axes
from pybn.folding.affine import Affine, Array, Float64, is_supported, round_to
from pybn.folding.graph import Facts, attribute, input_of, integers, unavailable
from pybn.folding.reasons import FoldError, Reason, Refusal
from pybn.folding.steps import Insert, Quantized, Rewrite, Rule, Step
from pybn.folding.weights import map_bias, scale_axis, scale_quantized, scale_transposed_conv

# Linear operators, which absorb


def conv(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Conv: ``W' = a[o] W``, ``c' = a c + b``. Groups divide the inputs, so they do not matter."""
    if facts.dequantized(node.inputs[1]) is not None:
        return _absorb_quantized(node, affine, 0, facts)
    operands = _weight_and_bias(node, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, bias = operands
    per_channel = affine.over(weight.shape[0], 1)
    return _absorb(node, per_channel, weight, scale_axis(weight, per_channel.scale, 0), bias)


def conv_transpose(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """ConvTranspose: as Conv, with the output channels numbered group by group along axis 1."""
    groups = int(attribute(node, "group", 1))
    if facts.dequantized(node.inputs[1]) is not None and groups == 1:
        return _absorb_quantized(node, affine, 1, facts)
    operands = _weight_and_bias(node, facts)
    if isinstance(operands, Refusal):
        return operands
    weight, bias = operands
    if groups < 1 or weight.shape[0] % groups:
        return Refusal(Reason.PARAMETER_SHAPE, f"group={groups} does not divide the weight")
    per_channel = affine.over(weight.shape[1] * groups, 1)
    return _absorb(node, per_channel, weight, scale_transposed_conv(weight, per_channel.scale, groups), bias)


def gemm(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Gemm, ``alpha A B + beta C``: ``B' = a B``, ``C' = a beta C + b``, and beta becomes 1."""
    output_axis = 0 if attribute(node, "transB", 0) else 1
    if facts.dequantized(node.inputs[1]) is not None:
        return _absorb_quantized(node, affine, output_axis, facts)
    operands = _weight_and_bias(node, facts, bias_rank=None)
    if isinstance(operands, Refusal):
        return operands
    weight, bias = operands
    if weight.ndim != 2 or (bias is not None and bias.ndim > 2):
        return Refusal(Reason.PARAMETER_SHAPE, "the weight or bias of Gemm has the wrong rank")
    features = weight.shape[output_axis]
    per_channel = affine.over(features, 1)
    if not is_per_channel(bias, features):
        return wrong_bias(node, bias)
    attributes: dict[str, int | None] = {"beta": None}
    if facts.opset(node) < 7:
        attributes["broadcast"] = 1
    scaled = scale_axis(weight, per_channel.scale, output_axis)
    gain = float(attribute(node, "beta", 1.0))
    return _absorb(node, per_channel, weight, scaled, bias, gain=gain, attributes=attributes)


def matmul(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """MatMul with a constant on either side: ``B' = a B`` along the last axis, or ``A' = a A`` along the one before.

    A shift needs the bias that Gemm has, or an Add where Gemm does not do: it takes matrices only.
    With two computed operands a scale goes to the one that brings in its axis.
    """
    arrays = [facts.constant(value) for value in node.inputs]
    ranks = [
        facts.rank(value) if array is None else array.ndim for value, array in zip(node.inputs, arrays, strict=True)
    ]
    known = [rank for rank in ranks if rank is not None]
    if min(known, default=2) < 2:
        return Refusal(Reason.CHANNEL_AXIS, "MatMul of a vector has no axis of channels")
    rank = max(known) if len(known) == 2 else None
    if rank is None and affine.axis is not None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of MatMul's operands is unknown")
    # The right operand brings in the last axis, the left one that before.
    sides = [side for side in (1, 0) if affine.axis is None or rank is None or affine.axis == rank - 2 + side]
    side = next((side for side in sides if arrays[side] is not None), None)
    if side is None:
        if not sides or not affine.keeps_zero:
            features = "in the last axis" if arrays[1] is not None else "of computed operands"
            return Refusal(
                Reason.CHANNEL_AXIS,
                f"MatMul has rank {rank} and its features {features}, but the channels are in axis {affine.axis}",
            )
        # A scale of rows or columns, or of everything, is that of one operand.
        axes = {at: None if ranks[at] is None else (ranks[at] or 0) - 2 + at for at in sides}
        steps = [Step(carries=((at, affine if axis is None else affine.along(axis)),)) for at, axis in axes.items()]
        return _first_of(steps)
    weight = arrays[side]
    assert weight is not None
    if not is_supported(weight.dtype):
        return _unsupported(weight, "the weight of MatMul")
    weight_axis = weight.ndim - 2 + side
    features = weight.shape[weight_axis]
    per_channel = affine.over(features, affine.axis if affine.axis is not None else 0)
    constants: dict[int, Array] = {}
    if not affine.keeps_scale:
        scaled = scale_axis(weight, per_channel.scale, weight_axis)
        constants[side] = round_to(scaled, weight.dtype, "the folded weight")
    if affine.keeps_zero:
        return Step((Rewrite(node, constants),))
    bias = round_to(affine.shift, weight.dtype, "the folded bias")
    if rank == 2 and side == 1 and facts.opset(node) >= 7:
        return Step((Rewrite(node, {**constants, 2: np.broadcast_to(bias, (features,)).copy()}, "Gemm"),))
    if affine.axis is None:
        bias = bias.reshape(())
    elif side == 0:
        bias = bias.reshape(features, 1)
    return Step((Rewrite(node, constants, after=(Insert("Add", (bias,)),)),))


# Operators that a map passes


def same(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Identity: every map passes."""
    return Step(carries=((0, affine),))


def dropout(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Dropout in evaluation mode is the identity."""
    # Since opset 12 the mode is an input; from 7 to 11 the operator is for inference only.
    mode = input_of(node, 2)
    training = facts.opset(node) < 7 and not attribute(node, "is_test", 0)
    if mode is not None:
        value = facts.constant(mode)
        training = value is None or value.size != 1 or bool(value.reshape(-1)[0])
    if training:
        return Refusal(Reason.DROPOUT_TRAINING, "Dropout is, or may be, in training mode")
    return Step(carries=((0, affine),))


# Types, by name, and those whose every value they hold.
HOLDS = {
    "float16": {"float16"},
    "bfloat16": {"bfloat16"},
    "float32": {"float16", "bfloat16", "float32"},
    "float64": {"float16", "bfloat16", "float32", "float64"},
}


def cast(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Cast between floats, unless the map would be computed in a narrower type than it was."""
    before, after = facts.dtype(node.inputs[0]), facts.dtype(node.outputs[0])
    if before is None or after is None or before.name not in HOLDS:
        return Refusal(Reason.NO_LINEAR_PRODUCER, f"it follows Cast, of {before} to {after}")
    if after.name not in HOLDS[before.name]:
        return Refusal(Reason.NARROWER_TYPE, f"before Cast it would be computed in {before.name}, not in {after.name}")
    return Step(carries=((0, affine),))


def relu(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Relu, LeakyRelu, PRelu: ``a f(x) = f(a x)`` for ``a >= 0``."""
    if not affine.keeps_zero:
        return Refusal(Reason.SHIFT_STAYS, f"a shift does not pass {node.op_type}")
    return _monotone(node, affine)


def max_pool(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Maxima over space: ``a max(x) + b = max(a x + b)`` for ``a >= 0``."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return Refusal(Reason.OTHER_CONSUMER, f"the indices of {node.op_type} are used")
    return _spatial(node, affine) or _monotone(node, affine)


def average_pool(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Averages over space: every map passes, except that zeros in the padding are not shifted."""
    if not affine.keeps_zero and (_counts_padding(node) or attribute(node, "ceil_mode", 0)):
        return Refusal(Reason.PADDING, "AveragePool counts padded zeros, which a shift does not reach")
    return _spatial(node, affine) or Step(carries=((0, affine),))


def _counts_padding(node: ir.Node) -> bool:
    if not attribute(node, "count_include_pad", 0):
        return False
    return attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(attribute(node, "pads", ()))


def global_average_pool(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """GlobalAveragePool: every map passes."""
    return _spatial(node, affine) or Step(carries=((0, affine),))


def reduce_mean(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """ReduceMean over other axes than the channels': every map passes."""
    carry = _before_reduction(node, affine, facts)
    return carry if isinstance(carry, Refusal) else Step(carries=((0, carry),))


def reduce_max(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """ReduceMax and ReduceMin over other axes than the channels', as a pooling."""
    carry = _before_reduction(node, affine, facts)
    return carry if isinstance(carry, Refusal) else _monotone(node, carry)


def _before_reduction(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    """Find the channel axis among those that the reduction started with."""
    if affine.axis is None:
        return affine
    rank = facts.rank(node.inputs[0])
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the rank of {node.op_type}'s data is unknown")
    reduced = reduced_axes(node, rank, facts)
    kept = [axis for axis in range(rank) if axis not in reduced]
    before = affine.axis if attribute(node, "keepdims", 1) else dict(enumerate(kept)).get(affine.axis)
    if before is None or before in reduced:
        return Refusal(Reason.CHANNEL_AXIS, f"{node.op_type} is over the axis of the channels")
    return affine.along(before)


def reduced_axes(node: ir.Node, rank: int, facts: Facts) -> set[int]:
    """Return the axes of its data that a reduction is over."""
    listed = integers(node, "axes", 1, facts)
    if listed:
        return {axis % rank for axis in listed}
    return set() if attribute(node, "noop_with_empty_axes", 0) else set(range(rank))


def clip(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Clip: ``a clip(x, l, h) + b = clip(a x + b, a l + b, a h + b)``; the bounds swap for ``a < 0``.

    The bounds are scalars, so all channels must agree on them.
    """
    if (affine.scale == 0).any():
        return Refusal(Reason.NEGATIVE_SCALE, "a scale of 0 does not pass Clip")
    flips = bool((affine.scale < 0).any())
    as_inputs = facts.opset(node) >= 11
    bounds: list[Float64 | None] = []
    dtype = None
    for position, name in ((1, "min"), (2, "max")):
        value = input_of(node, position)
        if as_inputs and value is not None:
            array = facts.constant(value)
            if array is None:
                return unavailable(facts, value, f"the {name} of Clip", parameter=False)
            if not is_supported(array.dtype) or array.size != 1:
                return _unsupported(array, f"the {name} of Clip")
            dtype = array.dtype
            bounds.append(array.reshape(-1).astype(np.float64))
        elif not as_inputs and name in node.attributes:
            dtype = np.dtype(np.float32)
            bounds.append(np.array([attribute(node, name, 0.0)], dtype=np.float64))
        else:
            bounds.append(None)
    if dtype is None:
        return Step(carries=((0, affine),))
    mapped: list[Array | None] = []
    for bound in bounds:
        if bound is None:
            mapped.append(None)
            continue
        values = round_to(affine.scale * bound + affine.shift, dtype, "the folded bound")
        if (values != values[0]).any():
            return Refusal(Reason.NEGATIVE_SCALE, "the bounds of Clip would differ between channels")
        mapped.append(values[:1].reshape(()))
    if flips:
        low, high = bounds
        if (affine.scale > 0).any() or low is None or high is None or low > high:
            return Refusal(Reason.NEGATIVE_SCALE, "a negative scale would swap the bounds of Clip")
        mapped.reverse()
    return Step((_with_bounds(node, mapped, as_inputs=as_inputs),), ((0, affine),))


def _with_bounds(node: ir.Node, bounds: Sequence[Array | None], *, as_inputs: bool) -> Rewrite:
    if as_inputs:
        return Rewrite(node, {at: bound for at, bound in enumerate(bounds, start=1) if bound is not None})
    names = ("min", "max")
    return Rewrite(
        node,
        attributes={name: float(bound) for name, bound in zip(names, bounds, strict=True) if bound is not None},
    )


def resize(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Resize and Upsample along other axes than the channels': the weights of a mean sum to 1."""
    if attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return Refusal(Reason.PADDING, "Resize fills in a value that a map does not reach")
    if affine.axis is not None and not _resize_keeps(node, affine.axis, facts):
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"{node.op_type} may change the axis of the channels")
    return Step(carries=((0, affine),))


def _resize_keeps(node: ir.Node, axis: int, facts: Facts) -> bool:
    """Say whether an axis is proven to be left as it is."""
    axes = attribute(node, "axes", None)
    if axes is not None:
        rank = facts.rank(node.inputs[0])
        return rank is not None and axis not in {item % rank for item in axes}
    scales = attribute(node, "scales", None)
    if scales is None:
        # Upsample and Resize of opset 10 have the scales second, later ones third.
        position = 1 if node.op_type == "Upsample" or facts.opset(node) < 11 else 2
        array = facts.constant(node.inputs[position]) if len(node.inputs) > position else None
        scales = None if array is None else array.tolist()
    if scales:
        return axis < len(scales) and scales[axis] == 1.0
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return False  # scales that only a run knows: 1.2 keeps three channels three, and yet moves them
    before, after = facts.size(node.inputs[0], axis), facts.size(node.outputs[0], axis)
    return (
        before is not None and before == after and attribute(node, "keep_aspect_ratio_policy", "stretch") == "stretch"
    )


def concat(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Concat: every input takes its channels of the map, or all of it along another axis."""
    inputs = range(len(node.inputs))
    if affine.axis is None:
        return Step(carries=tuple((at, affine) for at in inputs))
    rank = facts.rank(node.outputs[0])
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of Concat is unknown")
    if int(attribute(node, "axis", 1)) % rank != affine.axis:
        return Step(carries=tuple((at, affine) for at in inputs))
    sizes = [facts.size(value, affine.axis) for value in node.inputs]
    if None in sizes or sum(size or 0 for size in sizes) != affine.scale.size:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the channels of Concat's inputs are not proven: {sizes}")
    carries: list[tuple[int, Affine]] = []
    start = 0
    for at, size in enumerate(sizes):
        assert size is not None
        carries.append((at, affine.part(start, start + size)))
        start += size
    return Step(carries=tuple(carries))


def split(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Split: the part that the output is of the input, and nothing elsewhere."""
    value = node.inputs[0]
    rank = facts.rank(value)
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of Split's data is unknown")
    axis = int(attribute(node, "axis", 0)) % rank
    sizes = [facts.size(output, axis) for output in node.outputs]
    whole = facts.size(value, axis)
    if whole is None or None in sizes or sum(size or 0 for size in sizes) != whole:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the sizes of Split are not proven: {sizes}")
    known = [size for size in sizes if size is not None]
    start = sum(known[:index])
    if affine.axis not in (None, axis):
        return Refusal(Reason.CHANNEL_AXIS, f"Split is along axis {axis}, the map along {affine.axis}")
    part = affine.over(known[index], axis)
    return Step(carries=((0, part.among(slice(start, start + known[index]), whole)),))


def slice_(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Slice: the part that is kept of the input, and nothing elsewhere."""
    value = node.inputs[0]
    if affine.axis is None:
        return Step(carries=((0, affine),))
    rank = facts.rank(value)
    if rank is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the rank of Slice's data is unknown")
    kept = slices(node, rank, facts).get(affine.axis)
    if kept is None:
        return Step(carries=((0, affine),))
    whole = facts.size(value, affine.axis)
    if whole is None:
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the number of channels that Slice is given is not proven")
    # Where Python and ONNX disagree, about bounds before the start, the length tells.
    if not len(range(whole)[kept]) == affine.scale.size == facts.size(node.outputs[0], affine.axis):
        return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the channels that Slice keeps are not proven")
    return Step(carries=((0, affine.among(kept, whole)),))


def slices(node: ir.Node, rank: int, facts: Facts) -> Mapping[int, slice]:
    """Return what a Slice keeps of the axes that it cuts; NumPy's slices mean the same as ONNX's.

    Raises
    ------
    FoldError
        If that is not constant.
    """
    names = ("starts", "ends", "axes", "steps")
    starts, ends, cut, steps = (integers(node, name, at, facts) for at, name in enumerate(names, start=1))
    if starts is None or ends is None:
        raise FoldError(Reason.PARAMETER_SHAPE, "Slice lacks its starts or ends")
    cut = list(range(len(starts))) if cut is None else [axis % rank for axis in cut]
    steps = [1] * len(starts) if steps is None else steps
    if {len(ends), len(cut), len(steps)} != {len(starts)} or 0 in steps:
        raise FoldError(Reason.PARAMETER_SHAPE, "the starts, ends, axes and steps of Slice contradict each other")
    return {axis: slice(*bounds) for axis, *bounds in zip(cut, starts, ends, steps, strict=True)}


def pad(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Pad of other axes than the channels': with zeros only a scale passes, with repetitions every map."""
    if affine.axis is not None:
        pads = integers(node, "pads", 1, facts)
        rank = facts.rank(node.inputs[0])
        if pads is None or rank is None:
            return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the axes of Pad are unknown")
        axes = integers(node, "axes", 3, facts)
        padded = [axis % rank for axis in (range(rank) if axes is None else axes)]
        if len(pads) != 2 * len(padded):
            return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, "the axes of Pad are unknown")
        around = zip(padded, pads[: len(padded)], pads[len(padded) :], strict=True)
        if any(axis == affine.axis and (first or last) for axis, first, last in around):
            return Refusal(Reason.CHANNEL_AXIS, "Pad adds channels")
    if attribute(node, "mode", "constant") == "constant":
        if not _pads_with_zero(node, facts):
            return Refusal(Reason.PADDING, "Pad fills in a value other than zero")
        if not affine.keeps_zero:
            return Refusal(Reason.PADDING, "Pad fills in zeros, which a shift does not reach")
    return Step(carries=((0, affine),))


def _pads_with_zero(node: ir.Node, facts: Facts) -> bool:
    if facts.opset(node) < 11:
        return float(attribute(node, "value", 0.0)) == 0.0
    value = input_of(node, 2)
    if value is None:
        return True
    array = facts.constant(value)
    return array is not None and not array.any()


def add(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Add, Sum and Sub of computed values: the scale goes to every operand, the shift to one of them."""
    at_all = range(len(node.inputs))
    scales = [_operand(node, at, affine.only_scale(), facts) for at in at_all]
    refusal = next((scale for scale in scales if isinstance(scale, Refusal)), None)
    if refusal is not None and not affine.keeps_scale:
        return refusal
    carried = [(at, scale) for at, scale in enumerate(scales) if isinstance(scale, Affine)]
    if affine.keeps_zero:
        return Step(carries=tuple(carried))
    steps: list[Step] = []
    for at, scale in carried:
        sign = -1.0 if node.op_type == "Sub" and at == 1 else 1.0
        whole = Affine(scale.scale, sign * affine.shift, scale.axis)
        steps.append(Step(carries=tuple((other, whole if other == at else item) for other, item in carried)))
    return _first_of(steps) if steps else refusal or Refusal(Reason.NO_LINEAR_PRODUCER, f"it follows {node.op_type}")


def multiply(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
    """Mul and Div of computed values: a scale goes to either factor, or to what is divided."""
    if not affine.keeps_zero:
        return Refusal(Reason.SHIFT_STAYS, f"a shift does not pass {node.op_type} of two computed values")
    steps: list[Step] = []
    refusal: Refusal | None = None
    for at in (0, 1) if node.op_type == "Mul" else (0,):
        operand = _operand(node, at, affine, facts)
        if isinstance(operand, Refusal):
            refusal = refusal or operand
        else:
            steps.append(Step(carries=((at, operand),)))
    return _first_of(steps) if steps else refusal or Refusal(Reason.NO_LINEAR_PRODUCER, f"it follows {node.op_type}")


def _operand(node: ir.Node, at: int, affine: Affine, facts: Facts) -> Affine | Refusal:
    """Return the map along the axis that the channels have in one operand of a broadcasting operator."""
    if affine.axis is None:
        return affine
    rank, own = facts.rank(node.outputs[0]), facts.rank(node.inputs[at])
    axis = None if rank is None or own is None else affine.axis - (rank - own)
    if axis is None or axis < 0 or facts.size(node.inputs[at], axis) != affine.scale.size:
        return Refusal(
            Reason.CHANNEL_AXIS_UNPROVEN,
            f"{node.op_type}'s operand {_name(node.inputs[at])} is not proven to have {affine.scale.size} channels",
        )
    return affine.along(axis)


BACKWARD: dict[str, Rule] = {
    **axes.BACKWARD,
    "Add": add,
    "AveragePool": average_pool,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": multiply,
    "Dropout": dropout,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": max_pool,
    "Identity": same,
    "LeakyRelu": relu,
    "MatMul": matmul,
    "MaxPool": max_pool,
    "Mul": multiply,
    "PRelu": relu,
    "Pad": pad,
    "ReduceMax": reduce_max,
    "ReduceMean": reduce_mean,
    "ReduceMin": reduce_max,
    "Relu": relu,
    "Resize": resize,
    "Slice": slice_,
    "Split": split,
    "Sub": add,
    "Sum": add,
    "Upsample": resize,
}


def _weight_and_bias(node: ir.Node, facts: Facts, *, bias_rank: int | None = 1) -> tuple[Array, Array | None] | Refusal:
    """Read inputs 1 and 2 of a linear operator."""
    weight = weight_of(node, facts)
    if isinstance(weight, Refusal):
        return weight
    if weight.ndim < 2:
        return Refusal(Reason.PARAMETER_SHAPE, f"the weight of {node.op_type} is not a matrix")
    bias = bias_of(node, weight, facts)
    if isinstance(bias, Refusal):
        return bias
    if bias is not None and bias_rank is not None and bias.ndim != bias_rank:
        return wrong_bias(node, bias)
    return weight, bias


def weight_of(node: ir.Node, facts: Facts) -> Array | Refusal:
    """Read the weight of a linear operator, its input 1."""
    value = input_of(node, 1)
    weight = facts.constant(value)
    if weight is None and facts.dequantized(value) is not None:
        return Refusal(
            Reason.QUANTIZATION, f"the weight of {node.op_type} is quantized, and its scales are not those of the map"
        )
    if weight is None:
        return unavailable(facts, value, f"the weight of {node.op_type}", parameter=False)
    if not is_supported(weight.dtype):
        return _unsupported(weight, f"the weight of {node.op_type}")
    return weight


def bias_of(node: ir.Node, weight: Array, facts: Facts) -> Array | Refusal | None:
    """Read the bias of a linear operator, its input 2, if there is one."""
    value = input_of(node, 2)
    if value is None:
        return None
    bias = facts.constant(value)
    if bias is None:
        return unavailable(facts, value, f"the bias of {node.op_type}", parameter=False)
    if bias.dtype != weight.dtype:
        return Refusal(Reason.TYPE_MISMATCH, f"the weight is {weight.dtype} but the bias is {bias.dtype}")
    return bias


def is_per_channel(bias: Array | None, channels: int) -> bool:
    """Say whether a bias, if there is one, has one value per channel along its last axis, or one for all."""
    return bias is None or bias.shape[-1:] in ((), (1,), (channels,))


def _absorb(
    node: ir.Node,
    affine: Affine,
    weight: Array,
    scaled: Float64,
    bias: Array | None,
    *,
    gain: float = 1.0,
    attributes: Mapping[str, int | None] | None = None,
) -> Step | Refusal:
    """Make the step in which a linear operator takes up the whole map."""
    constants: dict[int, Array] = {}
    if not affine.keeps_scale:
        constants[1] = round_to(scaled, weight.dtype, "the folded weight")
    if bias is None and affine.keeps_zero:
        return Step((Rewrite(node, constants),))
    if not is_per_channel(bias, affine.scale.size):
        return wrong_bias(node, bias)
    constants[2] = round_to(map_bias(bias, affine, gain), weight.dtype, "the folded bias")
    return Step((Rewrite(node, constants, attributes=attributes or {}),))


def _absorb_quantized(node: ir.Node, affine: Affine, axis: int, facts: Facts) -> Step | Refusal:
    """Take up a map in a weight that stays behind a DequantizeLinear, by its scales; `axis` has the output channels."""
    weight = facts.dequantized(node.inputs[1])
    assert weight is not None
    dtype = weight.scale.dtype
    if weight.values.ndim <= axis or (weight.scale.size > 1 and weight.axis != axis):
        return Refusal(Reason.QUANTIZATION, f"the scales of {node.op_type}'s weight are not those of its outputs")
    per_channel = affine.over(weight.values.shape[axis], 1)
    constants: dict[int, Array | Quantized] = {}
    if not affine.keeps_scale:
        values, scale, zero_point = scale_quantized(
            weight.values, weight.scale, weight.zero_point, per_channel.scale, axis
        )
        if scale.size > 1 and facts.opset(node) < 13:
            return Refusal(Reason.QUANTIZATION, "before opset 13 a weight has one scale")
        constants[1] = Quantized(values, round_to(scale, dtype, "the folded scale"), axis, zero_point)
    bias = input_of(node, 2)
    array, integers = facts.constant(bias), facts.dequantized(bias)
    gain = float(attribute(node, "beta", 1.0))
    if bias is not None and array is None and integers is None:
        return unavailable(facts, bias, f"the bias of {node.op_type}", parameter=False)
    if integers is not None and affine.keeps_zero and gain == 1.0 and integers.values.shape == per_channel.scale.shape:
        # Runtimes expect the bias in units of input scale times weight scale, which grows alike.
        values, scale, zero_point = scale_quantized(
            integers.values, integers.scale, integers.zero_point, per_channel.scale, 0
        )
        constants[2] = Quantized(values, round_to(scale, dtype, "the folded scale"), 0, zero_point)
    elif bias is not None or not affine.keeps_zero:
        # In these units a shift would be rounded, and much more coarsely than a float is.
        plain = integers.array if integers is not None else array
        if array is not None and array.dtype != dtype:
            return Refusal(Reason.TYPE_MISMATCH, f"the weight is {dtype} but the bias is {array.dtype}")
        if not is_per_channel(plain, per_channel.scale.size):
            return wrong_bias(node, plain)
        constants[2] = round_to(map_bias(plain, per_channel, gain), dtype, "the folded bias")
    return Step((Rewrite(node, constants, attributes={"beta": None} if gain != 1.0 and 2 in constants else {}),))


def _first_of(steps: Sequence[Step]) -> Step:
    """Chain alternatives."""
    step = steps[-1]
    for earlier in reversed(steps[:-1]):
        step = Step(earlier.rewrites, earlier.carries, earlier.extra, step)
    return step


def _monotone(node: ir.Node, affine: Affine) -> Step | Refusal:
    if (affine.scale < 0).any():
        negative = int((affine.scale < 0).sum())
        return Refusal(
            Reason.NEGATIVE_SCALE,
            f"{node.op_type} passes positive scales only, and {negative} of {affine.scale.size} are negative",
        )
    return Step(carries=((0, affine),))


def _spatial(node: ir.Node, affine: Affine) -> Refusal | None:
    """Refuse a map along one of the axes that a pooling is over."""
    if affine.axis is not None and affine.axis > 1:
        return Refusal(Reason.CHANNEL_AXIS, f"{node.op_type} is over axis {affine.axis}, that of the channels")
    return None


def wrong_bias(node: ir.Node, bias: Array | None) -> Refusal:
    """Refuse a bias that is not one value per channel."""
    shape = () if bias is None else bias.shape
    return Refusal(Reason.PARAMETER_SHAPE, f"the bias of {node.op_type} has shape {shape}, not one value per channel")


def _unsupported(array: Array, what: str) -> Refusal:
    return Refusal(Reason.UNSUPPORTED_DTYPE, f"{what} is {array.dtype}")


def _name(value: ir.Value | None) -> str:
    return repr(value.name) if value is not None and value.name else "(unnamed)"
