"""Batch norm, residual sum and activation of torch tensors as one operation, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from pybn.torch import kernels, operators

_is_grad_enabled = torch.is_grad_enabled


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalization, as `torch.nn.functional.batch_norm`, with what often follows it in the same pass.

    ``activation((input - mean) / sqrt(var + eps) * weight + bias + residual)`` per channel. In training the mean and
    the biased variance are those of the batch, and the running statistics, if given, move towards them (the variance
    unbiased) in place.

    Parameters
    ----------
    input : (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W) tensor, float32, float64, bfloat16 or float16
    running_mean, running_var : (C,) tensors or None
        Needed in evaluation.
    weight, bias : (C,) tensors or None
        Independently optional; 1 and 0 if None. Of the input's type, or float32 or float64.
    training : bool
    momentum : float
        Weight of the new batch in the running statistics.
    eps : float
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
    negative_slope : float
        Of "leaky_relu", for values below 0.
    residual : tensor of the input's shape, optional
        Added before the activation.

    Returns
    -------
    Tensor
        Of the input's shape, dtype and memory format (contiguous or channels_last). Differentiable, twice if need be.

    Raises
    ------
    TypeError
        An input that is no tensor.
    ValueError
        One value per channel in training, an unknown activation, a residual of another shape; as torch's own, or
        before anything has changed.

    Notes
    -----
    Statistics are summed in float64, and half types are computed with in float32 and rounded once. What pybn's kernels
    do not carry (other devices, types and layouts of tensors, functorch's transformations) is computed by torch.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
        return handle_torch_function(
            batch_norm, (input, running_mean, running_var, weight, bias, residual), input, running_mean, running_var,
            weight, bias, training, momentum, eps, activation=activation, negative_slope=negative_slope,
            residual=residual,
        )  # fmt: skip
    if not isinstance(input, Tensor):
        raise TypeError(f"input is a {type(input).__name__}, expected a torch.Tensor")
    return normalize(
        input, running_mean, running_var, None, weight, bias, training, momentum, eps, activation, negative_slope,
        residual,
    )  # fmt: skip


def normalize(
    x: Tensor | tuple[Tensor, ...],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """`batch_norm`, which raises `counter`, an int64 tensor of shape (), together with the running statistics.

    A tuple, which comes without a residual, stands for its concatenation along the channels. That is not made where the
    core can read the pieces.
    The momentum is a tensor where it is the average of all batches and a graph is made of the call.
    """
    index = kernels.activation_index(activation)
    if kernels.is_eager():
        act = (index, negative_slope)
        keeps = _is_grad_enabled()
        result = kernels.forward(
            x, weight, bias, running_mean, running_var, counter, residual, training, momentum, eps, act, keeps
        )
        if result is not None:
            if not keeps:
                return result[0]  # type: ignore[no-any-return]
            done = (result, training, eps, act)
            if isinstance(x, tuple):
                assert residual is None  # whose gradient attach_pieces does not know
                return attach_pieces(weight, bias, done, *x)  # type: ignore[no-any-return]
            return attach(x, weight, bias, residual, done)  # type: ignore[no-any-return]
    if isinstance(x, tuple):
        x = torch.cat(x, 1)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, expected {tuple(x.shape)}, the shape of input")
    y = _normalize_unusual(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, negative_slope, residual
    )
    if counter is not None:
        counter.add_(1)
    return y


def _normalize_unusual(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """For what the core declined, or must not be given because somebody watches."""
    statistics = (running_mean, running_var)
    missing = sum(s is None for s in statistics)
    fits = (
        (missing == 0 or (missing == 2 and training))
        and not kernels.is_left_to_torch()
        and kernels.is_carried(x, weight, bias, *statistics, residual)
        and (residual is None or residual.dtype == x.dtype)
    )
    if fits and not kernels.is_eager():
        if not torch.onnx.is_in_onnx_export():  # which knows torch's operators only
            return operators.normalize(
                x, running_mean, running_var, weight, bias, training, momentum, eps, activation, negative_slope,
                residual,
            )  # fmt: skip
    elif fits and type(x) in (Tensor, torch.nn.Parameter):
        source, w, b, summand = kernels.convert(x, weight, bias, residual)
        mean, var = (None if s is None else kernels.full_precision(s) for s in statistics)
        act = (kernels.activation_index(activation), negative_slope)
        keeps = _is_grad_enabled()
        result = kernels.forward(source, w, b, mean, var, None, summand, training, momentum, eps, act, keeps)
        if result is not None:
            if training:
                for statistic, updated in zip(statistics, (mean, var), strict=True):
                    if statistic is not None and updated is not None and updated is not statistic:
                        statistic.copy_(updated)
            done = (result, training, eps, act)
            return attach(source, w, b, summand, done) if keeps else result[0]  # type: ignore[no-any-return]
    return kernels.composite(
        x, running_mean, running_var, weight, bias, training, momentum, eps, activation, negative_slope, residual
    )


class _BatchNorm(torch.autograd.Function):
    """Makes the result of a forward pass part of the graph.

    The pass itself is over by then: had the core declined it, there would be nothing to attach.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        done: tuple[kernels.Result, bool, float, kernels.Activation],
    ) -> Tensor:
        (y, ctx.saved, mask), ctx.training, ctx.eps, ctx.activation = done
        keeps_residual = ctx.activation[0] in kernels.SMOOTH
        ctx.save_for_backward(x, weight, bias, residual if keeps_residual else None, mask)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mask = ctx.saved_tensors
        wants_dx, wants_dweight, wants_dbias, wants_dresidual, _ = ctx.needs_input_grad
        saved, training, activation = ctx.saved, ctx.training, ctx.activation
        if not _is_grad_enabled() and kernels.is_eager():
            wants_dz = wants_dresidual and activation[0] != 0
            w, b = weight if wants_dweight else None, bias if wants_dbias else None
            wanted = (saved, w, b, training, activation, wants_dx, wants_dz)
            result = kernels.backward(dy, x, residual, mask, *wanted)
            if result is None:
                dy = dy.contiguous(memory_format=kernels.memory_format(x))
                result = kernels.backward(dy, x, residual, mask, *wanted)
            if result is not None:
                dx, dweight, dbias, dz = result
                return dx, dweight, dbias, dy if wants_dresidual and not wants_dz else dz, None
        # To be differentiated again, or something that only torch's operations know, such as batches of gradients.
        slope = _slope(x, mask, saved, training, activation)
        gradients = kernels.differentiable_backward(
            dy, x, weight, bias, residual, slope, torch.from_numpy(saved), training, ctx.eps, activation[0]
        )
        return *(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)), None


