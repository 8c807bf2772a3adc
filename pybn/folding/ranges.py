"""How large the weights of every linear operator are, before and after folding: what quantisation has to cover."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from pybn.folding.affine import Array, Float64, is_supported
from pybn.folding.graph import (
    LINEAR,
    AttributeNotConstant,
    Facts,
    Scope,
    attribute,
    display_name,
    scopes,
    standard_type,
)
from pybn.folding.report import Spread, WeightRange

# Elements that are looked at in one go: 16 MiB of float32.
BLOCK = 1 << 22


def weight_ranges(original: ir.Model, folded: ir.Model) -> tuple[WeightRange, ...]:
    """Measure the weights of every Conv, ConvTranspose, Gemm and MatMul in both models.

    One tensor after the other is read, in blocks, so that no model has to fit into memory twice.

    Parameters
    ----------
    original, folded : onnx_ir.Model
        A model, and what `fold_onnx` made of it.

    Returns
    -------
    tuple of WeightRange
        In graph order. Operators whose weights are not constant floats in both models are left out.
    """
    facts_before, facts_after = Facts(original), Facts(folded)
    ranges: list[WeightRange] = []
    for graph, before, after in _pairs(original, folded):
        weight, weight_after = _weight(before, facts_before), _weight(after, facts_after)
        if weight is None or weight_after is None:
            continue
        spread = _spread(weight)
        unchanged = weight.__array_interface__ == weight_after.__array_interface__  # the same memory
        spread_after = spread if unchanged else _spread(weight_after)
        ranges.append(WeightRange(display_name(after), before.op_type, graph, spread, spread_after))
    return tuple(ranges)


def _pairs(original: ir.Model, folded: ir.Model) -> Iterator[tuple[str, ir.Node, ir.Node]]:
    """Match the linear operators of both models, graph by graph."""
    scopes_after = {scope.label: scope for scope in scopes(folded)}
    for scope in scopes(original):
        if scope.label not in scopes_after:
            continue
        before, after = _linear(scope, original), _linear(scopes_after[scope.label], folded)
        if len(before) != len(after):  # only then by name, since nodes may have none
            named = {display_name(node): node for node in after}
            matched = [(node, named.get(display_name(node))) for node in before]
            before, after = (
                [node for node, other in matched if other is not None],
                [other for _, other in matched if other is not None],
            )
        for node, other in zip(before, after, strict=True):
            yield scope.label, node, other


def _linear(scope: Scope, model: ir.Model) -> list[ir.Node]:
    return [node for node in scope.graph if standard_type(node, model) in LINEAR]


def _weight(node: ir.Node, facts: Facts) -> Array | None:
    """Return the constant weight with the output channels as its first axis."""
    for index in (1, 0):
        array = facts.constant(node.inputs[index])
        if array is None or array.ndim < 2 or not array.size or not is_supported(array.dtype):
            continue
        try:
            if node.op_type == "Conv":
                return array
            if node.op_type == "ConvTranspose":  # (in, out / groups, *kernel); the groups divide the first axis
                grouped = array.reshape(attribute(node, "group", 1), -1, *array.shape[1:])
                return grouped.swapaxes(1, 2).reshape(-1, grouped.shape[1], *array.shape[2:])
            transposed = node.op_type == "Gemm" and attribute(node, "transB" if index == 1 else "transA", 0)
        except AttributeNotConstant:
            return None
        # Output features are the last axis of the right operand, the last but one of the left one.
        return np.moveaxis(array, -1 if (index == 1) != bool(transposed) else -2, 0)
    return None


def _spread(weight: Array) -> Spread:
    """Summarise |w|; `weight` has shape (channels, ...)."""
    channels = weight.shape[0]
    step = max(1, BLOCK * channels // weight.size)
    scales: Float64 = np.empty(channels)
    least = np.inf
    for start in range(0, channels, step):
        block = np.abs(weight[start : start + step])
        block = block.astype(np.float32) if block.itemsize == 2 else block
        scales[start : start + step] = block.max(axis=tuple(range(1, block.ndim)))
        smallest = block.min()
        if smallest == 0:
            smallest = block.min(where=block > 0, initial=np.inf)
        least = min(least, float(smallest))
    alive = scales[scales != 0]
    if not alive.size:
        return Spread(0.0, 0.0, 0.0, 0.0, channels, channels)
    low, middle, high = float(alive.min()), float(np.median(alive)), float(alive.max())
    return Spread(least, low, middle, high, channels, channels - alive.size)
