"""Where two models differ: values of both whose defining expressions are not the same.

A value name that is in both models carries the same data; that is what a fold promises. So the difference of two
models comes in small pieces. The *expression* of a value are the nodes from which it is computed, back to the nearest
values that both models have, the *entries*. A name whose expression differs between the models is a `Segment`. If every
segment computes the same function of its entries, then, by induction in graph order, so do the models.

Constants have no name here: they are compared by value, with all that is computed from them alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from pybn.folding.graph import Facts, Scope, scopes

# File, offset and length of external data.
Place: TypeAlias = tuple[str, int, int | None]


@dataclass(frozen=True)
class Expression:
    """A value as a function of values that both models have.

    Attributes
    ----------
    output : onnx_ir.Value
        The value.
    nodes : tuple of onnx_ir.Node
        What computes it, operands before their users.
    entries : tuple of onnx_ir.Value
        The values of both models that it starts from.
    constants : tuple of onnx_ir.Value
        Initializers and outputs of Constant nodes.
    opset : int
        The version of the standard operators.
    facts : Facts
        The model that it is in.
    """

    output: ir.Value
    nodes: tuple[ir.Node, ...]
    entries: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]
    opset: int
    facts: Facts

    @property
    def name(self) -> str:
        """The name of the value."""
        return self.output.name or ""


@dataclass(frozen=True)
class Segment:
    """A value of both models that they compute in different ways."""

    original: Expression
    folded: Expression
    scope: Scope

    @property
    def name(self) -> str:
        """The name of the value."""
        return self.original.name

    @cached_property
    def entries(self) -> tuple[str, ...]:
        """Names of the values that either expression starts from."""
        values = (*self.original.entries, *self.folded.entries)
        return tuple(dict.fromkeys(value.name or "" for value in values))


class DifferentInterface(ValueError):
    """The models do not have the same graphs or graph outputs. The message is one line."""


def segments(original: ir.Model, folded: ir.Model) -> list[Segment]:
    """Find every value of both models whose defining expression differs, in the original's graph order.

    Raises
    ------
    DifferentInterface
        If a graph or subgraph is in one model only, or its outputs are not the same.
    """
    pairs = list(_paired_scopes(original, folded))
    shared = _external_places(original) & _external_places(folded)
    sides = (_Side(original, shared), _Side(folded, shared))
    for before, after in pairs:
        common = _common_names(before, after, sides)
        for side, scope in zip(sides, (before, after), strict=True):
            side.read(scope, common)
    return [
        Segment(sides[0].expression(name, before), sides[1].expression(name, after), before)
        for before, after in pairs
        for name, definition in sides[0].definitions[before.label].items()
        if definition != sides[1].definitions[after.label][name]
    ]


def _paired_scopes(original: ir.Model, folded: ir.Model) -> Iterator[tuple[Scope, Scope]]:
    after = {scope.label: scope for scope in scopes(folded)}
    for scope in scopes(original):
        if scope.label not in after:
            raise DifferentInterface(f"the folded model lacks the graph {scope.label}")
        other = after[scope.label]
        names = [[output.name for output in graph.outputs] for graph in (scope.graph, other.graph)]
        if names[0] != names[1]:
            raise DifferentInterface(f"the outputs of {scope.label} are {names[1]}, expected {names[0]}")
        yield scope, other


def _common_names(before: Scope, after: Scope, sides: tuple[_Side, _Side]) -> set[str]:
    """Return the names that nodes of both graphs produce, and that are more than constants."""
    produced = [
        {output.name: output for node in scope.graph for output in node.outputs if output.name}
        for scope in (before, after)
    ]
    outputs = {output.name for output in before.graph.outputs}
    return {
        name
        for name in produced[0].keys() & produced[1].keys()
        if name in outputs
        or not all(side.is_constant(values[name]) for side, values in zip(sides, produced, strict=True))
    }


class _Side:
    """What is known of the values of one of the two models, and which tensors need not be read to know them equal."""

    def __init__(self, model: ir.Model, shared: set[Place]) -> None:
        self.facts = Facts(model)
        self._shared = shared
        # By the label of the graph and the name of the value: what it is computed from, as a digest.
        self.definitions: dict[str, dict[str, bytes]] = {}
        self._common: set[ir.Value] = set()
        self._digests: dict[ir.Value, bytes] = {}
        self._constants: dict[ir.Value, bool] = {}
        for scope in scopes(model):
            for node in scope.graph:
                constant = _is_deterministic(node) and all(self.is_constant(value) for value in _operands(node))
                self._constants.update(dict.fromkeys(node.outputs, constant))

    def is_constant(self, value: ir.Value) -> bool:
        """Say whether no input of the model can change the value."""
        if value.producer() is None:
            return value.is_initializer() and not self.facts.is_overridable(value)
        return self._constants.get(value, False)

    def read(self, scope: Scope, common: set[str]) -> None:
        """Describe every value of a graph in terms of the common ones; outer graphs come first."""
        definitions = self.definitions.setdefault(scope.label, {})
        for node in scope.graph:
            digest = self._digest_of(node)
            for index, output in enumerate(node.outputs):
                definition = _hash(digest, str(index).encode())
                self._digests[output] = definition
                if output.name in common:
                    definitions[output.name] = definition
                    self._common.add(output)
                    self._digests[output] = _hash(b"name", output.name.encode())

    def expression(self, name: str, scope: Scope) -> Expression:
        """Collect the nodes of a common value, back to the nearest common ones."""
        output = next(value for node in scope.graph for value in node.outputs if value.name == name)
        nodes: dict[ir.Node, None] = {}
        entries: dict[ir.Value, None] = {}
        constants: dict[ir.Value, None] = {}
        producer = output.producer()
        assert producer is not None
        pending = [(producer, False)]
        while pending:  # depth first, and without recursion, because expressions may be long
            node, operands_done = pending.pop()
            if operands_done:
                nodes[node] = None
            elif node not in nodes:
                pending.append((node, True))
                for value in _operands(node):
                    source = value.producer()
                    if value in self._common or (source is None and not self.is_constant(value)):
                        entries[value] = None
                    elif source is None or source.op_type == "Constant":
                        constants[value] = None
                    else:
                        pending.append((source, False))
        return Expression(output, tuple(nodes), tuple(entries), tuple(constants), scope.opset, self.facts)

    def _digest_of(self, node: ir.Node) -> bytes:
        parts = [node.domain.encode(), node.op_type.encode(), node.overload.encode()]
        for item in sorted(node.attributes.values(), key=lambda item: item.name):
            parts.append(item.name.encode())
            # What is inside a subgraph is compared value by value; here it counts for the values that it captures.
            if not _is_graph(item):
                parts.append(_attribute_bytes(item))
        parts += [b"" if value is None else self._digest(value) for value in node.inputs]
        parts += [self._digest(value) for value in _captured(node) if not self.is_constant(value)]
        return _hash(*parts)

    def _digest(self, value: ir.Value) -> bytes:
        if value not in self._digests:
            tensor = value.const_value if self.is_constant(value) else None
            place = None if tensor is None else _external_place(tensor)
            if tensor is None:  # a graph input is in both models
                digest = _hash(b"name", (value.name or "").encode())
            elif place is not None and place in self._shared:
                digest = _hash(b"place", repr((place, tensor.dtype, tensor.shape)).encode())
            else:
                digest = _tensor_digest(tensor)
            self._digests[value] = digest
        return self._digests[value]


def _external_places(model: ir.Model) -> set[Place]:
    tensors = (value.const_value for scope in scopes(model) for value in scope.graph.initializers.values())
    places = (_external_place(tensor) for tensor in tensors if tensor is not None)
    return {place for place in places if place is not None}


def _external_place(tensor: ir.TensorProtocol) -> Place | None:
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return str(tensor.path), tensor.offset or 0, tensor.length


def _operands(node: ir.Node) -> list[ir.Value]:
    """Return all values that a node needs, those that its subgraphs capture among them."""
    return [value for value in node.inputs if value is not None] + _captured(node)


def _captured(node: ir.Node) -> list[ir.Value]:
    graphs = [graph for item in node.attributes.values() for graph in _graphs(item)]
    if not graphs:
        return []
    inside = {graph for outer in graphs for graph in (outer, *outer.subgraphs())}
    used = [value for graph in inside for inner in graph for value in inner.inputs]
    used += [value for graph in inside for value in graph.outputs]
    outer = (value for value in used if value is not None and value.graph not in inside)
    return sorted(dict.fromkeys(outer), key=lambda value: value.name or "")


def _graphs(item: ir.Attr) -> list[ir.Graph]:
    if item.is_ref() or not _is_graph(item):
        return []
    return [item.as_graph()] if item.type == ir.AttributeType.GRAPH else list(item.as_graphs())


def _is_graph(item: ir.Attr) -> bool:
    return item.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _is_deterministic(node: ir.Node) -> bool:
    return not node.op_type.startswith(("Random", "Bernoulli", "Multinomial"))


def _attribute_bytes(item: ir.Attr) -> bytes:
    if not item.is_ref() and item.type == ir.AttributeType.TENSOR:
        return _tensor_digest(item.as_tensor())
    content: bytes = ir.to_proto(item).SerializeToString(deterministic=True)
    return content


def _tensor_digest(tensor: ir.TensorProtocol) -> bytes:
    array = tensor.numpy()
    # Strings are objects for NumPy. Anything else is hashed where it is, without a copy of it.
    content = (
        repr(array.tolist()).encode()
        if array.dtype == object
        else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    )
    return _hash(b"constant", str(tensor.dtype).encode(), str(array.shape).encode(), content)


def _hash(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
