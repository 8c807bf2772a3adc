"""How contenders are timed.

A shared machine drifts by more than the differences that matter, so contenders are interleaved: in every round each one
has a turn, in a new random order, and what counts is the ratio of medians over the rounds. A turn is

1. a copy of the tensor that the layer before would just have made (not timed), so that every contender finds the same
   cache and threads that are awake;
2. the call, timed by `time.perf_counter`; if it takes less than `REPEAT_BELOW`, several in a row, and their mean.

Contenders of another thread pool than OpenMP's (onnxruntime, OpenVINO, JAX) have their turns together: idle threads of
a pool spin for milliseconds and would disturb the next. `SETTLE` seconds pass before each such pool, and one call of
the contender itself, not timed, takes the place of the copy, so that it starts with its own data in cache.

Results are dropped inside the timed call, as a network drops them: memory that a contender allocates anew in every call
costs it its page faults. A contender that is very slow has fewer turns. Garbage collection is off.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from pybn.bench.problem import Contender

SETTLE = 0.01  # libgomp's threads were seen to spin for 5 ms after a parallel region
REPEAT_BELOW = 200e-6
MOST_REPEATS = 50
# A contender that takes longer than this, and than that many times the fastest one, has fewer turns.
SLOW, SLOW_TIMES = 5e-3, 25
FEWEST_TURNS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the turns, and the distance of the quartiles relative to it."""

    median: float
    spread: float


def measure(
    contenders: Mapping[str, Contender], rounds: int, before: Callable[[], object], seed: int = 0
) -> dict[str, Timing]:
    """Time all contenders in that many rounds; `before` is the copy that precedes a turn."""
    rng = np.random.default_rng(seed)
    estimates = {name: _estimate(contender) for name, contender in contenders.items()}
    repeats = {name: _repeats(estimate) for name, estimate in estimates.items()}
    strides = _strides(estimates, rounds)
    pools = sorted({contender.pool for contender in contenders.values()})
    times: dict[str, list[float]] = {name: [] for name in contenders}
    collects = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for i in rng.permutation(len(pools)):
                members = [
                    name
                    for name, contender in contenders.items()
                    if contender.pool == pools[i] and number % strides[name] == 0
                ]
                if len(pools) > 1 and members:
                    time.sleep(SETTLE)
                for j in rng.permutation(len(members)):
                    contender = contenders[members[j]]
                    warm = before if contender.pool == "openmp" else contender.run
                    times[members[j]].append(_turn(contender, warm, repeats[members[j]]))
    finally:
        if collects:
            gc.enable()
    return {name: _timing(values) for name, values in times.items()}


def _turn(contender: Contender, warm: Callable[[], object], repeats: int) -> float:
    run = contender.run
    warm()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _estimate(contender: Contender) -> float:
    """Return the time of the second call; the first may compile, or allocate once."""
    contender.run()
    return _turn(contender, lambda: None, 1)


def _repeats(estimate: float) -> int:
    return max(1, min(MOST_REPEATS, math.ceil(REPEAT_BELOW / estimate))) if estimate < REPEAT_BELOW else 1


def _strides(estimates: Mapping[str, float], rounds: int) -> dict[str, int]:
    """Every how manieth round each contender takes part in."""
    limit = max(SLOW, SLOW_TIMES * min(estimates.values()))
    most = max(1, rounds // FEWEST_TURNS)
    return {name: min(most, math.ceil(estimate / limit)) for name, estimate in estimates.items()}


def _timing(values: list[float]) -> Timing:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Timing(float(median), float((high - low) / median))
