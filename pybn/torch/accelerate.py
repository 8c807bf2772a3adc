"""One line that makes a model train faster: its batch norms become pybn's, with the sums and activations around them.

    layers      every torch.nn.BatchNorm changes its class, in place: parameters, buffers, hooks, names are the same
    forwards    modules whose forward pass has a norm with a sum or an activation behind it get a `FusedForward`
    report      what was done, and what was not, and why

What a norm can be fused with is read off a trace of the forward pass (`forwards`, `epilogues`), never guessed from
names or from the order of modules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase

from pybn.torch import kernels, memory, modules
from pybn.torch.epilogues import fuse
from pybn.torch.forwards import FusedForward, Untraceable, trace
from pybn.torch.functional import normalize
from pybn.torch.inplace import is_overwritable
from pybn.torch.inplace import overwrite as overwrite_


@dataclass(frozen=True)
class Replaced:
    """A batch norm that is pybn's now.

    Attributes
    ----------
    name : str
        Its path in the model; the first one if it has several.
    fused : tuple of str
        What is computed with it, one entry for each place that calls it: "relu", "sum + relu", ...; empty if nothing.
    """

    name: str
    fused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """Something that stayed as it was: a batch norm, a sum or an activation behind one, a forward pass."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` has done to a model, and whether it has set the process to reuse memory."""

    replaced: tuple[Replaced, ...] = ()
    left: tuple[Left, ...] = ()
    reuses_memory: bool = False

    def __str__(self) -> str:
        kinds: dict[str, int] = {}
        for layer in self.replaced:
            for kind in layer.fused or ("alone",):
                kinds[kind] = kinds.get(kind, 0) + 1
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        lines = [f"{_count(len(self.replaced), 'batch norm')} accelerated" + (f": {counts}" if counts else "")]
        if self.left:
            width = max(len(left.name) for left in self.left)
            lines.append(f"{len(self.left)} left:")
            lines += [f"  {left.name:{width}}  {left.reason}" for left in self.left]
        if self.reuses_memory:
            lines.append(memory.KEPT)
        return "\n".join(lines)


class Accelerated(NamedTuple):
    """A model and the report of what was done to it."""

    model: nn.Module
    report: Report


def accelerate(
    model: nn.Module,
    *,
    inplace: bool = False,
    inplace_activations: bool = False,
    concatenations: bool = False,
    reuse_memory: bool = False,
) -> Accelerated:
    """Make a model's batch norms pybn's, together with the sums and activations behind them.

    Losses, gradients and running statistics are the same up to rounding, in training and in evaluation. Parameters and
    buffers are the very same objects under the same names, so optimisers and checkpoints keep working, and the model is
    as ordinary as it was: it can be copied, pickled, saved, moved, compiled.

    Parameters
    ----------
    model : torch.nn.Module
    inplace : bool
        Whether `model` itself is changed. Otherwise it stays as it is, and a copy of it is returned, whose modules are
        new and whose parameters and buffers are those of `model`.
    inplace_activations : bool
        Whether norms without an activation, or with a leaky ReLU, overwrite their inputs where those are nobody
        else's, which takes less memory: see `InPlaceABN`. Backward passes through them cannot be differentiated again.
    concatenations : bool
        Whether norms of a concatenation (``norm(torch.cat(tensors, 1))``, as in DenseNet) read the tensors instead,
        and the concatenation is not made, which takes less memory and time. The tensors themselves are kept for the
        backward pass then: it raises torch's RuntimeError if something has changed one in place in between, which a
        concatenation would have survived. That is why it is not the default.
    reuse_memory : bool
        Whether the process keeps the memory that it frees, which networks of large tensors gain most from: see
        `pybn.torch.reuse_memory`. It concerns the whole process and `restore` does not end it, so it is not the
        default.

    Returns
    -------
    model : torch.nn.Module
    report : Report
        Print it to see what was done, and what was left and why.

    Raises
    ------
    RuntimeError
        If memory cannot be kept, because the C library is not glibc; nothing has changed then.

    Notes
    -----
    A module whose own forward pass has something to fuse gets a `forward` attribute that runs it fused, for the
    arguments, modes and attributes that it has been traced with, and else calls the forward of its class. It does so
    too while a hook watches a module that takes part. What a forward pass does besides computing its result (printing,
    counting outside the module) happens when it is traced, not at every call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if reuse_memory:
        memory.reuse_memory()
    if not inplace:
        model = _copy(model)
    names = {module: name or "(model)" for name, module in model.named_modules()}
    left: list[Left] = []
    layers: dict[nn.Module, list[str]] = {}
    for module, name in names.items():
        if isinstance(module, AcceleratedLayer):
            continue  # a second time
        if isinstance(module, _BatchNorm):
            reason = _reason_to_leave(module)
            if reason is None:
                module.__class__ = LAYERS[type(module)]
                layers[module] = []
            else:
                left.append(Left(name, reason))
    for module, name in names.items():
        if _may_call(module, layers):
            left += [
                Left(_join(name, path), reason)
                for path, reason in _fuse_forward(
                    module, layers, {"overwrite": inplace_activations, "concatenate": concatenations}
                )
            ]
    replaced = tuple(Replaced(names[layer], tuple(fused)) for layer, fused in layers.items())
    return Accelerated(model, Report(replaced, tuple(left), reuse_memory))


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, in place: modules have their own classes and forward passes again. Returns the model."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del module.forward
        if isinstance(module, AcceleratedLayer):
            module.restore()
    return model


def _copy(model: nn.Module) -> nn.Module:
    """New modules around the same parameters and buffers."""
    shared = {id(tensor): tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return copy.deepcopy(model, shared)


# ---- layers


class AcceleratedLayer(_BatchNorm):
    """What a torch.nn.BatchNorm becomes: pybn's, whose every call may say what is to be computed with it."""

    stock_class: ClassVar[type[_BatchNorm]]
    activation: str | None = None
    negative_slope: float = 0.01

    def forward(
        self,
        input: Tensor | tuple[Tensor, ...],
        residual: Tensor | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        overwrite: bool = False,
    ) -> Tensor:
        """activation(norm(input) + residual), where the residual is whatever can be added; see `overwrite`.

        A tuple of tensors stands for their concatenation along the channels, and comes without a residual.
        """
        self._check_input_dim(input[0] if isinstance(input, tuple) else input)  # type: ignore[no-untyped-call]
        weight, bias, statistics = modules.state_of(self)
        if overwrite and isinstance(input, Tensor) and is_overwritable(input, weight, bias):
            return overwrite_(input, statistics, weight, bias, self.eps, activation, negative_slope)
        mean, var, counter, training, momentum = statistics
        if (
            isinstance(input, tuple)
            or residual is None
            or (isinstance(residual, Tensor) and residual.shape == input.shape)
        ):
            return normalize(
                input, mean, var, counter, weight, bias, training, momentum, self.eps, activation, negative_slope,
                residual,
            )  # fmt: skip
        if counter is not None:
            counter.add_(1)
        return kernels.composite(
            input, mean, var, weight, bias, training, momentum, self.eps, activation, negative_slope, residual
        )

    def restore(self) -> None:
        """Be the stock layer again."""
        for name in ("activation", "negative_slope"):
            vars(self).pop(name, None)  # which copying adds
        self.__class__ = self.stock_class  # type: ignore[assignment]


