"""The proof that a folded model computes what the original did.

Everything is run on the CPU with graph optimisations off, because onnxruntime's own optimiser makes wrong folds. The
proof has two parts.

**Every difference by itself**, against a rigorous bound. `pybn.folding.segments` finds the values that the two models
compute in different ways, `pybn.folding.fold_proof` compares the two ways on the activations of a run of the original.
Where all pass, both models compute the same function, up to rounding, on these inputs.

**The whole model.** The graph outputs of both models are compared. How far the differences of the segments may move
them depends on the rest of the network, which is probed: an Add in the folded model moves the value of every segment,
all at once, by random signs times its own bound. The largest movement over `PROBES` draws, plus one rounding of the
output, times `SAFETY`, is the bound for that output. This is a first-order stochastic estimate of a worst case, not a
proof: random signs do not add up as the worst signs would, but the actual errors are far below their bounds, too. (A
proof would propagate absolute values: each layer then multiplies the bound by the ratio of a sum of absolute products
to the sum itself, and after a few layers it says nothing. The proof is in the segments.)

A segment inside a subgraph, or a function that cannot be inlined, cannot be seen or probed from outside. Its own check
then uses random activations, and the model's outputs are held to a plain tolerance, which the report says.

Last, both models are run as onnxruntime's optimiser rewrites them, and compared with themselves as they are: so it is
known whether a difference that a user sees comes from the fold or from the runtime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from pybn.folding.affine import Array
from pybn.folding.fold_proof import PRECISION, Evaluator, SegmentProof
from pybn.folding.inlining import inline, origin
from pybn.folding.inputs import random_entries
from pybn.folding.report import Check, FoldReport, OutputCheck, Predictions
from pybn.folding.runtime import CheckError, Feeds, Session, time_models
from pybn.folding.segments import DifferentInterface, Segment, segments

PROBES = 3
SAFETY = 4.0
# The tolerance where no bound is derived, in units of u times the largest output: for models whose segments cannot all
# be probed, and for the runtime's optimiser, which may change the order of every sum.
TOLERANCE = 1e4

# Models above this size, in bytes, are run from a file: one protobuf message holds 2 GiB at most.
LARGE = 2**30

SEEN = "pybn.seen."
STILL = "pybn.still."
DELTA = "pybn.delta."


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
        return _Comparison(before, after, report).run(inputs, labels, progress)


@dataclass(frozen=True)
class _Model:
    """A model, and where its external data are."""

    proto: onnx.ModelProto
    folder: Path | None

    def session(self, what: str, *, optimise: bool = False) -> Session:
        return Session(self.proto, what, optimise=optimise, folder=self.folder)

    def as_ir(self) -> ir.Model:
        model = ir.from_proto(self.proto)
        if self.folder is not None:
            for graph in (model.graph, *(function.graph for function in model.functions.values())):
                ir.external_data.set_base_dir(graph, self.folder.resolve())
        return model

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
        self._before, self._after = before, after
        graphs = inline(before.as_ir()), inline(after.as_ir())
        try:
            found = segments(*graphs)
        except DifferentInterface as error:
            raise CheckError(str(error)) from error
        proofs = [SegmentProof(segment, _folds_behind(segment, report)) for segment in found]
        self._visible = [proof for proof in proofs if proof.segment.scope.is_main]
        self._inside = [proof for proof in proofs if not proof.segment.scope.is_main]
        self._proofs = proofs
        self._names = [output.name for output in before.proto.graph.output]
        self._seen = _visible_names(proofs, graphs[0])
        self._exposed = Session(
            _expose(before.changed(graphs[0]), self._seen), "the original model", folder=before.folder
        )
        self._folded = after.session("the folded model")
        self._folded_graph = graphs[1]
        self._probed: Session | None = None
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
            timing=time_models(
                self._before.proto, self._after.proto, inputs[0], (self._before.folder, self._after.folder)
            ),
            predictions=None
            if labels is None
            else _predictions(np.concatenate(classes_before), np.concatenate(classes_after), labels),
        )

    def _compare(self, feeds: Feeds, *, first: bool) -> tuple[list[Any], list[Any]]:
        """Run everything on one input; nothing of it is kept but the outputs."""
        results = self._exposed.run(feeds)
        expected, actual = results[: len(self._names)], self._folded.run(feeds)
        seen = {**feeds, **dict(zip(self._seen, results[len(self._names) :], strict=True))}
        deltas = {proof.segment.name: proof.compare(seen, seen[proof.segment.name]) for proof in self._visible}
        if first:
            for proof in self._inside:
                _compare_inside(proof, seen, self._rng)
        del seen, results
        moved = self._movement(feeds, actual, deltas)
        optimised = [session.run(feeds) for session in self._optimised]
        for tallies, was, now in (
            (self._outputs, expected, actual),
            (self._runtime_original, expected, optimised[0]),
            (self._runtime_folded, actual, optimised[1]),
        ):
            for name, old, new, movement in zip(self._names, was, now, moved, strict=True):
                tallies[name].add(old, new, movement)
        return expected, actual

    def _movement(self, feeds: Feeds, actual: list[Any], deltas: Mapping[str, Array]) -> list[float]:
        """Measure how far each output moves when every segment's value moves by its bound."""
        moved = [0.0] * len(actual)
        deltas = {name: delta for name, delta in deltas.items() if delta.dtype.name in PRECISION}
        # A segment that has failed has no bound, and so neither have the outputs.
        if not deltas or not all(proof.result().passed for proof in self._visible):
            return moved
        if self._probed is None:
            perturbed = _perturbed(self._after.changed(self._folded_graph), deltas)
            self._probed = Session(perturbed, "the folded model, probed", folder=self._after.folder)
        for _ in range(PROBES):
            signs = {DELTA + name: _random_signs(self._rng, delta) for name, delta in deltas.items()}
            probed = self._probed.run({**feeds, **signs})
            moved = [max(far, _distance(value, base)) for far, value, base in zip(moved, probed, actual, strict=True)]
        return moved


