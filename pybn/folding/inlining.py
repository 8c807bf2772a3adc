"""Local functions put where they are called, so that their values can be seen from outside."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from pybn.folding.graph import scopes

# Where a node was before: the label of its graph, and the names of its outputs.
ORIGIN = "pybn.origin"


def inline(model: ir.Model) -> ir.Model:
    """Inline, in place, every local function for which that is possible.

    Both a model and what a fold made of it get the same names: a value of a function is named as in the function, and
    numbered if the name is taken.
    """
    if not model.functions:
        return model
    for scope in scopes(model):
        for node in scope.graph:
            node.meta[ORIGIN] = (scope.label, tuple(output.name or "" for output in node.outputs))
    InlinePass(lambda function: _can_be_inlined(function, model))(model)
    return model


def origin(value: ir.Value, label: str) -> tuple[str, str]:
    """Return the graph and the name that a value of the graph `label` had before it was inlined."""
    producer = value.producer()
    if producer is None or ORIGIN not in producer.meta:
        return label, value.name or ""
    graph, names = producer.meta[ORIGIN]
    return graph, names[value.index() or 0]


def _can_be_inlined(function: ir.Function, model: ir.Model) -> bool:
    same_opsets = all(
        model.opset_imports.get(domain, version) == version for domain, version in function.opset_imports.items()
    )
    # An input that is also an output would be renamed where it comes from.
    own_outputs = all(output.producer() is not None for output in function.outputs)
    distinct = len(set(function.outputs)) == len(function.outputs)
    no_graph_parameters = not any(
        item.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for item in function.attributes.values()
    )
    return same_opsets and own_outputs and distinct and no_graph_parameters
