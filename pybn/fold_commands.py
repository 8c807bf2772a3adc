"""`pybn fold`, `inspect` and `unfold`: what they take, in which order they work, how they fail."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pybn.failure import FAILED, WRONG_USAGE, fail, say

if TYPE_CHECKING:
    import onnx

    from pybn.folding.files import Loaded
    from pybn.folding.onnx import FoldResult
    from pybn.folding.report import Check, FoldReport, WeightRange

T = TypeVar("T")

# Standard input or output.
STANDARD = Path("-")
# Below this size, a fold is over before a bar could be read.
LARGE_BYTES = 50_000_000


class Failed(Exception):
    """One model cannot be folded. The message is one line."""


class WrongUsage(Exception):
    """The arguments make no sense, seen only when the model is known. The message is one line."""


@dataclass(frozen=True)
class Job:
    """One model to fold, and where to; None for nowhere. Of --output-dir, the folder is made."""

    source: Path
    target: Path | None
    makes_folder: bool


@dataclass(frozen=True)
class Options:
    """What `pybn fold` does with each model."""

    check: int | None
    check_data: Path | None
    aggressive: bool
    reversible: bool
    skip: tuple[str, ...]
    only: tuple[str, ...]
    max_left: int | None
    measure: bool
    quiet: bool


def fold(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="IN... [OUT]",
            help="The ONNX model, and where to write; IN.folded.onnx if absent. `-` is standard input or output. "
            "Several models with --output-dir or --in-place.",
            show_default=False,
        ),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", metavar="DIR", help="Write each model into DIR, under its own file name."),
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Replace each model by the folded one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all but write models.")] = False,
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
    max_left: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Write nothing, and exit with 1, if more than N batch norms stay."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave this batch norm (node or output name) alone. Repeatable."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Fold this one, and leave all others alone. Repeatable."),
    ] = None,
    aggressive: Annotated[
        bool,
        typer.Option("--aggressive", help="Also fold what only trades one operator for another, faster or not."),
    ] = False,
    reversible: Annotated[
        bool,
        typer.Option("--reversible", help="Store in the model what `pybn unfold` needs to restore the original file."),
    ] = False,
    report_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--report", metavar="FILE", help="Also write the report to FILE.html, a page, or FILE.json. Repeatable."
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Also draw the scales of weights before and after.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="List every row, also affine nodes that are not batch norms.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors, and JSON if asked.")] = False,
) -> None:
    """Fold the batch norms of trained ONNX models into the weights around them.

    Every batch norm that stays is listed with the reason. With a check, every folded operator is compared with the
    original against its own rounding bound, and nothing is written unless all pass. A model is replaced at once or not
    at all; if IN keeps its weights in a file of their own, so does OUT (OUT.data).

    **Examples**

    - `pybn fold model.onnx` (writes model.folded.onnx)

    - `pybn fold model.onnx small.onnx --check 16` (compares both models on 16 random batches)

    - `pybn fold model.onnx --check-data test.npz --report fold.html` (compares them on your data; a page to read)

    - `pybn fold a.onnx b.onnx c.onnx -o folded/` (several models)

    - `pybn fold model.onnx --in-place --reversible` and later `pybn unfold model.onnx original.onnx`

    - `pybn fold model.onnx --dry-run --max-left 0` (is any batch norm left? for scripts)

    - `pybn fold - < model.onnx > folded.onnx` (the report goes to standard error; JSON to a file: `--report f.json`)

    - `pybn fold model.onnx --json > report.json` (an object; for several models an array)

    **Exit codes**: 0 done, also if there was nothing to fold; 1 a model cannot be read or written, the check failed, or
    more was left than `--max-left` allows: that model was not written; 2 wrong usage.
    """
    # Here as elsewhere: imported where it is needed, because `--help` should not wait for it.
    from pybn import terminal

    jobs = _jobs(paths, output_dir, in_place, dry_run)
    pages = report_files or []
    options = Options(
        check=check,
        check_data=check_data,
        aggressive=aggressive,
        reversible=reversible,
        skip=tuple(skip or ()),
        only=tuple(only or ()),
        max_left=max_left,
        measure=as_json or bool(pages) or png is not None,
        quiet=quiet,
    )
    to_stdout = any(job.target == STANDARD for job in jobs)
    _require_consistent(jobs, pages, png, as_json, to_stdout)
    _quiet_libraries()

    reports: list[dict[str, Any]] = []
    code = 0
    for job in jobs:
        try:
            report, failure = _fold_one(job, options)
            _write_pages(report, pages, png)
            reports.append(report.to_dict())
            if not (as_json or quiet):
                # Where the model goes to standard output, all text goes to standard error.
                with contextlib.redirect_stdout(sys.stderr if to_stdout else sys.stdout):
                    terminal.print_report(report, everything=everything)
                    if dry_run:
                        typer.echo("dry run: no model was written")
        except (Failed, WrongUsage) as error:
            # Other models may be fine: what is wrong with one is said, and does not end the run.
            wrong = isinstance(error, WrongUsage)
            failure = f"{job.source}: {error}" if wrong else str(error)
            code = WRONG_USAGE if wrong else code
            reports.append({"input": {"path": str(job.source)}, "error": failure})
        if failure:
            say(failure)
            code = code or FAILED
    if as_json and not (len(jobs) == 1 and "error" in reports[0]):
        typer.echo(json.dumps(reports[0] if len(jobs) == 1 else reports, indent=2, allow_nan=False))
    raise typer.Exit(code)


def inspect(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model; `-` is standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """List every batch norm and affine node, what surrounds it, and what would become of it.

    Nothing is written.

    **Examples**

    - `pybn inspect model.onnx`

    - `pybn inspect model.onnx --json | jq '.rows[] | select(.fold.status == "left") | .name'`

    **Exit codes**: 0 done; 1 the model cannot be read; 2 wrong usage.
    """
    _require_name(source)
    _quiet_libraries()
    from pybn import terminal
    from pybn.folding import inspection

    try:
        with _one_line_errors(source):
            loaded = _load(source)
            report = replace(_fold(loaded, quiet=as_json).report, input=loaded.info)
            aggressive = _fold(loaded, quiet=as_json, aggressive=True).report
            findings = inspection.inspect(loaded.proto, report, aggressive, loaded.outside)
    except Failed as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(inspection.to_dict(findings, report), indent=2, allow_nan=False))
        return
    for finding in findings:
        where = "" if finding.graph == "main" else f" in {finding.graph}"
        lines = [
            f"{finding.op_type} {finding.name}{where}",
            f"  from        {', '.join(finding.before)}",
            f"  to          {', '.join(finding.after)}",
            f"  default     {finding.default}",
        ]
        if finding.aggressive is not None:
            lines.append(f"  aggressive  {finding.aggressive}")
        for line in lines:
            typer.echo(terminal.printable(line))
    nodes = f"{len(report.batch_norms)} batch norms, {len(report.affines)} other affine nodes"
    typer.echo(f"{nodes}: {len(report.folds)} would be folded, {len(aggressive.folds)} with --aggressive")


def unfold(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A model that was folded with --reversible; `-` is standard input.")
    ],
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="Where to write; IN.unfolded.onnx if absent. `-` is standard output.",
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Restore the original of a model that was folded with --reversible, bit for bit.

    What is written is the original's file, byte for byte, which its SHA-256 proves; data files that it had go beside
    OUT, under the names that it knows them by, unless another file has that name. A model that was changed after its
    fold cannot be unfolded.

    **Examples**

    - `pybn fold model.onnx folded.onnx --reversible` and later

    - `pybn unfold folded.onnx original.onnx` (`cmp model.onnx original.onnx` finds no difference)

    - `pybn unfold - < folded.onnx > original.onnx`

    **Exit codes**: 0 done; 1 the model cannot be read, does not carry its original, or was changed; 2 wrong usage.
    """
    _require_name(source)
    if target is None:
        target = STANDARD if source == STANDARD else source.with_name(f"{source.stem}.unfolded.onnx")
    _require_terminal_free(target)
    if STANDARD not in (source, target):
        from pybn.folding import disk

        if disk.is_same_file(source, target):
            fail("OUT is the same file as IN", WRONG_USAGE)
    _quiet_libraries()
    try:
        with _one_line_errors(source, target):
            written = _unfold(source, target)
    except Failed as error:
        fail(str(error))
    if not quiet:
        from pybn import terminal

        for path in written:
            typer.echo(f"wrote {terminal.printable(str(path))}", err=target == STANDARD)


