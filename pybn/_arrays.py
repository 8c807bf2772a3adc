"""What every argument must be, and the errors that say so.

Each check names the argument, what it was and what it should have been, and runs before anything is written.

Data (``x``, ``dy``, ``residual``) are float32, float64, float16 or bfloat16 and decide the type of ``y`` and ``dx``.
Per-channel arrays (weight, bias, running statistics) are float32 or float64 independently of the data: all per-channel
arithmetic is float64, so no combination loses anything before the one rounding of the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn import _core

Array = npt.NDArray[Any]

_FLOAT32, _FLOAT64, _FLOAT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
_PARAMETERS = (_FLOAT32, _FLOAT64)
_DATA = (_FLOAT32, _FLOAT64, _FLOAT16)


def shape_text(shape: tuple[int, ...]) -> str:
    return str(tuple(int(n) for n in shape))


def as_plain_array(name: str, value: npt.ArrayLike) -> Array:
    """`value` as an ndarray: array-likes, and what NumPy can convert, such as a torch tensor on the CPU."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, whose mask would be ignored; pass {name}.data, or {name}.filled(...)"
        )
    try:
        return np.asarray(value)
    except Exception as error:  # whatever the foreign type's conversion raises
        raise TypeError(f"{name} is a {type(value).__name__}, which cannot become a NumPy array: {error}") from error


def as_data_array(name: str, value: npt.ArrayLike) -> Array:
    """`value` as a plain ndarray of native float32, float64, float16 or bfloat16; a view wherever possible."""
    array = _as_native(name, value, _DATA)
    if array.dtype in _DATA:
        return array
    if array.dtype.name == "bfloat16":  # of ml_dtypes, which need not be imported to be recognized
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    raise TypeError(f"{name} has dtype {array.dtype}, expected float32, float64, float16 or bfloat16")


def as_parameter_array(name: str, value: npt.ArrayLike) -> Array:
    """`value` as a plain ndarray of native float32 or float64; a view wherever possible."""
    array = _as_native(name, value, _PARAMETERS)
    if array.dtype in _PARAMETERS:
        return array
    raise TypeError(f"{name} has dtype {array.dtype}, expected float32 or float64")


def _as_native(name: str, value: npt.ArrayLike, dtypes: tuple[np.dtype[Any], ...]) -> Array:
    if type(value) is np.ndarray and value.dtype in dtypes:  # the usual case, soon done
        return value
    array = as_plain_array(name, value)
    if array.dtype.kind == "f" and (native := array.dtype.newbyteorder("=")) in dtypes:
        return array.astype(native, copy=False)
    return array


def data(name: str, value: npt.ArrayLike, channel_axis: int) -> tuple[Array, int]:
    """A batch of data and its channel axis, which is 1 or the last."""
    array = as_data_array(name, value)
    if array.ndim < 2:
        raise ValueError(
            f"{name} has shape {shape_text(array.shape)}, expected at least 2 axes: a batch axis and a channel axis"
        )
    if isinstance(channel_axis, (int, np.integer)):
        if channel_axis == 1:
            return array, 1
        if channel_axis in (-1, array.ndim - 1):
            return array, array.ndim - 1
    raise ValueError(f"channel_axis is {channel_axis!r}, expected 1 (NCHW) or -1 (NHWC)")


def like(name: str, value: npt.ArrayLike, x: Array) -> Array:
    """Data that must match `x` in shape and dtype."""
    array = as_data_array(name, value)
    if array.shape != x.shape:
        raise ValueError(f"{name} has shape {shape_text(array.shape)}, expected {shape_text(x.shape)}, the shape of x")
    if array.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, expected {x.dtype}, the dtype of x")
    return array


def affine_parameters(
    weight: npt.ArrayLike | None, bias: npt.ArrayLike | None, channels: int, axis: int
) -> tuple[Array | None, Array | None]:
    """The optional parameters of shape (C,)."""
    return (
        None if weight is None else required_per_channel("weight", weight, channels, axis),
        None if bias is None else required_per_channel("bias", bias, channels, axis),
    )


