"""The array algebra of folding: a map absorbed by the weights of a linear operator.

Everything is float64; `pybn.folding.affine.round_to` rounds once at the end. The rules for ONNX
operators call the same functions, so there is one algebra.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pybn._arrays import as_plain_array, positive
from pybn.folding.affine import Affine, Array, Float64, is_supported, round_to
from pybn.folding.reasons import FoldError, Reason


def fold_conv(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    running_mean: npt.ArrayLike,
    running_var: npt.ArrayLike,
    bn_weight: npt.ArrayLike | None,
    bn_bias: npt.ArrayLike | None,
    eps: float = 1e-5,
    *,
    transposed: bool = False,
    groups: int = 1,
) -> tuple[Array, Array]:
    """Fold a batch norm in evaluation mode into the convolution before it.

    Parameters
    ----------
    weight : array_like
        float16, bfloat16, float32 or float64. Shape ``(out, in / groups, *kernel)``, or
        ``(in, out / groups, *kernel)`` if `transposed`; any number of spatial axes.
    bias : array_like of shape (out,), or None
        None stands for zeros.
    running_mean, running_var : array_like, shape (out,)
        Statistics of the batch norm, any float type.
    bn_weight, bn_bias : array_like of shape (out,), or None
        Affine parameters of the batch norm. None stands for ones and zeros.
    eps : float
        Added to the variance. Finite and positive.
    transposed : bool
        The convolution is a transposed one.
    groups : int
        Number of groups of the convolution. Matters only if `transposed`.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the type of `weight`. ``weight * a[o]`` and ``a * bias + b`` with
        ``a = bn_weight / sqrt(running_var + eps)``, ``b = bn_bias - a * running_mean``,
        computed in float64 and rounded once (Jacob et al. 2018, section 3.2, gives the formula).

    Raises
    ------
    TypeError
        If an argument is not an array of a supported type.
    ValueError
        If a shape, `eps` or `groups` does not fit.
    FoldError
        If ``running_var + eps <= 0``, or a value is NaN, infinite, or too large for the type of
        `weight`. A subclass of ValueError; its `reason` is the code.
    """
    kernel = _weight(weight)
    if kernel.ndim < 2:
        raise ValueError(f"weight has {kernel.ndim} axes, expected at least 2")
    if isinstance(groups, bool) or not isinstance(groups, (int, np.integer)):
        raise TypeError(f"groups is {type(groups).__name__}, expected an int")
    # The axis that the groups divide: out, or in if transposed; the first axis either way.
    if groups < 1 or kernel.shape[0] % groups:
        raise ValueError(
            f"groups is {groups}, expected a positive divisor of the {kernel.shape[0]} "
            f"{'input' if transposed else 'output'} channels of weight"
        )
    channels = kernel.shape[1] * groups if transposed else kernel.shape[0]
    offset, affine = _operands(channels, bias, running_mean, running_var, bn_weight, bn_bias, eps)
    scaled = (
        scale_transposed_conv(kernel, affine.scale, int(groups)) if transposed else scale_axis(kernel, affine.scale, 0)
    )
    return (
        round_to(scaled, kernel.dtype, "the folded weight"),
        round_to(map_bias(offset, affine), kernel.dtype, "the folded bias"),
    )


def fold_linear(
    weight: npt.ArrayLike,
    bias: npt.ArrayLike | None,
    running_mean: npt.ArrayLike,
    running_var: npt.ArrayLike,
    bn_weight: npt.ArrayLike | None,
    bn_bias: npt.ArrayLike | None,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """Fold a batch norm in evaluation mode into the linear layer before it.

    Exact only if the channels of the batch norm are the output features of the layer: for input
    of shape ``(N, in)``, not for ``(N, C, in)``.

    Parameters
    ----------
    weight : array_like, shape (out, in)
        float16, bfloat16, float32 or float64.
    bias : array_like of shape (out,), or None
        None stands for zeros.
    running_mean, running_var : array_like, shape (out,)
        Statistics of the batch norm, any float type.
    bn_weight, bn_bias : array_like of shape (out,), or None
        Affine parameters of the batch norm. None stands for ones and zeros.
    eps : float
        Added to the variance. Finite and positive.

    Returns
    -------
    weight, bias : ndarray
        New arrays of the type of `weight`; the formula is that of `fold_conv`.

    Raises
    ------
    TypeError, ValueError, FoldError
        As `fold_conv` does.
    """
    matrix = _weight(weight)
    if matrix.ndim != 2:
        raise ValueError(f"weight has {matrix.ndim} axes, expected 2: (out, in)")
    offset, affine = _operands(matrix.shape[0], bias, running_mean, running_var, bn_weight, bn_bias, eps)
    return (
        round_to(scale_axis(matrix, affine.scale, 0), matrix.dtype, "the folded weight"),
        round_to(map_bias(offset, affine), matrix.dtype, "the folded bias"),
    )


def scale_axis(weight: Array, scale: Float64, axis: int) -> Float64:
    """Multiply along the axis that holds the output channels."""
    shape = [1] * weight.ndim
    shape[axis] = scale.size
    with np.errstate(over="ignore", invalid="ignore"):  # round_to reports what is not finite
        scaled: Float64 = weight.astype(np.float64) * scale.reshape(shape)
    return scaled


def scale_transposed_conv(weight: Array, scale: Float64, groups: int) -> Float64:
    """Multiply along the output channels of ``(in, out / groups, *kernel)``.

    Output channels are numbered group by group while axis 1 counts within one group, so the
    groups need an axis of their own.
    """
    inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        grouped = weight.astype(np.float64).reshape(groups, inputs, outputs, -1)
        scaled: Float64 = grouped * scale.reshape(groups, 1, outputs, 1)
    return scaled.reshape(weight.shape)


def scale_quantized(
    values: Array, scale: Array, zero_point: Array | None, factors: Float64, axis: int
) -> tuple[Array, Float64, Array | None]:
    """Multiply ``(values - zero_point) * scale`` along an axis, without new rounding of the integers.

    The factors go into the scales, their signs into the integers, since runtimes expect scales to
    be positive.

    Parameters
    ----------
    values : ndarray of integers
        The quantized weight.
    scale : ndarray of floats, shape () or (1,) or (channels,)
        If there are several, they are along `axis`.
    zero_point : ndarray of integers or None
        As `scale`; None stands for zeros.
    factors : ndarray of float64, shape (channels,)
        What to multiply by, one for each slice along `axis`.
    axis : int
        The axis of the output channels.

    Returns
    -------
    values, scale, zero_point
        ``scale`` is float64, not rounded yet, and of shape (channels,) unless all are equal.

    Raises
    ------
    FoldError
        If a negative factor meets an integer that has no opposite, such as -128.
    """
    negative = np.flatnonzero(factors < 0)
    if negative.size:
        if zero_point is not None and zero_point.any():
            raise FoldError(Reason.QUANTIZATION, "a negative scale would have to turn a zero point around")
        information = np.iinfo(values.dtype)
        slices = (slice(None),) * axis + (negative,)
        if information.min == 0 or (values[slices] == information.min).any():
            raise FoldError(Reason.QUANTIZATION, f"{values.dtype} has no opposite of {information.min}")
        values = values.copy()
        values[slices] = -values[slices]
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.abs(factors) * scale.astype(np.float64).reshape(-1)
    if scale.size == 1 and (scaled == scaled[0]).all():
        return values, scaled[:1].reshape(scale.shape), zero_point
    if zero_point is not None:
        zero_point = np.broadcast_to(zero_point.reshape(-1), scaled.shape).copy()
    return values, scaled, zero_point


def map_bias(bias: Array | None, affine: Affine, gain: float = 1.0) -> Float64:
    """Apply the map to ``gain * bias``, whose last axis holds the channels or broadcasts to them.

    Parameters
    ----------
    bias : ndarray or None
        None stands for zero.
    affine : Affine
        The map.
    gain : float
        A factor that the operator applies to its bias (``beta`` of Gemm).
    """
    if bias is None:
        return affine.shift.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        mapped: Float64 = affine.scale * (gain * bias.astype(np.float64)) + affine.shift
    return mapped


def _operands(
    channels: int,
    bias: npt.ArrayLike | None,
    running_mean: npt.ArrayLike,
    running_var: npt.ArrayLike,
    bn_weight: npt.ArrayLike | None,
    bn_bias: npt.ArrayLike | None,
    eps: float,
) -> tuple[Array | None, Affine]:
    eps = positive("eps", eps)
    offset = _optional_vector(bias, "bias", channels)
    affine = Affine.from_batch_norm(
        _vector(running_mean, "running_mean", channels),
        _vector(running_var, "running_var", channels),
        _optional_vector(bn_weight, "bn_weight", channels),
        _optional_vector(bn_bias, "bn_bias", channels),
        eps,
    )
    return offset, affine


def _weight(weight: npt.ArrayLike) -> Array:
    return _floats(weight, "weight")


def _optional_vector(values: npt.ArrayLike | None, name: str, channels: int) -> Array | None:
    return None if values is None else _vector(values, name, channels)


def _vector(values: npt.ArrayLike, name: str, channels: int) -> Array:
    array = _floats(values, name)
    if array.shape != (channels,):
        raise ValueError(
            f"{name} has shape {array.shape}, expected ({channels},) to match the output channels of weight"
        )
    return array


def _floats(values: npt.ArrayLike, name: str) -> Array:
    array = as_plain_array(name, values)
    if not is_supported(array.dtype):
        raise TypeError(f"{name} has dtype {array.dtype}, expected float16, bfloat16, float32 or float64")
    return array
