"""A whole run: peers are loaded, every shape becomes a problem, every operation on it a case."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import pybn
from pybn import _core
from pybn.bench import ours
from pybn.bench.cases import Case, Operation, Shape, UsageError, l2_bytes
from pybn.bench.measure import measure
from pybn.bench.peers import Peer, UnsupportedError, find
from pybn.bench.problem import Problem, WrongResultError, require_equal
from pybn.bench.results import Measurement, PeerInfo, Run

ROUNDS, QUICK_ROUNDS = 21, 7


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    cases: Sequence[Case]
    peers: Sequence[str]
    threads: int
    rounds: int = ROUNDS


def plan_cases(
    shapes: Sequence[Shape], operations: Sequence[Operation], dtypes: Sequence[str], layouts: Sequence[str]
) -> list[Case]:
    """Every operation on every shape in every variant; those on the same data follow one another, and after them those
    of the next dtype, whose times are compared.
    """
    return [
        Case(operation, shape, dtype, layout)
        for layout in layouts
        for shape in dict.fromkeys(shapes)
        for dtype in dtypes
        for operation in operations
    ]


def set_threads(threads: int | None) -> int:
    """Set pybn's threads, all that it may use by default; return them."""
    if threads is None:
        return pybn.get_num_threads()
    if threads < 1:
        raise UsageError(f"--threads is {threads}, expected at least 1")
    pybn.set_num_threads(threads)
    if pybn.get_num_threads() < threads:
        raise UsageError(
            f"--threads is {threads}, but at most {pybn.get_num_threads()} can be used here "
            "(CPUs of this process, OMP_NUM_THREADS)"
        )
    return threads


def start(plan: Plan) -> tuple[Run, list[Peer]]:
    """Load the peers and note what the figures will depend on."""
    peers, absent = find(plan.peers, plan.threads)
    # Who was loaded last may have changed OpenMP's threads for all; pybn's own limit is its own.
    pybn.set_num_threads(plan.threads)
    info = {peer.name: PeerInfo(peer.version, peer.allocates) for peer in peers}
    return Run(environment(), plan.threads, l2_bytes(), plan.rounds, info, absent), peers


class Bench:
    """Measures cases with some peers; keeps the last problem, since cases on the same data follow one another."""

    def __init__(self, peers: Sequence[Peer], threads: int, rounds: int) -> None:
        self._peers, self._threads, self._rounds = peers, threads, rounds
        self._problem: Problem | None = None
        self._key: tuple[Shape, str, str] | None = None

    def measure(self, case: Case, seed: int = 0) -> Measurement:
        """Build all contenders, see that they agree, and time them."""
        problem = self._problem_of(case)
        out, scratch = problem.empty(), problem.empty()
        contenders = ours.contenders(case.operation, problem, self._threads, out)
        fresh = contenders[ours.FRESH]
        expected = fresh.read(fresh.run())
        for name in (ours.OUT, ours.OUT_ALONE):
            if name in contenders:
                require_equal(name, case, contenders[name].read(contenders[name].run()), expected)
        unsupported, wrong = {}, {}
        for peer in self._peers:
            try:
                contender = peer.contender(case.operation, problem)
                require_equal(peer.name, case, contender.read(contender.run()), expected)
                contenders[peer.name] = contender
            except UnsupportedError as error:
                unsupported[peer.name] = str(error)
            except WrongResultError as error:
                wrong[peer.name] = str(error)
        del expected
        source = ours.reads_first(case.operation, problem)
        additions = _core.additions_per_nanosecond()
        timings = measure(contenders, self._rounds, lambda: _core.copy(source, scratch), seed)
        return Measurement(
            case,
            {name: timing.seconds for name, timing in timings.items()},
            {name: timing.ratio for name, timing in timings.items()},
            {name: timing.spread for name, timing in timings.items()},
            additions,
            unsupported,
            wrong,
        )

    def _problem_of(self, case: Case) -> Problem:
        key = (case.shape, case.dtype, case.layout)
        if self._problem is None or key != self._key:
            self._problem = None  # before the next one is made: both may not fit
            self._problem, self._key = Problem(*key), key
        return self._problem


def run(plan: Plan, progress: Callable[[Iterable[Case]], Iterable[Case]] = lambda cases: cases) -> Run:
    """Measure all cases of a plan; `progress` passes them on one by one. An interrupt (Ctrl-C) keeps those so far."""
    result, peers = start(plan)
    bench = Bench(peers, plan.threads, plan.rounds)
    try:
        for case in progress(plan.cases):
            result.measurements.append(bench.measure(case))
    except KeyboardInterrupt:
        if not result.measurements:
            raise
    return result


def environment() -> dict[str, str]:
    """Return what the figures depend on, besides the peers and the threads."""
    return {
        "pybn": pybn.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "compiler": _core.compiler,
        "instruction set": _core.instruction_set(),
        "processor": processor(),
        "L2 per core": f"{l2_bytes() >> 10} KiB",
    }


def processor() -> str:
    """Return the processor's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return " ".join(value.split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
