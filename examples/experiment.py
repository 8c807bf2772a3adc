"""Running a claim: jobs over seeds and settings in two processes, the command line, results in one JSON file."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

import pybn
from examples.figures import save

Result = dict[str, Any]
Run = Callable[[bool, int], Result]
Plot = Callable[[Result], Figure]

PROCESSES = 2
FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"


def sweep(
    job: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], *, quick: bool, **settings: Any
) -> dict[Any, Any]:
    """``{a: job(*a, **settings) for a in arguments}`` in two processes of one thread each; in this one if `quick`.

    Results do not depend on which, as jobs draw what is random from seeds and one thread decides the order of sums.
    """
    arguments = list(arguments)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        if quick:
            with _one_thread():
                return {a: job(*a, **settings) for a in progress.track(arguments)}
        pool = _pool()
        futures = {a: pool.submit(job, *a, **settings) for a in arguments}
        try:
            for future in progress.track(as_completed(futures.values()), total=len(futures)):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return {a: future.result() for a, future in futures.items()}


@functools.cache
def _pool() -> ProcessPoolExecutor:
    """One for all claims; a forked child of a process with threads can hang, so new ones are started."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_set_threads, initargs=(1, 1))


def _set_threads(of_torch: int, of_pybn: int) -> None:
    torch.set_num_threads(of_torch)
    pybn.set_num_threads(of_pybn)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads(), pybn.get_num_threads()
    _set_threads(1, 1)
    try:
        yield
    finally:
        _set_threads(*before)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most of the seeds."""
    values = sorted(values)
    return {"median": median(values), "min": values[0], "max": values[-1]}


def perform(name: str, run: Run, plot: Plot, *, quick: bool, seeds: int, folder: Path) -> None:
    """Run a claim, draw it, and write both into `folder`: NAME.png, and its entry in results.json among others."""
    print(f"{name} ...", flush=True)
    start = time.perf_counter()
    result = _rounded(run(quick, seeds))
    seconds = time.perf_counter() - start
    figure = plot(result)
    folder.mkdir(parents=True, exist_ok=True)
    save(figure, folder / f"{name}.png")
    _add_to(folder / "results.json", name, result)
    print(f"{name}: {' '.join(figure.get_suptitle().split())} ({seconds:.0f} s)", flush=True)


def main(name: str, description: str | None, run: Run, plot: Plot) -> None:
    """The command line of one claim."""
    quick, seeds, folder = parse_arguments(f"python -m examples.{name}", description)
    perform(name, run, plot, quick=quick, seeds=seeds, folder=folder)
    print(f"wrote {folder / name}.png and results.json")


def parse_arguments(program: str, description: str | None) -> tuple[bool, int, Path]:
    """Whether to be quick, the number of seeds and where to write."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see it run; its figures mean nothing")
    parser.add_argument("--seeds", type=int, help="runs of every setting (default: 5, or 2 if quick)")
    parser.add_argument("--out-dir", type=Path, help="default: docs/figures; build/figures if quick")
    given = parser.parse_args()
    seeds = (2 if given.quick else 5) if given.seeds is None else given.seeds
    if seeds < 1:
        parser.error("--seeds must be at least 1")
    default = FIGURES.parents[1] / "build" / "figures" if given.quick else FIGURES
    return given.quick, seeds, given.out_dir or default


def _rounded(value: Any) -> Any:
    """Floats to five digits and what JSON has no number for to null, so that figures are drawn from what is written."""
    if isinstance(value, dict):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _add_to(path: Path, name: str, result: Result) -> None:
    """One line a claim, so that a changed line names the claim that changed."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = result
    lines = [f"{json.dumps(key)}: {json.dumps(results[key], allow_nan=False)}" for key in sorted(results)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