def _jobs(paths: list[Path], output_dir: Path | None, in_place: bool, dry_run: bool) -> list[Job]:
    """Sort the arguments into models and where to write each, or end with wrong usage."""
    if output_dir is not None and in_place:
        fail("--output-dir and --in-place exclude each other", WRONG_USAGE)
    several = output_dir is not None or in_place
    if not several and len(paths) > 2:
        fail(f"{len(paths)} paths: several models need --output-dir or --in-place", WRONG_USAGE)
    sources = paths if several else paths[:1]
    for source in sources:
        _require_name(source)
        if several and source == STANDARD:
            fail("standard input has no name: give OUT instead of --output-dir or --in-place", WRONG_USAGE)
    targets: list[Path]
    if in_place:
        targets = sources
    elif output_dir is not None:
        targets = [output_dir / source.name for source in sources]
    elif len(paths) == 2:
        targets = paths[1:]
    else:
        targets = [STANDARD if s == STANDARD else s.with_name(f"{s.stem}.folded.onnx") for s in sources]
    names = [os.path.abspath(target) for target in targets if target != STANDARD]  # noqa: PTH100 - links stay
    if len(set(names)) < len(names):
        fail("two models would be written to the same file", WRONG_USAGE)
    if not in_place:
        from pybn.folding import disk

        for source, target in zip(sources, targets, strict=True):
            if STANDARD not in (source, target) and disk.is_same_file(source, target):
                fail("OUT is the same file as IN; use --in-place to replace it", WRONG_USAGE)
    if not dry_run:
        for target in targets:
            _require_terminal_free(target)
    makes_folder = output_dir is not None
    pairs = zip(sources, targets, strict=True)
    return [Job(source, None if dry_run else target, makes_folder) for source, target in pairs]


