"""What synchronising costs: one training step of a layer on two ranks, against the same step of the local layer.

    python benchmarks/synchronise.py [--rounds 40] [--markdown] [--mpiexec mpiexec.gforker]

Both ranks have one thread, and step at the same time, synchronised or not; the two kinds of step alternate. Times are
medians of rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SHAPES = [(4, 16, 8, 8), (16, 64, 56, 56), (16, 256, 14, 14), (16, 512, 7, 7), (16, 2048, 7, 7)]
RANKS = 2
Step = Callable[[], object]


def torch_steps(rank: int, store: str) -> Iterator[tuple[tuple[int, ...], Step, Step, Step]]:
    """Shape, barrier, local step and synchronised step of pybn.torch over gloo."""
    import torch
    import torch.distributed as dist

    from pybn.torch import BatchNorm2d, SyncBatchNorm

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for shape in SHAPES:
        x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)

        def step(layer: torch.nn.Module, x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
            x.grad = None
            layer(x).backward(dy)

        local, synchronised = BatchNorm2d(shape[1]), SyncBatchNorm(shape[1])
        yield shape, dist.barrier, lambda s=step, m=local: s(m), lambda s=step, m=synchronised: s(m)


def mpi_steps() -> Iterator[tuple[tuple[int, ...], Step, Step, Step]]:
    """The same of the NumPy layers over MPI."""
    import numpy as np
    from mpi4py import MPI

    import pybn
    from pybn.mpi import SyncBatchNorm2d

    pybn.set_num_threads(1)
    for shape in SHAPES:
        x, dy = np.random.default_rng(0).standard_normal((2, *shape), np.float32)

        def step(layer: pybn.BatchNorm2d, x: object = x, dy: object = dy) -> None:
            layer(x)
            layer.backward(dy)

        local, synchronised = pybn.BatchNorm2d(shape[1]), SyncBatchNorm2d(shape[1])
        yield shape, MPI.COMM_WORLD.Barrier, lambda s=step, m=local: s(m), lambda s=step, m=synchronised: s(m)


def run_rank(steps: Iterator[tuple[tuple[int, ...], Step, Step, Step]], rounds: int, path: str | None) -> None:
    """Measure every shape; the rank that has a path writes the medians, in seconds."""
    rows = []
    for shape, barrier, *kinds in steps:
        times: tuple[list[float], list[float]] = ([], [])
        for step in kinds * 3:
            step()
        for _ in range(rounds):
            for step, found in zip(kinds, times, strict=True):
                barrier()
                start = time.perf_counter()
                step()
                found.append(time.perf_counter() - start)
        barrier()
        rows.append([shape, *map(statistics.median, times)])
    if path:
        Path(path).write_text(json.dumps(rows))


def launch(rounds: int, mpiexec: str) -> dict[str, list[tuple[list[int], float, float]]]:
    """The rows of both kinds of layers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        me = [sys.executable, __file__, "--rounds", str(rounds), "--results"]
        ranks = [
            subprocess.Popen([*me, f"{folder}/torch", "--rank", str(rank)], env=environment) for rank in range(RANKS)
        ]
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank failed")
        launcher = Path(sys.executable).with_name(mpiexec)
        subprocess.run([launcher, "-n", str(RANKS), *me, f"{folder}/mpi"], env=environment, check=True)
        return {name: json.loads(Path(folder, name).read_text()) for name in ("torch", "mpi")}


def main() -> None:
    """Launch the ranks and print a table; or, with --results, be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--mpiexec", default="mpiexec", help="the launcher, in the folder of Python")
    parser.add_argument("--results", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.results and options.rank is not None:
        path = options.results if options.rank == 0 else None
        run_rank(torch_steps(options.rank, options.results + "-store"), options.rounds, path)
    elif options.results:
        from mpi4py import MPI

        run_rank(mpi_steps(), options.rounds, options.results if MPI.COMM_WORLD.rank == 0 else None)
    else:
        results = launch(options.rounds, options.mpiexec)
        left, middle, right = ("| ", " | ", " |") if options.markdown else ("", "  ", "")
        print(left + middle.join(["layer", "shape on each rank", "local", "synchronised", "difference"]) + right)
        if options.markdown:
            print("|---|---|---|---|---|")
        for name, rows in results.items():
            for shape, local, synchronised in rows:
                times = [f"{1e3 * t:.2f} ms" for t in (local, synchronised, synchronised - local)]
                print(left + middle.join([f"pybn.{name}", "x".join(map(str, shape)), *times]) + right)


if __name__ == "__main__":
    main()
