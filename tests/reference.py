"""Batch normalization in float64, written as the formulas are, and the units that errors are measured in.

Activations are checked against PyTorch's, and everything else through it, in test_torch_oracle.py.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

ACTIVATIONS = (None, "relu", "relu6", "leaky_relu", "silu", "hardswish")


def _by_channel(x, channel_axis):
    """X in float64 as (C, values per channel)."""
    x = np.moveaxis(np.asarray(x, np.float64), channel_axis, 0)
    return x.reshape(x.shape[0], -1)


def _along_channels(values, x, channel_axis):
    """A (C,) array, shaped to broadcast against x."""
    shape = [1] * np.ndim(x)
    shape[channel_axis] = -1
    return np.asarray(values, np.float64).reshape(shape)


def stats(x, channel_axis=1):
    """Mean and biased variance, in two passes."""
    values = _by_channel(x, channel_axis)
    mean = values.mean(1, keepdims=True)
    mean += (values - mean).mean(1, keepdims=True)
    return mean[:, 0], ((values - mean) ** 2).mean(1)


def sigmoid(z):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def activate(z, activation=None, negative_slope=0.01):
    """In the type of z, so that a longdouble can be the reference of float64."""
    with np.errstate(invalid="ignore"):  # inf * 0 is NaN, as in PyTorch
        return {
            None: lambda: z,
            "relu": lambda: np.maximum(z, 0),
            "relu6": lambda: np.clip(z, 0, 6),
            "leaky_relu": lambda: np.where(z > 0, z, negative_slope * z),
            "silu": lambda: z * sigmoid(z),
            "hardswish": lambda: z * np.clip(z + 3, 0, 6) / 6,
        }[activation]()


def derivative(z, activation=None, negative_slope=0.01):
    """Of the activation; at its kinks and at NaN what PyTorch takes."""
    with np.errstate(invalid="ignore"):
        return {
            None: lambda: np.ones_like(z),
            "relu": lambda: np.where(z <= 0, 0.0, 1.0),
            "relu6": lambda: np.where((z > 0) & (z < 6), 1.0, 0.0),
            "leaky_relu": lambda: np.where(z > 0, 1.0, negative_slope),
            "silu": lambda: sigmoid(z) * (1 + z * (1 - sigmoid(z))),
            "hardswish": lambda: np.where(z <= -3, 0, np.where(z >= 3, 1, z / 3 + 0.5)),
        }[activation]()


KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)}


def near_a_kink(z, activation, distance=1e-4):
    """Where rounding z may take it to the other side of a kink, and so change the derivative."""
    return np.any([np.abs(z - kink) < distance for kink in KINKS.get(activation, ())], axis=0)


def normalize(
    x,
    mean,
    var,
    weight=None,
    bias=None,
    eps=1e-5,
    activation=None,
    channel_axis=1,
    negative_slope=0.01,
    residual=None,
):
    """The output; without an activation, z."""
    mean, var = _along_channels(mean, x, channel_axis), _along_channels(var, x, channel_axis)
    y = (np.asarray(x, np.float64) - mean) / np.sqrt(var + eps)
    if weight is not None:
        y = y * _along_channels(weight, x, channel_axis)
    if bias is not None:
        y = y + _along_channels(bias, x, channel_axis)
    if residual is not None:
        y = y + np.asarray(residual, np.float64)
    return activate(y, activation, negative_slope)


def running(old, new, momentum=0.1):
    return (1 - momentum) * np.asarray(old, np.float64) + momentum * new


def unbiased(var, count):
    return var * count / (count - 1)


class Gradients(NamedTuple):
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    sum_dy_xmu: np.ndarray


def backward(dy, x, mean, var, weight=None, eps=1e-5, training=True, channel_axis=1, active=True):
    """Gradients; `active` is the derivative of the activation. That of a residual is dy * active."""
    dz = np.asarray(dy, np.float64) * active
    xmu = np.asarray(x, np.float64) - _along_channels(mean, x, channel_axis)
    invstd = 1 / np.sqrt(np.asarray(var, np.float64) + eps)
    count = x.size // x.shape[channel_axis]
    sum_dy = _by_channel(dz, channel_axis).sum(1)
    sum_dy_xmu = _by_channel(dz * xmu, channel_axis).sum(1)
    dx = dz
    if training:
        dx = dx - _along_channels(sum_dy / count, x, channel_axis)
        dx = dx - xmu * _along_channels(invstd**2 * sum_dy_xmu / count, x, channel_axis)
    scale = invstd if weight is None else invstd * np.asarray(weight, np.float64)
    return Gradients(dx * _along_channels(scale, x, channel_axis), sum_dy_xmu * invstd, sum_dy, sum_dy_xmu)


def error_in_ulp(actual, expected, scale=1.0):
    """The largest error in units of eps(dtype) * max(|expected|, scale).

    One such unit is one to two spacings of the floating-point numbers at the expected value.
    """
    actual = np.asarray(actual)
    error = np.abs(actual.astype(np.float64) - expected)
    return float(np.max(error / (np.finfo(actual.dtype).eps * np.maximum(np.abs(expected), scale)), initial=0))


def spacing(values, dtype):
    """Between the numbers of a type (float16, bfloat16, ...) at real values."""
    info = ml_dtypes.finfo(dtype)
    _, exponents = np.frexp(values)
    exponents = np.where(values == 0, info.minexp, np.maximum(exponents - 1, info.minexp))
    return np.ldexp(np.ones_like(values), exponents - info.nmant)


def error_in_spacings(actual, expected, slack=0.0):
    """The largest error beyond `slack`, in spacings of the actual type at the expected value: 0.5 if rounded right.

    Expected values that round to infinity must be infinite.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    unit = spacing(expected, actual.dtype)
    largest = float(ml_dtypes.finfo(actual.dtype).max)
    with np.errstate(invalid="ignore"):
        error = np.abs(actual.astype(expected.dtype) - expected)
        overflows = np.abs(expected) + slack >= largest + unit / 2
        error[overflows & (np.sign(expected) * np.inf == actual.astype(expected.dtype))] = 0
    return float(np.max((error - slack) / unit, initial=0))
