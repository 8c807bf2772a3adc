"""What was folded, what was left and why, and what the check found. JSON is the truth.

``docs/report.md`` documents the JSON, ``report.schema.json`` beside this file is its JSON Schema. The text, the page
and the picture that people see are made from it: `pybn.terminal`, `pybn.folding.html`, `pybn.folding.picture`.
"""

from __future__ import annotations

import json
import math
import types
from collections import Counter
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from pybn.folding.reasons import UNLOCK, Reason

SCHEMA = 2

BATCH_NORM = "BatchNormalization"

# Operator types of neighbours that are not nodes: where a value enters the graph, and where it leaves it.
GRAPH_INPUT, GRAPH_OUTPUT = "graph input", "graph output"

Direction: TypeAlias = Literal["backward", "forward", "merged"]


class ReportError(ValueError):
    """A text is not a report that this version reads. The message is one line."""


@dataclass(frozen=True)
class Fold:
    """A batch norm, or another affine node, that is gone.

    Attributes
    ----------
    name : str
        The node's name, or its output's if it has none.
    op_type : str
        "BatchNormalization", or the operator type of another affine node: Mul, Add, Sub, Div, Neg.
    output : str
        The value that it produced.
    graph : str
        The graph it was in: "main", or the path to a subgraph or local function.
    direction : str
        "backward" into what came before it, "forward" into what came after it, or "merged" with another affine node.
    into : tuple of str
        Names of the nodes that absorbed it.
    route : tuple of str
        Operator types on the way, nearest to the affine first, those that absorbed it among them.
    outputs : tuple of str
        Values of both models, with the same data in both, that are now computed in another way.
    cost : int
        Operators that the fold added; the affine itself, which is gone, not subtracted.
    scale_range : tuple of two floats
        The least and the largest |scale| of the map.
    """

    name: str
    op_type: str
    output: str
    graph: str
    direction: Direction
    into: tuple[str, ...]
    route: tuple[str, ...]
    outputs: tuple[str, ...]
    cost: int
    scale_range: tuple[float, float]

    @property
    def key(self) -> tuple[str, str]:
        """The graph and the name, by which the check knows the fold."""
        return self.graph, self.name


@dataclass(frozen=True)
class Neighbour:
    """A node near an affine that stays; constants are not among its inputs.

    Attributes
    ----------
    name : str
        The node's name, or its output's if it has none.
    op_type : str
        The operator type, "domain::type" outside the standard domain; or `GRAPH_INPUT` or `GRAPH_OUTPUT`, for a value
        that enters or leaves the graph.
    inputs, outputs : tuple of str
        Names of values. Two neighbours are connected where one's output is the other's input.
    """

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """A batch norm, or another affine node, that stays, with the reason.

    Attributes
    ----------
    name, op_type, output, graph : str
        As in `Fold`.
    reason : Reason
        The code.
    detail : str
        What was found.
    would : str or None
        What ``aggressive`` would do and bring; None if it would not help. The same words for all rows of a kind,
        without names, so that they can be counted.
    neighbours : tuple of Neighbour
        The nodes of the folded model within two steps, the affine itself first.
    """

    name: str
    op_type: str
    output: str
    graph: str
    reason: Reason
    detail: str
    would: str | None = None
    neighbours: tuple[Neighbour, ...] = ()

    @property
    def sentence(self) -> str:
        """What was found, and what would unlock the fold."""
        return f"{self.detail}; {UNLOCK[self.reason]}"


Row: TypeAlias = Fold | Left


@dataclass(frozen=True)
class Spread:
    """How large the weights of an operator are, by output channel.

    The scale of a channel is its largest |w|: a quantisation step per channel is proportional to it. A step per tensor
    is proportional to the largest scale, which costs the channel of the smallest one `bits`.

    Attributes
    ----------
    least_weight : float
        The least |w| > 0 of the tensor; 0 if all weights are zero.
    smallest_scale, median_scale, largest_scale : float
        Over the channels that are not all zero; 0 if all are.
    channels, zero_channels : int
        Output channels, and those among them whose weights are all zero.
    """

    least_weight: float
    smallest_scale: float
    median_scale: float
    largest_scale: float
    channels: int
    zero_channels: int

    @property
    def bits(self) -> float:
        """Bits that one step per tensor costs the smallest channel: log2(largest / smallest). NaN if there are none."""
        return math.log2(self.largest_scale) - math.log2(self.smallest_scale) if self.smallest_scale > 0 else math.nan


