"""Statistics of the parts of a batch, and how they make those of the whole.

A part is what one process, one sub-batch or one partition of a data set has seen. Its values are not needed again:
count, mean and the sum of squared deviations are enough (Chan, Golub, LeVeque, "Updating formulae and a pairwise
algorithm for computing sample variances", 1979). What float64 takes from the mean is kept, too: with means of 1e7 and a
spread of 1, the differences between the rounded means would cost the variance of the whole six of its sixteen digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pybn import _arrays, _core
from pybn._arrays import Array


@dataclass(frozen=True, slots=True)
class Moments:
    """Of every channel, (C,) float64: ``mean + remainder`` is the mean, ``m2`` the sum of squared deviations from it.

    All are zeros if the count is 0.
    """

    count: int
    mean: Array
    remainder: Array
    m2: Array

    @property
    def var(self) -> Array:
        """The biased variance; zeros if there are no values."""
        return self.m2 / max(self.count, 1)

    @property
    def unbiased_var(self) -> Array:
        """The variance with divisor count - 1, of at least two values."""
        return self.m2 / (self.count - 1)


def moments(x: npt.ArrayLike, channel_axis: int = 1) -> Moments:
    """Of the values of `x`, which may be empty, as `pybn.batch_norm_stats`."""
    x, axis = _arrays.data("x", x, channel_axis)
    if x.size == 0:
        return Moments(0, *np.zeros((3, x.shape[axis])))
    (source,) = _arrays.for_kernels(axis, x)
    mean, var, remainder = _core.stats(source, axis)
    count = source.size // mean.size
    return Moments(count, mean, remainder, var * count)


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of all parts together, as accurate as those of the concatenated values.

    All parts are merged at once, in the given order, by additions, multiplications and divisions of float64 alone: the
    same parts in the same order have the same bits on every machine. Whoever collects parts in another order (tasks
    that end when they will) sorts them first; merges of merges agree up to rounding. Everything is added as the
    difference from the first part's mean, so a channel that is constant over all parts is exactly constant here.
    """
    filled = [part for part in parts if part.count]
    if len(filled) < 2:
        return filled[0] if filled else parts[0]
    count = sum(part.count for part in filled)
    with np.errstate(invalid="ignore", over="ignore"):  # infinite means have differences that are NaN
        origin, first_remainder = filled[0].mean, filled[0].remainder
        distances = [(part.mean - origin) + (part.remainder - first_remainder) for part in filled]
        total = np.zeros_like(origin)
        for part, distance in zip(filled, distances, strict=True):
            total += part.count * distance
        offset = total / count
        m2 = np.zeros_like(origin)
        for part, distance in zip(filled, distances, strict=True):
            m2 += part.m2 + part.count * (distance - offset) ** 2
        return Moments(count, *_exact_sum(origin, first_remainder + offset), m2)


def _exact_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Knuth's: the rounded sum, and what rounding took from it."""
    total = a + b
    rounded_b = total - a
    return total, (a - (total - rounded_b)) + (b - rounded_b)