def required_per_channel(name: str, value: npt.ArrayLike, channels: int, axis: int) -> Array:
    array = as_parameter_array(name, value)
    if array.shape != (channels,):
        raise ValueError(
            f"{name} has shape {shape_text(array.shape)}, expected ({channels},) to match axis {axis} of x"
        )
    return array if array.flags.aligned else array.copy()


def variance(name: str, value: npt.ArrayLike, channels: int, axis: int) -> Array:
    array = required_per_channel(name, value, channels, axis)
    c = _core.first_negative(array)
    if c >= 0:
        raise ValueError(f"{name} is negative in channel {c} ({array[c]!s}), expected values >= 0")
    return array


def updatable(name: str, value: Any, channels: int, axis: int) -> Array:
    """A running statistic, which is updated in place and so must be an ndarray that can be."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a NumPy array, because it is updated in place")
    if not value.dtype.isnative:
        raise TypeError(
            f"{name} is byte-swapped ({value.dtype}), expected native byte order, because it is updated in place"
        )
    array = as_parameter_array(name, value)
    if array.shape != (channels,):
        raise ValueError(
            f"{name} has shape {shape_text(array.shape)}, expected ({channels},) to match axis {axis} of x"
        )
    _require_writable(name, array, "it is updated in place")
    if not array.flags.aligned:
        raise ValueError(f"{name} is not aligned in memory, expected an aligned array, because it is updated in place")
    return array


def running_statistics(mean: Any, var: Any, x: Array, axis: int, training: bool) -> tuple[Array | None, Array | None]:
    """The running statistics: in training both, to be updated, or neither; in evaluation both."""
    channels = x.shape[axis]
    if not training:
        if mean is None or var is None:
            missing = "running_mean" if mean is None else "running_var"
            raise ValueError(
                f"{missing} is None, expected an array of shape ({channels},) in evaluation (training=False)"
            )
        return required_per_channel("running_mean", mean, channels, axis), variance("running_var", var, channels, axis)
    if (mean is None) != (var is None):
        missing, given = ("running_mean", "running_var") if mean is None else ("running_var", "running_mean")
        raise ValueError(f"{missing} is None but {given} is not, expected both or neither")
    if mean is not None:
        mean = updatable("running_mean", mean, channels, axis)
        var = updatable("running_var", var, channels, axis)
        variance("running_var", var, channels, axis)
        if np.may_share_memory(mean, var) and np.shares_memory(mean, var):
            raise ValueError("running_mean and running_var share memory, expected two separate arrays")
    return mean, var


def _require_writable(name: str, array: Array, why: str) -> None:
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only, expected a writable array, because {why}")
    if _may_repeat_elements(array):
        raise ValueError(
            f"{name} has strides {array.strides}, by which elements share memory (as in a broadcast view), "
            "expected an array with an element of its own at every index"
        )


def _may_repeat_elements(array: Array) -> bool:
    """Whether two indices can mean the same memory; True also for strides too odd to tell."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return False
    extent = array.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < extent:
            return array.size > 0
        extent += stride * (n - 1)
    return False


def output(name: str, value: Any, x: Array, inputs: dict[str, Array | None]) -> Array:
    """An array for results of x's shape and dtype: it may be one of the inputs of that shape, but not overlap any in
    part.
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a NumPy array")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored; pass {name}.data")
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {shape_text(value.shape)}, expected {shape_text(x.shape)}, the shape of x")
    if value.dtype != x.dtype or not value.dtype.isnative:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {x.dtype}, the dtype of x")
    array: Array = value
    _require_writable(name, array, "results are written to it")
    for other, given in inputs.items():
        if given is not None and overlaps_in_part(array, given):
            raise ValueError(f"{name} overlaps {other} in part, expected a separate array or exactly {other}")
    return array


def overlaps_in_part(a: Array, b: Array) -> bool:
    if not np.may_share_memory(a, b) or _core.is_same_memory(a, b):
        return False
    effort: Any = 100_000  # the exact answer can take exponential time; its type is declared too narrow
    try:
        return bool(np.shares_memory(a, b, max_work=effort))
    except np.exceptions.TooHardError:
        return True


def at_least_one(name: str, value: int) -> int:
    """A whole number >= 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected an integer >= 1")
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    return int(value)


