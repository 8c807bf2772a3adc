"""The array algebra of folding forward: a map absorbed by the weights of the linear operator after it.

A linear operator on ``a x + b`` is the operator with scaled weights on ``x``, plus what it makes of
the constant ``b``. Zero padding is not part of that constant: near a border fewer taps of the
kernel meet it, so there ``b`` becomes a map over the positions of the output rather than a bias.

Everything is float64; `pybn.folding.affine.round_to` rounds once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pybn.folding.affine import Affine, Array, Float64, require_size
from pybn.folding.weights import scale_axis


@dataclass(frozen=True)
class Window:
    """How a convolution or a pooling operator walks along one spatial axis.

    Attributes
    ----------
    kernel, stride, dilation : int
        Positive.
    begin, end : int
        Zeros before and after the data; not negative. A transposed convolution cuts off as much.
    """

    kernel: int
    stride: int = 1
    dilation: int = 1
    begin: int = 0
    end: int = 0

    @property
    def extent(self) -> int:
        """How many positions of the data lie under the kernel."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def is_padded(self) -> bool:
        """Say whether it reaches beyond the data."""
        return self.begin > 0 or self.end > 0


def same_padding(size: int, window: Window, *, upper: bool) -> tuple[int, int]:
    """Return the zeros before and after one axis that ``auto_pad`` SAME stands for.

    The output has ``ceil(size / stride)`` positions; of an odd number of zeros, SAME_UPPER puts the
    odd one after the data and SAME_LOWER before it (ONNX operators, Conv, auto_pad).
    """
    outputs = -(-size // window.stride)
    total = max((outputs - 1) * window.stride + window.extent - size, 0)
    return (total // 2, total - total // 2) if upper else (total - total // 2, total // 2)


def conv_reach(window: Window, size: int | None) -> Float64:
    """Say which taps of a convolution's kernel meet data, and not padding, at which outputs.

    Parameters
    ----------
    window : Window
        The axis.
    size : int or None
        How long the data is; None only if nothing is padded.

    Returns
    -------
    ndarray of float64, shape (kernel, outputs)
        1 where the tap meets data, else 0. One column if all columns are the same.
    """
    if not window.is_padded:
        return np.ones((window.kernel, 1))
    if size is None:
        raise ValueError("size is None, expected the length of a padded axis")
    outputs = (size + window.begin + window.end - window.extent) // window.stride + 1
    require_size(window.kernel * outputs, "the map of the borders")
    tap = window.dilation * np.arange(window.kernel)[:, None]
    position = tap + window.stride * np.arange(outputs) - window.begin
    return _collapsed((position >= 0) & (position < size))


def conv_transpose_reach(window: Window, size: int, output_padding: int) -> Float64:
    """Say which taps of a transposed convolution's kernel bring data to which outputs.

    Parameters
    ----------
    window : Window
        The axis.
    size : int
        How long the data is.
    output_padding : int
        How many positions are added at the end of the output.

    Returns
    -------
    ndarray of float64, shape (kernel, outputs)
        1 where the tap brings data, else 0. One column if all columns are the same.
    """
    outputs = window.stride * (size - 1) + window.extent + output_padding - window.begin - window.end
    require_size(window.kernel * outputs, "the map of the borders")
    tap = window.dilation * np.arange(window.kernel)[:, None]
    distance = np.arange(outputs) + window.begin - tap
    return _collapsed((distance >= 0) & (distance < size * window.stride) & (distance % window.stride == 0))


def absorb_conv(weight: Array, affine: Affine, groups: int, reaches: Sequence[Float64]) -> tuple[Float64, Float64]:
    """Give a convolution the map that comes before it: ``conv(a x + b, W) = conv(x, W') + K``.

    ``W'[o, i] = a[i] W[o, i]``, where ``i`` counts the inputs that the group of ``o`` sees, and ``K``
    is the convolution of ``b``, which padding interrupts.

    Parameters
    ----------
    weight : ndarray, shape (out, in / groups, *kernel)
        Weight of the convolution.
    affine : Affine
        The map before it, over its ``in`` channels.
    groups : int
        A divisor of ``in`` and ``out``.
    reaches : sequence of ndarray, each of shape (kernel, outputs)
        `conv_reach` of every spatial axis.

    Returns
    -------
    weight : ndarray
        Shape as before.
    added : ndarray, shape (out, *outputs)
        What to add to the output. With one value per channel it is a bias.
    """
    kernel = weight.shape[2:]
    grouped = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    with np.errstate(over="ignore", invalid="ignore"):  # round_to reports what is not finite
        scaled = grouped * affine.scale.reshape(groups, 1, -1, 1)
        taps = np.einsum("goik,gi->gok", grouped, affine.shift.reshape(groups, -1))
    return scaled.reshape(weight.shape), _spread(taps.reshape(-1, *kernel), reaches)


def absorb_conv_transpose(
    weight: Array, affine: Affine, groups: int, reaches: Sequence[Float64]
) -> tuple[Float64, Float64]:
    """Give a transposed convolution the map that comes before it, as `absorb_conv` does.

    Parameters
    ----------
    weight : ndarray, shape (in, out / groups, *kernel)
        Weight of the transposed convolution.
    affine : Affine
        The map before it, over its ``in`` channels.
    groups : int
        A divisor of ``in`` and ``out``.
    reaches : sequence of ndarray, each of shape (kernel, outputs)
        `conv_transpose_reach` of every spatial axis.

    Returns
    -------
    weight : ndarray
        Shape as before.
    added : ndarray, shape (out, *outputs)
        What to add to the output. With one value per channel it is a bias.
    """
    kernel = weight.shape[2:]
    grouped = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    with np.errstate(over="ignore", invalid="ignore"):
        taps = np.einsum("giok,gi->gok", grouped, affine.shift.reshape(groups, -1))
    return scale_axis(weight, affine.scale, 0), _spread(taps.reshape(-1, *kernel), reaches)


def absorb_matrix(weight: Array, affine: Affine, axis: int) -> tuple[Float64, Float64]:
    """Give a matrix product the map that comes before it: ``(a x + b) W = x W' + b W``.

    Parameters
    ----------
    weight : ndarray, two axes
        The matrix.
    affine : Affine
        The map before it, over the input features.
    axis : int
        The axis of `weight` that holds the input features.

    Returns
    -------
    weight : ndarray
        Shape as before.
    added : ndarray, shape (out,)
        What to add to the product.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        added: Float64 = np.tensordot(affine.shift, weight.astype(np.float64), axes=(0, axis))
    return scale_axis(weight, affine.scale, axis), added


def data_share(window: Window, size: int | None) -> Float64:
    """Say which share of each window of an average that counts its padding is data; 1 altogether if nothing is padded.

    Returns
    -------
    ndarray of float64, shape (outputs,)
        Between 0 and 1.
    """
    share: Float64 = conv_reach(window, size).mean(axis=0)
    return share


def _spread(taps: Float64, reaches: Sequence[Float64]) -> Float64:
    """Sum the taps, of shape (out, *kernel), that meet data at each output position."""
    # A kernel that leaves the data through several axes leaves it through each by itself, so the
    # axes are summed one after the other.
    require_size(taps.shape[0] * math.prod(reach.shape[1] for reach in reaches), "the map of the borders")
    for axis, reach in enumerate(reaches, start=1):
        with np.errstate(over="ignore", invalid="ignore"):
            taps = np.moveaxis(np.tensordot(taps, reach, axes=(axis, 0)), -1, axis)
    return taps


def _collapsed(reach: Array) -> Float64:
    """Keep one column if all are the same: no border is in reach."""
    same = reach.shape[1] > 0 and bool((reach == reach[:, :1]).all())
    columns: Float64 = (reach[:, :1] if same else reach).astype(np.float64)
    return columns