def _require_consistent(jobs: list[Job], pages: list[Path], png: Path | None, as_json: bool, to_stdout: bool) -> None:
    everything = [*pages, *([png] if png is not None else [])]
    if everything and len(jobs) > 1:
        fail("--report and --png take one model", WRONG_USAGE)
    for page in pages:
        if page.suffix not in (".html", ".json"):
            fail(f"--report is {str(page)!r}, expected a name that ends in .html or .json", WRONG_USAGE)
    if png is not None and png.suffix != ".png":
        fail(f"--png is {str(png)!r}, expected a name that ends in .png", WRONG_USAGE)
    for page in everything:
        if not page.parent.is_dir():
            fail(f"{page}: there is no folder {str(page.parent)!r}", WRONG_USAGE)
    _require_other_files(jobs, everything)
    if as_json and to_stdout:
        fail("the model goes to standard output: write JSON to a file (--report FILE.json)", WRONG_USAGE)
    # Imported before anything is written, in case they are not installed.
    if any(page.suffix == ".html" for page in pages):
        importlib.import_module("pybn.folding.html")
    if png is not None:
        importlib.import_module("pybn.folding.picture")


def _require_other_files(jobs: list[Job], pages: list[Path]) -> None:
    """End with wrong usage if a report would be written over a model."""
    if not pages:
        return
    from pybn.folding import disk

    models = [path for job in jobs for path in (job.source, job.target) if path is not None and path != STANDARD]
    for page in pages:
        if any(disk.is_same_file(page, model) for model in models):
            fail(f"{page}: the report would be written over the model", WRONG_USAGE)


def _require_name(source: Path) -> None:
    if not source.name:
        fail(f"IN is {str(source)!r}, expected the path of an ONNX model", WRONG_USAGE)


def _require_terminal_free(target: Path) -> None:
    if target == STANDARD and sys.stdout.isatty():
        fail("standard output is a terminal, which cannot show a model: give OUT", WRONG_USAGE)


def _fold_one(job: Job, options: Options) -> tuple[FoldReport, str | None]:
    """Fold one model; return the report, and what failed if the model was not written for that."""
    with _one_line_errors(job.source, job.target):
        loaded = _load(job.source, keep=options.reversible)
        if job.target not in (None, STANDARD, job.source):
            _require_target(job.target, loaded)
        result = _fold(loaded, options.quiet, options.aggressive, options.skip, options.only)
        report = replace(result.report, input=loaded.info)
        if options.check is not None or options.check_data is not None:
            report = replace(report, check=_verify(loaded, result.model, report, options))
        if options.measure:
            report = replace(report, weights=_weights(loaded, result.model))
        failure = _failure(report, options)
        if failure is None and job.target is not None:
            report = _write(job, loaded, result.model, report, options)
    return report, failure and f"{job.source}: {failure}; nothing was written"


