"""The proof of one segment: the folded expression alone, on the activations of the original model.

The entries ``X`` of the segment and its value ``Y`` come from a run of the original model. The folded expression alone
is run on ``X`` and compared with ``Y``, element by element, against a bound.

Derivation of the bound. In exact arithmetic, and with constants that are not rounded, both expressions are the same
function of ``X``. `pybn.folding.majorant` derives for each how far its computed value may be from the exact one:

- original: ``gamma_no M_o``, with the constants as the model has them;
- folded: ``gamma_nf M_f``, where each constant counts one rounding more, that to its type;
- the fold computes the new constants in float64 from the old ones. It applies the operators that the original applies
  to activations, at most twice as many of them (the quotient ``b / a`` for a shift that stays before a nonlinear
  operator is undone by one product), and on no larger numbers: with the unit roundoff of float64,
  ``gamma_(2 no) M_o``. That matters for float64 models only.

The difference is at most the sum of the three. ``no`` and ``nf`` count sums of products apart from the rest, because
onnxruntime's CPU kernels accumulate float16 in float32, in the unit roundoff of which they then count; onnx.reference
does not. Where types are mixed, the coarsest counts for all. ``M`` is a sum of non-negative terms, so its own rounding
is relative to itself, and covered by a factor ``1 + gamma``. The bound assumes conventional convolutions, not Winograd
or FFT ones.

What is not a float (a shape, say) must be equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from pybn.folding.affine import Array
from pybn.folding.majorant import Arithmetic, Majorant, Majorants, NoBound, constant_array, is_float
from pybn.folding.report import FoldCheck
from pybn.folding.runtime import CheckError, Session, model_of
from pybn.folding.segments import Expression, Segment

# Unit roundoff and smallest normal number.
PRECISION = {
    "float16": (2.0**-11, 2.0**-14),
    "bfloat16": (2.0**-8, 2.0**-126),
    "float32": (2.0**-24, 2.0**-126),
    "float64": (2.0**-53, 2.0**-1022),
}


@dataclass(frozen=True)
class Local:
    """How a segment's value differs on the original's activations, in its own type; zero where that is not finite.

    Attributes
    ----------
    difference : ndarray
        The folded expression's value minus the original's.
    bound : ndarray
        The most that rounding explains.
    """

    difference: Array
    bound: Array


class SegmentProof:
    """One segment, and the element of it that came closest to its bound so far.

    Parameters
    ----------
    segment : Segment
        What to prove.
    folds : sequence of str
        Names of the folds that changed it.
    """

    def __init__(self, segment: Segment, folds: Sequence[str]) -> None:
        self.segment = segment
        self._folds = tuple(folds)
        self._folded = Evaluator(segment.folded)
        self._majorants: tuple[Majorants, Majorants] | None = None
        self._unit = 0.0
        self._worst_ratio = -1.0
        self._worst = self._check(0.0, 0.0, passed=False, detail="no finite activation to compare")

    def compare(self, activations: Mapping[str, Array], expected: Array) -> Local:
        """Run the folded expression on the original's activations, and judge every element.

        Parameters
        ----------
        activations : mapping
            At least the entries of the segment, by name.
        expected : ndarray
            The original's activation of the segment's value.
        """
        try:
            actual = self._folded.run(activations)
            _require_same_kind(actual, expected)
            bound = self._bound(activations, expected)
        except (CheckError, NoBound) as error:
            self._keep_worst(np.inf, self._check(np.inf, 0.0, passed=False, detail=str(error)))
            return Local(np.zeros_like(expected), np.zeros_like(expected))
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.subtract(actual, expected, dtype=bound.dtype)
        self._record(expected, difference, bound)
        return Local(_narrowed(difference, expected.dtype), _narrowed(bound, expected.dtype))

    def skip(self, detail: str) -> None:
        """Record that the segment was not compared by itself; the comparison of the models decides."""
        self._keep_worst(0.0, self._check(0.0, np.inf, passed=True, detail=detail))

    def result(self) -> FoldCheck:
        """Return the element that came closest to its bound."""
        return self._worst

    def _bound(self, activations: Mapping[str, Array], expected: Array) -> Array:
        if self._majorants is None:
            self._majorants = self._make_majorants(activations, expected)
        known = [majorant(activations) for majorant in self._majorants]
        before, after = (item if isinstance(item, Majorant) else None for item in known)
        if before is None or after is None:
            return np.zeros(np.shape(expected))
        folding = gamma(2 * (before.products + before.others), PRECISION["float64"][0])
        bound: Array = before.size * before.size.dtype.type(self._relative(before) + folding)
        bound += after.size * after.size.dtype.type(self._relative(after))
        return bound

    def _relative(self, known: Majorant) -> float:
        accumulated = self._unit
        if self._folded.is_onnxruntime:
            accumulated = min(self._unit, PRECISION["float32"][0])
        sums, others = gamma(known.products, accumulated), gamma(known.others, self._unit)
        relative = sums + others + sums * others
        return relative * (1 + relative)

    def _make_majorants(self, activations: Mapping[str, Array], expected: Array) -> tuple[Majorants, Majorants]:
        arrays = [activations[name] for name in self.segment.entries]
        for expression in (self.segment.original, self.segment.folded):
            arrays += [constant_array(value) for value in expression.constants]
        types = {array.dtype.name for array in (*arrays, expected) if is_float(array)} or {"float32"}
        self._unit = max(PRECISION[name][0] for name in types)
        narrow = bool(types & {"float16", "bfloat16"})
        original, folded = (
            Arithmetic(
                wide=np.dtype(np.float64 if "float64" in types else np.float32),
                smallest=max(PRECISION[name][1] for name in types),
                entry_roundings=int(narrow),
                constant_roundings=rounded,
            )
            for rounded in (0, 1)
        )
        return Majorants(self.segment.original, original), Majorants(self.segment.folded, folded)

    def _record(self, expected: Array, difference: Array, bound: Array) -> None:
        usable = np.isfinite(expected.astype(bound.dtype)) & np.isfinite(bound)
        if not usable.any():
            return
        error = np.abs(difference)
        # NaN: the original is a number, and the folded expression is not.
        error[~usable], error[usable & np.isnan(error)] = 0.0, np.inf
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            ratios = np.where(error == 0, 0.0, error / bound)
        at = np.unravel_index(np.argmax(np.where(usable, ratios, -1.0)), ratios.shape)
        ratio = float(ratios[at])
        self._keep_worst(ratio, self._check(float(error[at]), float(bound[at]), passed=ratio <= 1))

    def _check(self, error: float, bound: float, *, passed: bool, detail: str = "") -> FoldCheck:
        return FoldCheck(self.segment.name, self.segment.scope.label, self._folds, error, bound, passed, detail)

    def _keep_worst(self, ratio: float, found: FoldCheck) -> None:
        if ratio > self._worst_ratio:
            self._worst_ratio, self._worst = ratio, found


def _narrowed(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        narrow: Array = array.astype(dtype)
        narrow[~np.isfinite(array)] = 0
    return narrow


def _require_same_kind(actual: Array, expected: Array) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        found = f"{actual.dtype} of shape {actual.shape}, expected {expected.dtype} of shape {expected.shape}"
        raise CheckError(f"the folded expression gives {found}")


class Evaluator:
    """An expression, run by itself. Its constants are fed, so that no session holds a copy of them."""

    def __init__(self, expression: Expression) -> None:
        self._expression = expression
        self._session: Session | None = None
        self.is_onnxruntime = True

    def run(self, activations: Mapping[str, Array]) -> Array:
        """Compute the value from its entries, by name."""
        expression = self._expression
        feeds = {value.name or "": activations[value.name or ""] for value in expression.entries}
        feeds |= {value.name or "": constant_array(value) for value in expression.constants}
        if self._session is None:
            nodes = [ir.to_proto(node) for node in expression.nodes]
            model = model_of(nodes, feeds, [expression.name], expression.opset)
            self._session = Session(model, f"the expression of {expression.name} by itself")
            self.is_onnxruntime = self._session.is_onnxruntime
        result: Array = np.asarray(self._session.run(feeds)[0])
        return result


def gamma(count: int, unit: float) -> float:
    """Return the bound of the relative error of `count` roundings; infinite if there are too many."""
    return count * unit / (1 - count * unit) if count * unit < 1 else np.inf
