"""Batch norm that overwrites its input, and keeps nothing but its output for the backward pass.

Rota Bulo, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", 2018: an ordinary
norm keeps its input, and the layer after it keeps its output. If the activation can be inverted, the output alone is
enough: z = activation^-1(y), and the normalized input is (z - bias) / weight.

The paper divides by |weight| + eps, and so changes the function that a weight near 0, or below it, stands for. Here the
function is that of every other batch norm, and a call in which some weight is too small to divide by keeps its input
instead: nothing but memory is lost.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pybn import _core
from pybn.torch import kernels
from pybn.torch.functional import normalize
from pybn.torch.modules import Activated, Statistics, state_of

# Dividing z - bias by the weight multiplies z's rounding by |bias / weight|: a factor of 2^10 leaves float32 gradients
# four digits.
_LARGEST_RATIO = 2.0**10
_SMALLEST_WEIGHT = 1e-30

_DTYPES = (torch.float32, torch.float64)


class InPlaceABN(Activated):
    """Activated batch norm that overwrites its input.

    A training step keeps one tensor for it where a norm and an activation keep two (or, if the activation is in place,
    one and its input). Values, gradients and parameters are those of a batch norm with an activation behind it.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in `torch.nn.BatchNorm2d`.
    activation : "leaky_relu" or None
        It must have an inverse.
    negative_slope : float > 0
        Of "leaky_relu".

    Notes
    -----
    The input, of shape (N, C, ...), is gone after the call: it must not be needed by anybody else, nor by the backward
    pass of the layer that made it (convolutions, linear layers, concatenations and sums do not keep their results;
    torch raises an error where somebody does). Where it cannot be overwritten (it is a leaf of the graph, a view, of a
    half type, on another device, or some weight is too small to divide by), it is left alone, and the call takes the
    memory of an ordinary norm. A backward pass cannot be differentiated again.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = "leaky_relu",
        negative_slope: float = 0.01,
    ) -> None:
        if activation not in (None, "leaky_relu"):
            raise ValueError(f"activation is {activation!r}, expected 'leaky_relu' or None, which have an inverse")
        if not (negative_slope > 0 and math.isfinite(negative_slope)):
            raise ValueError(f"negative_slope is {negative_slope!r}, expected a number > 0")
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """activation(norm(input)), in the memory of `input`."""
        self._check_input_dim(input)
        weight, bias, statistics = state_of(self)
        options: tuple[float, str | None, float] = (self.eps, self.activation, self.negative_slope)
        if is_overwritable(input, weight, bias):
            return overwrite(input, statistics, weight, bias, *options)
        mean, var, counter, training, momentum = statistics
        return normalize(input, mean, var, counter, weight, bias, training, momentum, *options, residual=None)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dimensions, expected at least 2: (N, C, ...)")


def is_overwritable(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether `overwrite` can take the memory of x, and get back from the result what the backward pass needs."""
    if not kernels.is_eager() or x.dtype not in _DTYPES or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if not (x.is_contiguous() or x.is_contiguous(memory_format=kernels.memory_format(x))) or x.numel() == 0:
        return False
    if not torch.is_grad_enabled():
        return True
    if x._is_view() or (x.is_leaf and x.requires_grad):
        return False
    if weight is None:
        return True
    with torch.no_grad():
        magnitude = weight.abs()
        least = (
            magnitude.clamp(min=_SMALLEST_WEIGHT)
            if bias is None
            else torch.maximum(magnitude.new_tensor(_SMALLEST_WEIGHT), bias.abs() / _LARGEST_RATIO)
        )
        return bool((magnitude >= least).all())


def overwrite(
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """activation(norm(x)), in the memory of x, which must be overwritable."""
    y: Tensor = _Overwriting.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, statistics, eps, activation, negative_slope
    )
    return y


class _Overwriting(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        eps: float,
        activation: str | None,
        negative_slope: float,
    ) -> Tensor:
        mean, var, counter, training, momentum = statistics
        if training and x.numel() == x.size(1):
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        act = (kernels.activation_index(activation), negative_slope)
        values = x.detach().numpy()
        normalization, _ = _core.forward(
            values, values, 1, _array(weight), _array(bias), _array(mean), _array(var), _array(counter), training,
            momentum, eps, act, None, True,
        )  # fmt: skip
        assert normalization is not None  # it keeps it
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, weight, bias)
        ctx.invstd, ctx.training = normalization[0][1], training
        ctx.activation, ctx.is_activated = act, activation is not None
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a norm of z = activation^-1(y), whose mean is bias and whose standard deviation |weight|."""
        y, weight, bias = ctx.saved_tensors
        dy = dy.contiguous(memory_format=kernels.memory_format(y))
        dx = torch.empty_like(y)
        channels = y.size(1)
        w = np.ones(channels) if weight is None else weight.detach().double().numpy()
        b = np.zeros(channels) if bias is None else bias.detach().double().numpy()
        statistics = np.stack([b, 1 / w])
        # centre, scale and shift of the map; z is not computed by it, so the shift is not used
        affine = np.stack([b, w * ctx.invstd, np.zeros(channels)]).astype(_array(y).dtype)
        sums = _core.backward(
            _array(dy), _array(y), _array(dx), None, 1, (statistics, affine), ctx.activation, None, None, ctx.training,
            overwritten=ctx.is_activated,
        )  # fmt: skip
        dweight = None if weight is None else torch.from_numpy(sums[1] / w).to(weight.dtype)
        dbias = None if bias is None else torch.from_numpy(sums[0]).to(bias.dtype)
        return dx, dweight, dbias, None, None, None, None


def _array(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().numpy()
