"""Re-estimation of the batch norms of a torch module; see `pybn.population`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pybn._arrays import Array
from pybn._merge import Moments
from pybn.population import Observe, observer
from pybn.sequence import names_of_steps, population
from pybn.torch.kernels import values_of
from pybn.torch.variants import SequenceBatchNorm


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
        steps = {
            name: names_of_steps(name, layer.max_steps)
            for name, layer in self._layers.items()
            if isinstance(layer, SequenceBatchNorm)
        }
        self.names = [part for name in self._layers for part in steps.get(name, [name])]
        self.optional: Collection[str] = {part for parts in steps.values() for part in parts}

    @contextlib.contextmanager
    def running(self, observe: Observe) -> Iterator[Callable[[Any], None]]:
        """See `pybn.population.Subject`. Batch norms are in training, all else in evaluation."""
        training = {module: module.training for module in self._model.modules()}
        kept = ("track_running_stats", "momentum", "running_mean", "running_var", "num_batches_tracked")
        before = [(layer, {what: getattr(layer, what) for what in kept}) for layer in self._layers.values()]
        hooks = []
        try:
            self._model.eval()
            for name, layer in self._layers.items():
                layer.train()
                if isinstance(layer, SequenceBatchNorm):
                    layer._observer = observer(observe, name, 1)
                    # A step may use an earlier step's statistics: the batch's own, kept apart from the layer's.
                    layer.momentum = 1.0
                    for what in kept[2:]:
                        setattr(layer, what, getattr(layer, what).clone())
                else:
                    hooks.append(layer.register_forward_pre_hook(_observing(observe, name), with_kwargs=True))
                    # Without running statistics a layer uses the batch's own, and has nothing to change.
                    layer.track_running_stats = False
                    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            yield self._run
        finally:
            for hook in hooks:
                hook.remove()
            for layer, values in before:
                for what, value in values.items():
                    setattr(layer, what, value)
                if isinstance(layer, SequenceBatchNorm):
                    del layer._observer
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
        new = {name: _statistics_of(layer, name, statistics) for name, layer in self._layers.items()}
        for name, layer in self._layers.items():
            for what, values in new[name].items():
                getattr(layer, what).copy_(torch.from_numpy(values))
        return self._model


def _statistics_of(layer: _BatchNorm, name: str, statistics: Mapping[str, Moments]) -> dict[str, Array]:
    """What changes in the layer's buffers."""
    if isinstance(layer, SequenceBatchNorm):
        assert layer.num_batches_tracked is not None
        return population(name, statistics, layer.num_batches_tracked.numpy())
    return {"running_mean": statistics[name].mean, "running_var": statistics[name].var}


def _observing(observe: Observe, name: str) -> Callable[[nn.Module, Any, Any], None]:
    return lambda _, inputs, named: observe(name, values_of(inputs[0] if inputs else named["input"]), 1)


def run_module(model: nn.Module, forward: Callable[[Any], Any] | None, batch: Any) -> None:
    """Run a batch, of which a tuple or list begins with the module's input, as those of a data loader do."""
    with torch.no_grad():
        if forward is not None:
            forward(batch)
        else:
            model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def fingerprint(model: nn.Module, without: set[str]) -> str:
    """Of a module's form and state."""
    digest = hashlib.sha256(repr(model).encode())
    for name, value in model.state_dict().items():
        if name not in without and isinstance(value, Tensor):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
