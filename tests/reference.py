"""Batch normalization in float64, written as the formulas are, and the units that errors are measured in."""

from typing import NamedTuple

import numpy as np


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


def normalize(x, mean, var, weight=None, bias=None, eps=1e-5, activation=None, channel_axis=1):
    mean, var = _along_channels(mean, x, channel_axis), _along_channels(var, x, channel_axis)
    y = (np.asarray(x, np.float64) - mean) / np.sqrt(var + eps)
    if weight is not None:
        y = y * _along_channels(weight, x, channel_axis)
    if bias is not None:
        y = y + _along_channels(bias, x, channel_axis)
    return np.maximum(y, 0) if activation == "relu" else y


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
    """Gradients; `active` is where the activation passes its gradient on."""
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
