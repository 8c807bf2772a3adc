"""Batch norm as operators that torch knows by name, for torch.compile, torch.export and whoever watches operations.

They are pure: the running statistics are read, and what they become is a result. Writing it to them is left to torch's
own ``copy_``, so that whoever traces a graph sees what is mutated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybn.torch import kernels


def normalize(
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
    """`functional.normalize` by the operators."""
    if training:
        torch.nn.functional._verify_batch_size(x.size())  # type: ignore[attr-defined]
    # With a momentum of 1 the running statistics become those of the batch.
    factor = 1.0 if isinstance(momentum, Tensor) else momentum
    y, _, statistics = batch_norm(
        x, weight, bias, running_mean, running_var, residual, training, factor, eps, activation, negative_slope
    )
    if training and running_mean is not None and running_var is not None:
        for running, new in ((running_mean, statistics[0]), (running_var, statistics[1])):
            running.copy_(torch.lerp(running.double(), new, momentum) if isinstance(momentum, Tensor) else new)
    return y  # type: ignore[no-any-return]


@torch.library.custom_op("pybn::batch_norm", mutates_args=())
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, what the backward pass needs, and in training what the running statistics are to become, float64 (2, C)."""
    channels = x.size(1)
    statistics = torch.zeros(2, channels, dtype=torch.float64)
    if running_mean is not None and running_var is not None:
        statistics[0], statistics[1] = running_mean, running_var
    if x.numel() == 0:
        y = torch.empty_like(x, memory_format=kernels.memory_format(x))
        return y, torch.zeros(5, channels, dtype=torch.float64), statistics
    source, w, b, summand = kernels.convert(x, weight, bias, residual)
    act = (kernels.activation_index(activation), negative_slope)
    result = kernels.forward(
        source, w, b, statistics[0], statistics[1], None, summand, training, momentum, eps, act, True
    )
    if result is None:
        raise ValueError("pybn::batch_norm got tensors whose shapes do not belong together")
    y, saved, _ = result
    return y, torch.from_numpy(saved), statistics


@batch_norm.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=kernels.memory_format(x))
    saved, statistics = (x.new_empty((rows, x.size(1)), dtype=torch.float64) for rows in (5, 2))
    return y, saved, statistics


@torch.library.custom_op("pybn::batch_norm_backward", mutates_args=())
def batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
    negative_slope: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dresidual, each empty if it is not `wanted`."""
    wants_dx, wants_dweight, wants_dbias, wants_dresidual = wanted
    if x.numel() == 0:
        return tuple(g.zero_() for g in _gradients_like(x, weight, bias, wanted))  # type: ignore[return-value]
    source, w, b, summand = kernels.convert(x, weight, bias, residual)
    gradient = dy.contiguous(memory_format=kernels.memory_format(source))
    act = (kernels.activation_index(activation), negative_slope)
    result = kernels.backward(
        gradient, source, summand, None, saved.numpy(), w if wants_dweight else None, b if wants_dbias else None,
        training, act, wants_dx, wants_dresidual,
    )  # fmt: skip
    if result is None:
        raise ValueError("pybn::batch_norm_backward got tensors of other shapes than it declares")
    empty = _gradients_like(x, weight, bias, [False] * 4)
    dtypes = (x.dtype, *(x.dtype if p is None else p.dtype for p in (weight, bias)), x.dtype)
    return tuple(  # type: ignore[return-value]
        e if g is None else g.to(dtype) for g, e, dtype in zip(result, empty, dtypes, strict=True)
    )


def _gradients_like(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def gradient(of: Tensor | None, is_wanted: bool) -> Tensor:
        if of is None or not is_wanted:
            return (x if of is None else of).new_empty(0)
        return torch.empty_like(of, memory_format=kernels.memory_format(of) if of is x else torch.contiguous_format)

    dx, dweight, dbias, dresidual = (
        gradient(of, is_wanted) for of, is_wanted in zip((x, weight, bias, x), wanted, strict=True)
    )
    return dx, dweight, dbias, dresidual


@batch_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    saved: Tensor,
    training: bool,
    eps: float,
    activation: str | None,
    negative_slope: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients_like(x, weight, bias, wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, residual, ctx.training, _, ctx.eps, ctx.activation, ctx.negative_slope = inputs
    _, saved, statistics = output
    ctx.mark_non_differentiable(saved, statistics)
    needs_residual = ctx.activation is not None
    ctx.save_for_backward(x, weight, bias, residual if needs_residual else None, saved)


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], needs[5] and ctx.activation is not None]
    options = (saved, ctx.training, ctx.eps, ctx.activation, ctx.negative_slope)
    if torch.is_grad_enabled():
        index = kernels.activation_index(ctx.activation)
        slope = None
        if index != 0 and index not in kernels.SMOOTH:  # the gradient that a gradient of ones becomes
            with torch.no_grad():
                ones, summand = torch.ones_like(x), torch.zeros_like(x) if residual is None else residual
                slope = batch_norm_backward(ones, x, weight, bias, summand, *options, [False, False, False, True])[3]
        gradients = kernels.differentiable_backward(
            dy, x, weight, bias, residual, slope, saved, ctx.training, ctx.eps, index
        )
    else:
        gradients = batch_norm_backward(dy, x, weight, bias, residual, *options, wanted)
    dx, dweight, dbias, dz = (g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True))
    dresidual = dy if needs[5] and ctx.activation is None else dz
    return dx, dweight, dbias, None, None, dresidual, None, None, None, None, None


batch_norm.register_autograd(_backward, setup_context=_setup_context)