def _folds_behind(segment: Segment, report: FoldReport) -> tuple[str, ...]:
    """Name the folds that say that they changed how the segment's value is computed."""
    graph, name = origin(segment.original.output, segment.scope.label)
    return tuple(fold.name for fold in report.folds if fold.graph == graph and name in fold.outputs)


def _visible_names(proofs: Sequence[SegmentProof], original: ir.Model) -> list[str]:
    """Return the values of the main graph that the proofs need, in a fixed order."""
    graph = original.graph
    names = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    names |= {value.name for node in graph for value in node.outputs}
    needed: dict[str, None] = {}
    for proof in proofs:
        needed |= dict.fromkeys((*proof.segment.entries, proof.segment.name))
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
        if not isinstance(expected, np.ndarray) or expected.dtype.name not in PRECISION:
            self.changed += _count_changes(expected, actual)
            return
        if actual.shape != expected.shape:
            self.passed, self.error = False, np.inf
            return
        unit = PRECISION[expected.dtype.name][0]
        finite = np.isfinite(expected)
        # Where the original overflows, so may the folded model: there is nothing to compare.
        before = expected[finite].astype(np.float64)
        after = actual[finite].astype(np.float64)
        if not before.size:
            return
        largest = float(np.abs(before).max())
        # One rounding of the output itself may always differ.
        limit = SAFETY * (movement + unit * largest)
        if not self.derived:
            limit = max(limit, TOLERANCE * unit * largest)
        difference = np.abs(after - before)
        error = float(np.where(np.isnan(difference), np.inf, difference).max())
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


def _distance(value: Any, base: Any) -> float:
    """Return the largest finite difference of two tensors of floats; 0 for anything else."""
    if not isinstance(base, np.ndarray) or base.dtype.name not in PRECISION:
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(value.astype(np.float64) - base.astype(np.float64))
    return float(np.where(np.isfinite(distance), distance, 0.0).max(initial=0.0))


def _random_signs(rng: np.random.Generator, delta: Array) -> Array:
    signs = rng.integers(0, 2, delta.shape, dtype=np.int8) * 2 - 1
    return (delta * signs).astype(delta.dtype)


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


def _expose(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Make values of the main graph outputs of the model."""
    for name in names:
        # Identity, because a value may be an input or an output of the graph already.
        model.graph.node.append(onnx.helper.make_node("Identity", [name], [SEEN + name]))
        model.graph.output.append(onnx.ValueInfoProto(name=SEEN + name))
    return model


def _perturbed(model: onnx.ModelProto, deltas: Mapping[str, Array]) -> onnx.ModelProto:
    """Add an input to each of these values of the main graph."""
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(delta.dtype) for name, delta in deltas.items()}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            element = types.get(name)
            if element is None:
                continue
            node.output[index] = STILL + name
            nodes.append(onnx.helper.make_node("Add", [STILL + name, DELTA + name], [name]))
            model.graph.input.append(onnx.helper.make_tensor_value_info(DELTA + name, element, None))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model
