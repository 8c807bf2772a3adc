"""`pybn reestimate` and `pybn insert`: what they take, in which order they work, how they fail."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from pybn import fold_commands
from pybn.failure import WRONG_USAGE, fail

if TYPE_CHECKING:
    import onnx

    from pybn.archives import Archives
    from pybn.folding.files import Loaded
    from pybn.population import Population

Source = Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model.")]
Data = Annotated[
    list[Path],
    typer.Option(
        "--data",
        metavar="FILE.npz",
        help="The data: an array for each input, by its name, with the samples along its first axis. Read batch by "
        "batch. Repeatable.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="Samples per batch, unless the model says how many.")]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Save what is done here; if the file is there, go on from it. Removed at the end."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def reestimate(
    source: Source,
    data: Data,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Where to write; IN.reestimated.onnx if absent.", show_default=False),
    ] = None,
    batch: Batch = 100,
    state: State = None,
    quiet: Quiet = False,
) -> None:
    """Replace the running statistics of a model's batch norms by those of a data set, in one pass over it.

    For models whose moving averages are stale, or that will see other data. As in training, every batch norm
    normalizes a batch with the batch's own statistics (Wu and Johnson 2021, PreciseBN), so batches should be as large
    as those in training.

    **Examples**

    - `pybn reestimate model.onnx --data images.npz` (writes model.reestimated.onnx)

    - `pybn reestimate model.onnx new.onnx --data a.npz --data b.npz --batch 256 --state progress.npz`

    **Exit codes**: 0 done; 1 the model or the data cannot be read, or OUT not written; 2 wrong usage.
    """
    target = _target(source, target, "reestimated")
    fold_commands._quiet_libraries()
    try:
        with fold_commands._one_line_errors(source, target):
            loaded = _load(source, target)
            found, archives = _reestimate(loaded, data, batch, state, quiet)
            _write(found.model, target, loaded)
    except fold_commands.Failed as error:
        fail(str(error))
    if not quiet:
        typer.echo(
            f"{len(found.statistics)} batch norms re-estimated from {archives.rows} samples in {found.batches} "
            f"batches, {len(found.left)} left"
        )
        _say_rest(found, target)


def insert(
    source: Source,
    data: Data,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Where to write; IN.inserted.onnx if absent.", show_default=False),
    ] = None,
    after: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="After this operator (its node or output name). Repeatable."),
    ] = None,
    eps: Annotated[float, typer.Option(help="Of the batch norms.")] = 1e-5,
    batch: Batch = 100,
    state: State = None,
    quiet: Quiet = False,
) -> None:
    """Put a batch norm after every linear operator of a trained model, such that its outputs stay as they are.

    The reverse of `pybn fold`, which takes them out again. Mean and variance are those of the data; weight and bias
    undo them, until they are trained on.

    **Examples**

    - `pybn insert model.onnx --data images.npz` (writes model.inserted.onnx)

    - `pybn insert model.onnx --data images.npz --after /conv1/Conv --after /conv2/Conv`

    **Exit codes**: 0 done; 1 the model or the data cannot be read, or OUT not written; 2 wrong usage.
    """
    target = _target(source, target, "inserted")
    fold_commands._quiet_libraries()
    try:
        with fold_commands._one_line_errors(source, target):
            loaded = _load(source, target)
            found, archives = _insert(loaded, data, after, eps, batch, state, quiet)
            change = _largest_change(loaded, found.model, next(iter(archives)))
            _write(found.model, target, loaded)
    except fold_commands.Failed as error:
        fail(str(error))
    if not quiet:
        typer.echo(f"{len(found.statistics)} batch norms inserted, {len(found.left)} operators left without")
        typer.echo(f"outputs change by {change:.1e} of the largest, on the first batch")
        _say_rest(found, target)


def _target(source: Path, target: Path | None, suffix: str) -> Path:
    fold_commands._require_name(source)
    if target is None:
        target = source.with_name(f"{source.stem}.{suffix}.onnx")
    if fold_commands.STANDARD in (source, target):
        fail("standard input and output are not supported here: give paths", WRONG_USAGE)
    from pybn.folding import disk

    if disk.is_same_file(source, target):
        fail("OUT is the same file as IN", WRONG_USAGE)
    return target


def _load(source: Path, target: Path) -> Loaded:
    loaded = fold_commands._load(source)
    try:
        fold_commands._require_target(target, loaded)
    except fold_commands.WrongUsage as error:
        fail(str(error), WRONG_USAGE)
    return loaded


def _reestimate(
    loaded: Loaded, data: list[Path], batch: int, state: Path | None, quiet: bool
) -> tuple[Population, Archives]:
    from pybn.stages import OnnxModel

    subject = OnnxModel(loaded.proto, loaded.outside)
    if not subject.names:
        why = "; ".join(f"{name}: {reason}" for name, reason in subject.left.items())
        raise fold_commands.Failed(f"{loaded.info.path}: no batch norm can be re-estimated{': ' if why else ''}{why}")
    return _populate(subject, loaded, data, batch, state, quiet)


def _insert(
    loaded: Loaded, data: list[Path], after: list[str] | None, eps: float, batch: int, state: Path | None, quiet: bool
) -> tuple[Population, Archives]:
    from pybn.insertion import OnnxLinears

    try:
        subject = OnnxLinears(loaded.proto, after, eps, loaded.outside)
    except ValueError as error:
        fail(str(error), WRONG_USAGE)
    if not subject.names:
        raise fold_commands.Failed(f"{loaded.info.path}: no operator after which a batch norm can be put")
    return _populate(subject, loaded, data, batch, state, quiet)


def _populate(
    subject: Any, loaded: Loaded, data: list[Path], batch: int, state: Path | None, quiet: bool
) -> tuple[Population, Archives]:
    from pybn.archives import Archives
    from pybn.folding.inputs import require_fit, required_batch, required_inputs
    from pybn.population import populate

    try:
        infos = required_inputs(loaded.proto)
        fixed = required_batch(loaded.proto)
        archives = Archives(data, [info.name for info in infos], fixed or batch, exact=fixed is not None)
        for info in infos:
            shape, dtype = archives.first()[info.name]
            require_fit(info, np.broadcast_to(np.zeros((), dtype), shape), data[0])
        with fold_commands._bar("running", hidden=quiet) as told:
            found = populate(
                subject, archives, None, None, state, 10, lambda done, _: told(done, len(archives)),
                data_is=archives.fingerprint(),
            )  # fmt: skip
    except ValueError as error:  # of the data, the state, and the runtime's CheckError
        raise fold_commands.Failed(f"{error}; nothing was written") from error
    return found, archives


def _largest_change(loaded: Loaded, model: onnx.ModelProto, feeds: dict[str, Any]) -> float:
    """Of the outputs, relative to the largest value of each."""
    from pybn.folding.runtime import Session

    largest = 0.0
    outputs = (Session(m, "the model", folder=loaded.outside).run(feeds) for m in (loaded.proto, model))
    for before, after in zip(*outputs, strict=True):
        scale = np.abs(np.asarray(before, np.float64)).max(initial=0.0)
        change = np.abs(np.asarray(before, np.float64) - np.asarray(after, np.float64)).max(initial=0.0)
        largest = max(largest, float(change / scale) if scale else float(change))
    return largest


def _write(model: onnx.ModelProto, target: Path, loaded: Loaded) -> None:
    from pybn.folding import reversible
    from pybn.folding.files import write_model

    if reversible.is_reversible(model):
        reversible.forget(model)  # of another model than this one
    write_model(model, target, folder=loaded.outside, with_data_file=bool(loaded.data_files))


def _say_rest(found: Population, target: Path) -> None:
    from pybn import terminal

    for name, reason in found.left.items():
        typer.echo(terminal.printable(f"left {name}: {reason}"))
    typer.echo(terminal.printable(f"wrote {target}"))
