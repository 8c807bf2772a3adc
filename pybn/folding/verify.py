"""The proof that a folded model computes what the original did.

Everything is run on the CPU with graph optimisations off, because onnxruntime's own optimiser makes wrong folds. The
proof has two parts.

**Every difference by itself**, against a rigorous bound. `pybn.folding.segments` finds the values that the two models
compute in different ways, `pybn.folding.fold_proof` compares the two ways on the activations of a run of the original.
Where all pass, both models compute the same function, up to rounding, on these inputs.

**The whole model.** The graph outputs of both models are compared. How far the differences of the segments may move
them depends on the rest of the network, which `pybn.folding.probing` measures: the bound of an output is `SAFETY` times
its movement when every segment's value moves by its own measured difference, plus one rounding of the output. That is a
first-order estimate. Where an output jumps (it is sorted, or has passed a threshold), it may miss; then what counts is
the movement under random signs times the bounds of the segments. (A proof would propagate absolute values: each layer
then multiplies the bound by the ratio of a sum of absolute products to the sum itself, and after a few layers it says
nothing. The proof is in the segments.)

A segment inside a subgraph, or a function that cannot be inlined, cannot be seen or probed from outside. Its own check
then uses random activations, and the model's outputs are held to a plain tolerance, which the report says.

Last, both models are run as onnxruntime's optimiser rewrites them, and compared with themselves as they are: so it is
known whether a difference that a user sees comes from the fold or from the runtime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from pybn.folding.affine import Array
from pybn.folding.files import to_ir
from pybn.folding.fold_proof import PRECISION, Evaluator, Local, SegmentProof
from pybn.folding.inlining import inline, origin
from pybn.folding.inputs import random_entries
from pybn.folding.probing import Probe, expose
from pybn.folding.report import Check, FoldReport, OutputCheck, Predictions
from pybn.folding.runtime import CheckError, Feeds, Session, time_models
from pybn.folding.segments import DifferentInterface, Segment, segments

SAFETY = 4.0
# The tolerance where no bound is derived, in units of u times the largest output: for models whose segments cannot all
# be probed, and for the runtime's optimiser, which may change the order of every sum.
TOLERANCE = 1e4

# Models above this size, in bytes, are run from a file: one protobuf message holds 2 GiB at most.
LARGE = 2**30


def verify(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    report: FoldReport,
    inputs: Sequence[Feeds],
    *,
    labels: Array | None = None,
    folder: Path | None = None,
    progress: Callable[[Iterable[Feeds]], Iterable[Feeds]] = iter,
) -> Check:
    """Compare a folded model with its original on the given inputs.

    Parameters
    ----------
    original, folded : onnx.ModelProto
        The models, and
    report : FoldReport
        what `fold_onnx` says about them.
    inputs : sequence of dict
        Arrays by input name: one dict per run. At least one.
    labels : ndarray, optional
        The true classes of the first samples, over as many inputs as they fill.
    folder : path, optional
        Where the external data of the models are, if they have any.
    progress : callable
        Wraps the iteration over the inputs.

    Returns
    -------
    Check
        What was compared; `Check.passed` is the verdict.

    Raises
    ------
    CheckError
        If a model cannot be run on an input, or the models do not have the same inputs and outputs.
    """
    if not inputs:
        raise CheckError("no inputs to check with")
    with _opened(original, folder) as before, _opened(folded, folder) as after:
        found = _Comparison(before, after, report).run(inputs, labels, progress)
        # All other sessions are gone by now, with their memory.
        timing = time_models((before.proto, after.proto), (before.folder, after.folder), inputs[0])
        return replace(found, timing=timing)


@dataclass(frozen=True)
class _Model:
    """A model, and where its external data are."""

    proto: onnx.ModelProto
    folder: Path | None

    def session(self, what: str, *, optimise: bool = False) -> Session:
        return Session(self.proto, what, optimise=optimise, folder=self.folder)

    def as_ir(self) -> ir.Model:
        return to_ir(self.proto, self.folder)

    def changed(self, inlined: ir.Model) -> onnx.ModelProto:
        """Return a copy to change, with its functions inlined."""
        if self.proto.functions:
            return ir.to_proto(inlined)
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        return copy


@contextlib.contextmanager
def _opened(proto: onnx.ModelProto, folder: Path | None) -> Iterator[_Model]:
    """Give a model that can be serialised: one that is too large, with its weights in a temporary file."""
    if not _is_large(proto):
        yield _Model(proto, folder)
        return
    with TemporaryDirectory(prefix="pybn-") as temporary:
        path = Path(temporary) / "model.onnx"
        ir.save(_Model(proto, folder).as_ir(), path, external_data="weights")
        yield _Model(onnx.load(path, load_external_data=False), path.parent)


def _is_large(proto: onnx.ModelProto) -> bool:
    try:
        return bool(proto.ByteSize() > LARGE)
    except EncodeError:
        return True


class _Comparison:
    """The two models, and what has been found so far."""

    def __init__(self, before: _Model, after: _Model, report: FoldReport) -> None:
        graphs = inline(before.as_ir()), inline(after.as_ir())
        try:
            found = segments(*graphs)
        except DifferentInterface as error:
            raise CheckError(str(error)) from error
        self._names = [output.name for output in before.proto.graph.output]
        self._seen = _visible_names(found, graphs[0])
        self._exposed = Session(
            expose(before.changed(graphs[0]), self._seen), "the original model", folder=before.folder
        )
        self._folded = after.session("the folded model")
        self._proofs = [
            SegmentProof(segment, _folds_behind(segment, report), sums_in_float32=self._exposed.is_onnxruntime)
            for segment in found
        ]
        self._visible = [proof for proof in self._proofs if proof.segment.scope.is_main]
        self._inside = [proof for proof in self._proofs if not proof.segment.scope.is_main]
        self._probe = Probe(lambda: after.changed(graphs[1]), after.folder)
        self._optimised = [
            model.session(f"the {what} model, optimised", optimise=True)
            for model, what in ((before, "original"), (after, "folded"))
        ]
        self._outputs, self._runtime_original, self._runtime_folded = (
            {name: _OutputTally(name, derived) for name in self._names} for derived in (not self._inside, False, False)
        )
        self._rng = np.random.default_rng(0)

    def run(
        self, inputs: Sequence[Feeds], labels: Array | None, progress: Callable[[Iterable[Feeds]], Iterable[Feeds]]
    ) -> Check:
        classes_before: list[Array] = []
        classes_after: list[Array] = []
        for number, feeds in enumerate(progress(inputs)):
            expected, actual = self._compare(feeds, first=number == 0)
            if labels is not None and sum(map(len, classes_before)) < labels.size:
                classes_before.append(_classes(expected[0]))
                classes_after.append(_classes(actual[0]))
        return Check(
            inputs=len(inputs),
            folds=tuple(proof.result() for proof in self._proofs),
            outputs=tuple(tally.result() for tally in self._outputs.values()),
            runtime_optimiser=tuple(tally.result() for tally in self._runtime_original.values()),
            runtime_optimiser_folded=tuple(tally.result() for tally in self._runtime_folded.values()),
            timing=None,
            predictions=None
            if labels is None
            else _predictions(np.concatenate(classes_before), np.concatenate(classes_after), labels),
        )

    def _compare(self, feeds: Feeds, *, first: bool) -> tuple[list[Any], list[Any]]:
        """Run everything on one input; nothing of it is kept but the outputs."""
        results = self._exposed.run(feeds)
        expected, actual = results[: len(self._names)], self._folded.run(feeds)
        seen = {**feeds, **dict(zip(self._seen, results[len(self._names) :], strict=True))}
        local = {proof.segment.name: proof.compare(seen, seen[proof.segment.name]) for proof in self._visible}
        if first:
            for proof in self._inside:
                _compare_inside(proof, seen, self._rng)
        del seen, results
        moved = self._movement(feeds, expected, actual, local)
        optimised = [session.run(feeds) for session in self._optimised]
        for tallies, was, now in (
            (self._outputs, expected, actual),
            (self._runtime_original, expected, optimised[0]),
            (self._runtime_folded, actual, optimised[1]),
        ):
            for name, old, new, movement in zip(self._names, was, now, moved, strict=True):
                tallies[name].add(old, new, movement)
        return expected, actual

    def _movement(
        self, feeds: Feeds, expected: list[Any], actual: list[Any], local: Mapping[str, Local]
    ) -> list[float]:
        """Return how far each output may be moved by the differences of the segments."""
        # A segment that has failed has no bound, and so neither have the outputs.
        if not all(proof.result().passed for proof in self._visible):
            return [0.0] * len(actual)
        differences = {name: item.difference for name, item in local.items()}
        moved = self._probe.movement(feeds, actual, differences, self._rng)
        judged = zip(expected, actual, moved, strict=True)
        if all(_is_within(old, new, movement) for old, new, movement in judged):
            return moved
        bounds = {name: item.bound for name, item in local.items()}
        return self._probe.movement(feeds, actual, bounds, self._rng)


def _folds_behind(segment: Segment, report: FoldReport) -> tuple[str, ...]:
    """Name the folds that say that they changed how the segment's value is computed."""
    graph, name = origin(segment.original.output, segment.scope.label)
    return tuple(fold.name for fold in report.folds if fold.graph == graph and name in fold.outputs)


