"""The proof that a folded model computes what the original did.

Everything is run by onnxruntime on the CPU with its graph optimisations off, because its own
optimiser makes wrong folds. The proof has two parts.

**Every fold by itself**, against a rigorous bound: `pybn.folding.fold_proof` derives it. One run
of the original model yields the activations around every fold.

**The whole model.** The graph outputs of both models are compared. How far the errors of the
folds may move them depends on the rest of the network, which is probed: an Add in the folded model
moves every fold's output, all at once, by random signs times its own bound. The largest movement
over `PROBES` draws, plus one rounding of the output, times `SAFETY`, is the bound for that output.
This is a first-order stochastic estimate of a worst case, not a proof: random signs do not add up
as the worst signs would, but the actual errors are far below their bounds, too.

A fold inside a subgraph or local function cannot be probed from outside. Its own check then uses
random activations, and the model's outputs are held to a plain tolerance, which the report says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pybn.folding.affine import Array
from pybn.folding.fold_proof import PRECISION, FoldProof, surviving
from pybn.folding.report import Check, FoldReport, OutputCheck, Predictions
from pybn.folding.runtime import CheckError, Feeds, Session, time_models

PROBES = 3
SAFETY = 4.0
# The tolerance for models whose folds cannot be probed, in units of u times the largest output.
UNPROBED_TOLERANCE = 1e4


def verify(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    report: FoldReport,
    inputs: Sequence[Feeds],
    *,
    labels: Array | None = None,
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
    progress : callable
        Wraps the iteration over the inputs.

    Returns
    -------
    Check
        What was compared; `Check.passed` is the verdict.

    Raises
    ------
    CheckError
        If a model cannot be run on an input.
    """
    if not inputs:
        raise CheckError("no inputs to check with")
    graphs = ir.from_proto(original), ir.from_proto(folded)
    proofs = [FoldProof(fold, *graphs) for fold in surviving(report.folds, graphs[1])]
    watched = [proof for proof in proofs if proof.in_main_graph]
    before = Session(_expose(original, watched), "the original model")
    after = Session(folded, "the folded model")
    probed = Session(_perturbed(folded, watched), "the folded model")
    optimised = Session(original, "the original model, optimised", optimise=True)
    names = [output.name for output in original.graph.output]
    outputs = {name: _OutputTally(name, len(watched) == len(proofs)) for name in names}
    optimiser = {name: _OutputTally(name, len(watched) == len(proofs)) for name in names}
    classes_before: list[Array] = []
    classes_after: list[Array] = []
    rng = np.random.default_rng(0)

    for proof in proofs:
        if not proof.in_main_graph:
            proof.compare_on_random_input(rng)
    for feeds in progress(inputs):
        exposed = before.run(feeds)
        expected, actual = exposed[: len(names)], after.run(feeds)
        deltas: list[Array] = []
        for proof, entering, leaving in zip(
            watched, exposed[len(names) :: 2], exposed[len(names) + 1 :: 2], strict=True
        ):
            deltas.append(proof.compare(entering, leaving))
        moved = [np.zeros(np.shape(value)) for value in actual]
        for _ in range(PROBES if watched else 0):
            signs = {proof.delta_name: _random_signs(rng, delta) for proof, delta in zip(watched, deltas, strict=True)}
            for total, value, base in zip(moved, probed.run({**feeds, **signs}), actual, strict=True):
                np.maximum(total, _distance(value, base), out=total)
        runtime = optimised.run(feeds)
        for name, was, now, quick, movement in zip(names, expected, actual, runtime, moved, strict=True):
            outputs[name].add(was, now, movement)
            optimiser[name].add(was, quick, movement)
        if labels is not None and sum(map(len, classes_before)) < labels.size:
            classes_before.append(_classes(expected[0]))
            classes_after.append(_classes(actual[0]))

    return Check(
        inputs=len(inputs),
        folds=tuple(proof.result() for proof in proofs),
        outputs=tuple(tally.result() for tally in outputs.values()),
        runtime_optimiser=tuple(tally.result() for tally in optimiser.values()),
        timing=time_models(original, folded, inputs[0]),
        predictions=None
        if labels is None
        else _predictions(np.concatenate(classes_before), np.concatenate(classes_after), labels),
    )


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

    def add(self, expected: Any, actual: Any, movement: npt.NDArray[np.float64]) -> None:
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
        limit = (
            # One rounding of the output itself may always differ.
            SAFETY * (float(movement[finite].max()) + unit * largest)
            if self.derived
            else UNPROBED_TOLERANCE * unit * largest
        )
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


def _distance(value: Any, base: Any) -> npt.NDArray[np.float64]:
    if not isinstance(base, np.ndarray) or base.dtype.name not in PRECISION:
        return np.zeros(np.shape(base))
    with np.errstate(invalid="ignore", over="ignore"):
        distance: npt.NDArray[np.float64] = np.abs(value.astype(np.float64) - base.astype(np.float64))
    return np.where(np.isfinite(distance), distance, 0.0)


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


def _expose(original: onnx.ModelProto, proofs: Sequence[FoldProof]) -> onnx.ModelProto:
    """Copy the original with X and Y of every fold as additional outputs."""
    model = onnx.ModelProto()
    model.CopyFrom(original)
    for proof in proofs:
        for kind, value in (("x", proof.entering), ("y", proof.fold.output)):
            # Identity, because a value may be an input or an output of the graph already.
            name = f"pybn.{kind}.{proof.fold.output}"
            model.graph.node.append(onnx.helper.make_node("Identity", [value], [name]))
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return model


def _perturbed(folded: onnx.ModelProto, proofs: Sequence[FoldProof]) -> onnx.ModelProto:
    """Copy the folded model with an additional input added to every fold's output."""
    model = onnx.ModelProto()
    model.CopyFrom(folded)
    moved = {proof.fold.output: proof for proof in proofs}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        proof = moved.get(node.output[0]) if node.output else None
        if proof is None:
            continue
        value = node.output[0]
        node.output[0] = f"pybn.still.{value}"
        nodes.append(onnx.helper.make_node("Add", [node.output[0], proof.delta_name], [value]))
        model.graph.input.append(onnx.helper.make_tensor_value_info(proof.delta_name, proof.element_type, None))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model
