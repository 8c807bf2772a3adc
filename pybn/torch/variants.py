"""The members of the family as torch modules: other statistics, the same operation. See docs/family.md.

Each calls `pybn.torch.batch_norm`, or for virtual batch norm the split operations, so kernels, activations and residual
sums are the same; gradients that are not written here are those that autograd finds for the few operations around.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pybn import _arrays, sequence, virtual
from pybn.functional import batch_norm_backward, batch_norm_stats
from pybn.ghost import parts
from pybn.layers import Observer
from pybn.renorm import PAPER_DMAX, PAPER_RMAX, Schedule, corrections, value_of
from pybn.torch import kernels
from pybn.torch.functional import batch_norm
from pybn.torch.kernels import values_of
from pybn.torch.modules import Activated, state_of


class _Variant(Activated):
    """What the layers here have in common; a subclass of torch's layer, with its parameters, buffers and state dict."""

    def __init__(self, num_features: int, *args: Any, **options: Any) -> None:
        _arrays.at_least_one("num_features", num_features)
        super().__init__(num_features, *args, **options)

    def _check_input_dim(self, input: Tensor) -> None:
        if not 2 <= input.ndim <= 5:
            raise ValueError(f"input has {input.ndim} axes, expected 2 to 5")
        if input.shape[1] != self.num_features:
            raise ValueError(f"input has {input.shape[1]} channels on axis 1, expected {self.num_features}")

    def _batch_norm(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        *,
        training: bool,
        momentum: float = 0.0,
    ) -> Tensor:
        return batch_norm(
            x, mean, var, weight, bias, training, momentum, self.eps, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual,
        )  # fmt: skip

    def _evaluate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return self._batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, residual, training=False
        )


class GhostBatchNorm(_Variant):
    """`pybn.GhostBatchNorm` for torch: statistics of consecutive parts of the batch, of at least `ghost_size` examples.

    Input has shape (N, C) to (N, C, D, H, W). Arguments as there, and `device` and `dtype`.
    """

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
        self.ghost_size = _arrays.at_least_one("ghost_size", ghost_size)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(ghost batch norm(input) + residual)``."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return self._evaluate(input, residual)
        cut = parts(len(input), self.ghost_size)
        smallest = input[cut[-1]]
        if smallest.numel() == self.num_features:
            raise ValueError(
                f"a ghost batch has shape {tuple(smallest.shape)}, one value per channel; expected more when training"
            )
        outputs = []
        for part in cut:
            weight, bias, (mean, var, counter, _, momentum) = state_of(self)
            summand = None if residual is None else residual[part]
            outputs.append(
                self._batch_norm(input[part], mean, var, weight, bias, summand, training=True, momentum=momentum)
            )
            if counter is not None:
                counter.add_(1)
        return torch.cat(outputs)

    def extra_repr(self) -> str:
        """As of torch's layer, and the size."""
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


class BatchRenorm(_Variant):
    """`pybn.BatchRenorm` for torch: batch statistics corrected by running ones, with r and d as constants.

    Input has shape (N, C) to (N, C, D, H, W). Arguments as there, and `device` and `dtype`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rmax: Schedule = PAPER_RMAX,
        dmax: Schedule = PAPER_DMAX,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, True, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
        value_of("rmax", rmax, 0, least=1)
        value_of("dmax", dmax, 0, least=0)
        self.rmax = rmax
        self.dmax = dmax

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(batch renorm(input) + residual)``."""
        self._check_input_dim(input)
        if self.running_mean is None:  # while they are re-estimated: nothing to correct by, so it is batch norm
            return self._batch_norm(input, None, None, self.weight, self.bias, residual, training=True)
        if not self.training:
            return self._evaluate(input, residual)
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        _arrays.require_several_values(values_of(input), 1, "input")
        batches = int(self.num_batches_tracked)
        rmax = value_of("rmax", self.rmax, batches, least=1)
        dmax = value_of("dmax", self.dmax, batches, least=0)
        mean, var, count = batch_norm_stats(values_of(input))
        running_mean, running_var = values_of(self.running_mean.double()), values_of(self.running_var.double())
        if count == 0:  # an empty batch tells nothing
            mean, var = running_mean, running_var
        r, d = map(torch.from_numpy, corrections(mean, var, running_mean, running_var, self.eps, rmax, dmax))
        weight = torch.ones_like(r) if self.weight is None else self.weight.double()
        bias = torch.zeros_like(d) if self.bias is None else self.bias.double()
        y = self._batch_norm(input, None, None, weight * r, bias + weight * d, residual, training=True)
        momentum = 1 / (batches + 1) if self.momentum is None else self.momentum
        if count > 0:
            for running, batch in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
                running.copy_(torch.lerp(running.double(), torch.from_numpy(batch), momentum))
        self.num_batches_tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        """As of torch's layer, and the limits."""
        return f"{super().extra_repr()}, rmax={self.rmax}, dmax={self.dmax}"


