"""What was folded, what was left and why, and what the check found. JSON is the truth.

`FoldReport.to_dict` documents the JSON; the text that people see is made from it in `pybn.cli`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from pybn.folding.reasons import UNLOCK, Reason

SCHEMA = 1


@dataclass(frozen=True)
class Fold:
    """A batch norm that is gone.

    Attributes
    ----------
    name : str
        The batch norm's node name, or its output's if it has none.
    output : str
        The value it produced; the operator that absorbed it produces it now.
    graph : str
        The graph it was in: "main", or the path to a subgraph or local function.
    into, op : str
        Name and original operator type of the node that absorbed it.
    route : tuple of str
        Operator types passed on the way back, nearest to the batch norm first, `op` last.
    input : str
        The value that enters the absorbing operator.
    """

    name: str
    output: str
    graph: str
    into: str
    op: str
    route: tuple[str, ...]
    input: str


@dataclass(frozen=True)
class Left:
    """A batch norm that stays, with the reason.

    Attributes
    ----------
    name, output, graph : str
        As in `Fold`.
    reason : Reason
        The code.
    detail : str
        What was found.
    """

    name: str
    output: str
    graph: str
    reason: Reason
    detail: str

    @property
    def sentence(self) -> str:
        """What was found, and what would unlock the fold."""
        return f"{self.detail}; {UNLOCK[self.reason]}"


@dataclass(frozen=True)
class FileInfo:
    """A model file: where it is, its size in bytes, its SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FoldCheck:
    """One fold against its own bound, at the element where it came closest to it."""

    name: str
    error: float
    bound: float
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class OutputCheck:
    """A graph output of both models, at the element where the difference came closest to the bound.

    Attributes
    ----------
    name : str
        The graph output.
    error : float
        The largest absolute difference.
    bound : float or None
        The bound there; None for outputs that are not floating point.
    changed : int
        Elements that differ, for outputs that are not floating point.
    derived : bool
        False if the bound is a plain tolerance, because a fold is inside a subgraph or function.
    passed : bool
        Whether every difference is within the bound. True for outputs that are not floats.
    """

    name: str
    error: float
    bound: float | None
    changed: int
    derived: bool
    passed: bool


@dataclass(frozen=True)
class Timing:
    """Median seconds per run of both models, optimised by the runtime or not."""

    plain_before: float
    plain_after: float
    optimised_before: float
    optimised_after: float
    runs: int


@dataclass(frozen=True)
class Predictions:
    """Classification by argmax over the last axis of the first output."""

    samples: int
    changed: int
    accuracy_before: float
    accuracy_after: float


@dataclass(frozen=True)
class Check:
    """The proof that the folded model computes what the original did."""

    inputs: int
    folds: tuple[FoldCheck, ...]
    outputs: tuple[OutputCheck, ...]
    runtime_optimiser: tuple[OutputCheck, ...]
    timing: Timing
    predictions: Predictions | None

    @property
    def passed(self) -> bool:
        """Whether every fold and every output is within its bound."""
        return all(f.passed for f in self.folds) and all(o.passed for o in self.outputs)

    @property
    def runtime_agrees(self) -> bool:
        """Whether the runtime's optimiser keeps the original model's outputs within the bound."""
        return all(output.passed for output in self.runtime_optimiser)


@dataclass(frozen=True)
class FoldReport:
    """Every batch norm of a model and what became of it.

    Attributes
    ----------
    batch_norms : tuple of Fold or Left
        In graph order.
    input, output : FileInfo or None
        The files, where there are any.
    check : Check or None
        The proof, if it was asked for.
    """

    batch_norms: tuple[Fold | Left, ...]
    input: FileInfo | None = None
    output: FileInfo | None = None
    check: Check | None = None

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The batch norms that are gone."""
        return tuple(row for row in self.batch_norms if isinstance(row, Fold))

    @property
    def left(self) -> tuple[Left, ...]:
        """The batch norms that stay."""
        return tuple(row for row in self.batch_norms if isinstance(row, Left))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON.

        Keys, stable within one ``schema``: ``schema``, ``input`` and ``output`` (null, or
        ``path``, ``bytes``, ``sha256``), ``counts`` (``batch_norms``, ``folded``, ``left``),
        ``batch_norms`` and ``check``. A row of ``batch_norms`` has ``status``, ``name``,
        ``output``, ``graph``; if ``status`` is "folded" also ``into``, ``op``, ``route``,
        ``input``; if it is "left" also ``reason``, ``detail``, ``unlock``. ``check`` is null or
        has ``passed``, ``inputs``, ``folds``, ``outputs``, ``runtime_agrees``,
        ``runtime_optimiser``, ``timing`` (seconds) and ``predictions`` (null without labels).
        A number that is not finite is null.
        """
        return {
            "schema": SCHEMA,
            "input": None if self.input is None else asdict(self.input),
            "output": None if self.output is None else asdict(self.output),
            "counts": {
                "batch_norms": len(self.batch_norms),
                "folded": len(self.folds),
                "left": len(self.left),
            },
            "batch_norms": [_row(row) for row in self.batch_norms],
            "check": None if self.check is None else _check(self.check),
        }

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def _row(row: Fold | Left) -> dict[str, Any]:
    if isinstance(row, Fold):
        return {"status": "folded", **asdict(row), "route": list(row.route)}
    return {
        "status": "left",
        **asdict(row),
        "reason": row.reason.value,
        "unlock": UNLOCK[row.reason],
    }


def _check(check: Check) -> dict[str, Any]:
    values: dict[str, Any] = {
        "passed": check.passed,
        "runtime_agrees": check.runtime_agrees,
        **_finite(asdict(check)),
    }
    return values


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:
        return None
    return value
