"""The commands of `pybn`: what they take, in which order they work, how they fail."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import pybn
from pybn import fold_commands, population_commands
from pybn.failure import WRONG_USAGE, fail

if TYPE_CHECKING:
    from pybn.bench.cases import Case
    from pybn.bench.results import Run

OPTIONAL_PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "torch", "typer", "rich", "matplotlib", "ml-dtypes")

app = typer.Typer(
    help="Fold the batch norms of trained ONNX models into their weights, put batch norms in, give them the "
    "statistics of your data, measure pybn's speed against its peers, and show what this installation of pybn is.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
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


app.command()(fold_commands.fold)
app.command()(fold_commands.inspect)
app.command()(fold_commands.unfold)
app.command()(population_commands.reestimate)
app.command()(population_commands.insert)


@app.command()
def info() -> None:
    """Show versions, the instruction set, and threads."""
    import importlib.metadata

    width = max(map(len, pybn.show_config()))
    for package in OPTIONAL_PACKAGES:
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = "not installed"
        typer.echo(f"{package:{width}}  {installed}")


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
            help="numpy, torch, compile, onednn, onnxruntime, openvino, jax, by commas; bare: loops without a library, "
            "compiled here; all; or none.",
            show_default="all that are installed, without bare",
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
        fail(str(error), WRONG_USAGE)
    except WrongResultError as error:
        fail(str(error))
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
        fail(f"{target}: {error.strerror or error}")
    if wrong := sorted({peer for m in run.measurements for peer in m.wrong}):
        fail(f"{', '.join(wrong)}: another result than pybn's, see the cases that are not timed")
    if strict and (count := tables.missed(found)):
        fail(f"{count} figures miss their target")


def _compare(earlier: Run, threads: int, rounds: int, tolerance: float | None, style: str) -> None:
    from pybn.bench import compare, report, session

    limit = compare.TOLERANCE if tolerance is None else tolerance
    for line in compare.differences(earlier, session.environment(), threads):
        typer.echo(f"pybn: not the same as in the file: {line}", err=True)
    measure = session.Bench([], threads, rounds).measure
    comparisons = compare.compare(earlier, measure, limit, _measuring)
    report.print_tables([compare.comparison_table(comparisons, limit)], style)
    if slower := compare.regressions(comparisons, limit):
        fail(f"{len(slower)} of {len(comparisons)} figures are worse by more than {limit:.0%}")
    typer.echo(f"none of {len(comparisons)} figures is worse by more than {limit:.0%}")


def _measuring(cases: Iterable[Case]) -> Iterable[Case]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pybn import terminal

    cases = list(cases)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = terminal.error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            yield case
            progress.advance(task)
