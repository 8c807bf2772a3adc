"""Re-estimation of the batch norms of a torch module; see `pybn.population`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pybn._arrays import Array
from pybn._merge import Moments
from pybn.population import Observe


class Modules:
    """A torch module as a `pybn.population.Subject`: its batch norms that have running statistics."""

    def __init__(self, model: nn.Module, forward: Callable[[Any], Any] | None) -> None:
        self._model, self._forward = model, forward
        self._layers: dict[str, _BatchNorm] = {}
        self.left: dict[str, str] = {}
        for name, module in model.named_modules():
            if not isinstance(module, _BatchNorm):
                continue
            if module.running_mean is None or module.running_var is None:
                self.left[name] = "it has no running statistics"
            else:
                self._layers[name] = module
        self.names = list(self._layers)

    @contextlib.contextmanager
    def running(self, observe: Observe) -> Iterator[Callable[[Any], None]]:
        """See `pybn.population.Subject`. Batch norms are in training, all else in evaluation."""
        training = {module: module.training for module in self._model.modules()}
        state = [
            (layer, layer.track_running_stats, layer.running_mean, layer.running_var, layer.num_batches_tracked)
            for layer in self._layers.values()
        ]
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, name=name: observe(name, values_of(inputs[0]), 1))
            for name, layer in self._layers.items()
        ]
        try:
            self._model.eval()
            for layer in self._layers.values():
                layer.train()
                # Without running statistics a layer uses the batch's own, and has nothing to change.
                layer.track_running_stats = False
                layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            yield self._run
        finally:
            for hook in hooks:
                hook.remove()
            for layer, tracks, mean, var, counter in state:
                layer.track_running_stats = tracks
                layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, counter
            for module, mode in training.items():
                module.training = mode

    def _run(self, batch: Any) -> None:
        run_module(self._model, self._forward, batch)

    def fingerprint(self) -> str:
        """See `pybn.population.Subject`. Running statistics play no part."""
        own = {
            f"{name}.{what}" for name in self.names for what in ("running_mean", "running_var", "num_batches_tracked")
        }
        return fingerprint(self._model, own)

    def finish(self, statistics: Mapping[str, Moments]) -> nn.Module:
        """See `pybn.population.Subject`."""
        for name, layer in self._layers.items():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(torch.from_numpy(statistics[name].mean))
            layer.running_var.copy_(torch.from_numpy(statistics[name].var))
        return self._model


def run_module(model: nn.Module, forward: Callable[[Any], Any] | None, batch: Any) -> None:
    """Run a batch, of which a tuple or list begins with the module's input, as those of a data loader do."""
    with torch.no_grad():
        if forward is not None:
            forward(batch)
        else:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def values_of(x: Tensor) -> Array:
    """A tensor's values for the kernels; a view of those on the CPU, in float32 if NumPy has no such type."""
    x = x.detach().cpu()
    array: Array = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return array


def fingerprint(model: nn.Module, without: set[str]) -> str:
    """Of a module's form and state."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        if name not in without and isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