@dataclass(frozen=True)
class WeightRange:
    """The weights of one operator in the original and in the folded model.

    Attributes
    ----------
    node, op_type, graph : str
        The operator, named as in the folded model.
    before, after : Spread
        Equal if no fold changed the weights.
    """

    node: str
    op_type: str
    graph: str
    before: Spread
    after: Spread


@dataclass(frozen=True)
class FileInfo:
    """A model file: where it is, its size in bytes, its SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FoldCheck:
    """A value that both models compute in different ways, at the element where the two came closest to the bound.

    Attributes
    ----------
    output : str
        The value's name, in both models.
    graph : str
        The graph it is in, as in `Fold`.
    folds : tuple of str
        Names of the folds that changed how it is computed.
    error, bound : float
        The difference there, and the most that rounding explains.
    passed : bool
        Whether every difference is within its bound.
    detail : str
        Why it could not be compared, if it could not.
    """

    output: str
    graph: str
    folds: tuple[str, ...]
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


def closeness(check: FoldCheck | OutputCheck) -> float:
    """Return the error as a part of the bound; infinity for what did not pass."""
    if not check.passed:
        return math.inf
    return check.error / check.bound if check.bound else 0.0


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
    """The proof that the folded model computes what the original did.

    Attributes
    ----------
    inputs : int
        How many inputs both models were run on.
    folds : tuple of FoldCheck
        Every value that the models compute in different ways.
    outputs : tuple of OutputCheck
        The outputs of the folded model against those of the original.
    runtime_optimiser, runtime_optimiser_folded : tuple of OutputCheck
        The original model, and the folded one, as onnxruntime's optimiser rewrites it, against the same model as it is.
    timing : Timing or None
        None if onnxruntime cannot run the models.
    predictions : Predictions or None
        None without labels.
    """

    inputs: int
    folds: tuple[FoldCheck, ...]
    outputs: tuple[OutputCheck, ...]
    runtime_optimiser: tuple[OutputCheck, ...]
    runtime_optimiser_folded: tuple[OutputCheck, ...]
    timing: Timing | None
    predictions: Predictions | None

    @property
    def passed(self) -> bool:
        """Whether every fold and every output is within its bound."""
        return all(f.passed for f in self.folds) and all(o.passed for o in self.outputs)

    @property
    def by_fold(self) -> dict[tuple[str, str], FoldCheck]:
        """What was found of each fold, by its `Fold.key`: of several values, the one that is closest to its bound."""
        found: dict[tuple[str, str], FoldCheck] = {}
        for check in sorted(self.folds, key=closeness):
            found |= {(check.graph, name): check for name in check.folds}
        return found

    @property
    def runtime_agrees(self) -> bool:
        """Whether the runtime's optimiser keeps the outputs of both models within the bound."""
        return not self.runtime_at_fault

    @property
    def runtime_at_fault(self) -> tuple[str, ...]:
        """Which models the runtime's own optimiser breaks: "original", "folded", both or none."""
        tallies = (("original", self.runtime_optimiser), ("folded", self.runtime_optimiser_folded))
        return tuple(name for name, outputs in tallies if not all(output.passed for output in outputs))


