"""The fold of a model in place: every node that is a map in its turn, until nothing more can be gained."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from pybn.folding import sources
from pybn.folding.choice import Choice, choose
from pybn.folding.editor import Editor
from pybn.folding.effects import Effect, Effects
from pybn.folding.graph import Facts, display_name, scopes
from pybn.folding.neighbours import neighbours
from pybn.folding.reasons import Reason, Refusal
from pybn.folding.report import Direction, Fold, FoldReport, Left
from pybn.folding.sources import Source

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Options:
    """What the caller of `fold_onnx` asks for; see there."""

    aggressive: bool = False
    skip: Collection[str] = ()
    only: Collection[str] = ()
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Reject a name in the place of a collection of names, which would be taken for its letters."""
        for what, names in (("skip", self.skip), ("only", self.only)):
            if isinstance(names, str):
                raise TypeError(f"{what} is a string, expected a collection of them: ({names!r},)")


def fold_in_place(model: ir.Model, options: Options) -> FoldReport:
    """Fold a model and report on every affine node that it had.

    Raises
    ------
    ValueError
        If `Options.skip` or `Options.only` names no node of the model.
    """
    return _Engine(model, options).run()


@dataclass
class _Origin:
    """A node of the original model, and what has become of it so far."""

    node: ir.Node
    name: str
    op_type: str
    output: str
    graph: str
    left: Left | None = None
    scale_range: tuple[float, float] | None = None
    direction: Direction = "merged"
    into: list[str] = field(default_factory=list)
    route: list[str] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    cost: int = 0


