"""How contenders are timed.

A shared machine drifts by more than the differences that matter: a copy takes 10 ms, and for half a second 20. So every
call is timed right after a copy of the tensor, and what counts is the median, over the rounds, of the ratio of the two.
In a round each contender has a turn, in a new random order:

1. a copy of the tensor that the layer before would just have made (not timed), so that every contender finds the same
   cache and threads that are awake;
2. the same copy, timed by `time.perf_counter`;
3. the call, timed. What takes less than `REPEAT_BELOW`, copy or call, is done several times in a row for its mean.

Contenders of another thread pool than OpenMP's (onnxruntime, OpenVINO, JAX) have their turns together: idle threads of
a pool spin for milliseconds and would disturb the next. `SETTLE` seconds pass between a copy and such a contender, and
between it and the next copy; and before it is timed one call of its own puts its data in cache.

Results are dropped inside the timed call, as a network drops them: memory that a contender allocates anew in every call
costs it its page faults. A contender that is very slow has fewer turns. Garbage collection is off.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
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
    """Medians over the turns: seconds of a call, and their ratio to those of the copy before it.

    `spread` is the distance of the seconds' quartiles, relative to the median.
    """

    seconds: float
    ratio: float
    spread: float


def measure(
    contenders: Mapping[str, Contender], rounds: int, copy: Callable[[], object], seed: int = 0
) -> dict[str, Timing]:
    """Time all contenders in that many rounds; `copy` is what precedes a turn."""
    rng = np.random.default_rng(seed)
    estimates = {name: _estimate(contender.run) for name, contender in contenders.items()}
    repeats = {name: _repeats(estimate) for name, estimate in estimates.items()}
    copy_repeats = _repeats(_estimate(copy))
    strides = _strides(estimates, rounds)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    spins = False  # whether threads of another pool than OpenMP's may still do
    collects = gc.isenabled()
    gc.disable()
    try:
        for name in _order(contenders, strides, rounds, rng):
            contender = contenders[name]
            if spins:
                time.sleep(SETTLE)
            copy()
            of_copy = _seconds(copy, copy_repeats)
            spins = contender.pool != "openmp"
            if spins:
                time.sleep(SETTLE)
                contender.run()
            turns[name].append((_seconds(contender.run, repeats[name]), of_copy))
    finally:
        if collects:
            gc.enable()
    return {name: _timing(values) for name, values in turns.items()}


def _order(
    contenders: Mapping[str, Contender], strides: Mapping[str, int], rounds: int, rng: np.random.Generator
) -> Iterator[str]:
    """Whose turn it is, round after round: pool by pool, both in random order."""
    pools = sorted({contender.pool for contender in contenders.values()})
    for number in range(rounds):
        playing = [name for name in contenders if number % strides[name] == 0]
        for pool in rng.permutation(pools):
            yield from rng.permutation([name for name in playing if contenders[name].pool == pool])


def _seconds(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _estimate(run: Callable[[], object]) -> float:
    """Return the time of the second call; the first may compile, or allocate once."""
    run()
    return _seconds(run, 1)


def _repeats(estimate: float) -> int:
    return max(1, min(MOST_REPEATS, math.ceil(REPEAT_BELOW / estimate))) if estimate < REPEAT_BELOW else 1


def _strides(estimates: Mapping[str, float], rounds: int) -> dict[str, int]:
    """Every how manieth round each contender takes part in."""
    limit = max(SLOW, SLOW_TIMES * min(estimates.values()))
    most = max(1, rounds // FEWEST_TURNS)
    return {name: min(most, math.ceil(estimate / limit)) for name, estimate in estimates.items()}


def _timing(turns: list[tuple[float, float]]) -> Timing:
    seconds, copies = np.array(turns).T
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    return Timing(float(median), float(np.median(seconds / copies)), float((high - low) / median))