@dataclass(frozen=True)
class FoldReport:
    """Every batch norm and affine node of a model and what became of it.

    Attributes
    ----------
    rows : tuple of Fold or Left
        One for each, in graph order.
    weights : tuple of WeightRange
        One for each linear operator with constant weights, if they were measured.
    input, output : FileInfo or None
        The files, where there are any.
    check : Check or None
        The proof, if it was asked for.
    """

    rows: tuple[Row, ...]
    weights: tuple[WeightRange, ...] = ()
    input: FileInfo | None = None
    output: FileInfo | None = None
    check: Check | None = None

    @property
    def batch_norms(self) -> tuple[Row, ...]:
        """The rows that are batch norms."""
        return tuple(row for row in self.rows if row.op_type == BATCH_NORM)

    @property
    def affines(self) -> tuple[Row, ...]:
        """The rows that are not batch norms."""
        return tuple(row for row in self.rows if row.op_type != BATCH_NORM)

    @property
    def folds(self) -> tuple[Fold, ...]:
        """The rows that are gone, batch norms or not."""
        return tuple(row for row in self.rows if isinstance(row, Fold))

    @property
    def left(self) -> tuple[Left, ...]:
        """The rows that stay, batch norms or not."""
        return tuple(row for row in self.rows if isinstance(row, Left))

    @property
    def batch_norms_left(self) -> tuple[Left, ...]:
        """The batch norms that stay."""
        return tuple(row for row in self.left if row.op_type == BATCH_NORM)

    @property
    def counts(self) -> dict[str, int]:
        """How many batch norms and how many other affine nodes there were, are folded, and are left."""
        batch_norms, affines = self.batch_norms, self.affines
        left, affines_left = len(self.batch_norms_left), len(self.left) - len(self.batch_norms_left)
        return {
            "batch_norms": len(batch_norms),
            "folded": len(batch_norms) - left,
            "left": left,
            "affines": len(affines),
            "affines_folded": len(affines) - affines_left,
            "affines_left": affines_left,
        }

    @property
    def aggressive_would(self) -> dict[str, int]:
        """What ``aggressive`` would do, and to how many of the rows that stay; the most frequent first."""
        return dict(Counter(row.would for row in self.left if row.would is not None).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON; ``docs/report.md`` says what they mean.

        The fields of the dataclasses, and what follows from them: ``schema``, ``counts``, of every row its ``status``
        and what would ``unlock`` it, of the check whether it ``passed``. A number that is not finite is None.
        """
        values: dict[str, Any] = _plain(asdict(self))
        for row, plain in zip(self.rows, values["rows"], strict=True):
            plain["status"] = "folded" if isinstance(row, Fold) else "left"
            if isinstance(row, Left):
                plain["unlock"] = UNLOCK[row.reason]
        if self.check is not None:
            values["check"]["passed"] = self.check.passed
            values["check"]["runtime_agrees"] = self.check.runtime_agrees
            values["check"]["runtime_at_fault"] = list(self.check.runtime_at_fault)
        return {"schema": SCHEMA, "counts": self.counts, **values}

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FoldReport:
        """Read what `to_json` wrote. Numbers that were not finite are NaN.

        Raises
        ------
        ReportError
            If the text is not JSON, not a report, or of another schema.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ReportError(f"the report is not JSON: {error}") from error
        schema = values.get("schema") if isinstance(values, dict) else None
        if schema != SCHEMA:
            raise ReportError(f"the report has schema {schema!r}, expected {SCHEMA}")
        try:
            report: FoldReport = _read(cls, values)
        except KeyError as error:
            raise ReportError(f"the report lacks the key {error}") from error
        except (TypeError, ValueError) as error:
            raise ReportError(f"the report is malformed: {error}") from error
        return report


def _plain(value: Any) -> Any:
    """Turn what `asdict` returns into what JSON has: lists, and None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Reason):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read(kind: Any, value: Any) -> Any:
    """Make a value of the annotated type from plain values: the inverse of `_plain`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in arguments:
            return None if value is None else _read(arguments[0], value)
        status = value["status"]  # of a `Row`, the only other union
        if status not in ("folded", "left"):
            raise ValueError(f"{status!r} is neither 'folded' nor 'left'")
        return _read(Fold if status == "folded" else Left, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        return tuple(_read(arguments[0], item) for item in value)  # all items of a tuple are of one type
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        items = {field.name: _read(hints[field.name], value[field.name]) for field in fields(kind)}
        return kind(**items)  # type: ignore[operator]  # mypy takes it for an instance
    if kind is float:
        return math.nan if value is None else float(value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is none of {', '.join(arguments)}")
        return value
    if kind is Reason:
        return Reason(value)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
