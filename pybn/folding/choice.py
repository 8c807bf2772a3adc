"""Choosing what becomes of one node that is a map: all ways to fold it, by what they cost.

The map ``a x + b`` may go whole, backward or forward, or in two parts: ``a`` one way and the shift
the other, since ``a x + b = a (x + b / a)``. A part that goes nowhere may stay where the node was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from pybn.folding.affine import Affine
from pybn.folding.graph import Facts
from pybn.folding.reasons import FoldError, Reason, Refusal
from pybn.folding.sources import Remainder, Source, remainder, require_room
from pybn.folding.walk import Plan, Walk


@dataclass(frozen=True)
class Choice:
    """One way to fold a node.

    Attributes
    ----------
    backward, forward : Plan or None
        What is to be done for the parts that go these ways.
    rest : Remainder or None
        What the node itself becomes; None: it goes.
    """

    backward: Plan | None = None
    forward: Plan | None = None
    rest: Remainder | None = None

    @property
    def plan(self) -> Plan:
        """Everything to be done."""
        return (self.backward or Plan()) + (self.forward or Plan())

    @property
    def gain(self) -> int:
        """Operators that disappear, less those that come. An Add for a batch norm is an even trade."""
        return (1 if self.rest is None else 0) - self.plan.cost

    @property
    def cost(self) -> int:
        """Operators that come."""
        return self.plan.cost + (0 if self.rest is None else 1)

    def describe(self) -> str:
        """Say what is done, in the same words for all nodes of a kind."""
        plan = self.plan
        ends = " and ".join(dict.fromkeys(node.op_type for node in plan.absorbers))
        added = [insert.op_type for rewrite in plan.rewrites for insert in rewrite.after]
        added += [
            f"{rewrite.op_type} for {rewrite.node.op_type}"
            for rewrite in plan.rewrites
            if rewrite.op_type in ("Max", "Min")
        ]
        if self.rest is not None:
            added.append(f"{self.rest.op_type} in its place")
        fewer = (1 if self.rest is None else 0) - sum(len(rewrite.after) for rewrite in plan.rewrites)
        brings = {1: "one operator less", 0: "as many operators as now", -1: "one operator more"}
        net = brings.get(fewer, f"{-fewer} operators more")
        way = " and ".join(
            word for word, part in (("backward", self.backward), ("forward", self.forward)) if part is not None
        )
        return f"fold it {way} into {ends or 'nothing'}" + (f", with {', '.join(added)}" if added else "") + f": {net}"


def choose(
    source: Source, facts: Facts, frozen: Collection[ir.Node], *, whole: bool, sufficient: int
) -> tuple[Choice | None, Refusal]:
    """Find the way to fold a node that gains the most.

    Parameters
    ----------
    source : Source
        The node, read as a map.
    facts : Facts
        What is known of the model.
    frozen : collection of ir.Node
        Nodes that must stay as they are.
    whole : bool
        The node has to go; if not, a part of it may stay as an Add or a Mul.
    sufficient : int
        A gain with which the search ends.

    Returns
    -------
    choice : Choice or None
        None if there is no way.
    refusal : Refusal
        Why the map cannot simply go, for when there is no way, or the way gains too little.
    """
    node, value = source.node, source.node.inputs[source.data]
    if facts.constant(value) is not None:
        return None, Refusal(Reason.NO_LINEAR_PRODUCER, "its input is a constant")
    mismatch = _types_disagree(source)
    if mismatch is not None:
        return None, mismatch
    if source.affine.is_identity:
        return _identity(source)
    best: Choice | None = None
    refusals: list[Refusal] = []
    for back, forth, rest in _ways(source, facts, whole=whole):
        backward = None if back is None else Walk(facts, frozen).backward(back, node, source.data)
        if isinstance(backward, Refusal):
            refusals.append(backward)
            continue
        forward = None if forth is None else Walk(facts, frozen).forward(forth, node.outputs[0])
        if isinstance(forward, Refusal):
            refusals.append(forward)
            continue
        try:
            choice = Choice(backward, forward, None if rest is None else remainder(source, rest, facts))
        except FoldError as error:
            refusals.append(Refusal(error.reason, str(error)))
            continue
        if rest is None and choice.gain < 1:
            refusals.insert(0, Refusal(Reason.NO_GAIN, f"no work would be saved; one could {choice.describe()}"))
        if best is None or choice.gain > best.gain:
            best = choice
        if best.gain >= sufficient:
            break
    return best, _explain(refusals)


def _ways(source: Source, facts: Facts, *, whole: bool) -> Iterator[tuple[Affine | None, Affine | None, Affine | None]]:
    """List what may go backward, what forward, and what then stays."""
    affine = source.affine
    yield affine, None, None
    yield None, affine, None
    if affine.keeps_scale or affine.keeps_zero:
        return
    scale, shift = affine.only_scale(), affine.only_shift()
    inner = _inner_shift(source, facts)
    yield scale, shift, None
    if inner is not None:
        yield inner, scale, None
    if whole:
        return
    yield scale, None, shift
    if inner is not None:
        yield None, scale, inner
        yield inner, None, scale
    yield None, shift, scale


def _inner_shift(source: Source, facts: Facts) -> Affine | None:
    """Return the shift that comes before the scale, ``b / a``, if there is one."""
    affine = source.affine
    if not affine.scale.all():
        return None
    with np.errstate(over="ignore"):
        inner = Affine(np.ones_like(affine.scale), affine.shift / affine.scale, affine.axis)
    try:
        require_room(inner, facts.dtype(source.node.inputs[source.data]))
    except FoldError:
        return None
    return inner


def _identity(source: Source) -> tuple[Choice | None, Refusal]:
    """A map that changes nothing can go wherever its value can stand for its output."""
    node, value = source.node, source.node.inputs[source.data]
    refusal = Refusal(Reason.GRAPH_OUTPUT, "it only gives a value the name of a graph output")
    assert value is not None
    producer = value.producer()
    if node.outputs[0].is_graph_output() and (
        producer is None or producer.graph is not node.graph or value.is_graph_output()
    ):
        return None, refusal
    return Choice(), refusal


def _types_disagree(source: Source) -> Refusal | None:
    before, after = source.node.inputs[source.data], source.node.outputs[0]
    assert before is not None
    if before.dtype is not None and after.dtype is not None and before.dtype != after.dtype:
        return Refusal(
            Reason.TYPE_MISMATCH,
            f"its input is declared {before.dtype.name}, its output {after.dtype.name}",
        )
    return None


def _explain(refusals: list[Refusal]) -> Refusal:
    """Join why the map can go neither backward nor forward. The reason is that of the way back, if there is one."""
    if len(refusals) < 2:
        return refusals[0] if refusals else Refusal(Reason.NO_GAIN, "no work would be saved")
    first, second = refusals[:2]
    words = "else" if first.reason is Reason.NO_GAIN else "forward"
    nowhere = (Reason.NO_LINEAR_CONSUMER, Reason.FOREIGN_DOMAIN, Reason.GRAPH_OUTPUT)
    reason = first.reason
    if first.reason is Reason.NO_LINEAR_PRODUCER and second.reason not in nowhere:
        reason = second.reason
    return Refusal(reason, f"{first.detail}; {words}, {second.detail}")