# What Function.apply does besides is for functorch, which is_eager() rules out; without it a call takes 1 us less.
attach: Any = super(torch.autograd.Function, _BatchNorm).apply


class _BatchNormOfPieces(torch.autograd.Function):
    """The same for a concatenation that is not made, so that its pieces are kept and get gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor | None,
        bias: Tensor | None,
        done: tuple[kernels.Result, bool, float, kernels.Activation],
        *pieces: Tensor,
    ) -> Tensor:
        (y, ctx.saved, _), ctx.training, ctx.eps, ctx.activation = done
        ctx.save_for_backward(weight, bias, *pieces)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, *pieces = ctx.saved_tensors
        wants_dweight, wants_dbias, _, *wants_pieces = ctx.needs_input_grad
        saved, training, activation = ctx.saved, ctx.training, ctx.activation
        if not _is_grad_enabled() and kernels.is_eager():
            w, b = weight if wants_dweight else None, bias if wants_dbias else None
            wanted = (saved, w, b, training, activation, any(wants_pieces), False)
            result = kernels.backward(dy.contiguous(), tuple(pieces), None, None, *wanted)
            if result is not None:
                parts, dweight, dbias, _ = result
                return dweight, dbias, None, *(parts if parts is not None else (None,) * len(pieces))
        x = torch.cat(pieces, 1)
        slope = _slope(x, None, saved, training, activation)
        dx, dweight, dbias, _ = kernels.differentiable_backward(
            dy, x, weight, bias, None, slope, torch.from_numpy(saved), training, ctx.eps, activation[0]
        )
        gradients = (dweight, dbias, None, *torch.split(dx, [piece.size(1) for piece in pieces], 1))
        return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=True))


attach_pieces: Any = super(torch.autograd.Function, _BatchNormOfPieces).apply


def _slope(x: Tensor, mask: Tensor | None, saved: Any, training: bool, activation: kernels.Activation) -> Tensor | None:
    """The derivative of a piecewise linear activation: the gradient that a gradient of ones becomes."""
    if activation[0] == 0 or activation[0] in kernels.SMOOTH:
        return None
    with torch.no_grad():
        wanted = kernels.memory_format(x)
        ones = torch.ones_like(x, memory_format=wanted)
        # Kernels give this gradient where there is a residual only; adding 0 changes no bit that matters.
        residual = torch.zeros_like(x, memory_format=wanted) if mask is None else None
        result = kernels.backward(ones, x, residual, mask, saved, None, None, training, activation, False, True)
    return result[3]  # type: ignore[no-any-return]