class VirtualBatchNorm(_Variant):
    """`pybn.VirtualBatchNorm` for torch: statistics of a reference batch and of the example itself.

    ``reference_forward(reference)`` before the examples; autograd takes gradients through the reference's statistics
    of that call, unless it was made under `torch.no_grad`. With gradients each step needs a call of its own, as its
    graph is used up by the backward pass. Input has shape (N, C) to (N, C, D, H, W).
    """

    reference_mean: Tensor
    reference_var: Tensor
    reference_count: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_features, eps, 0.1, affine, False, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
        self.register_buffer("reference_mean", torch.zeros(num_features, dtype=torch.float64, device=device))
        self.register_buffer("reference_var", torch.ones(num_features, dtype=torch.float64, device=device))
        self.register_buffer("reference_count", torch.zeros((), dtype=torch.int64, device=device))
        self._reference: tuple[Tensor, Tensor] | None = None

    def reference_forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Make input the reference batch, and normalize it with its own statistics."""
        self._check_input_dim(input)
        if input.numel() <= self.num_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, expected a reference batch with several values per channel"
            )
        y = self._batch_norm(input, None, None, self.weight, self.bias, residual, training=True)
        axes = [axis for axis in range(input.ndim) if axis != 1]
        var, mean = torch.var_mean(input.double(), axes, correction=0)
        self._reference = (mean, var) if mean.requires_grad else None
        self.reference_mean.copy_(mean.detach())
        self.reference_var.copy_(var.detach())
        self.reference_count.fill_(input.numel() // self.num_features)
        return y

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(virtual batch norm(input) + residual)``, in training and evaluation alike."""
        self._check_input_dim(input)
        count = int(self.reference_count)
        if count == 0:
            raise RuntimeError("there is no reference batch yet, expected a call of reference_forward before")
        mean, var = (self.reference_mean, self.reference_var)
        if self._reference is not None and torch.is_grad_enabled():
            mean, var = self._reference
        y: Tensor = _Virtual.apply(  # type: ignore[no-untyped-call]
            input, residual, self.weight, self.bias, mean, var, count, self.eps, self.activation, self.negative_slope
        )
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reference": None}  # a graph cannot be copied