def _fold(
    loaded: Loaded,
    quiet: bool,
    aggressive: bool = False,
    skip: Collection[str] = (),
    only: Collection[str] = (),
) -> FoldResult[onnx.ModelProto]:
    from pybn.folding.files import ModelError
    from pybn.folding.onnx import fold_onnx

    with _bar("folding", hidden=quiet or loaded.info.bytes < LARGE_BYTES) as progress:
        try:
            return fold_onnx(
                loaded.proto,
                folder=loaded.outside,
                aggressive=aggressive,
                skip=skip,
                only=only,
                progress=progress,
            )
        except ModelError:
            raise
        except ValueError as error:  # of names that no node has
            if not skip and not only:
                raise
            raise WrongUsage(f"{error}; `pybn inspect` lists them") from error


def _load(source: Path, *, keep: bool = False) -> Loaded:
    from pybn.folding.files import load, parse

    if source == STANDARD:
        return parse(sys.stdin.buffer.read(), "standard input", keep=keep)
    return load(source, keep=keep)


def _require_target(target: Path, loaded: Loaded) -> None:
    from pybn.folding.files import require_replaceable

    require_replaceable(target)
    if target.exists() and target.resolve() in loaded.data_files:
        raise WrongUsage("OUT is a file in which IN keeps its weights")


def _failure(report: FoldReport, options: Options) -> str | None:
    if report.check is not None and not report.check.passed:
        return f"the check failed: {_failures(report.check)}"
    left = len(report.batch_norms_left)
    if options.max_left is not None and left > options.max_left:
        return f"{left} batch norms are left, more than --max-left {options.max_left}"
    return None


def _write(job: Job, loaded: Loaded, folded: onnx.ModelProto, report: FoldReport, options: Options) -> FoldReport:
    from pybn.folding import reversible
    from pybn.folding.files import fits_one_file, unused_data_files, write_model

    assert job.target is not None
    carries = reversible.is_reversible(loaded.proto)
    if options.reversible and (report.folds or not carries):
        reversible.store(folded, loaded.content, loaded.data())
    elif carries and report.folds:
        reversible.forget(folded)
        _note("the folded model does not carry its original: that needs --reversible again", options)
    elif job.target == job.source and not report.folds:
        return report  # the file stays as it is
    if job.target == STANDARD:
        if not fits_one_file(folded):
            raise Failed("a model above 2 GB cannot go to standard output: give OUT")
        _to_standard_output(folded.SerializeToString(deterministic=True))
        return report
    if job.makes_folder:
        job.target.parent.mkdir(parents=True, exist_ok=True)
    info = write_model(folded, job.target, folder=loaded.outside, with_data_file=bool(loaded.data_files))
    if job.target == job.source:
        for file in unused_data_files(loaded.data_files, job.target):
            _note(f"{file}: holds nothing of {job.target} any more", options)
    return replace(report, output=info)


def _note(text: str, options: Options) -> None:
    if not options.quiet:
        say(text)


def _to_standard_output(content: bytes) -> None:
    left = memoryview(content)
    try:
        while left:  # an unbuffered stream, that of PYTHONUNBUFFERED, writes a part and leaves it at that
            left = left[sys.stdout.buffer.write(left) :]
        sys.stdout.buffer.flush()
    except OSError:
        # What is in the buffer still must not be tried once more at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _write_pages(report: FoldReport, pages: list[Path], png: Path | None) -> None:
    """Write the report to files, whether the check passed or not."""
    from pybn.folding import disk

    contents: dict[Path, bytes] = {}
    for page in pages:
        if page.suffix == ".json":
            contents[page] = report.to_json().encode()
        else:
            from pybn.folding.html import render_html

            contents[page] = render_html(report).encode()
    if png is not None:
        from pybn.folding.picture import render_png

        try:
            contents[png] = render_png(report)
        except ValueError as error:  # there is nothing to draw
            raise Failed(f"{png}: {error}") from error
    for page, content in contents.items():
        try:
            with disk.replacing(page) as file:
                file.write(content)
        except OSError as error:
            raise Failed(f"{page}: {error.strerror or error}") from error


