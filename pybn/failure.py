"""How a command fails: one line on standard error, and an exit code."""

from __future__ import annotations

from typing import NoReturn

import typer

FAILED = 1
WRONG_USAGE = 2


def say(message: str) -> None:
    """Print one line on standard error."""
    from pybn import terminal  # slow to import, and most commands do not fail

    typer.echo(f"pybn: {terminal.printable(message)}", err=True)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Print one line on standard error and end the command."""
    say(message)
    raise typer.Exit(code)
