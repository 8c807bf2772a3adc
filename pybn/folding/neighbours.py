"""The surroundings of a node: what a report shows of a batch norm that stays."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

import onnx_ir as ir

from pybn.folding.graph import STANDARD_DOMAINS, constant_source, display_name
from pybn.folding.report import GRAPH_INPUT, GRAPH_OUTPUT, Neighbour

# A value may have hundreds of users. What is nearest is kept.
MOST = 16


# A node, or where a value enters or leaves the graph.
Place: TypeAlias = ir.Node | tuple[str, ir.Value]


def neighbours(node: ir.Node, steps: int = 2) -> tuple[Neighbour, ...]:
    """Return what is within some steps of a node, along its edges in either direction, the node itself first.

    Constants are left out; the inputs and outputs of the graph count as nodes.
    """
    found: dict[Place, int] = {node: 0}
    waiting: deque[Place] = deque([node])
    while waiting and len(found) < MOST:
        place = waiting.popleft()
        if found[place] == steps:
            break
        for near in islice((near for near in _adjacent(place) if near not in found), MOST):
            found[near] = found[place] + 1
            waiting.append(near)
    return tuple(_neighbour(place) for place in list(found)[:MOST])


def _adjacent(place: Place) -> Iterator[Place]:
    if isinstance(place, ir.Node):
        inputs, outputs = _data(place), list(place.outputs)
    else:
        kind, value = place
        inputs, outputs = ([], [value]) if kind == GRAPH_INPUT else ([value], [])
    for value in inputs:
        yield value.producer() or (GRAPH_INPUT, value)
    for value in outputs:
        yield from (use.node for use in value.uses())
        if value.is_graph_output():
            yield GRAPH_OUTPUT, value


def _neighbour(place: Place) -> Neighbour:
    if not isinstance(place, ir.Node):
        kind, value = place
        names = (value.name or "",)
        return Neighbour(names[0], kind, () if kind == GRAPH_INPUT else names, names if kind == GRAPH_INPUT else ())
    op_type = place.op_type if place.domain in STANDARD_DOMAINS else f"{place.domain}::{place.op_type}"
    inputs = tuple(value.name or "" for value in _data(place))
    return Neighbour(display_name(place), op_type, inputs, tuple(value.name for value in place.outputs if value.name))


def _data(node: ir.Node) -> list[ir.Value]:
    """Return the inputs that are computed or given at run time, each once."""
    present = dict.fromkeys(value for value in node.inputs if value is not None)
    return [value for value in present if constant_source(value) is None or value.is_graph_input()]
