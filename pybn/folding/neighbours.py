"""The surroundings of a node: what a report shows of a batch norm that stays."""

from __future__ import annotations

import onnx_ir as ir

from pybn.folding.graph import STANDARD_DOMAINS, constant_source, display_name
from pybn.folding.report import GRAPH_INPUT, GRAPH_OUTPUT, Neighbour

# A value may have hundreds of users. What is nearest is kept.
MOST = 24


def neighbours(node: ir.Node, steps: int = 2) -> tuple[Neighbour, ...]:
    """Return what is within some steps of a node, along its edges in either direction, the node itself first.

    Constants are left out; the inputs and outputs of the graph count as nodes.
    """
    found: dict[tuple[int, str], Neighbour] = {(id(node), node.op_type): _neighbour(node)}
    frontier = [node]
    for _ in range(steps):
        reached: list[ir.Node] = []
        for current in frontier:
            for value in (*_data(current), *current.outputs):
                for other in _ends(value):
                    if isinstance(other, Neighbour):
                        found.setdefault((id(value), other.op_type), other)
                    elif (id(other), other.op_type) not in found:
                        found[id(other), other.op_type] = _neighbour(other)
                        reached.append(other)
        frontier = reached
    return tuple(found.values())[:MOST]


def _ends(value: ir.Value) -> list[ir.Node | Neighbour]:
    """Return where a value comes from and where it goes."""
    name, producer = value.name or "", value.producer()
    ends: list[ir.Node | Neighbour] = []
    if producer is not None:
        ends.append(producer)
    elif name:
        ends.append(Neighbour(name, GRAPH_INPUT, (), (name,)))
    ends.extend(use.node for use in value.uses())
    if value.is_graph_output():
        ends.append(Neighbour(name, GRAPH_OUTPUT, (name,), ()))
    return ends


def _neighbour(node: ir.Node) -> Neighbour:
    op_type = node.op_type if node.domain in STANDARD_DOMAINS else f"{node.domain}::{node.op_type}"
    inputs = tuple(value.name or "" for value in _data(node))
    return Neighbour(display_name(node), op_type, inputs, tuple(o.name for o in node.outputs if o.name))


def _data(node: ir.Node) -> list[ir.Value]:
    """Return the inputs that are computed or given at run time, each once."""
    present = dict.fromkeys(value for value in node.inputs if value is not None)
    return [value for value in present if constant_source(value) is None or value.is_graph_input()]
