"""From module to module, until all of a map is absorbed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from torch import fx, nn

from pybn.folding.affine import Affine
from pybn.folding.reasons import FoldError, Reason
from pybn.torch.fold_layers import Direction, is_norm, require_plain, require_types
from pybn.torch.fold_rules import (
    BACKWARD,
    FORWARD,
    Carried,
    Step,
    data_input,
    data_users,
    describe,
    is_view,
    known_rank,
    leaves_input_alone,
    operator_name,
)
from pybn.torch.fold_trace import Trace, has_hooks

# How far a map is carried: each level is two Python frames, whose number is limited.
DEEPEST = 150


@dataclass
class Plan:
    """All that is to change for a norm to disappear.

    Attributes
    ----------
    direction : str
        "backward" or "forward".
    absorbed : dict of Module to Carried
        Which layer absorbs what.
    route : list of Module or str
        What the map met, nearest first.
    rank : int or None
        The rank that the data of the norm is taken to have, if nothing proves it.
    """

    direction: Direction
    absorbed: dict[nn.Module, Carried] = field(default_factory=dict)
    route: list[str] = field(default_factory=list)
    rank: int | None = None


def plan(
    norm: nn.Module,
    affine: Affine,
    trace: Trace,
    direction: Direction,
    *,
    gone: Collection[nn.Module],
    kept: Collection[nn.Module],
    merges: bool,
) -> Plan:
    """Plan how all calls of a norm can be folded.

    Parameters
    ----------
    norm, affine : Module, Affine
        The norm and the map that it is.
    trace : Trace
        What flows in the network.
    direction : str
        Where the map is to go.
    gone, kept : collection of Module
        Norms that are folded already, and modules that must stay as they are.
    merges : bool
        Whether another norm may absorb it.

    Raises
    ------
    FoldError
        If that cannot be done.
    """
    walk = _Walk(trace, norm, direction, gone, kept, merges=merges)
    for call in trace.calls[norm]:
        walk.fold(call, affine)
    return walk.finished()


class _Walk:
    def __init__(
        self,
        trace: Trace,
        norm: nn.Module,
        direction: Direction,
        gone: Collection[nn.Module],
        kept: Collection[nn.Module],
        *,
        merges: bool,
    ) -> None:
        self._trace = trace
        self._norm = norm
        self._gone = gone
        self._kept = kept
        self._merges = merges
        self._plan = Plan(direction)
        self._visits: dict[nn.Module, dict[fx.Node, Carried]] = {}
        # Ranks that the data of the norm was taken to have, and those that it is known to have.
        self._assumed: set[int] = set()
        self._proven: set[int] = set()

    def fold(self, call: fx.Node, affine: Affine) -> None:
        """Carry the map of one call to where it is absorbed."""
        value = data_input(call)
        kind = operator_name(call)
        rank = int(kind[-2]) + 2 if kind in ("BatchNorm2d", "BatchNorm3d") else known_rank(value)
        if rank is not None:
            self._proven.add(rank)
        carried = Carried(affine, rank)
        if self._plan.direction == "backward":
            self._backward(value, call, carried, 0)
        else:
            if len(call.all_input_nodes) != 1 or getattr(self._norm, "activation", None) is not None:
                raise FoldError(Reason.NO_LINEAR_CONSUMER, "it is followed by its own activation or residual")
            self._require_unaliased(value, call)
            self._forward(call, carried, 0)

    def finished(self) -> Plan:
        """Return the plan, if every call of every layer absorbs the same."""
        for module, visits in self._visits.items():
            first, *others = visits.values()
            what = type(module).__name__
            if any(not _same(first, other) for other in others):
                raise FoldError(Reason.SHARED_MODULE, f"calls of one {what} would have to absorb different maps")
            if visits.keys() != set(self._trace.calls[module]):
                raise FoldError(
                    Reason.SHARED_MODULE, f"the {what} is called {len(self._trace.calls[module])} times, elsewhere too"
                )
            self._plan.absorbed[module] = first
        ranks = self._assumed | self._proven if self._assumed else set()
        if len(ranks) > 1:
            raise FoldError(Reason.CHANNEL_AXIS_UNPROVEN, f"calls of it would have data of {sorted(ranks)} axes")
        self._plan.rank = next(iter(ranks), None)
        return self._plan

    def _backward(self, value: fx.Node, consumer: fx.Node, carried: Carried, depth: int) -> None:
        """Make `consumer` get ``affine(value)`` where it got ``value``."""
        if carried.affine.is_identity:
            return
        self._require_only_use(value, consumer)
        step = self._ask(value, carried, depth)
        for node, more in step.inputs:
            self._backward(node, value, more, depth + 1)

    def _forward(self, value: fx.Node, carried: Carried, depth: int) -> None:
        """Make all users of `value` do with ``x`` where they got ``affine(x)``."""
        if carried.affine.is_identity:
            return
        for user in data_users(value):
            if user.op == "output":
                raise FoldError(Reason.GRAPH_OUTPUT, "its output leaves what was traced")
            if _uses(user, value) != 1 or value not in (*user.args[:1], user.kwargs.get("input")):
                raise FoldError(Reason.NO_LINEAR_CONSUMER, f"it is followed by {describe(user)}")
            step = self._ask(user, carried, depth)
            if step.output is not None:
                self._forward(user, step.output, depth + 1)

    def _ask(self, node: fx.Node, carried: Carried, depth: int) -> Step:
        """Ask the rule of an operator, and note what it does."""
        backward = self._plan.direction == "backward"
        module = node.meta["module"] if node.op == "call_module" else None
        rule = (BACKWARD if backward else FORWARD).get(operator_name(node))
        if module in self._gone:  # an identity by now
            rule = (BACKWARD if backward else FORWARD)["Identity"]
            if getattr(module, "activation", None) is not None or len(node.all_input_nodes) != 1:
                rule = None
        if rule is None:
            reason = Reason.NO_LINEAR_PRODUCER if backward else Reason.NO_LINEAR_CONSUMER
            raise FoldError(reason, f"it {'follows' if backward else 'is followed by'} {describe(node)}")
        if depth > DEEPEST:
            raise FoldError(Reason.TOO_FAR, f"the map was followed over {depth} operators")
        step = rule(node, carried)
        if step.absorbed is not None:
            assert module is not None
            self._require_absorber(module)
            self._visits.setdefault(module, {})[node] = step.absorbed
        elif module is not None and module not in self._gone and has_hooks(module):
            raise FoldError(Reason.HOOKS, f"{describe(node)} has hooks, which would see other values")
        self._plan.route.append(describe(node))
        after = [step.absorbed, step.output, *(more for _, more in step.inputs)]
        if carried.rank is None and not carried.flat:
            self._assumed |= {
                more.rank for more in after if more is not None and more.rank is not None and not more.flat
            }
        return step

    def _require_absorber(self, module: nn.Module) -> None:
        what = type(module).__name__
        if module in self._kept:
            raise FoldError(Reason.SKIPPED, f"the {what} is to stay as it is")
        if is_norm(module) and not self._merges:
            raise FoldError(Reason.NO_LINEAR_PRODUCER, f"it follows {what}")
        if module in self._trace.blind:
            raise FoldError(Reason.UNTRACED, f"the {what} may be used elsewhere: {self._trace.blind[module]}")
        require_plain(module)
        require_types(self._norm, module)
        if any(id(tensor) in self._trace.read for tensor in (module.weight, module.bias)):
            raise FoldError(Reason.WEIGHT_READ, f"other code uses the parameters of the {what}")
        if is_norm(module) and module.training:
            raise FoldError(Reason.TRAINING_MODE, f"the {what} before it is in training mode")

    def _require_only_use(self, value: fx.Node, consumer: fx.Node) -> None:
        """Raise FoldError if a value that is to change is used by anything but `consumer`, once."""
        if value.op == "placeholder":
            raise FoldError(Reason.NO_LINEAR_PRODUCER, "it follows an input")
        others = [user for user in data_users(value) if user is not consumer]
        if any(user.op == "output" for user in others):
            raise FoldError(Reason.GRAPH_OUTPUT, f"the output of {describe(value)} leaves what was traced")
        if others or _uses(consumer, value) != 1:
            by = describe(others[0]) if others else describe(consumer)
            raise FoldError(Reason.OTHER_CONSUMER, f"the output of {describe(value)} is also used by {by}")

    def _require_unaliased(self, value: fx.Node, call: fx.Node) -> None:
        """Raise FoldError if somebody may change a value in place that the users of a norm now read themselves."""
        for user in data_users(value):
            if user is not call:
                self._require_unchanged_by(user)
        if is_view(value):
            self._require_unaliased(data_input(value), value)

    def _require_unchanged_by(self, user: fx.Node) -> None:
        if is_view(user):
            for other in data_users(user):
                self._require_unchanged_by(other)
        elif user.op != "output" and not leaves_input_alone(user):
            raise FoldError(
                Reason.OTHER_CONSUMER, f"its input is also used by {describe(user)}, and maybe changed in place"
            )


def _uses(user: fx.Node, value: fx.Node) -> int:
    """Count how often a call is given a value."""

    def count(argument: object) -> Iterator[fx.Node]:
        if isinstance(argument, fx.Node):
            yield argument
        elif isinstance(argument, (tuple, list)):
            for item in argument:
                yield from count(item)
        elif isinstance(argument, dict):
            yield from count(list(argument.values()))

    return sum(node is value for node in count([user.args, user.kwargs]))


def _same(one: Carried, other: Carried) -> bool:
    return (
        replace(one, affine=other.affine) == other
        and np.array_equal(one.affine.scale, other.affine.scale)
        and np.array_equal(one.affine.shift, other.affine.shift)
    )