class BatchNorm1d(AcceleratedLayer, modules.BatchNorm1d):
    stock_class = nn.BatchNorm1d


class BatchNorm2d(AcceleratedLayer, modules.BatchNorm2d):
    stock_class = nn.BatchNorm2d


class BatchNorm3d(AcceleratedLayer, modules.BatchNorm3d):
    stock_class = nn.BatchNorm3d


LAYERS: dict[type[_BatchNorm], type[AcceleratedLayer]] = {
    layer.stock_class: layer for layer in (BatchNorm1d, BatchNorm2d, BatchNorm3d)
}


def is_accelerated(module: nn.Module) -> bool:
    return isinstance(module, AcceleratedLayer)


def _reason_to_leave(module: _BatchNorm) -> str | None:
    if isinstance(module, nn.SyncBatchNorm):
        return "it synchronises its statistics with other processes (see convert_sync_batchnorm)"
    if isinstance(module, _LazyNormBase):
        return "it is not built yet: call the model once before"
    if type(module) not in LAYERS:
        return f"it is a {type(module).__name__}, which may compute something else than its base class"
    if "forward" in vars(module):
        return "its forward has been replaced"
    devices = {tensor.device.type for tensor in (*module.parameters(), *module.buffers())} - {"cpu"}
    return f"it is on another device, {devices.pop()}" if devices else None


def _join(name: str, path: str) -> str:
    if not path:
        return name
    return path if name == "(model)" else f"{name}.{path}"


# ---- forward passes


def _may_call(module: nn.Module, layers: dict[nn.Module, list[str]]) -> bool:
    has_forward = "forward" in vars(module) or type(module).forward is not nn.Module.forward
    return has_forward and module not in layers and any(part in layers for part in module.modules())


def _fuse_forward(
    module: nn.Module, layers: dict[nn.Module, list[str]], options: dict[str, bool]
) -> Iterator[tuple[str, str]]:
    """Give a module a `FusedForward` if there is anything for it. Yields (path, reason) of what is left."""
    if "forward" in vars(module):
        yield "", "its forward has been replaced"
        return
    parts = dict(module.named_modules())
    found: dict[tuple[str, str], None] = {}
    refused: dict[tuple[str, str], None] = {}
    for training in (True, False):
        try:
            with _mode(module, training):
                graph = _trace_likely_call(module)
        except Untraceable as reason:
            refused["", str(reason)] = None
            continue
        fusions, refusals = fuse(graph, parts, is_accelerated, **options)
        found |= dict.fromkeys((fusion.norm, str(fusion)) for fusion in fusions)
        refused |= dict.fromkeys(refusals.items())
    for path, what in found:
        layers[parts[path]].append(what)
    if found:
        module.forward = FusedForward(module, is_accelerated, **options)
    yield from refused


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """All parts in training or in evaluation; not by train(), which classes may override."""
    before = [(part, part.training) for part in module.modules()]
    for part, _ in before:
        part.training = training
    try:
        yield
    finally:
        for part, was_training in before:
            part.training = was_training


def _trace_likely_call(module: nn.Module) -> Graph:
    """A trace with a tensor for each argument that has no default, or else a list of tensors."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    positional = sum(p.kind is not p.KEYWORD_ONLY for p in needed)

    def trace_with(value: Tensor | list[Tensor]) -> Graph:
        return trace(module, (value,) * positional, {p.name: value for p in needed if p.kind is p.KEYWORD_ONLY})

    tensor = torch.empty(0)
    try:
        return trace_with(tensor)
    except Untraceable as reason:
        try:
            return trace_with([tensor, tensor])
        except Untraceable:
            raise reason from None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
