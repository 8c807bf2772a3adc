"""The one value that is folded: a per-channel map ``y = scale * x + shift``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn.folding.reasons import FoldError, Reason

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

# Weights of these types can be folded. Names, so that ml_dtypes, which has bfloat16, need not be imported.
FLOATS = ("float16", "bfloat16", "float32", "float64")

# The most channels of a map, and values of a constant that a fold makes anew: 64 MiB of float32. A model that declares
# absurd sizes must not fill the memory, nor a border map of a satellite image the model.
MOST_VALUES = 2**24


@dataclass(frozen=True)
class Affine:
    """A per-channel affine map, ``y = scale * x + shift``.

    Attributes
    ----------
    scale, shift : ndarray of float64, shape (C,)
        One value per channel; a single one if the map is the same everywhere.
    axis : int or None
        The axis of the data that holds the channels, counted from the front. None: the map is the
        same for every element, whatever the shape, as ``x * 0.5`` is.
    """

    scale: Float64
    shift: Float64
    axis: int | None = 1

    @classmethod
    def everywhere(cls, scale: float, shift: float = 0.0) -> Affine:
        """Return a map that is the same for every element."""
        return cls(np.array([scale], dtype=np.float64), np.array([shift], dtype=np.float64), None)

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

    @classmethod
    def joined(cls, parts: Sequence[Affine], sizes: Sequence[int], axis: int) -> Affine:
        """Put maps of neighbouring channels side by side; each is `over` its own size."""
        whole = [part.over(size, axis) for part, size in zip(parts, sizes, strict=True)]
        return cls(
            np.concatenate([part.scale for part in whole]),
            np.concatenate([part.shift for part in whole]),
            axis,
        )

    @property
    def is_identity(self) -> bool:
        """Whether every value stays what it is."""
        return self.keeps_scale and self.keeps_zero

    @property
    def keeps_scale(self) -> bool:
        """Whether every scale is 1."""
        return bool((self.scale == 1.0).all())

    @property
    def keeps_zero(self) -> bool:
        """Whether every shift is 0."""
        return not self.shift.any()

    def over(self, channels: int, axis: int) -> Affine:
        """Return the map as one value per channel of an operator.

        Parameters
        ----------
        channels, axis : int
            How many channels the operator has, and along which axis of its data.

        Raises
        ------
        FoldError
            If the map is along another axis, has another number of channels, or would have too many.
        """
        if self.axis is None:
            return replace(self, axis=axis).repeated(channels)
        if self.axis != axis:
            raise FoldError(Reason.CHANNEL_AXIS, f"the map is along axis {self.axis}, the operator's along {axis}")
        if self.scale.size != channels:
            raise FoldError(
                Reason.PARAMETER_SHAPE, f"the map has {self.scale.size} channels, the operator or its bias {channels}"
            )
        return self

    def then(self, outer: Affine) -> Affine:
        """Return this map followed by another, ``outer(self(x))``.

        Raises
        ------
        FoldError
            If the two are along different axes or have different numbers of channels.
        """
        axis = self.axis if self.axis is not None else outer.axis
        if axis is None:
            inner = self
        else:
            channels = max(self.scale.size, outer.scale.size)
            inner, outer = self.over(channels, axis), outer.over(channels, axis)
        with np.errstate(over="ignore", invalid="ignore"):  # round_to reports what is not finite
            return Affine(outer.scale * inner.scale, outer.scale * inner.shift + outer.shift, axis)

    def of(self, array: Array) -> Float64:
        """Apply the map to an array whose channels are along `axis`.

        Raises
        ------
        FoldError
            If the array has another number of channels there.
        """
        shape = [1] * array.ndim
        inner = self
        if self.axis is not None:
            if array.ndim <= self.axis:
                raise FoldError(Reason.CHANNEL_AXIS, f"an operand of shape {array.shape} has no axis {self.axis}")
            inner = self.over(array.shape[self.axis], self.axis)
            shape[self.axis] = -1
        with np.errstate(over="ignore", invalid="ignore"):  # round_to reports what is not finite
            result: Float64 = inner.scale.reshape(shape) * array.astype(np.float64) + inner.shift.reshape(shape)
        return result

    def only_scale(self) -> Affine:
        """Return the same scale with a shift of 0."""
        return replace(self, shift=np.zeros_like(self.shift))

    def only_shift(self) -> Affine:
        """Return the same shift with a scale of 1."""
        return replace(self, scale=np.ones_like(self.scale))

    def along(self, axis: int) -> Affine:
        """Return the same map of the same channels, now along another axis of the data."""
        return self if self.axis is None else replace(self, axis=axis)

    def part(self, start: int, stop: int) -> Affine:
        """Return the map of the channels from `start` up to `stop`."""
        return self if self.axis is None else replace(self, scale=self.scale[start:stop], shift=self.shift[start:stop])

    def among(self, positions: slice, channels: int) -> Affine:
        """Return the map over more channels: at these positions what it is, and elsewhere the identity."""
        require_size(channels, "a map")
        scale, shift = np.ones(channels), np.zeros(channels)
        scale[positions], shift[positions] = self.scale, self.shift
        return replace(self, scale=scale, shift=shift)

    def repeated(self, times: int) -> Affine:
        """Return the map with every channel `times` times in a row: 0 0 1 1 2 2."""
        if self.axis is None:
            return self
        require_size(self.scale.size * times, "a map")
        return replace(self, scale=np.repeat(self.scale, times), shift=np.repeat(self.shift, times))

    def tiled(self, times: int) -> Affine:
        """Return the map with all channels, `times` times over: 0 1 2 0 1 2."""
        if self.axis is None:
            return self
        require_size(self.scale.size * times, "a map")
        return replace(self, scale=np.tile(self.scale, times), shift=np.tile(self.shift, times))


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
    return dtype.name in FLOATS


def require_size(count: int, what: str) -> None:
    """Raise FoldError for something that would have more than `MOST_VALUES` values."""
    if count > MOST_VALUES:
        raise FoldError(Reason.TOO_LARGE, f"{what} would have {count} values, more than {MOST_VALUES}")


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