def _unfold(source: Path, target: Path) -> list[Path]:
    """Write the original of a reversible model; return what was written, the model last."""
    from pybn.folding import disk, reversible
    from pybn.folding.files import ModelError, require_replaceable

    loaded = _load(source)
    try:
        files = reversible.restore(loaded.proto)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    model = files.pop("")
    if target == STANDARD:
        if files:
            raise Failed(f"the original has its weights in {', '.join(files)}: give OUT")
        _to_standard_output(model)
        return []
    require_replaceable(target)
    data = {_data_target(target, name): content for name, content in files.items()}
    written = [path for path, content in data.items() if not _holds(path, content)]
    for path in (*written, target):
        if path != target:
            path.parent.mkdir(parents=True, exist_ok=True)
        with disk.replacing(path) as file:
            file.write(data.get(path, model))
    return [*written, target]


def _data_target(target: Path, name: str) -> Path:
    path = target.parent / name
    if not path.parent.resolve().is_relative_to(target.parent.resolve()) or path == target:
        raise Failed(f"data file {name!r} of the original is outside the folder of OUT, or OUT itself")
    return path


def _holds(path: Path, content: bytes) -> bool:
    """Say whether a data file is there already; another file of that name is an error."""
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not path.is_file() or path.read_bytes() != content:
        raise Failed(f"{path}: is in the way of a data file of the original, and differs; give OUT in another folder")
    return True


def _verify(loaded: Loaded, folded: onnx.ModelProto, report: FoldReport, options: Options) -> Check:
    from pybn.folding.inputs import load_inputs, random_inputs
    from pybn.folding.runtime import CheckError
    from pybn.folding.verify import verify

    original, data = loaded.proto, options.check_data
    try:
        inputs, labels = ([], None) if data is None else load_inputs(original, data)
        if options.check is not None:
            inputs = inputs + random_inputs(original, options.check)
        with _bar("checking", hidden=options.quiet) as told:
            return verify(
                original,
                folded,
                report,
                inputs,
                labels=labels,
                folder=loaded.outside,
                progress=lambda _: _counted(inputs, told),
            )
    except CheckError as error:
        raise Failed(f"{error}; nothing was written") from error


def _weights(loaded: Loaded, folded: onnx.ModelProto) -> tuple[WeightRange, ...]:
    from pybn.folding.files import to_ir
    from pybn.folding.ranges import weight_ranges

    return weight_ranges(to_ir(loaded.proto, loaded.outside), to_ir(folded, loaded.outside))


def _failures(check: Check) -> str:
    folds = [f"fold {', '.join(fold.folds) or fold.output}" for fold in check.folds if not fold.passed]
    outputs = [f"output {output.name}" for output in check.outputs if not output.passed]
    return ", ".join(folds + outputs)


@contextlib.contextmanager
def _bar(what: str, *, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is, of which it is told what is done and what there is to do."""
    from rich.progress import Progress

    from pybn import terminal

    console = terminal.error_console()
    with Progress(console=console, transient=True, disable=hidden or not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _counted(items: Sequence[T], told: Callable[[int, int], None]) -> Iterator[T]:
    for done, item in enumerate(items):
        told(done, len(items))
        yield item


@contextlib.contextmanager
def _one_line_errors(source: Path, target: Path | None = None) -> Iterator[None]:
    """Turn what may be wrong with files, and with a hostile model, into `Failed`."""
    # Imported here so that `pybn info` works without onnx.
    from pybn.folding.protos import ModelError

    try:
        yield
    except ModelError as error:
        raise Failed(str(error)) from error
    except OSError as error:
        where = error.filename if target is None else "standard output" if target == STANDARD else target
        what = "it has no whole model" if target == STANDARD else "nothing was written"
        raise Failed(f"{where}: {error.strerror or error}; {what}") from error
    except RecursionError as error:
        raise Failed(f"{source}: the model is nested too deeply") from error
    except MemoryError as error:
        raise Failed(f"{source}: not enough memory") from error


def _quiet_libraries() -> None:
    # Errors are one line of ours; onnx-ir's warnings on odd models would come on top.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
