"""Changing a graph: new constants for a node, and a batch norm taken out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from pybn.folding.affine import Array
from pybn.folding.graph import OVERRIDABLE_SINCE_IR, constant_source, display_name, scopes
from pybn.folding.rules import Rewrite


class Editor:
    """Changes the working copy of a model, keeping its names and what others still use."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._settled: set[ir.Value] = set()
        self._names = {value.name for scope in scopes(model) for value in _all_values(scope.graph) if value.name}

    def apply(self, rewrites: tuple[Rewrite, ...]) -> None:
        """Give the nodes their new constants and form."""
        for rewrite in rewrites:
            node = rewrite.node
            for index, array in sorted(rewrite.constants.items()):
                self._set_constant(node, index, array)
            for name in rewrite.dropped_attributes:
                node.attributes.pop(name, None)
            node.op_type = rewrite.op_type

    def remove(self, batch_norm: ir.Node) -> None:
        """Remove a batch norm whose map has been absorbed by what produces its input."""
        value, output = batch_norm.inputs[0], batch_norm.outputs[0]
        graph = batch_norm.graph
        assert value is not None
        assert graph is not None
        parameters = [parameter for parameter in batch_norm.inputs[1:] if parameter is not None]
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(batch_norm, safe=True)
        # The value takes over the name and description of the batch norm's output: it carries
        # that data now, and graph outputs and captures by subgraphs keep their names.
        value.name = output.name
        self._settled.add(value)
        value.doc_string = output.doc_string
        value.metadata_props.clear()
        value.metadata_props.update(output.metadata_props)
        value.type = output.type or value.type
        value.shape = output.shape or value.shape
        for parameter in parameters:
            self._release(parameter)

    def rename_changed(self, nodes: Iterable[ir.Node]) -> None:
        """Give new names to values that carry other data now: a name of both models means the same data in both."""
        for value in dict.fromkeys(node.outputs[0] for node in nodes):
            if value not in self._settled:
                value.name = self._unused_name(value.name or "value")

    def _set_constant(self, node: ir.Node, index: int, array: Array) -> None:
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is not None and self._is_private(old):
            # The usual case: the operator's own initializer keeps its name and place.
            old.const_value = ir.tensor(array, name=old.name)
            old.shape = ir.Shape(array.shape)
            return
        # A new constant is of the same kind, and in the same graph, as the one it comes from;
        # a bias that was absent follows the weight.
        source = constant_source(old if old is not None else node.inputs[1])
        assert source is not None
        assert source.name is not None
        base = source.name if old is not None else f"{display_name(node)}.bias"
        name = self._unused_name(base)
        tensor = ir.tensor(array, name=name)
        producer = source.producer()
        if producer is None:
            new = ir.Value(name=name, const_value=tensor)
            new.type = ir.TensorType(tensor.dtype)
            new.shape = ir.Shape(array.shape)
            graph = source.graph
            assert graph is not None
            graph.register_initializer(new)
            if source.is_graph_input():
                graph.inputs.append(new)
        else:
            constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], name=f"{name}.constant")
            new = constant.outputs[0]
            new.name = name
            assert node.graph is not None
            node.graph.insert_before(node, constant)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)
        if old is not None:
            self._release(old)

    def _is_private(self, value: ir.Value) -> bool:
        return value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output()

    def _release(self, value: ir.Value) -> None:
        """Remove a constant that the fold was the last to use."""
        if value.uses() or value.is_graph_output():
            return
        producer = value.producer()
        graph = value.graph
        if graph is None:
            return
        if producer is None:
            if not value.is_initializer():
                return
            if value.is_graph_input():
                if self._model.ir_version >= OVERRIDABLE_SINCE_IR:
                    return
                graph.inputs.remove(value)
            assert value.name is not None
            del graph.initializers[value.name]
        elif all(not output.uses() for output in producer.outputs):
            inputs = [item for item in producer.inputs if item is not None]
            graph.remove(producer, safe=True)
            for item in inputs:
                self._release(item)

    def _unused_name(self, base: str) -> str:
        name, count = f"{base}.folded", 2
        while name in self._names:
            name, count = f"{base}.folded{count}", count + 1
        self._names.add(name)
        return name


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
