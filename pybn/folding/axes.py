"""Following the channels through operators that move data and compute nothing, in both directions.

Each of these operators gives its output the values of its input, in other places or several times.
So a map passes if, and only if, it is again one value per index of a single axis on the other side.
Either that is proven by the shapes that `Facts` knows, or the map is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from pybn.folding.affine import Affine, Float64
from pybn.folding.graph import Facts, attribute, integers
from pybn.folding.reasons import Reason, Refusal
from pybn.folding.steps import Rule, Step

# A length, the name of an unknown length that is the same wherever it appears, or None.
Dims: TypeAlias = "tuple[int | str | None, ...]"
Move: TypeAlias = Callable[[ir.Node, Affine, Facts], "Affine | Refusal"]


def reshaped(affine: Affine, before: Dims, after: Dims) -> Affine | None:
    """Follow a map from one shape to another that has the same elements in the same order.

    Parameters
    ----------
    affine : Affine
        One value per index of an axis of `before`.
    before, after : tuple of int, str or None
        The two shapes.

    Returns
    -------
    Affine or None
        The map along an axis of `after`; None if that is not proven, or if there is no such axis.
    """
    axis = affine.axis
    if axis is None:
        return affine
    # Channels that are all the same are along any axis: what comes next may choose.
    everywhere = _everywhere(affine)
    if everywhere is not None:
        return everywhere
    front = _common_prefix(before, after)
    if axis < front:
        return affine
    back = _common_prefix(before[front:][::-1], after[front:][::-1])
    if axis >= len(before) - back:
        return affine.along(axis + len(after) - len(before))
    inner = _product(before[axis + 1 : len(before) - back])
    if inner is not None and before[axis] == affine.scale.size:
        for target in range(front, len(after) - back):
            size, target_inner = after[target], _product(after[target + 1 : len(after) - back])
            if isinstance(size, int) and size > 0 and target_inner is not None:
                moved = _onto_axis(affine, inner, size, target_inner)
                if moved is not None:
                    return moved.along(target)
    return None


def _onto_axis(affine: Affine, inner: int, size: int, target_inner: int) -> Affine | None:
    """Follow a map to an axis of `size` steps; one step of it is `target_inner` elements, one channel `inner`."""
    # Number the elements in order. The channel of element n is n // inner % channels, its index
    # along the axis n // target_inner % size. What both know of n is n // low % (high // low).
    channels = affine.scale.size
    low, high = max(inner, target_inner), min(inner * channels, target_inner * size)
    if low >= high:
        return None
    multiples = (low, inner), (low, target_inner), (high, low), (inner * channels, high), (target_inner * size, high)
    if any(multiple % number for multiple, number in multiples):
        return None
    shared = _shared(affine, (inner * channels // high, high // low, low // inner))
    if shared is None:
        return None
    return shared.repeated(low // target_inner).tiled(target_inner * size // high)


def _shared(affine: Affine, split: tuple[int, int, int]) -> Affine | None:
    """Return the map over the middle one of three digits of the channel; None if the others matter."""

    def middle(values: Float64) -> Float64 | None:
        cube = values.reshape(split)
        return cube[0, :, 0] if bool((cube == cube[:1, :, :1]).all()) else None

    scale, shift = middle(affine.scale), middle(affine.shift)
    return None if scale is None or shift is None else Affine(scale, shift, affine.axis)


def _everywhere(affine: Affine) -> Affine | None:
    """Return a map whose channels are all the same as one that has no channels, else None."""
    if affine.scale.size == 0 or np.ptp(affine.scale) or np.ptp(affine.shift):
        return None
    return Affine.everywhere(float(affine.scale[0]), float(affine.shift[0]))


def _reshape_forward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    return _reshaped_or_refusal(node, affine, node.inputs[0], node.outputs[0], facts)


def _reshape_backward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    return _reshaped_or_refusal(node, affine, node.outputs[0], node.inputs[0], facts)


def _reshaped_or_refusal(
    node: ir.Node, affine: Affine, start: ir.Value | None, end: ir.Value | None, facts: Facts
) -> Affine | Refusal:
    before, after = _dims(start, facts), _dims(end, facts)
    if before is None or after is None:
        return _unproven(node)
    moved = reshaped(affine, before, after)
    if moved is not None:
        return moved
    is_static = all(isinstance(dim, int) for dim in before[1:] + after[1:])
    return _mixed(node, affine) if is_static else _unproven(node)


def _transpose_forward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    order = _order(node, affine, facts)
    return _unproven(node) if order is None else affine.along(order.index(_axis(affine)))


def _transpose_backward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    order = _order(node, affine, facts)
    return _unproven(node) if order is None else affine.along(order[_axis(affine)])


def _order(node: ir.Node, affine: Affine, facts: Facts) -> list[int] | None:
    """Return the input axis of each output axis of a Transpose, if that of the map is among them."""
    order = attribute(node, "perm", None)
    if order is None:
        dims = _dims(node.inputs[0], facts)
        order = [] if dims is None else range(len(dims))[::-1]
    axes = range(len(order))
    return [int(axis) for axis in order] if sorted(order) == list(axes) and _axis(affine) in axes else None


def _squeeze_forward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    removed = _removed_axes(node, facts)
    return _unproven(node) if removed is None else _without_axes(node, affine, removed)


def _squeeze_backward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    removed = _removed_axes(node, facts)
    return _unproven(node) if removed is None else _with_axes(affine, removed)


def _unsqueeze_forward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    added = _added_axes(node, facts)
    return _unproven(node) if added is None else _with_axes(affine, added)


def _unsqueeze_backward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    added = _added_axes(node, facts)
    return _unproven(node) if added is None else _without_axes(node, affine, added)


def _removed_axes(node: ir.Node, facts: Facts) -> set[int] | None:
    """Return the axes that a Squeeze removes, numbered as those of its input."""
    dims = _dims(node.inputs[0], facts)
    if dims is None:
        return None
    if "axes" not in node.attributes and (len(node.inputs) < 2 or node.inputs[1] is None):
        # It removes what turns out to be 1, so every length has to be known.
        static = all(isinstance(dim, int) for dim in dims)
        return {axis for axis, dim in enumerate(dims) if dim == 1} if static else None
    axes = integers(node, "axes", 1, facts)
    return None if axes is None else {axis % len(dims) for axis in axes}


def _added_axes(node: ir.Node, facts: Facts) -> set[int] | None:
    """Return the axes that an Unsqueeze adds, numbered as those of its output."""
    axes, dims = integers(node, "axes", 1, facts), _dims(node.inputs[0], facts)
    return None if axes is None or dims is None else {axis % (len(dims) + len(axes)) for axis in axes}


def _without_axes(node: ir.Node, affine: Affine, axes: set[int]) -> Affine | Refusal:
    axis = _axis(affine)
    if axis in axes:  # one channel, so the map is the same everywhere
        return _everywhere(affine) or _mixed(node, affine)
    return affine.along(axis - sum(removed < axis for removed in axes))


def _with_axes(affine: Affine, axes: set[int]) -> Affine:
    kept = (axis for axis in range(_axis(affine) + len(axes) + 1) if axis not in axes)
    return affine.along(next(axis for number, axis in enumerate(kept) if number == affine.axis))


def _expand_forward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    before, after = _dims(node.inputs[0], facts), _dims(node.outputs[0], facts)
    if before is None or after is None or before[_axis(affine)] != affine.scale.size:
        return _unproven(node)
    if affine.scale.size == 1:  # the one channel may become many
        return _everywhere(affine) or _mixed(node, affine)
    return affine.along(_axis(affine) + len(after) - len(before))


def _expand_backward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    before, after = _dims(node.inputs[0], facts), _dims(node.outputs[0], facts)
    if before is None or after is None:
        return _unproven(node)
    axis = _axis(affine) + len(before) - len(after)
    if axis >= 0 and before[axis] == affine.scale.size:
        return affine.along(axis)
    return _everywhere(affine) or (_mixed(node, affine) if axis < 0 or before[axis] == 1 else _unproven(node))


# DepthToSpace makes the channels c of each position from its channels (block, c), or (c, block) in
# the mode CRD; SpaceToDepth makes the channels (block, c). A block is blocksize**2 positions.


def _depth_to_space_forward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    return _out_of_blocks(node, affine)


def _depth_to_space_backward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    return _into_blocks(node, affine)


def _space_to_depth_forward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    return _into_blocks(node, affine)


def _space_to_depth_backward(node: ir.Node, affine: Affine, facts: Facts) -> Affine | Refusal:
    return _out_of_blocks(node, affine)


def _into_blocks(node: ir.Node, affine: Affine) -> Affine | Refusal:
    if affine.axis != 1:
        return _everywhere(affine) or _mixed(node, affine)
    block = _block(node)
    return affine.repeated(block) if _channels_first(node) else affine.tiled(block)


def _out_of_blocks(node: ir.Node, affine: Affine) -> Affine | Refusal:
    block = _block(node)
    if affine.axis != 1 or affine.scale.size % block:
        return _everywhere(affine) or _mixed(node, affine)
    channels = affine.scale.size // block
    moved = _shared(affine, (1, channels, block) if _channels_first(node) else (block, channels, 1))
    return moved or _mixed(node, affine)


def _block(node: ir.Node) -> int:
    return int(attribute(node, "blocksize", 1)) ** 2


def _channels_first(node: ir.Node) -> bool:
    return node.op_type == "DepthToSpace" and attribute(node, "mode", "DCR") == "CRD"


def _rule(move: Move) -> Rule:
    """Make a rule of a function that follows a map which has channels."""

    def rule(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
        if index != 0:
            return Refusal(
                Reason.NO_LINEAR_CONSUMER, f"a map passes {node.op_type} only through its first input and output"
            )
        moved = affine if affine.axis is None else move(node, affine, facts)
        return moved if isinstance(moved, Refusal) else Step(carries=((0, moved),))

    return rule


FORWARD: dict[str, Rule] = {
    "DepthToSpace": _rule(_depth_to_space_forward),
    "Expand": _rule(_expand_forward),
    "Flatten": _rule(_reshape_forward),
    "Reshape": _rule(_reshape_forward),
    "SpaceToDepth": _rule(_space_to_depth_forward),
    "Squeeze": _rule(_squeeze_forward),
    "Transpose": _rule(_transpose_forward),
    "Unsqueeze": _rule(_unsqueeze_forward),
}

BACKWARD: dict[str, Rule] = {
    "DepthToSpace": _rule(_depth_to_space_backward),
    "Expand": _rule(_expand_backward),
    "Flatten": _rule(_reshape_backward),
    "Reshape": _rule(_reshape_backward),
    "SpaceToDepth": _rule(_space_to_depth_backward),
    "Squeeze": _rule(_squeeze_backward),
    "Transpose": _rule(_transpose_backward),
    "Unsqueeze": _rule(_unsqueeze_backward),
}


def _axis(affine: Affine) -> int:
    assert affine.axis is not None
    return affine.axis


def _dims(value: ir.Value | None, facts: Facts) -> Dims | None:
    shape = None if value is None else facts.shape(value)
    return None if shape is None else tuple(dim if isinstance(dim, int) else dim.value for dim in shape)


def _common_prefix(a: Dims, b: Dims) -> int:
    """Count the leading lengths that are known to be the same."""
    pairs = zip(a, b, strict=False)
    return next((n for n, (m, k) in enumerate(pairs) if m is None or m != k), min(len(a), len(b)))


def _product(dims: Dims) -> int | None:
    """Return how many elements there are; None if that is unknown, or if there are none."""
    numbers = [dim for dim in dims if isinstance(dim, int) and dim > 0]
    return math.prod(numbers) if len(numbers) == len(dims) else None


def _unproven(node: ir.Node) -> Refusal:
    return Refusal(Reason.CHANNEL_AXIS_UNPROVEN, f"the shapes or axes of {node.op_type} are not known")


def _mixed(node: ir.Node, affine: Affine) -> Refusal:
    return Refusal(
        Reason.CHANNEL_AXIS, f"{node.op_type} mixes axis {affine.axis}, which holds the channels, with other axes"
    )
