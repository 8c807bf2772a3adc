"""How a command fails: one line on standard error, and an exit code."""

from __future__ import annotations

from typing import NoReturn

import typer

from pybn import terminal

FAILED = 1
WRONG_USAGE = 2


def say(message: str) -> None:
    """Print one line on standard error."""
    typer.echo(f"pybn: {terminal.printable(message)}", err=True)


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Print one line on standard error and end the command."""
    say(message)
    raise typer.Exit(code)
