"""The regression guard: a fresh run against an earlier one, in ratios to the copy of each run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pybn.bench import ours
from pybn.bench.cases import Case
from pybn.bench.results import Measurement, Run
from pybn.bench.tables import MARK, Table

TOLERANCE = 0.25
# What is compared: with `out=` and with fresh results.
COMPARED = (ours.OUT, ours.FRESH)


@dataclass(frozen=True)
class Comparison:
    """One figure, then and now, in copies; `again` if a second measurement was needed."""

    case: Case
    contender: str
    before: float
    now: float
    again: bool

    @property
    def change(self) -> float:
        """Relative change; positive is slower."""
        return self.now / self.before - 1


def compare(
    baseline: Run,
    measure: Callable[[Case, int], Measurement],
    tolerance: float = TOLERANCE,
    progress: Callable[[Iterable[Case]], Iterable[Case]] = lambda cases: cases,
) -> list[Comparison]:
    """Measure the cases of an earlier run anew.

    A case with a figure that is worse by more than the tolerance is measured once more, and the better figures count:
    a machine that was busy for a moment is no regression.
    """
    comparisons = []
    earlier = {then.case: then for then in baseline.measurements}
    for case in progress(earlier):
        then = earlier[case]
        now = [measure(case, 0)]
        if any(c.change > tolerance for c in _figures(then, now)):
            now.append(measure(case, 1))
        comparisons += _figures(then, now)
    return comparisons


def _figures(then: Measurement, now: Sequence[Measurement]) -> list[Comparison]:
    figures = []
    for name in COMPARED:
        before = then.copies(name)
        values = [value for m in now if (value := m.copies(name)) is not None]
        if before is not None and values:
            figures.append(Comparison(then.case, name, before, min(values), len(now) > 1))
    return figures


def regressions(comparisons: Sequence[Comparison], tolerance: float) -> list[Comparison]:
    """Return the figures that are worse by more than the tolerance."""
    return [c for c in comparisons if c.change > tolerance]


def comparison_table(comparisons: Sequence[Comparison], tolerance: float) -> Table:
    """Return all figures, then and now; those that are worse are marked."""
    table = Table(
        "Time in copies of the tensor, then and now",
        ["operation", "shape", "variant", "results", "then", "now", "change"],
        notes=[f"{MARK} worse by more than {tolerance:.0%}; (2) measured twice, the better figure counts"],
    )
    for c in comparisons:
        case = c.case
        mark = f" {MARK}" if c.change > tolerance else ""
        results = "out=" if c.contender == ours.OUT else "fresh"
        change = f"{c.change:+.0%}{' (2)' if c.again else ''}{mark}"
        table.rows.append([
            case.operation.name, str(case.shape), f"{case.dtype} {case.layout}", results,
            f"{c.before:.2f}", f"{c.now:.2f}", change,
        ])  # fmt: skip
    return table


def differences(baseline: Run, environment: dict[str, str], threads: int) -> list[str]:
    """Return what ratios depend on and is different from the baseline's run, as sentences."""
    keys = ("processor", "instruction set", "compiler", "L2 per core")
    lines = [
        f"{key}: {baseline.environment.get(key)} then, {environment.get(key)} now"
        for key in keys
        if baseline.environment.get(key) != environment.get(key)
    ]
    if baseline.threads != threads:
        lines.append(f"threads: {baseline.threads} then, {threads} now")
    return lines
