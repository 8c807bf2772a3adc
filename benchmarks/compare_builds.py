"""Builds of pybn in turns, each in a process of its own: what a change of the kernels gains.

    pip install --no-deps --target /tmp/before .     # with the one state of the source
    pip install --no-deps --target /tmp/after .      # and with the other
    python benchmarks/compare_builds.py /tmp/before /tmp/after --ops forward,backward --layout nchw,nhwc

Times are those of `pybn bench` with `out=`. A ratio is the median over the turns of a build's time to the first one's
right before or after it, so that a machine that drifts hits both. One process could not hold two builds: pybind11 gives
the second import the first one's functions.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pybn
from pybn import _core
from pybn.bench import measure, options, ours
from pybn.bench.cases import OPERATIONS, Case, Shape, UsageError
from pybn.bench.problem import Problem
from pybn.bench.results import geometric_mean

ROUNDS_OF_A_TURN = 3


def work(build: str) -> None:
    """Answer requests, a line each: a case to prepare, or nothing, to be timed. The answer is a number of seconds."""
    if not Path(pybn.__file__).resolve().is_relative_to(Path(build).resolve()):
        raise SystemExit(f"pybn is {pybn.__file__}, expected it in {build}")
    for line in sys.stdin:
        if request := line.strip():
            operation, dims, dtype, layout, threads = json.loads(request)
            pybn.set_num_threads(threads)
            problem = Problem(Shape(*dims), dtype, layout)
            out, elsewhere = problem.empty(), problem.empty()
            contender = ours.contenders(OPERATIONS[operation], problem, 1, out)[ours.OUT]
            copy = functools.partial(_core.copy, ours.reads_first(OPERATIONS[operation], problem), elsewhere)
        timing = measure.measure({"": contender}, ROUNDS_OF_A_TURN, copy)
        print(timing[""].seconds, flush=True)


class Worker:
    """A process with one build."""

    def __init__(self, build: str) -> None:
        command = [sys.executable, __file__, "--worker", build]
        environment = {**os.environ, "PYTHONPATH": build}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, request: str = "") -> float:
        """Return the seconds that it answers, once its threads have stopped spinning."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(1)  # what it died of is on stderr
        time.sleep(measure.SETTLE)
        return float(answer)


def compare(case: Case, workers: list[Worker], threads: int, turns: int) -> list[list[float]]:
    """Return every worker's times."""
    s = case.shape
    request = json.dumps([case.operation.name, [s.n, s.c, s.h, s.w], case.dtype, case.layout, threads])
    for worker in workers:
        worker.ask(request)
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(turns):
        for i in random.sample(range(len(workers)), len(workers)):
            times[i].append(workers[i].ask())
    return times


def main() -> None:
    """Compare, or answer as one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="FOLDER", help="what `pip install --target` made; the first is 1")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turns", type=int, default=15)
    for option in ("ops", "shapes", "dtype", "layout"):
        parser.add_argument(f"--{option}", default=None, help="as in `pybn bench`")
    parser.add_argument("--threads", type=int, default=None, help="as in `pybn bench`")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.builds[0])
        return
    given = {name: [value] if value else [] for name, value in vars(arguments).items()}
    try:
        plan = options.plan(
            operations=arguments.ops, shapes=given["shapes"], batch=None, dtypes=given["dtype"],
            layouts=given["layout"], peers="none", threads=arguments.threads, rounds=None, quick=False,
        )  # fmt: skip
    except UsageError as error:
        parser.error(str(error))
    workers = [Worker(build) for build in arguments.builds]
    all_ratios: list[list[float]] = [[] for _ in workers]
    for case in plan.cases:
        times = compare(case, workers, plan.threads, arguments.turns)
        ratios = [statistics.median(b / a for a, b in zip(times[0], of_one, strict=True)) for of_one in times]
        figures = [f"{statistics.median(t) * 1e3:9.3f} ms {r:5.2f}" for t, r in zip(times, ratios, strict=True)]
        print(f"{case!s:45}", *figures, flush=True)
        for every, ratio in zip(all_ratios, ratios, strict=True):
            every.append(ratio)
    print(f"{'geometric mean':45}", *(f"{geometric_mean(ratios):18.2f}" for ratios in all_ratios))


if __name__ == "__main__":
    main()
