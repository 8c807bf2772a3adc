"""Batch renormalization: batch statistics corrected by running ones.

Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn import _arrays
from pybn._arrays import Array
from pybn.functional import Gradients, Saved, apply, batch_norm_backward, batch_norm_stats, require_finite
from pybn.layers import _BatchNorm


@dataclass(frozen=True)
class Ramp:
    """A schedule: `first` until batch `begin`, `last` from batch `end` on, a straight line in between."""

    first: float
    last: float
    begin: int
    end: int

    def __post_init__(self) -> None:
        if not self.begin < self.end:
            raise ValueError(f"begin is {self.begin!r}, expected less than end, which is {self.end!r}")

    def __call__(self, batches: int) -> float:
        """The value after so many batches."""
        done = (batches - self.begin) / (self.end - self.begin)
        return self.first + (self.last - self.first) * min(max(done, 0.0), 1.0)


Schedule = float | Callable[[int], float]

# Those of section 4.1: batch norm for 5000 batches, then ever less of it.
PAPER_RMAX = Ramp(1, 3, 5_000, 40_000)
PAPER_DMAX = Ramp(0, 5, 5_000, 25_000)


class BatchRenorm(_BatchNorm):
    """Batch renormalization: in training ``y = ((x - mean) / std * r + d) * weight + bias``, with the batch's mean and
    std and, of the running ones before they move, ``r = std / running_std``, clipped to [1/rmax, rmax], and ``d =
    (mean - running_mean) / running_std``, clipped to [-dmax, dmax].

    Unless r or d are clipped, training computes what evaluation does. Gradients are those of batch norm with r and d
    as constants. For batches that are too small, or whose examples are too much alike, for their statistics to be good
    ones. With ``rmax=1`` and ``dmax=0`` it is batch norm; the paper begins so, and lets them grow.

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    eps : float
        Added to the variance inside ``std = sqrt(var + eps)``, of the batch and the running one alike.
    momentum : float in [0, 1] or None
        As in `BatchNorm2d`; the paper's is 0.01.
    affine : bool
    rmax, dmax : float, or a function from batches trained on to a float
        At least 1 and at least 0. Those of the paper are ``Ramp(1, 3, 5_000, 40_000)`` and ``Ramp(0, 5, 5_000,
        25_000)``, which are the defaults; the batches are counted by `num_batches_tracked`. A function is not in the
        state dict, its argument is.
    activation, negative_slope, channel_axis, dtype, check_finite
        As in `BatchNorm2d`.

    Notes
    -----
    Input has shape (N, C) to (N, C, D, H, W), or with ``channel_axis=-1`` (N, ..., C). The paper averages standard
    deviations; the running variance here is that of `BatchNorm2d`, unbiased, so that state dicts are the same.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        rmax: Schedule = PAPER_RMAX,
        dmax: Schedule = PAPER_DMAX,
        activation: str | None = None,
        negative_slope: float = 0.01,
        channel_axis: int = 1,
        dtype: npt.DTypeLike = np.float32,
        check_finite: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, activation=activation, negative_slope=negative_slope,
            channel_axis=channel_axis, dtype=dtype, check_finite=check_finite,
        )  # fmt: skip
        value_of("rmax", rmax, 0, least=1)
        value_of("dmax", dmax, 0, least=0)
        self.rmax = rmax
        self.dmax = dmax

    def _train(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        if self._observer is not None:  # running statistics, which are being replaced, correct nothing: batch norm
            return super()._train(x, residual, out)
        running_mean, running_var, counter = self.running_mean, self.running_var, self.num_batches_tracked
        assert running_mean is not None
        assert running_var is not None
        assert counter is not None
        x, axis = _arrays.data("x", x, self.channel_axis)
        _arrays.require_several_values(x, axis)
        _arrays.variance("running_var", running_var, self.num_features, axis)
        rmax = value_of("rmax", self.rmax, int(counter), least=1)
        dmax = value_of("dmax", self.dmax, int(counter), least=0)
        if self.check_finite:
            require_finite(x, axis)

        mean, var, count = batch_norm_stats(x, channel_axis=axis)
        if count == 0:  # an empty batch tells nothing
            mean, var = running_mean.astype(np.float64), running_var.astype(np.float64)
        r, d = corrections(mean, var, running_mean, running_var, self.eps, rmax, dmax)
        weight = np.ones(self.num_features) if self.weight is None else self.weight.astype(np.float64)
        bias = np.zeros(self.num_features) if self.bias is None else self.bias.astype(np.float64)
        y, saved = apply(
            x, mean, var, weight * r, bias + weight * d, self.eps, self.activation, self.negative_slope, residual,
            axis, out, training=True,
        )  # fmt: skip

        momentum = self._weight_of_new_batch()
        if count > 0:
            running_mean[...] = (1 - momentum) * running_mean.astype(np.float64) + momentum * mean
            unbiased = var * (count / (count - 1))
            running_var[...] = (1 - momentum) * running_var.astype(np.float64) + momentum * unbiased
        counter += 1
        self._saved = (saved, r, d)
        return y

    def _gradients(self, dy: npt.ArrayLike, saved: Any, out: Array | None) -> Gradients:
        if isinstance(saved, Saved):  # of evaluation
            return super()._gradients(dy, saved, out)
        kept, r, d = saved
        dx, by_std, dbias, dresidual = batch_norm_backward(dy, kept, out=out)
        # by_std: sum of the gradient times (x - mean) / std, of which the weight's factor is r, beside d.
        assert by_std is not None
        assert dbias is not None
        return Gradients(dx, by_std * r + dbias * d, dbias, dresidual)

    def _arguments(self) -> list[str]:
        channels, eps, momentum, affine, _ = super()._arguments()
        return [channels, eps, momentum, affine, f"rmax={self.rmax}", f"dmax={self.dmax}"]


def corrections(
    mean: Array, var: Array, running_mean: Array, running_var: Array, eps: float, rmax: float, dmax: float
) -> tuple[Array, Array]:
    """Return r and d of every channel, float64."""
    running_std = np.sqrt(running_var.astype(np.float64) + eps)
    r = np.clip(np.sqrt(var + eps) / running_std, 1 / rmax, rmax)
    d = np.clip((mean - running_mean) / running_std, -dmax, dmax)
    return r, d


def value_of(name: str, schedule: Schedule, batches: int, *, least: float) -> float:
    value = schedule(batches) if callable(schedule) else schedule
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and value >= least:
        return float(value)
    after = f" after {batches} batches" if callable(schedule) else ""
    raise ValueError(f"{name} is {value!r}{after}, expected a number >= {least}")
