"""A fold report for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pybn.folding.reasons import UNLOCK
from pybn.folding.report import BATCH_NORM, Check, Fold, FoldCheck, FoldReport, Left, Row, closeness

# Wide enough for a line per batch norm where the output is not a terminal.
FILE_WIDTH = 160
# The most rows that are listed one by one; more are counted by kind.
MOST_ROWS = 20
# How a route reads: against the flow of data, along it, or from one affine to the one it joins.
ARROWS = {"backward": " < ", "forward": " > ", "merged": " + "}

K = TypeVar("K")
V = TypeVar("V")


def print_report(report: FoldReport, *, everything: bool = False) -> None:
    """Print what was folded, what was left and why, and what the check found.

    Parameters
    ----------
    report : FoldReport
        What to print.
    everything : bool
        List every row, also those that are not batch norms, however many there are.
    """
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    most = len(report.rows) if everything else MOST_ROWS
    checks = {} if report.check is None else report.check.by_fold
    failed = {key for key, check in checks.items() if not check.passed}
    folds = [row for row in report.folds if everything or row.op_type == BATCH_NORM or row.key in failed]
    left = [[row] for row in report.left] if everything else _alike(report.batch_norms_left)
    if len(folds) > most:
        console.print(_folds_by_route(folds))
        folds = [fold for fold in folds if fold.key in failed]
    if folds:
        console.print(_folds(folds, checks))
    if len(left) > most:
        console.print(_left_by_reason(report.batch_norms_left))
        left = []
    if left:
        console.print(_left(left))
    _print_summary(console, report)
    if len(folds) + len(left) < len(report.rows):
        console.print("(--all lists every one of them)")
    if report.check is not None and report.folds:  # without a fold, both models are the same file
        _print_check(console, report.check)
    if report.output is not None:
        console.print(f"wrote {printable(report.output.path)} ({_size(report.output.bytes)})")


def error_console() -> Console:
    """Return a console on standard error."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False)


def printable(text: str) -> str:
    """Make text from a model safe for a terminal: one line, no control sequences."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _folds(folds: Sequence[Fold], checks: dict[tuple[str, str], FoldCheck]) -> Table:
    table = _table("batch norm", "folded into", "operator")
    if checks:
        table.add_column("largest error", justify="right")
        table.add_column("bound", justify="right")
    for fold in folds:
        cells = [_name(fold), printable(", ".join(fold.into)), _route(fold)]
        check = checks.get(fold.key)
        if checks:
            cells += ["(with another)", ""] if check is None else [f"{check.error:.1e}", f"{check.bound:.1e}"]
        style = "bold red" if check is not None and not check.passed else None
        table.add_row(*map(Text, cells), style=style)
    return table


def _folds_by_route(folds: Sequence[Fold]) -> Table:
    groups: dict[tuple[str, str], list[Fold]] = defaultdict(list)
    for fold in folds:
        groups[fold.direction, _route(fold)].append(fold)
    table = _table("batch norms", "folded", "operator", "such as")
    for (direction, route), group in _largest_first(groups):
        table.add_row(*map(Text, (str(len(group)), direction, route, printable(group[0].name))))
    return table


def _alike(rows: Sequence[Left]) -> list[list[Left]]:
    """Put rows together of which the same is to be said."""
    groups: dict[tuple[str, str], list[Left]] = defaultdict(list)
    for row in rows:
        groups[row.reason.value, row.sentence].append(row)
    return list(groups.values())


def _left(groups: Sequence[Sequence[Left]]) -> Table:
    table = _table("left", "reason", "because")
    for first, *others in groups:
        name = f"{_name(first)} and {len(others)} more" if others else _name(first)
        table.add_row(Text(name), Text(first.reason.value), Text(printable(first.sentence)))
    return table


def _left_by_reason(rows: Sequence[Left]) -> Table:
    groups: dict[str, list[Left]] = defaultdict(list)
    for row in rows:
        groups[row.reason.value].append(row)
    table = _table("left", "reason", "such as", "what would unlock them")
    for reason, group in _largest_first(groups):
        table.add_row(*map(Text, (str(len(group)), reason, printable(group[0].name), UNLOCK[group[0].reason])))
    return table


def _largest_first(groups: dict[K, list[V]]) -> list[tuple[K, list[V]]]:
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _name(row: Row) -> str:
    return printable(row.name if row.op_type == BATCH_NORM else f"{row.name} ({row.op_type})")


def _route(fold: Fold) -> str:
    return printable(ARROWS[fold.direction].join(fold.route))


def _print_summary(console: Console, report: FoldReport) -> None:
    counts = report.counts
    if not report.rows:
        console.print("nothing to fold: the model has no batch norms", style="bold")
    if counts["batch_norms"]:
        summary = f"{counts['folded']} of {counts['batch_norms']} batch norms folded, {counts['left']} left"
        console.print(summary, style="bold yellow" if counts["left"] else "bold green")
    if counts["affines"]:
        console.print(
            f"{counts['affines_folded']} of {counts['affines']} other affine nodes (Mul, Add, Sub, Div, Neg) folded, "
            f"{counts['affines_left']} left"
        )
    for what, count in report.aggressive_would.items():
        console.print(f"--aggressive would, {count} times: {printable(what)}")


def _print_check(console: Console, check: Check) -> None:
    inputs = "1 run" if check.inputs == 1 else f"{check.inputs} runs"
    for difference in check.folds:
        if not difference.passed and not difference.folds:
            console.print(
                f"no fold explains that value {printable(difference.output)} differs by {difference.error:.1e}, "
                f"bound {difference.bound:.1e}",
                style="bold red",
            )
    judged = [output for output in check.outputs if output.bound is not None or not output.passed]
    if judged:
        worst = max(judged, key=closeness)
        kind = "bound" if worst.derived else "tolerance"
        console.print(
            f"checked on {inputs}: largest error {worst.error:.1e}, {kind} {worst.bound or 0:.1e} "
            f"(output {printable(worst.name)})",
            style="green" if check.passed else "bold red",
        )
    else:
        console.print(f"checked on {inputs}")
    for output in check.outputs:
        if output.bound is None and output.passed:
            console.print(f"output {printable(output.name)}: {output.changed} values changed")
    if check.predictions is not None:
        seen = check.predictions
        console.print(
            f"{seen.changed} of {seen.samples} predictions changed, "
            f"accuracy {seen.accuracy_before:.2%} before, {seen.accuracy_after:.2%} after"
        )
    for model in check.runtime_at_fault:
        console.print(
            f"onnxruntime's own optimiser moves the {model} model's outputs beyond the bound",
            style="yellow",
        )
    timing = check.timing
    if timing is not None:
        console.print(
            f"time per run {_speed(timing.plain_before, timing.plain_after)}; "
            f"optimised by onnxruntime {_speed(timing.optimised_before, timing.optimised_after)}"
        )


def _speed(before: float, after: float) -> str:
    return f"{before * 1e3:.3g} ms before, {after * 1e3:.3g} ms after"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    if count < 1_000_000:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB"