class _Virtual(torch.autograd.Function):
    """Examples with the statistics of their union with a reference batch, by the split operations."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: int,
        eps: float,
        activation: str | None,
        negative_slope: float,
    ) -> Tensor:
        y, ctx.union = virtual.normalize(
            _planes(x), len(x), (mean.numpy(), var.numpy(), count), _numpy(weight), _numpy(bias), eps, activation,
            negative_slope, None if residual is None else _planes(residual), None,
        )  # fmt: skip
        ctx.settings = (count, eps, activation, negative_slope)
        ctx.save_for_backward(x, residual, weight, bias, mean, var)
        return torch.from_numpy(y.reshape(tuple(x.shape))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        x, residual, weight, bias, _, _ = inputs
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: torch's own operations have one
            wanted = [value for value, needs in zip(inputs, ctx.needs_input_grad, strict=False) if needs]
            found = iter(torch.autograd.grad(_composite(*inputs, *ctx.settings), wanted, dy, create_graph=True))
            return (*(next(found) if needs else None for needs in ctx.needs_input_grad[:6]), *[None] * 4)
        dx, by_std, sum_dy, dz = batch_norm_backward(_planes(dy), ctx.union.saved)
        assert dx is not None
        assert by_std is not None
        assert sum_dy is not None
        by_std, sum_dy = by_std.reshape(x.shape[:2]), sum_dy.reshape(x.shape[:2])
        mean_grad, var_grad = ctx.union.reference_gradients(_numpy(weight), by_std, sum_dy)
        return (
            torch.from_numpy(dx.reshape(tuple(x.shape))).to(x.dtype),
            None if residual is None or dz is None else torch.from_numpy(dz.reshape(tuple(x.shape))).to(x.dtype),
            None if weight is None else torch.from_numpy(by_std.sum(0)).to(weight.dtype),
            None if bias is None else torch.from_numpy(sum_dy.sum(0)).to(bias.dtype),
            torch.from_numpy(mean_grad),
            torch.from_numpy(var_grad),
            None, None, None, None,
        )  # fmt: skip


def _numpy(parameter: Tensor | None) -> Any:
    return None if parameter is None else values_of(parameter)


def _planes(x: Tensor) -> Any:
    return virtual.planes_of(values_of(x), 1)


def _composite(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> Tensor:
    """What `_Virtual` computes, in torch's operations."""
    flat = x.double().reshape(*x.shape[:2], -1)
    own = flat.shape[2] / (count + flat.shape[2])
    x_var, x_mean = torch.var_mean(flat, 2, correction=0)
    offset = x_mean - mean
    union = (1 - own) * (var + own * offset**2) + own * x_var
    z = (flat - (mean + own * offset)[:, :, None]) / (union + eps).sqrt()[:, :, None]
    z = z if weight is None else z * weight.double()[:, None]
    z = z if bias is None else z + bias.double()[:, None]
    z = z.reshape(x.shape).to(x.dtype)
    return kernels.FUNCTIONS[activation](z if residual is None else z + residual, negative_slope)


