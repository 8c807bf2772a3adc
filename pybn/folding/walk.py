"""Carrying a map through the graph, from operator to operator, until all of it is absorbed.

A walk changes nothing. It ends with a `Plan` of everything that is to change, or with a `Refusal`:
all or nothing. A node is visited at most once per plan, so no rule sees what another has planned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import islice

import onnx_ir as ir

from pybn.folding import sources
from pybn.folding.affine import Affine, is_supported, round_to
from pybn.folding.backward import BACKWARD
from pybn.folding.forward import FORWARD
from pybn.folding.graph import AttributeNotConstant, Facts, display_name, standard_type
from pybn.folding.reasons import FoldError, Reason, Refusal
from pybn.folding.steps import Rewrite, Rule, Step

# Operators whose broadcasting is that of NumPy only since an opset.
BROADCASTS_SINCE = {"Add": 7, "Sub": 7, "Mul": 7, "Div": 7, "PRelu": 7, "Max": 8, "Min": 8, "Sum": 8}

# How far a map is carried: each level is two Python frames, whose number is limited.
DEEPEST = 200
# How many rules are asked for one plan, alternatives included.
MOST_STEPS = 250
# How many users of a value are looked at to say why it cannot change; it may have thousands.
MOST_USERS = 16


@dataclass(frozen=True)
class Plan:
    """Everything that is to change for a map to disappear.

    Attributes
    ----------
    rewrites : tuple of Rewrite
        What becomes of the nodes.
    changed : tuple of ir.Value
        The values that will carry other data than before.
    passed, absorbers : tuple of ir.Node
        The nodes visited, nearest first: those that carry the map on, and those that end it.
    cost : int
        Operators that it adds.
    """

    rewrites: tuple[Rewrite, ...] = ()
    changed: tuple[ir.Value, ...] = ()
    passed: tuple[ir.Node, ...] = ()
    absorbers: tuple[ir.Node, ...] = ()
    cost: int = 0

    def __add__(self, other: Plan) -> Plan:
        """Return both plans as one."""
        return Plan(
            self.rewrites + other.rewrites,
            self.changed + other.changed,
            self.passed + other.passed,
            self.absorbers + other.absorbers,
            self.cost + other.cost,
        )

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Every node that the plan visits, once."""
        return tuple(dict.fromkeys(self.passed + self.absorbers))


