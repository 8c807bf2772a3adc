"""Entry point of the `pybn` command. It works, if only to say what is missing, without extras."""

from __future__ import annotations

import sys

# What may be missing, and the extras that bring it.
OPTIONAL = dict.fromkeys(("typer", "rich", "jinja2", "onnx", "onnx_ir", "onnxruntime"), "cli,onnx")
OPTIONAL["matplotlib"] = "cli,onnx,bench"


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    # Names in models may hold characters that the terminal's encoding does not have.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        from pybn.commands import app

        app()
    except OSError as error:  # of standard output: a full disk behind a redirection
        print(f"pybn: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in OPTIONAL:
            raise
        print(f'pybn: {missing} is not installed; run: pip install "pybn[{OPTIONAL[missing]}]"', file=sys.stderr)
        sys.exit(1)