class SequenceBatchNorm(_Variant):
    """`pybn.SequenceBatchNorm` for torch: statistics of every time step.

    Input has shape (N, C, T), or with ``channel_axis=-1`` (N, T, C); with a step (N, C). Steps of a recurrence are
    calls in turn; autograd goes back through them.
    """

    _observer: Observer | None = None  # told of inputs while statistics are re-estimated

    def __init__(
        self,
        num_features: int,
        max_steps: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        channel_axis: int = 1,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, True, device, dtype, activation=activation,
            negative_slope=negative_slope,
        )  # fmt: skip
        if channel_axis not in (1, -1):
            raise ValueError(f"channel_axis is {channel_axis!r}, expected 1 or -1")
        self.max_steps = _arrays.at_least_one("max_steps", max_steps)
        self.channel_axis = channel_axis
        shape = (max_steps, num_features)
        self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros(max_steps, device=device, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Weight 0.1, bias 0, no statistics."""
        super().reset_parameters()
        if self.affine:
            nn.init.constant_(self.weight, 0.1)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        lengths: Any = None,
        mask: Any = None,
        step: int | None = None,
    ) -> Tensor:
        """``activation(sequence batch norm(input) + residual)``, 0 where there is no sequence."""
        time_axis = 2 if self.channel_axis == 1 else 1
        if step is not None:
            if input.ndim != 2:
                raise ValueError(f"input has shape {tuple(input.shape)}, expected 2 axes, (N, C), with a step")
            input = input.unsqueeze(time_axis)
            residual = None if residual is None else residual.unsqueeze(time_axis)
        if input.ndim != 3 or input.shape[self.channel_axis] != self.num_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, expected 3 axes, {self.num_features} channels on axis "
                f"{self.channel_axis}"
            )
        first = 0 if step is None else sequence.first_step(step)
        there = sequence.there_of(lengths, mask, len(input), input.shape[time_axis])
        y = self._normalize(input, residual, there, first, time_axis)
        return y if step is None else y.squeeze(time_axis)

    def _normalize(self, x: Tensor, residual: Tensor | None, there: Any, first: int, time_axis: int) -> Tensor:
        blocks = sequence.blocks_of(there, len(x), x.shape[time_axis], is_last=time_axis == 1)
        sizes = [sequence.count_of(block, len(x)) for block in blocks]
        _, _, counter = self._statistics()
        training = self.training or self._observer is not None
        if training and blocks and max(sizes) < 2 and (first == 0 or not counter.any()):
            raise ValueError(
                f"input has shape {tuple(x.shape)} and at no step more than one sequence; expected more than one when "
                "training"
            )
        if self._observer is not None:
            if first == 0:  # so that a sequence that is left alone uses an earlier step of these, not of any before
                self.reset_running_stats()
            for step, values in sequence.arrivals(blocks, values_of(x), first, self.max_steps):
                self._observer(values, step)
        y = torch.zeros_like(x, memory_format=torch.contiguous_format)
        order = sorted(zip(blocks, sizes, strict=True), key=lambda pair: training and pair[1] == 1)
        for block, size in order:
            steps = block.end - block.begin
            part, summand = _of(block, x), None if residual is None else _of(block, residual)
            weight, bias = (
                None if p is None else p.repeat(steps) if block.is_last else p.repeat_interleave(steps)
                for p in (self.weight, self.bias)
            )
            if training and size > 1:
                # With a momentum of 1 the running statistics are those of the batch, the variance unbiased.
                mean, var = (torch.zeros(part.shape[1], dtype=torch.float64) for _ in range(2))
                result = self._batch_norm(part, mean, var, weight, bias, summand, training=True, momentum=1.0)
                self._move(block, mean, var, first + block.begin)
            else:
                seen = counter.numpy() > 0
                rows = torch.from_numpy(sequence.rows_of(seen, np.arange(first + block.begin, first + block.end)))
                known = (s[rows] if block.is_last else s[rows].T for s in self._statistics()[:2])
                mean, var = (s.reshape(-1) for s in known)
                result = self._batch_norm(part, mean, var, weight, bias, summand, training=False)
            if len(blocks) == 1 and there is None:
                return result.reshape(x.shape)
            index = _index(block)
            y[index] = result.reshape(y[index].shape)
        return y

    def _statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        return self.running_mean, self.running_var, self.num_batches_tracked

    def _move(self, block: Any, mean: Tensor, var: Tensor, first: int) -> None:
        end = min(first + block.end - block.begin, self.max_steps)
        if first >= end:
            return
        running_mean, running_var, counter = self._statistics()
        counter = counter[first:end]
        counter += 1
        factor = 1 / counter[:, None].double() if self.momentum is None else self.momentum
        for running, batch in ((running_mean, mean), (running_var, var)):
            by_step = torch.from_numpy(np.ascontiguousarray(block.by_step(batch.numpy())))[: end - first]
            old = running[first:end].double()
            running[first:end] = ((1 - factor) * old + factor * by_step).to(running.dtype)


def _index(block: Any) -> Any:
    rows = block.rows if isinstance(block.rows, slice) else torch.from_numpy(block.rows)
    steps = slice(block.begin, block.end)
    return (rows, steps) if block.is_last else (rows, slice(None), steps)


def _of(block: Any, x: Tensor) -> Tensor:
    part = x[_index(block)]
    return part.reshape(len(part), -1)


def freeze(model: nn.Module) -> nn.Module:
    """Let every batch norm of a module use its running statistics, unchanged, in training, too; `unfreeze` ends it.

    It holds whatever `train` does later. Gradients of weight and bias are still computed: leave them out of the
    optimizer to freeze those, too. Returns the module.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.eval()
            if not is_frozen(module):
                module.register_forward_pre_hook(_stay_in_evaluation)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Undo `freeze`; batch norms are in training as the module is. Returns the module."""
    for module in model.modules():
        if is_frozen(module):
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook is _stay_in_evaluation]:
                del hooks[key]
            module.train(model.training)
    return model


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` holds a batch norm."""
    return any(hook is _stay_in_evaluation for hook in module._forward_pre_hooks.values())


def _stay_in_evaluation(module: nn.Module, _: Any) -> None:
    module.training = False
