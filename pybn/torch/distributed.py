"""Synchronised batch norm on the CPU, over torch.distributed: statistics of all ranks' batches together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pybn import _arrays, _synchronized
from pybn._arrays import Array
from pybn._exchange import Direction, Exchange, absence, loss
from pybn._synchronized import GIVES_SUMS, NOTHING, WANTS_SUMS
from pybn.torch.inplace import InPlaceABN
from pybn.torch.modules import Activated, _BatchNorm, state_of


class SyncBatchNorm(_BatchNorm):
    """Batch normalization in which, in training, mean and variance are those of the batches of all ranks together.

    What `torch.nn.SyncBatchNorm` is on GPUs, for CPU tensors, over gloo (or another backend that carries CPU tensors).
    Outputs, input gradients and running statistics are what one process gives on the concatenated batches (statistics
    to about 1e-15, in float64), the running statistics with the same bits on every rank. Batches may differ in size,
    and be empty: a rank without data must still call the layer. Gradients of weight and bias are sums over the local
    values, as torch's are; DistributedDataParallel averages them. It is no subclass of `torch.nn.SyncBatchNorm` because
    DistributedDataParallel refuses those on the CPU.

    In evaluation, before `torch.distributed.init_process_group` and in a group of one it is the plain layer: nothing is
    communicated. In training forward and backward passes are collective: every rank of the group calls its layers
    equally often, in the same order, and the graphs of all ranks are alike.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in `torch.nn.BatchNorm2d`.
    process_group : torch.distributed.ProcessGroup, optional
        Whose ranks belong together; default all.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
        Applied in the same pass over memory.
    negative_slope : float
        Of "leaky_relu".
    timeout : float, optional
        Seconds to wait for the other ranks; default the group's own timeout (30 minutes, unless `init_process_group`
        was given another).

    Raises
    ------
    TimeoutError, ConnectionError
        In both passes: a rank stayed away, or is gone; the error names it. The process group cannot be used any more.
    ValueError, RuntimeError
        On every rank, if they differ in the number of channels, the dtype or what they call, if there is one value per
        channel on all ranks together, or if one of them raised an error. Nothing has changed then.
    """

    process_group: dist.ProcessGroup | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        timeout: float | None = None,
        **torch_options: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, activation=activation,
            negative_slope=negative_slope, **torch_options,
        )  # fmt: skip
        self._join(process_group, timeout)

    def _join(self, process_group: dist.ProcessGroup | None, timeout: float | None) -> None:
        self.process_group = process_group
        self.timeout = None if timeout is None else _arrays.positive("timeout", timeout)
        self._calls = 0
        self._plain_class: type[torch.nn.Module] | None = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(batch_norm(input) + residual)``; `input` has shape (N, C), (N, C, L), (N, C, H, W), ..."""
        transport = self._transport() if self.training else None
        if transport is None:
            return super().forward(input, residual)
        if torch.compiler.is_compiling():  # and only then, as what it imports takes seconds
            eager: Any = torch.compiler.disable
            y: Tensor = eager(self._synchronized)(transport, input, residual)
            return y
        return self._synchronized(transport, input, residual)

    def _synchronized(self, transport: _Transport, input: Tensor, residual: Tensor | None) -> Tensor:
        self._calls += 1
        intention = self._intention(input, residual)
        apply: Any = _Synchronize.apply
        y: Tensor = apply(input, self.weight, self.bias, residual, self, transport, intention)
        return y

    def _transport(self) -> _Transport | None:
        """None if there is nobody to talk to."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group or dist.group.WORLD
        assert group is not None
        if dist.get_rank(group) < 0:
            raise ValueError(f"process_group is one that this rank, {dist.get_rank()}, is no member of")
        return _Transport(group, self.timeout) if dist.get_world_size(group) > 1 else None

    def _intention(self, input: Tensor, residual: Tensor | None) -> int:
        """What this rank will do in the backward pass."""
        if not torch.is_grad_enabled():
            return NOTHING
        if input.requires_grad:
            return WANTS_SUMS
        others = (self.weight, self.bias, residual)
        return GIVES_SUMS if any(t is not None and t.requires_grad for t in others) else NOTHING

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"input has shape {tuple(input.shape)}, expected at least 2 axes and {self.num_features} channels "
                "(num_features) on axis 1"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy in the same process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin


class _Synchronize(torch.autograd.Function):
    """The passes of a layer; tensors become arrays and back without copies."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        layer: SyncBatchNorm,
        transport: _Transport,
        intention: int,
    ) -> Tensor:
        what = f"SyncBatchNorm({layer.num_features})"
        _, _, (*running, counter, _, momentum) = state_of(layer)
        new_mean, new_var = (None if r is None else r.detach().double().clone().numpy() for r in running)
        with Exchange(transport, what, Direction.forward, layer._calls) as exchange:
            layer._check_input_dim(input)
            y, saved = _synchronized.forward(
                exchange, _array("input", input), _parameter(weight), _parameter(bias), new_mean, new_var,
                None, momentum, layer.eps, layer.activation, layer.negative_slope,
                None if residual is None else _array("residual", residual), channel_axis=1, intention=intention,
            )  # fmt: skip
        for old, array in zip(running, (new_mean, new_var), strict=True):
            if old is not None and array is not None:
                old.copy_(torch.from_numpy(array))
        if counter is not None:
            counter.add_(1)
        ctx.save_for_backward(input, residual)
        ctx.saved, ctx.dtypes = saved, [None if p is None else p.dtype for p in (weight, bias)]
        ctx.exchange = (transport, what, Direction.backward, layer._calls)
        return _tensor(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, residual = ctx.saved_tensors
        exchange = Exchange(*ctx.exchange) if ctx.saved.needs_exchange() else None
        doubles = (None if dtype is None else np.dtype(np.float64) for dtype in ctx.dtypes)
        weight_dtype, bias_dtype = doubles  # rounded once, to the parameter's type, below
        with exchange or nullcontext():
            dx, dweight, dbias, dresidual = _synchronized.backward(
                exchange, ctx.saved, _array("the output's gradient", dy), _array("input", input),
                None if residual is None else _array("residual", residual), weight_dtype, bias_dtype,
            )  # fmt: skip
        parameters = (
            None if array is None else torch.from_numpy(array).to(dtype)
            for array, dtype in zip((dweight, dbias), ctx.dtypes, strict=True)
        )
        dr = None if dresidual is None else dy if ctx.saved.activation[0] == 0 else _tensor(dresidual)
        return None if dx is None else _tensor(dx), *parameters, dr, None, None, None


# ---- converting networks


def convert_sync_batchnorm(
    module: torch.nn.Module, process_group: dist.ProcessGroup | None = None, *, timeout: float | None = None
) -> torch.nn.Module:
    """Replace every batch norm in `module` by a `SyncBatchNorm` that shares its parameters and buffers.

    Torch's layers and pybn's alike, with their activations (those of `InPlaceABN` are not in place then); hooks,
    training flags and names stay. A layer that occurs twice is one layer afterwards, too. `revert_sync_batchnorm`
    undoes it.

    Returns
    -------
    torch.nn.Module
        `module`, changed in place; if it is a batch norm itself, the new layer.

    Raises
    ------
    ValueError
        If a layer has not seen data yet, or has statistics that are not those of its batch, such as `GhostBatchNorm`.
        Nothing has changed then.
    """

    def convert(layer: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) or isinstance(layer, SyncBatchNorm):
            return layer
        activated = isinstance(layer, Activated)
        twin = SyncBatchNorm.from_torch(layer, *((layer.activation, layer.negative_slope) if activated else ()))
        twin._join(process_group, timeout)
        twin._plain_class = type(layer)
        return twin

    for layer in module.modules():
        _require_convertible(layer)
    return _replace(module, convert, {})


def _require_convertible(layer: torch.nn.Module) -> None:
    if isinstance(layer, torch.nn.modules.batchnorm._LazyNormBase):
        raise ValueError(f"{layer} has not seen data yet, expected a batch norm that knows its number of features")
    if isinstance(layer, Activated) and not isinstance(layer, (_BatchNorm, InPlaceABN)):
        raise ValueError(f"{layer} has statistics of another kind, expected batch norms with those of the batch")


def revert_sync_batchnorm(module: torch.nn.Module) -> torch.nn.Module:
    """Undo `convert_sync_batchnorm`: layers of the classes that there were, which share parameters and buffers.

    Layers that were made as `SyncBatchNorm` stay. Returns as `convert_sync_batchnorm` does.
    """

    def revert(layer: torch.nn.Module) -> torch.nn.Module:
        if not isinstance(layer, SyncBatchNorm) or layer._plain_class is None:
            return layer
        twin: torch.nn.Module = layer._plain_class.__new__(layer._plain_class)
        alien = ["process_group", "timeout", "_calls", "_plain_class"]
        if not isinstance(twin, Activated):
            alien += ["activation", "negative_slope"]
        for name, value in vars(layer).items():
            if name not in alien:
                vars(twin)[name] = value.copy() if isinstance(value, (dict, set)) else value
        return twin

    return _replace(module, revert, {})


def _replace(
    module: torch.nn.Module,
    replacement: Callable[[torch.nn.Module], torch.nn.Module],
    done: dict[torch.nn.Module, torch.nn.Module],
) -> torch.nn.Module:
    if module not in done:
        done[module] = replacement(module)
        for name, child in list(module._modules.items()):
            if child is not None:
                module._modules[name] = _replace(child, replacement, done)
    return done[module]


# ---- how blocks travel

_TAG = 0x626E  # of messages between layers; collectives have numbers of their own


class _Transport:
    """Blocks from every rank straight to every other, rather than by all_gather, so that it is known who is missing."""

    def __init__(self, group: dist.ProcessGroup, timeout: float | None) -> None:
        self._rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.names = dist.get_process_group_ranks(group)
        self._group, self._timeout = group, timeout

    def swap(self, block: Array, what: str) -> Array:
        """See `pybn._exchange.Transport`."""
        own, blocks = torch.from_numpy(block), torch.empty((self.size, block.size), dtype=torch.float64)
        blocks[self._rank] = own
        start = time.monotonic()
        failed: dict[int, RuntimeError] = {}
        work: list[tuple[int, Any]] = []
        for rank, name in enumerate(self.names):
            if rank != self._rank:
                try:
                    work += [(rank, dist.irecv(blocks[rank], name, self._group, _TAG))]
                    work += [(rank, dist.isend(own, name, self._group, _TAG))]
                except RuntimeError as error:  # the connection is closed already
                    failed[rank] = error
        for rank, item in work:
            try:
                if failed:
                    item.wait(timedelta(milliseconds=1))
                elif self._timeout is None:
                    item.wait()
                else:
                    item.wait(timedelta(seconds=max(1e-3, start + self._timeout - time.monotonic())))
            except RuntimeError as error:
                failed.setdefault(rank, error)
        if failed:
            raise self._failure(failed, what, time.monotonic() - start) from next(iter(failed.values()))
        return blocks.numpy()

    def _failure(self, failed: dict[int, RuntimeError], what: str, seconds: float) -> OSError:
        """Of those that were waited for: the first is late or lost, and the connection to others may end with it."""
        lost = [self.names[rank] for rank, error in failed.items() if "Timed out" not in str(error)]
        late = [self.names[rank] for rank in failed]
        first = str(next(iter(failed.values())))
        return absence(what, late, self.size, seconds) if "Timed out" in first else loss(what, lost, self.size, first)


# ---- tensors as arrays

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _array(name: str, tensor: Tensor) -> Array:
    """An array on the tensor's memory."""
    if tensor.device.type != "cpu" or tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        raise TypeError(
            f"{name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, expected a dense one of "
            "float32, float64, float16 or bfloat16 on the CPU; torch.nn.SyncBatchNorm is for other devices"
        )
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(_bfloat16())
    return tensor.detach().numpy()


def _tensor(array: Array) -> Tensor:
    """A tensor on the array's memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _parameter(tensor: Tensor | None) -> Array | None:
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()).numpy()


def _bfloat16() -> np.dtype[Any]:
    """NumPy's bfloat16, which ml_dtypes adds to it."""
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
