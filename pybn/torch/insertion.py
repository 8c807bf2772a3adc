"""Batch norms put into a torch module that leave what it computes as it was; see `pybn.insertion`."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from pybn import _arrays
from pybn._merge import Moments
from pybn.insertion import require_all
from pybn.population import Observe
from pybn.torch.kernels import values_of
from pybn.torch.population import fingerprint, run_module

BATCH_NORMS: dict[type[nn.Module], type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}


class Linears:
    """The linear layers of a torch module, as a `pybn.population.Subject`."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[Any], Any] | None,
        after: Collection[str] | None,
        eps: float,
    ) -> None:
        self._model, self._forward, self._eps = model, forward, _arrays.positive("eps", eps)
        self.left: dict[str, str] = {}
        self._layers: dict[str, nn.Module] = {}
        # Which module comes next is known of a Sequential only; elsewhere a batch norm twice over does no harm.
        followed = {
            id(first)
            for module in model.modules()
            if isinstance(module, nn.Sequential)
            for first, second in pairwise(module)
            if isinstance(second, nn.modules.batchnorm._BatchNorm)
        }
        for name, module in model.named_modules():
            if type(module) not in BATCH_NORMS or (after is not None and name not in after):
                continue
            if not name:
                self.left[name] = "it is the whole model, in which it cannot be replaced"
            elif id(module) in followed:
                self.left[name] = "it has a batch norm already"
            else:
                self._layers[name] = module
        require_all(after, self._layers, self.left)
        self.names = list(self._layers)
        self.optional: Collection[str] = ()

    @contextlib.contextmanager
    def running(self, observe: Observe) -> Iterator[Callable[[Any], None]]:
        """See `pybn.population.Subject`. All modules are in evaluation."""
        training = {module: module.training for module in self._model.modules()}
        hooks = [
            layer.register_forward_hook(
                lambda module, _, y, name=name: observe(name, values_of(_by_channel(module, name, y)), 1)
            )
            for name, layer in self._layers.items()
        ]
        try:
            self._model.eval()
            yield lambda batch: run_module(self._model, self._forward, batch)
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in training.items():
                module.training = mode

    def fingerprint(self) -> str:
        """See `pybn.population.Subject`."""
        return fingerprint(self._model, set())

    def finish(self, statistics: Mapping[str, Moments]) -> nn.Module:
        """Put the batch norms behind the layers, in place. They are in evaluation if the layer was."""
        for name, layer in self._layers.items():
            parameter = next(layer.parameters())
            found = statistics[name]
            batch_norm = BATCH_NORMS[type(layer)](
                len(found.mean), self._eps, device=parameter.device, dtype=parameter.dtype
            )
            assert batch_norm.running_mean is not None
            assert batch_norm.running_var is not None
            with torch.no_grad():
                batch_norm.running_mean.copy_(torch.from_numpy(found.mean))
                batch_norm.running_var.copy_(torch.from_numpy(found.var))
                # Of the rounded variance, so that only one rounding keeps the map from being the identity.
                var = batch_norm.running_var.double().cpu().numpy()
                batch_norm.weight.copy_(torch.from_numpy(np.sqrt(var + self._eps)))
                batch_norm.bias.copy_(batch_norm.running_mean)
            batch_norm.train(layer.training)
            parent, _, child = name.rpartition(".")
            both = nn.Sequential(OrderedDict(linear=layer, batch_norm=batch_norm))
            both.training = layer.training
            setattr(self._model.get_submodule(parent), child, both)
        return self._model


def _by_channel(module: nn.Module, name: str, y: torch.Tensor) -> torch.Tensor:
    if isinstance(module, nn.Linear) and y.ndim != 2:
        raise ValueError(
            f"layer {name!r} is linear and gives {y.ndim} axes, of which the last are channels, expected 2; "
            "name in `after` the layers to have a batch norm"
        )
    return y
