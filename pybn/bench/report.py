"""Tables on a terminal, or in Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from pybn.bench import tables
from pybn.bench.results import Run

FILE_WIDTH = 160
STYLES = ("terminal", "markdown")


def print_run(run: Run, found: Sequence[tables.Table], style: str) -> None:
    """Print what a run measured: every table, who took part and how, and how many figures miss their target."""
    print_tables(found, style)
    bullet = "- " if style == "markdown" else ""
    console = _console()
    for line in (tables.environment_line(run), tables.additions_line(run), *tables.peer_lines(run)):
        if line:
            console.print(Text(bullet + line), soft_wrap=True)
    if busy := tables.noise_line(run):
        console.print(Text(bullet + busy), soft_wrap=True, style="bold red")
    count = tables.missed(found)
    if count == 0:
        console.print("every target is met", style="bold green")
    else:
        figures = "1 figure misses its target" if count == 1 else f"{count} figures miss their targets"
        console.print(f"{figures}: those marked {tables.MARK}", style="bold yellow")


def print_tables(found: Sequence[tables.Table], style: str) -> None:
    """Print tables in a style."""
    console = _console()
    for table in found:
        if style == "markdown":
            console.print(Text(markdown(table)), soft_wrap=True)
        else:
            _print(console, table)
        console.print()


def _console() -> Console:
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def markdown(table: tables.Table) -> str:
    """Return a table in GitHub's Markdown, its title before it and its notes after it."""
    lines = [f"**{table.title}**", "", _row(table.columns), "|---" * len(table.columns) + "|"]
    lines += [_row(row) for row in table.rows]
    lines += [
        "",
        *(f"- {note.replace('*', chr(92) + '*', 1) if note.startswith('*') else note}" for note in table.notes),
    ]
    return "\n".join(lines).rstrip()


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _print(console: Console, table: tables.Table) -> None:
    shown = RichTable(
        box=None, pad_edge=False, header_style="bold", title=Text(table.title, "bold"), title_justify="left"
    )
    for number, column in enumerate(table.columns):
        words = number == 0 or column in ("shapes", "variant")
        shown.add_column(column, justify="left" if words else "right")
    for row in table.rows:
        shown.add_row(*(Text(cell, "bold red" if tables.MARK in cell else "") for cell in row))
    console.print(shown)
    for note in table.notes:
        console.print(Text(note, "dim"), soft_wrap=True)
