"""The commands of `pybn`: what they take, in which order they work, how they fail."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.progress import track

import pybn
from pybn import terminal

if TYPE_CHECKING:
    import onnx

    from pybn.folding.report import Check, FoldReport

OPTIONAL_PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "torch", "typer", "rich", "ml-dtypes")
WRONG_USAGE = 2

app = typer.Typer(
    help="Fold the batch norms of trained ONNX models into their weights, and show what this installation of pybn is.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    # Errors are one line; a traceback would be a bug of pybn, shown as Python shows it.
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pybn {pybn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def info() -> None:
    """Show versions, the instruction set, and threads."""
    width = max(map(len, pybn.show_config()))
    for package in OPTIONAL_PACKAGES:
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        typer.echo(f"{package:{width}}  {installed}")


@app.command()
def fold(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model.")],
    target: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Where to write; IN.folded.onnx if absent.", show_default=False),
    ] = None,
    check: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Compare both models on N random batches."),
    ] = None,
    check_data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Compare both models on your data: an array for each input, by its name; "
            "an array `labels` gives the accuracy before and after.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Fold the batch norms of a trained ONNX model into the weights before them.

    Every batch norm that stays is listed with the reason. With a check, every folded operator is compared with the
    original against its own rounding bound, and OUT is written only if all pass.

    **Examples**

    - `pybn fold model.onnx` (writes model.folded.onnx)

    - `pybn fold model.onnx small.onnx --check 16` (compares both models on 16 random batches)

    - `pybn fold model.onnx --check-data test.npz` (compares them on your data)

    - `pybn fold model.onnx --json > report.json` (for scripts)

    **Exit codes**: 0 done, also if there was nothing to fold; 1 the model cannot be read or
    written, or the check failed; 2 wrong usage.
    """
    if not source.name:
        _fail(f"IN is {str(source)!r}, expected the path of an ONNX model", WRONG_USAGE)
    destination = target or source.with_name(f"{source.stem}.folded.onnx")
    if _is_same_file(source, destination):
        _fail("OUT is the same file as IN", WRONG_USAGE)
    # Imported here so that `pybn info` works without onnx.
    from pybn.folding.files import ModelError, external_data_files, read_model, write_model
    from pybn.folding.onnx import fold_onnx

    # Errors are one line of ours; onnx-ir's warnings on odd models would come on top.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
    try:
        original, input_info = read_model(source)
        if destination.exists() and destination.resolve() in external_data_files(source):
            _fail("OUT is a file in which IN keeps its weights", WRONG_USAGE)
        result = fold_onnx(original)
        report = replace(result.report, input=input_info)
        if check is not None or check_data is not None:
            report = replace(report, check=_verify(original, result.model, report, check, check_data))
        passed = report.check is None or report.check.passed
        if passed:
            report = replace(report, output=write_model(result.model, destination))
    except ModelError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{destination}: {error.strerror or error}; nothing was written")

    if as_json:
        typer.echo(report.to_json())
    else:
        terminal.print_report(report)
    if not passed:
        assert report.check is not None
        _fail(f"the check failed: {_failures(report.check)}; nothing was written")


def _verify(
    original: onnx.ModelProto,
    folded: onnx.ModelProto,
    report: FoldReport,
    count: int | None,
    data: Path | None,
) -> Check:
    from pybn.folding.inputs import load_inputs, random_inputs
    from pybn.folding.runtime import CheckError
    from pybn.folding.verify import verify

    try:
        inputs, labels = ([], None) if data is None else load_inputs(original, data)
        if count is not None:
            inputs = inputs + random_inputs(original, count)
        return verify(original, folded, report, inputs, labels=labels, progress=_progress())
    except CheckError as error:
        _fail(f"{error}; nothing was written")


def _progress() -> Callable[[Iterable[Any]], Iterable[Any]]:
    console = terminal.error_console()
    return lambda inputs: track(inputs, "checking", console=console, transient=True, disable=not console.is_terminal)


def _failures(check: Check) -> str:
    folds = [f"fold {fold.name}" for fold in check.folds if not fold.passed]
    outputs = [f"output {output.name}" for output in check.outputs if not output.passed]
    return ", ".join(folds + outputs)


def _is_same_file(source: Path, destination: Path) -> bool:
    try:
        return source.resolve() == destination.resolve() or source.samefile(destination)
    except (OSError, RuntimeError):
        return False


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"pybn: {terminal.printable(message)}", err=True)
    raise typer.Exit(code)