class _Engine:
    def __init__(self, model: ir.Model, options: Options) -> None:
        self._model = model
        self._options = options
        self._editor = Editor(model)
        self._facts = Facts(model)
        self._origins: dict[ir.Node, _Origin] = {}
        self._names: set[str] = set()
        for scope in scopes(model):
            for node in scope.graph:
                output = (node.outputs[0].name if node.outputs else None) or ""
                self._origins[node] = _Origin(node, display_name(node), node.op_type, output, scope.label)
                self._names.update(value.name for value in node.outputs if value.name)
        affine = [node for node in self._origins if sources.read(node, self._facts) is not None]
        _require_names("only", options.only, (self._origins[node].name for node in affine))
        _require_names("skip", options.skip, (origin.name for origin in self._origins.values()))
        self._frozen = {node for node, origin in self._origins.items() if origin.name in options.skip}
        self._effects = Effects()
        self._waiting = set(affine)
        self._total = len(affine)

    def run(self) -> FoldReport:
        # Maps go into linear operators first: the bias of a linear layer that merged into a batch norm
        # would keep it there. Trades come last, when all that is free has been had.
        stages = ((False, False), (True, False), (True, True))
        for merges, trades in stages if self._options.aggressive else stages[:2]:
            while self._pass(merges=merges, trades=trades):
                # What has been folded may prove what was unknown. Folding the result again has to find
                # nothing, so this goes on until a pass that starts from the model as it is finds nothing.
                self._facts = Facts(self._model)
        shown = self._effects.shown()
        rows = [row for origin in self._origins.values() if (row := self._row(origin, shown)) is not None]
        return FoldReport(tuple(rows))

    def _pass(self, *, merges: bool, trades: bool) -> bool:
        """Try to fold every affine node once. In graph order, what is upstream has settled before."""
        folded = False
        for node in [node for scope in scopes(self._model) for node in scope.graph]:
            # A Constant may have gone with what used it.
            found = None if node.graph is None else sources.read(node, self._facts)
            if found is not None:
                folded = self._fold(node, found, merges=merges, trades=trades) or folded
                self._tell(node)
        return folded

    def _tell(self, node: ir.Node) -> None:
        """Report progress, once per affine node of the original."""
        if self._options.progress is not None and node in self._waiting:
            self._waiting.remove(node)
            self._options.progress(self._total - len(self._waiting), self._total)

    def _fold(self, node: ir.Node, found: Source | Refusal, *, merges: bool, trades: bool) -> bool:
        """Fold one node, or note why not."""
        origin = self._origins.get(node)
        name = origin.name if origin is not None else display_name(node)
        if isinstance(found, Source) and (
            node in self._frozen or (self._options.only and name not in self._options.only)
        ):
            found = Refusal(Reason.SKIPPED, f"{node.op_type} {name} was not to be folded")
        if isinstance(found, Refusal):
            self._leave(origin, found, None)
            return False
        # Trades without a gain are for batch norms only: their number falls, so there is an end.
        tradable = found.is_batch_norm
        choice, refusal = choose(found, self._facts, self._frozen, whole=not tradable, sufficient=1)
        if choice is None or (choice.gain < 1 and not (trades and tradable)):
            self._leave(origin, refusal, choice.describe() if choice is not None and tradable else None)
            return False
        if not merges and any(isinstance(sources.read(end, self._facts), Source) for end in choice.plan.absorbers):
            return False
        self._commit(found, choice)
        return True

    def _commit(self, source: Source, choice: Choice) -> None:
        """Do what was chosen, and note it."""
        node, plan = source.node, choice.plan
        output, value = node.outputs[0], node.inputs[source.data]
        assert value is not None
        record = self._record(source, choice)
        # Without a forward part the value that enters the node comes to carry what left it.
        takes_name = (
            choice.rest is None and choice.forward is None and (choice.backward is not None or output.is_graph_output())
        )
        changed = [item for item in plan.changed if not (takes_name and item is value)]
        if choice.rest is not None and choice.forward is not None:
            changed.append(output)
        kept = [item for passed in plan.nodes for item in passed.outputs if item not in plan.changed]
        if takes_name:
            kept.append(value)
        elif choice.rest is not None and choice.forward is None:
            kept.append(output)
        moved = self._editor.apply(plan.rewrites, changed)
        for old, new in moved.items():
            self._facts.adopt(new, old)
        kept = [moved.get(item, item) for item in kept]
        effects = self._effects.show(kept, gone=(output, *plan.changed), moved=moved)
        if record is not None:
            record.effects += effects
        if choice.rest is not None:
            self._editor.replace(node, choice.rest.op_type, source.data, choice.rest.constant)
        else:
            self._editor.remove(node, source.data, moved.get(value, value), renamed=takes_name)
        self._facts.forget()

    def _record(self, source: Source, choice: Choice) -> _Origin | None:
        """Note how a node was folded, before the graph changes."""
        record = self._origins.get(source.node)
        if record is None:
            return None
        plan = choice.plan
        if record.scale_range is None:
            magnitudes = np.abs(source.affine.scale)
            record.scale_range = float(magnitudes.min(initial=np.inf)), float(magnitudes.max(initial=0.0))
        if all(isinstance(sources.read(node, self._facts), Source) for node in plan.absorbers):
            record.direction = "merged"
        else:
            record.direction = "forward" if choice.backward is None else "backward"
        names = (self._origins[node].name if node in self._origins else display_name(node) for node in plan.absorbers)
        record.into += [name for name in dict.fromkeys(names) if name not in record.into]
        record.route += [node.op_type for node in plan.nodes]
        record.cost += choice.cost
        record.left = None
        return record

    def _leave(self, origin: _Origin | None, refusal: Refusal, would: str | None) -> None:
        if origin is not None:
            origin.left = Left(
                origin.name, origin.op_type, origin.output, origin.graph, refusal.reason, refusal.detail, would
            )

    def _row(self, origin: _Origin, shown: Mapping[Effect, tuple[ir.Value, ...]]) -> Fold | Left | None:
        if origin.scale_range is None:
            return None if origin.left is None else replace(origin.left, neighbours=neighbours(origin.node))
        names = dict.fromkeys(value.name for effect in origin.effects for value in shown[effect] if value.name)
        return Fold(
            name=origin.name,
            op_type=origin.op_type,
            output=origin.output,
            graph=origin.graph,
            direction=origin.direction,
            into=tuple(origin.into),
            route=tuple(origin.route),
            outputs=tuple(name for name in names if name in self._names),
            cost=origin.cost,
            scale_range=origin.scale_range,
        )


def _require_names(option: str, names: Collection[str], known: Iterable[str]) -> None:
    """Raise ValueError for a name that no node has, with the ones that look most like it."""
    existing = sorted(set(known))
    for name in names:
        if name not in existing:
            close = difflib.get_close_matches(name, existing)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            kind = "batch norm or affine node" if option == "only" else "node"
            raise ValueError(f"{option} names {name!r}, but no {kind} of the model has that name{hint}")
