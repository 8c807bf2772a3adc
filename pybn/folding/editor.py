"""Changing a graph: what a plan says of nodes and values, and a node taken out.

One invariant holds throughout: a value whose name is in both the original and the folded model
carries the same data in both. A value whose data changes gets a new name; one that takes over the
data of another takes its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import onnx_ir as ir

from pybn.folding.affine import Array
from pybn.folding.graph import (
    OVERRIDABLE_SINCE_IR,
    PASSED_BY_CONSTANTS,
    STANDARD_DOMAINS,
    constant_source,
    display_name,
    scopes,
)
from pybn.folding.steps import Insert, Quantized, Rewrite

# Operators with one output by which a constant may reach its user.
_OF_CONSTANTS = ("Constant", "DequantizeLinear", *PASSED_BY_CONSTANTS)


class Editor:
    """Changes the working copy of a model, keeping its names and what others still use."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._functions = {id(function.graph) for function in model.functions.values()}
        # Node names are used as names of values, so neither may take one of the other.
        self._names = {value.name for scope in scopes(model) for value in _all_values(scope.graph) if value.name}
        self._names |= {node.name for scope in scopes(model) for node in scope.graph if node.name}
        self._made: set[str] = set()
        # Where to go on counting: a thousand operators may share one weight.
        self._next: dict[str, int] = {}

    def apply(self, rewrites: Iterable[Rewrite], changed: Iterable[ir.Value]) -> dict[ir.Value, ir.Value]:
        """Give nodes their new constants and form, and values that carry other data new names.

        Returns
        -------
        dict
            Where operators were put behind a node: its old output, and what produces that data now.
        """
        moved: dict[ir.Value, ir.Value] = {}
        for rewrite in rewrites:
            node = rewrite.node
            for index, constant in sorted(rewrite.constants.items()):
                if constant is None:
                    self._take_away(node, index)
                elif isinstance(constant, Quantized):
                    self._set_quantized(node, index, constant)
                else:
                    self._set_constant(node, index, constant)
            for name, item in rewrite.attributes.items():
                node.attributes.pop(name, None)
                if item is not None:
                    node.attributes[name] = ir.convenience.convert_attribute(name, item)
            node.op_type = rewrite.op_type or node.op_type
            if rewrite.after:
                moved[node.outputs[0]] = self._insert_after(node, rewrite.after)
        for value in changed:
            value = moved.get(value, value)
            assert value.name is not None
            if value.name not in self._made:
                value.name = self._unused_name(value.name)
        return moved

    def remove(self, node: ir.Node, data: int, value: ir.Value, *, renamed: bool) -> None:
        """Take out a node, whose input `data` it was; its users get `value` instead.

        If `renamed`, `value` takes over the name and description of the node's output.
        """
        output, graph = node.outputs[0], node.graph
        assert graph is not None
        parameters = _others(node, data)
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if renamed:
            _describe_as(value, output)
        for parameter in parameters:
            self._release(parameter)

    def replace(self, node: ir.Node, op_type: str, data: int, constant: Array) -> None:
        """Turn a node into an operator with a constant: ``op_type(data, constant)``."""
        value, parameters = node.inputs[data], _others(node, data)
        node.resize_outputs(1)
        node.resize_inputs(2)
        node.attributes.clear()
        node.op_type = op_type
        node.replace_input_with(0, value)
        node.replace_input_with(1, None)
        for parameter in parameters:
            self._release(parameter)
        self._set_constant(node, 1, constant)

    def _insert_after(self, node: ir.Node, inserts: Iterable[Insert]) -> ir.Value:
        """Put operators behind a node; the last one produces the value of this name from now on."""
        output = node.outputs[0]
        graph = node.graph
        assert graph is not None
        name = output.name
        assert name is not None
        nodes: list[ir.Node] = []
        for insert in inserts:
            value = nodes[-1].outputs[0] if nodes else output
            label = self._unused_name(f"{display_name(node)}.{insert.op_type}")
            new = ir.Node("", insert.op_type, [value], num_outputs=1, name=label)
            graph.insert_after(nodes[-1] if nodes else node, new)
            new.outputs[0].type, new.outputs[0].shape = output.type, output.shape
            new.outputs[0].name = self._unused_name(name)
            for index, constant in enumerate(insert.constants, start=1):
                self._set_constant(new, index, constant)
            nodes.append(new)
        last = nodes[-1].outputs[0]
        output.replace_all_uses_with(last, replace_graph_outputs=True)
        nodes[0].replace_input_with(0, output)
        spare = last.name
        _describe_as(last, output)
        output.name = spare
        return last

    def _set_quantized(self, node: ir.Node, index: int, constant: Quantized) -> None:
        """Give a node its own DequantizeLinear with new integers and scales."""
        old = node.inputs[index]
        assert old is not None
        dequantize = old.producer()
        assert dequantize is not None
        attributes = {**dequantize.attributes, "axis": ir.AttrInt64("axis", constant.axis)}
        if constant.scale.ndim == 0:
            attributes.pop("axis")
        base = display_name(dequantize)
        new = ir.Node(
            "", "DequantizeLinear", dequantize.inputs, attributes.values(), num_outputs=1, name=self._unused_name(base)
        )
        new.outputs[0].type, new.outputs[0].shape = old.type, old.shape
        new.outputs[0].name = self._unused_name(old.name or base)
        assert node.graph is not None
        node.graph.insert_before(node, new)
        node.replace_input_with(index, new.outputs[0])
        self._release(old)
        self._set_constant(new, 0, constant.values)
        self._set_constant(new, 1, constant.scale)
        if constant.zero_point is not None:
            self._set_constant(new, 2, constant.zero_point)

    def _set_constant(self, node: ir.Node, index: int, array: Array) -> None:
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is not None and self._is_private(old):
            # The usual case: the operator's own initializer keeps its name and place.
            old.const_value = ir.tensor(array, name=old.name)
            old.type = ir.TensorType(old.const_value.dtype)
            old.shape = ir.Shape(array.shape)
            return
        # A new constant is of the same kind, and in the same graph, as the one it comes from;
        # one that was absent follows another constant of the node, such as a bias the weight.
        siblings = [constant_source(value) for value in (old, *node.inputs[1:], *node.inputs[:1])]
        source = next((value for value in siblings if value is not None), None)
        base = f"{display_name(node)}.{'bias' if index == 2 else 'constant'}"
        if old is not None and source is not None and source.name:
            base = source.name
        new = self._new_constant(node, self._unused_name(base), array, source)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)
        if old is not None:
            self._release(old)

    def _new_constant(self, node: ir.Node, name: str, array: Array, source: ir.Value | None) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        graph = node.graph if source is None or source.graph is None else source.graph
        assert graph is not None
        old_style = self._model.ir_version < OVERRIDABLE_SINCE_IR
        as_node = source is not None and source.producer() is not None
        # Functions have no initializers. Before IR version 4 initializers were inputs, which subgraphs do not have.
        if as_node or id(graph) in self._functions or (old_style and graph is not self._model.graph):
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=f"{name}.constant")
            constant.outputs[0].name = name
            assert node.graph is not None
            node.graph.insert_before(node, constant)
            return constant.outputs[0]
        new = ir.Value(name=name, const_value=tensor)
        new.type = ir.TensorType(tensor.dtype)
        new.shape = ir.Shape(array.shape)
        graph.register_initializer(new)
        if old_style:
            graph.inputs.append(new)
        return new

    def _take_away(self, node: ir.Node, index: int) -> None:
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is not None:
            node.replace_input_with(index, None)
            self._release(old)
        while node.inputs and node.inputs[-1] is None:
            node.resize_inputs(len(node.inputs) - 1)

    def _is_private(self, value: ir.Value) -> bool:
        return value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output()

    def _release(self, value: ir.Value) -> None:
        """Remove a constant that the fold was the last to use."""
        producer, graph = value.producer(), value.graph
        if value.uses() or value.is_graph_output() or graph is None:
            return
        if producer is not None:
            if producer.domain in STANDARD_DOMAINS and producer.op_type in _OF_CONSTANTS:
                inputs = [item for item in producer.inputs if item is not None]
                graph.remove(producer, safe=True)
                for item in inputs:
                    self._release(item)
        elif value.is_initializer():
            if value.is_graph_input():
                if self._model.ir_version >= OVERRIDABLE_SINCE_IR:
                    return
                graph.inputs.remove(value)
            assert value.name is not None
            del graph.initializers[value.name]

    def _unused_name(self, base: str) -> str:
        base = re.sub(r"\.folded\d*$", "", base)
        name, count = f"{base}.folded", self._next.get(base, 2)
        while name in self._names:
            name, count = f"{base}.folded{count}", count + 1
        self._next[base] = count
        self._names.add(name)
        self._made.add(name)
        return name


def _others(node: ir.Node, data: int) -> list[ir.Value]:
    return [item for index, item in enumerate(node.inputs) if index != data and item is not None]


def _describe_as(value: ir.Value, other: ir.Value) -> None:
    """Let a value take over the name and description of another that it replaces."""
    value.name = other.name
    value.doc_string = other.doc_string
    value.metadata_props.clear()
    value.metadata_props.update(other.metadata_props)
    value.type = other.type or value.type
    value.shape = other.shape or value.shape


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
