"""The commands of `pybn`: what they take, in which order they work, how they fail."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

import pybn
from pybn import terminal

if TYPE_CHECKING:
    import onnx

    from pybn.bench.cases import Case
    from pybn.bench.results import Run
    from pybn.folding.report import Check, FoldReport

OPTIONAL_PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "torch", "typer", "rich", "matplotlib", "ml-dtypes")
WRONG_USAGE = 2

app = typer.Typer(
    help="Fold the batch norms of trained ONNX models into their weights, measure pybn's speed against its peers, and "
    "show what this installation of pybn is.",
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


@app.command()
def bench(
    ops: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Operations, by commas: forward, inference, backward, each also -relu and -add-relu (a residual).",
            show_default="all",
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="resnet50|mobilenet|densenet|extra|FILE",
            help="Shapes; a FILE has a line N,C,H,W for each. Several by commas.",
            show_default="resnet50",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Images per batch, for the networks' lists.", show_default="32"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="float32, float64, float16 or bfloat16. Several by commas.", show_default="float32"
        ),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(metavar="nchw|nhwc", help="Memory layout. Both by a comma.", show_default="nchw"),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="numpy, torch, compile, onednn, onnxruntime, openvino, jax, by commas; all; or none.",
            show_default="all that are installed",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Threads of everyone.", show_default="all"),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Rounds in which everyone has a turn.", show_default="21, quick 7"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Four shapes of each list, fewer rounds, torch.compile only if named.")
    ] = False,
    table: Annotated[str, typer.Option(metavar="terminal|markdown", help="How tables are printed.")] = "terminal",
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write times and ratios to FILE.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Also draw every time against its traffic bound."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Measure nothing: tables and pictures of an earlier --json FILE."),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="FILE",
            help="Measure the cases of an earlier --json FILE; exit with 1 if one is slower now.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="X", help="How much slower, relatively, --compare lets pass.", show_default="0.25"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if a target is missed.")] = False,
) -> None:
    """Measure pybn against a memory copy and against its peers, all interleaved in one run.

    The unit is the time in which all threads copy the tensor. Peers that are not installed are listed as absent;
    what each one's time includes, and what all this does not show, is in docs/benchmarks.md.

    **Examples**

    - `pybn bench --quick` (four shapes, a minute or two)

    - `pybn bench --ops forward,backward --shapes mobilenet,extra --layout nchw,nhwc`

    - `pybn bench --dtype float32,float16 --peers torch,onednn --threads 1`

    - `pybn bench --json run.json --plot run.png` and later `pybn bench --from run.json --table markdown`

    - `pybn bench --compare benchmarks/baseline.json` (has pybn become slower on this machine?)

    **Exit codes**: 0 done; 1 something is slower (`--compare`) or misses a target (`--strict`), a contender's result is
    wrong, or a file cannot be written; 2 wrong usage.
    """
    # Imported here: no other command needs it.
    from pybn.bench import options, results, session
    from pybn.bench.cases import UsageError
    from pybn.bench.problem import WrongResultError

    chosen = {
        "--ops": ops, "--shapes": shapes, "--batch": batch, "--dtype": dtype, "--layout": layout, "--peers": peers,
        "--quick": quick,
    }  # fmt: skip
    try:
        options.require_consistent(table, tolerance, baseline, as_json, picture)
        if baseline is not None:
            options.require_no_others(
                "--compare", chosen | {"--from": source, "--json": as_json, "--plot": picture, "--strict": strict}
            )
            earlier = results.load(baseline, "--compare")
            _compare(
                earlier, session.set_threads(threads or earlier.threads), rounds or earlier.rounds, tolerance, table
            )
            return
        if source is not None:
            options.require_no_others("--from", chosen | {"--threads": threads, "--rounds": rounds})
            run = results.load(source, "--from")
        else:
            plan = options.plan(
                operations=ops, shapes=shapes or [], batch=batch, dtypes=dtype or [], layouts=layout or [], peers=peers,
                threads=threads, rounds=rounds, quick=quick,
            )  # fmt: skip
            run = session.run(plan, _measuring)
            if len(run.measurements) < len(plan.cases):
                typer.echo(f"pybn: interrupted after {len(run.measurements)} of {len(plan.cases)} cases", err=True)
    except UsageError as error:
        _fail(str(error), WRONG_USAGE)
    except WrongResultError as error:
        _fail(str(error))
    _report(run, table, as_json, picture, strict)


def _report(run: Run, style: str, as_json: Path | None, picture: Path | None, strict: bool) -> None:
    from pybn.bench import report, tables

    found = tables.all_tables(run)
    report.print_run(run, found, style)
    target = as_json
    try:
        if as_json is not None:
            as_json.write_text(run.to_json())
            typer.echo(f"wrote {as_json}")
        target = picture
        if picture is not None:
            from pybn.bench.plot import plot

            for path in plot(run, picture):
                typer.echo(f"wrote {path}")
    except OSError as error:
        _fail(f"{target}: {error.strerror or error}")
    if wrong := sorted({peer for m in run.measurements for peer in m.wrong}):
        _fail(f"{', '.join(wrong)}: another result than pybn's, see the cases that are not timed")
    if strict and (count := tables.missed(found)):
        _fail(f"{count} figures miss their target")


def _compare(earlier: Run, threads: int, rounds: int, tolerance: float | None, style: str) -> None:
    from pybn.bench import compare, report, session

    limit = compare.TOLERANCE if tolerance is None else tolerance
    for line in compare.differences(earlier, session.environment(), threads):
        typer.echo(f"pybn: not the same as in the file: {line}", err=True)
    measure = session.Bench([], threads, rounds).measure
    comparisons = compare.compare(earlier, measure, limit, _measuring)
    report.print_tables([compare.comparison_table(comparisons, limit)], style)
    if slower := compare.regressions(comparisons, limit):
        _fail(f"{len(slower)} of {len(comparisons)} figures are worse by more than {limit:.0%}")
    typer.echo(f"none of {len(comparisons)} figures is worse by more than {limit:.0%}")


def _measuring(cases: Iterable[Case]) -> Iterable[Case]:
    cases = list(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = terminal.error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            yield case
            progress.advance(task)


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
    folds = [f"fold {', '.join(fold.folds) or fold.output}" for fold in check.folds if not fold.passed]
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