def _visible_names(found: Sequence[Segment], original: ir.Model) -> list[str]:
    """Return the values of the main graph that the segments start from and end in, in a fixed order."""
    graph = original.graph
    names = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    names |= {value.name for node in graph for value in node.outputs}
    needed: dict[str, None] = {}
    for segment in found:
        needed |= dict.fromkeys((*segment.entries, segment.name))
    return [name for name in needed if name in names]


def _compare_inside(proof: SegmentProof, seen: Mapping[str, Array], rng: np.random.Generator) -> None:
    """Compare a segment that cannot be seen from outside: random numbers stand for what is not visible."""
    segment = proof.segment
    try:
        hidden = random_entries(segment, seen, rng)
        activations = {**seen, **hidden}
        expected = Evaluator(segment.original).run(activations)
    except CheckError as error:
        proof.skip(f"not compared by itself, only within the model: {error}")
        return
    proof.compare(activations, expected)


@dataclass
class _OutputTally:
    """The worst element of one graph output over all inputs."""

    name: str
    derived: bool
    error: float = 0.0
    bound: float | None = None
    changed: int = 0
    passed: bool = True
    _ratio: float = field(default=-1.0, repr=False)

    def add(self, expected: Any, actual: Any, movement: float) -> None:
        """Compare one run. Tensors of floats are judged; anything else is counted."""
        if not _is_judged(expected):
            self.changed += _count_changes(expected, actual)
            return
        error, limit = _error_and_limit(expected, actual, movement)
        if not self.derived:
            limit = max(limit, TOLERANCE * _rounding(expected))
        ratio = error / limit if limit else (0.0 if error == 0 else np.inf)
        self.passed = self.passed and ratio <= 1
        if ratio > self._ratio:
            self._ratio, self.error, self.bound = ratio, error, limit

    def result(self) -> OutputCheck:
        """Return the tally as it goes into the report."""
        return OutputCheck(self.name, self.error, self.bound, self.changed, self.derived, self.passed)


