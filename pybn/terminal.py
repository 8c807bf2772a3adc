"""A fold report for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pybn.folding.report import Check, FoldReport, OutputCheck

# Wide enough for a line per batch norm where the output is not a terminal.
FILE_WIDTH = 160


def print_report(report: FoldReport) -> None:
    """Print what was folded, what was left and why, and what the check found."""
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    if report.folds:
        console.print(_folds(report))
    if report.left:
        console.print(_left(report))
    folded, total = len(report.folds), len(report.batch_norms)
    if total == 0:
        console.print("nothing to fold: the model has no batch norms", style="bold")
    else:
        summary = f"{folded} of {total} batch norms folded, {total - folded} left"
        console.print(summary, style="bold green" if folded == total else "bold yellow")
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


def _folds(report: FoldReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("batch norm", "folded into", "operator"):
        table.add_column(column, overflow="fold")
    checks = {} if report.check is None else {fold.name: fold for fold in report.check.folds}
    if checks:
        table.add_column("largest error", justify="right")
        table.add_column("bound", justify="right")
    for fold in report.folds:
        route = " < ".join(fold.route)
        cells = [printable(fold.name), printable(", ".join(fold.into)), route]
        style = None
        check = checks.get(fold.name)
        if checks:
            cells += ["(see next)", ""] if check is None else [f"{check.error:.1e}", f"{check.bound:.1e}"]
        if check is not None and not check.passed:
            style = "bold red"
        table.add_row(*map(Text, cells), style=style)
    return table


def _left(report: FoldReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("left", "reason", "because"):
        table.add_column(column, overflow="fold")
    for row in report.left:
        table.add_row(Text(printable(row.name)), Text(row.reason.value), Text(printable(row.sentence)))
    return table


def _print_check(console: Console, check: Check) -> None:
    inputs = "1 run" if check.inputs == 1 else f"{check.inputs} runs"
    judged = [output for output in check.outputs if output.bound is not None or not output.passed]
    if judged:
        worst = max(judged, key=_closeness)
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
    if not check.runtime_agrees:
        console.print(
            "onnxruntime's own optimiser moves the original model's outputs beyond the bound",
            style="yellow",
        )
    timing = check.timing
    console.print(
        f"time per run {_speed(timing.plain_before, timing.plain_after)}; "
        f"optimised by onnxruntime {_speed(timing.optimised_before, timing.optimised_after)}"
    )


def _closeness(output: OutputCheck) -> float:
    if not output.passed:
        return float("inf")
    return output.error / output.bound if output.bound else 0.0


def _speed(before: float, after: float) -> str:
    return f"{before * 1e3:.3g} ms before, {after * 1e3:.3g} ms after"


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    if count < 1_000_000:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB"