class Walk:
    """One walk, in either direction.

    Parameters
    ----------
    facts : Facts
        What is known of the model.
    frozen : collection of ir.Node
        Nodes that must stay as they are.
    """

    def __init__(self, facts: Facts, frozen: Collection[ir.Node] = ()) -> None:
        self._facts = facts
        self._frozen = frozen
        self._steps = 0

    def backward(
        self, affine: Affine, user: ir.Node, index: int, visited: frozenset[ir.Node] = frozenset(), depth: int = 0
    ) -> Plan | Refusal:
        """Plan that `user` gets ``affine(x)`` at an input where it got ``x``, from those who make it."""
        if affine.is_identity:
            return Plan()
        value = user.inputs[index]
        if self._facts.constant(value) is not None:
            return self._into_constant(affine, user, index)
        producer = self._only_feeds(user, index)
        if isinstance(producer, Refusal):
            return producer
        assert value is not None
        step = self._ask(BACKWARD, producer, producer.outputs.index(value), affine, visited, depth)
        if isinstance(step, Refusal):
            return step

        def whole(way: Step) -> Plan | Refusal:
            # Only one value feeds `user` here, so everything that changes hangs on this producer.
            plan = self._visit(producer, way)
            for at, carry in way.carries:
                more = self.backward(carry, producer, at, visited | {user, *plan.nodes}, depth + 1)
                if isinstance(more, Refusal):
                    return more
                plan += more
            return Plan(changed=(value,)) + plan

        return _cheapest(step, whole)

    def forward(
        self, affine: Affine, value: ir.Value, visited: frozenset[ir.Node] = frozenset(), depth: int = 0
    ) -> Plan | Refusal:
        """Plan that all who use `value`, which is ``affine(x)``, can be given ``x`` for it."""
        plan = Plan()
        if affine.is_identity:
            return plan
        if value.is_graph_output():
            return Refusal(Reason.GRAPH_OUTPUT, f"{value.name!r} is a graph output")
        for use in value.uses():
            more = self._forward_into(use.node, use.idx, affine, value, visited.union(plan.nodes), depth)
            if isinstance(more, Refusal):
                return more
            plan += more
        return plan

    def _forward_into(
        self, node: ir.Node, index: int, affine: Affine, value: ir.Value, visited: frozenset[ir.Node], depth: int
    ) -> Plan | Refusal:
        producer = value.producer()
        if producer is not None and node.graph is not producer.graph:
            return Refusal(Reason.SUBGRAPH_CAPTURE, f"{value.name!r} is used by {display_name(node)} in a subgraph")
        step = self._ask(FORWARD, node, index, affine, visited, depth)
        if isinstance(step, Refusal):
            return step

        def whole(way: Step) -> Plan | Refusal:
            plan = self._visit(node, way)
            for at, carry in way.carries:
                output = node.outputs[at]
                more = self.forward(carry, output, visited.union(plan.nodes), depth + 1)
                if isinstance(more, Refusal):
                    return more
                plan += more
                plan += Plan(changed=() if carry.is_identity else (output,))
            return plan

        return _cheapest(step, whole)

    def _ask(
        self,
        table: Mapping[str, Rule],
        node: ir.Node,
        index: int,
        affine: Affine,
        visited: Collection[ir.Node],
        depth: int,
    ) -> Step | Refusal:
        """Ask the rule of a node, if it has one and may be changed."""
        backward = table is BACKWARD
        follows = "it follows" if backward else "it is followed by"
        no_rule = Reason.NO_LINEAR_PRODUCER if backward else Reason.NO_LINEAR_CONSUMER
        op_type = standard_type(node, self._facts.model)
        self._steps += 1
        if op_type is None:
            return Refusal(Reason.FOREIGN_DOMAIN, f"{follows} {node.domain or 'the local function'}::{node.op_type}")
        if node in visited:
            return Refusal(Reason.MEETS_ITSELF, f"two ways of the map meet at {op_type} {display_name(node)}")
        if node in self._frozen:
            return Refusal(Reason.SKIPPED, f"{op_type} {display_name(node)} is to stay as it is")
        if depth > DEEPEST or self._steps > MOST_STEPS:
            return Refusal(Reason.TOO_FAR, f"the map was followed over {min(depth, self._steps)} operators")
        if backward and index > 0 and op_type != "Split":
            return Refusal(no_rule, f"{follows} a secondary output of {op_type}")
        try:
            rule = sources.rule(node, self._facts, backward=backward) or table.get(op_type)
            if rule is None:
                return Refusal(no_rule, f"{follows} {op_type}")
            self._require_broadcasting(node, op_type)
            step = rule(node, index, affine, self._facts)
            way = step if isinstance(step, Step) else None
            while way is not None:
                for rewrite in way.rewrites:
                    self._require_broadcasting(
                        node, *(insert.op_type for insert in rewrite.after), rewrite.op_type or op_type
                    )
                way = way.otherwise
            return step
        except FoldError as error:
            return Refusal(error.reason, str(error))
        except AttributeNotConstant as error:
            return Refusal(Reason.ATTRIBUTE_NOT_CONSTANT, f"{error} of {op_type} is a parameter of the local function")

    def _require_broadcasting(self, node: ir.Node, *op_types: str) -> None:
        """Raise FoldError for an operator that broadcasts, where it did not yet, or in another way."""
        opset = self._facts.opset(node)
        for op_type in op_types:
            if opset < BROADCASTS_SINCE.get(op_type, 0):
                raise FoldError(Reason.OLD_OPSET, f"{op_type} of opset {opset} broadcasts in another way")

    @staticmethod
    def _visit(node: ir.Node, step: Step) -> Plan:
        if any(not carry.is_identity for _, carry in step.carries):
            return Plan(step.rewrites, passed=(node,), cost=step.cost)
        return Plan(step.rewrites, absorbers=(node,), cost=step.cost)

    def _into_constant(self, affine: Affine, user: ir.Node, index: int) -> Plan | Refusal:
        """Apply the map to a constant operand itself."""
        array = self._facts.constant(user.inputs[index])
        assert array is not None
        if not is_supported(array.dtype):
            return Refusal(Reason.UNSUPPORTED_DTYPE, f"an operand of {user.op_type} is {array.dtype}")
        try:
            mapped = round_to(affine.of(array), array.dtype, "the folded constant")
        except FoldError as error:
            return Refusal(error.reason, str(error))
        return Plan((Rewrite(user, {index: mapped}),), absorbers=(user,))

    def _only_feeds(self, user: ir.Node, index: int) -> ir.Node | Refusal:
        """Return the producer of an input, if its output goes nowhere else."""
        value = user.inputs[index] if index < len(user.inputs) else None
        producer = None if value is None else value.producer()
        if value is None or producer is None:
            what = "a graph input" if value is not None and value.is_graph_input() else "not a node's"
            name = value.name if value is not None else ""
            return Refusal(Reason.NO_LINEAR_PRODUCER, f"its input {name!r} is {what}")
        where = f"the output {value.name!r} of {producer.op_type}"
        if value.is_graph_output():
            return Refusal(Reason.GRAPH_OUTPUT, f"{where} is a graph output")
        if producer.graph is not user.graph:
            return Refusal(Reason.SUBGRAPH_CAPTURE, f"{where} belongs to an outer graph")
        others = [use.node for use in islice(value.uses(), MOST_USERS) if (use.node, use.idx) != (user, index)]
        captured = [node for node in others if node.graph is not producer.graph]
        if captured:
            return Refusal(
                Reason.SUBGRAPH_CAPTURE, f"{where} is also used by {display_name(captured[0])} in a subgraph"
            )
        if others:
            return Refusal(
                Reason.OTHER_CONSUMER, f"{where} is also used by {others[0].op_type} {display_name(others[0])}"
            )
        return producer


def _cheapest(step: Step, whole: Callable[[Step], Plan | Refusal]) -> Plan | Refusal:
    """Follow the ways of a step until one costs nothing; if all are closed, say why the first is."""
    cheapest: Plan | None = None
    refusal: Refusal | None = None
    way: Step | None = step
    while way is not None and (cheapest is None or cheapest.cost > 0):
        plan = whole(way)
        if isinstance(plan, Refusal):
            refusal = refusal or plan
        elif cheapest is None or plan.cost < cheapest.cost:
            cheapest = plan
        way = way.otherwise
    answer = cheapest or refusal
    assert answer is not None
    return answer