def positive(name: str, value: float) -> float:
    """A finite number > 0."""
    if type(value) is float and 0 < value < math.inf:  # the usual case
        return value
    if _is_real(value) and value > 0 and _as_float(value) < math.inf:
        return _as_float(value)
    raise ValueError(f"{name} is {value!r}, expected a finite number > 0")


def _finite(name: str, value: float) -> float:
    if type(value) is float and -math.inf < value < math.inf:  # the usual case
        return value
    if _is_real(value) and math.isfinite(number := _as_float(value)):
        return number
    raise ValueError(f"{name} is {value!r}, expected a finite number")


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer
        return math.inf


def flag(name: str, value: bool) -> bool:
    """True or False."""
    if isinstance(value, (bool, np.bool_, int)):
        return bool(value)
    raise TypeError(f"{name} is {value!r}, expected True or False")


def factor(momentum: float | None) -> float:
    """The weight of a new batch in the running statistics."""
    if type(momentum) is float and 0 <= momentum <= 1:  # the usual case
        return momentum
    if momentum is None:
        raise ValueError(
            "momentum is None, which means a cumulative average; only a layer, which counts its batches, can keep one"
        )
    if not _is_real(momentum) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum!r}, expected a number in [0, 1], the weight of the new batch")
    return float(momentum)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


_ACTIVATIONS = {None if name == "none" else name: index for index, name in enumerate(_core.activations)}


def activation(name: str | None, negative_slope: float) -> tuple[int, float]:
    """An activation as the core knows it."""
    try:
        index = _ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(map(repr, _ACTIVATIONS))}") from None
    return index, _finite("negative_slope", negative_slope)


def require_several_values(x: Array, axis: int, name: str = "x") -> None:
    """Training needs a variance: more than one value per channel."""
    channels = x.shape[axis]
    if channels and x.size == channels:
        raise ValueError(
            f"{name} has shape {shape_text(x.shape)}, one value per channel; expected more than one when training"
        )


def layout(axis: int, *arrays: Array) -> list[int] | None:
    """Outer, channel and inner extents by which the kernels can follow the strides of these arrays together, or None.

    They follow one outer stride and one contiguous inner extent (or contiguous channels), which covers contiguous
    arrays, slices along the batch or the channels, and transposed views.
    """
    return _core.layout(axis, *arrays) if all(array.flags.aligned for array in arrays) else None


def for_kernels(axis: int, first: Array, *others: Any) -> tuple[Any, ...]:
    """The arrays as they are if the kernels can follow them; otherwise with as few copies as that takes.

    The first decides the order of memory and the extents, so that a mask that belongs to it is read as it was written.
    The others may be None, and stay so.
    """
    if all(a is None or (a.flags.c_contiguous and a.flags.aligned) for a in (first, *others)):
        return first, *others
    if layout(axis, first) is None:
        first = np.array(first, order="C")
    extents = layout(axis, first)
    return first, *(a if a is None or layout(axis, first, a) == extents else _copy_like(first, a) for a in others)


def _copy_like(first: Array, array: Array) -> Array:
    copy: Array = _core.empty_like(first)
    copy[...] = array
    return copy


class Result:
    """Where a result of x's shape goes: the caller's `out`, or a new array laid out as x is.

    ``inputs`` (x first; the others may be None) and ``target`` are what the kernels get; ``finish()`` returns the
    caller's array, after copying to it if the kernels could not follow its strides.
    """

    def __init__(self, axis: int, out: Array | None, x: Array, *others: Array | None) -> None:
        def fits(target: Array) -> bool:
            return layout(axis, self.inputs[0], target) == layout(axis, self.inputs[0])

        self.inputs = for_kernels(axis, x, *others)
        self._out = out
        self.target = out if out is not None and fits(out) else _core.empty_like(self.inputs[0])
        if not fits(self.target):  # x repeats elements (strides of 0), as no result may
            self.inputs = tuple(None if a is None else np.array(a, order="C") for a in (x, *others))
            self.target = _core.empty_like(self.inputs[0])

    def finish(self) -> Array:
        """Return the array that the caller is to have."""
        if self._out is None or self._out is self.target:
            return self.target
        self._out[...] = self.target
        return self._out
