"""The one value that is folded: a per-channel map ``y = scale * x + shift``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn.folding.reasons import FoldError, Reason

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """A per-channel affine map, ``y = scale * x + shift``.

    Attributes
    ----------
    scale, shift : ndarray of float64, shape (C,)
        One value per channel.
    axis : int
        The axis of the data that holds the channels.
    """

    scale: Float64
    shift: Float64
    axis: int = 1

    @classmethod
    def from_batch_norm(
        cls,
        running_mean: Array,
        running_var: Array,
        weight: Array | None,
        bias: Array | None,
        eps: float,
    ) -> Affine:
        """Collapse a batch norm in evaluation mode into its affine map.

        ``scale = weight / sqrt(running_var + eps)``, ``shift = bias - scale * running_mean``
        (Ioffe and Szegedy 2015, algorithm 2, step 11), in float64.

        Parameters
        ----------
        running_mean, running_var : ndarray, shape (C,)
            Statistics, any float type. The caller has checked the shapes.
        weight, bias : ndarray of shape (C,) or None
            None stands for ones and zeros.
        eps : float
            Added to the variance.

        Raises
        ------
        FoldError
            If ``running_var + eps <= 0`` somewhere, or a value is NaN or infinite.
        """
        with np.errstate(invalid="ignore"):  # signalling NaNs are reported below, like all others
            mean = np.asarray(running_mean, dtype=np.float64)
            variance = np.asarray(running_var, dtype=np.float64) + eps
            gamma = np.ones_like(mean) if weight is None else np.asarray(weight, dtype=np.float64)
            beta = np.zeros_like(mean) if bias is None else np.asarray(bias, dtype=np.float64)

        # NaN fails this comparison too, and is reported below as what it is.
        not_positive = np.flatnonzero(variance <= 0)
        if not_positive.size:
            channel = int(not_positive[0])
            raise FoldError(
                Reason.INVALID_VARIANCE,
                f"running_var + eps is {float(variance[channel])!r} in channel {channel}, expected a positive number",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            scale = gamma / np.sqrt(variance)
            shift = beta - scale * mean
        for name, values in (
            ("running_mean", mean),
            ("running_var", variance),
            ("weight", gamma),
            ("bias", beta),
            ("the scale", scale),
            ("the shift", shift),
        ):
            _require_finite(values, name)
        return cls(scale, shift)

    def without_shift(self) -> Affine:
        """Return the same scale with a shift of zero."""
        return Affine(self.scale, np.zeros_like(self.shift), self.axis)


def round_to(values: Float64, dtype: np.dtype[Any], name: str) -> Array:
    """Round float64 results to the type of the weights: the only rounding of a fold.

    Parameters
    ----------
    values : ndarray of float64
        Exact to float64.
    dtype : dtype
        float16, float32, float64 or ml_dtypes' bfloat16.
    name : str
        What the values are, for the message.

    Raises
    ------
    FoldError
        If a value is NaN or infinite, before or after rounding.
    """
    _require_finite(values, name)
    with np.errstate(over="ignore", under="ignore"):
        rounded = _round_to_odd_float32(values) if dtype.name == "bfloat16" else values
        result: Array = rounded.astype(dtype)
        overflow = ~np.isfinite(result)
    if overflow.any():
        largest = float(np.abs(values[overflow]).max())
        raise FoldError(Reason.OUTSIDE_DTYPE, f"{name} would reach {largest:.4g}, which overflows {dtype.name}")
    return result


def is_supported(dtype: np.dtype[Any]) -> bool:
    """Say whether weights of this type can be folded."""
    # bfloat16 is known by name, so that ml_dtypes need not be imported.
    return dtype.name in ("float16", "bfloat16", "float32", "float64")


def _require_finite(values: Float64, name: str) -> None:
    if not np.isfinite(values).all():
        raise FoldError(Reason.NOT_FINITE, f"{name} contains NaN or infinite values")


def _round_to_odd_float32(values: Float64) -> Array:
    """Round to float32 so that a second rounding, to bfloat16, is as good as one.

    ml_dtypes goes from float64 to bfloat16 by way of float32. Rounding that first step to odd
    instead of to nearest keeps the information that the second needs to break ties
    (Boldo and Melquiond 2008).
    """
    nearest = values.astype(np.float32)
    away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    truncated = np.where(away, np.nextafter(nearest, np.float32(0)), nearest)
    inexact = truncated.astype(np.float64) != values
    bits = np.ascontiguousarray(truncated).view(np.uint32)
    odd: Array = np.where(inexact, bits | np.uint32(1), bits).view(np.float32)
    return odd