def _count_changes(expected: Any, actual: Any) -> int:
    if isinstance(expected, np.ndarray) and expected.shape == getattr(actual, "shape", None):
        return int(np.count_nonzero(expected != actual))
    return int(str(expected) != str(actual))


def _is_judged(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.name in PRECISION


def _is_within(expected: Any, actual: Any, movement: float) -> bool:
    if not _is_judged(expected):
        return True
    error, limit = _error_and_limit(expected, actual, movement)
    return error <= limit


def _error_and_limit(expected: Array, actual: Array, movement: float) -> tuple[float, float]:
    """Return the largest error, and the most that a movement of the output explains."""
    if actual.shape != expected.shape:
        return np.inf, 0.0
    # Where the original overflows, so may the folded model: there is nothing to compare.
    finite = np.isfinite(expected)
    difference = np.abs(actual[finite].astype(np.float64) - expected[finite].astype(np.float64))
    error = float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))
    # One rounding of the output itself may always differ.
    return error, SAFETY * (movement + _rounding(expected))


def _rounding(expected: Array) -> float:
    """Return one rounding of the largest finite value."""
    finite = expected[np.isfinite(expected)].astype(np.float64)
    return PRECISION[expected.dtype.name][0] * float(np.abs(finite).max(initial=0.0))


def _classes(scores: Array) -> Array:
    if scores.ndim < 2:
        raise CheckError(f"labels need an output of shape (samples, classes), not {scores.shape}")
    classes: Array = np.argmax(scores, axis=-1).reshape(scores.shape[0], -1)[:, 0]
    return classes


def _predictions(before: Array, after: Array, labels: Array) -> Predictions:
    if before.shape != labels.shape:
        raise CheckError(f"the model makes {before.size} predictions for {labels.size} labels")
    return Predictions(
        samples=int(labels.size),
        changed=int(np.count_nonzero(before != after)),
        accuracy_before=float(np.mean(before == labels)),
        accuracy_after=float(np.mean(after == labels)),
    )
