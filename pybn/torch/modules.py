"""torch's batch norm layers, with the activation and the residual sum that follow them in the same pass."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy

from pybn import _arrays
from pybn.torch.functional import normalize

_Layer = TypeVar("_Layer", bound="_BatchNorm")

# Running mean and variance, the number of batches they have seen, whether the statistics are those of the batch, and
# the weight of these in the running ones: a float, or a tensor if it is to be part of a graph.
Statistics = tuple[Tensor | None, Tensor | None, Tensor | None, bool, Any]


def state_of(layer: torch.nn.modules.batchnorm._BatchNorm) -> tuple[Tensor | None, Tensor | None, Statistics]:
    """Weight, bias, and what a call does with which statistics, as in torch's layers."""
    try:  # attributes of modules take 0.3 us each, these dictionaries 0.03 us
        parameters, buffers = layer._parameters, layer._buffers
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # computed by a parametrization, or replaced by plain tensors
        weight, bias = layer.weight, layer.bias
        mean, var, counter = layer.running_mean, layer.running_var, layer.num_batches_tracked
    training = layer.training
    momentum: Any = layer.momentum
    if not training:
        counter = None
        training = mean is None and var is None
    elif not layer.track_running_stats:
        mean = var = counter = None
    if momentum is None:  # the average of all batches
        momentum = 0.0 if counter is None else 1 / ((counter.double() if is_compiling() else float(counter)) + 1)
    return weight, bias, (mean, var, counter, training, momentum)


class Activated(torch.nn.modules.batchnorm._BatchNorm):
    """torch's batch norm layer with the settings of an activation; what all layers here have in common."""

    activation: str | None
    negative_slope: float

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        **options: Any,
    ) -> None:
        _arrays.activation(activation, negative_slope)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = activation
        self.negative_slope = negative_slope

    def extra_repr(self) -> str:
        """As torch's, and the activation if there is one."""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"activation": None, "negative_slope": 0.01, **state})  # type: ignore[no-untyped-call]


class _BatchNorm(Activated):
    """Batch normalization as torch's own layer of this name, and in the same pass a residual sum and an activation.

    It is a subclass of torch's layer, with the same parameters, buffers and state dict.

    Parameters
    ----------
    num_features : int
    eps : float
    momentum : float or None
    affine : bool
    track_running_stats : bool
    device, dtype
        All as for torch's layer.
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
    negative_slope : float
        Of "leaky_relu".
    options
        Further keyword arguments that torch's layer takes.

    Notes
    -----
    ``layer(input, residual)`` is ``activation(batch_norm(input) + residual)``; see `pybn.torch.batch_norm` for types,
    errors, and what is left to torch.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shapes as in `pybn.torch.batch_norm`; the residual has the input's."""
        if isinstance(input, Proxy):  # torch.fx knows torch's own layers as leaves by their module's name
            return _traced_as_leaf(self, input, residual)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        weight, bias, (mean, var, counter, training, momentum) = state_of(self)
        return normalize(
            input, mean, var, counter, weight, bias, training, momentum, self.eps, self.activation,
            self.negative_slope, residual,
        )  # fmt: skip

    @classmethod
    def from_torch(
        cls: type[_Layer],
        module: torch.nn.modules.batchnorm._BatchNorm,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> _Layer:
        """A layer that shares the parameters and buffers of one of torch's, and has its settings and hooks.

        Raises
        ------
        TypeError
            If `module` is no batch norm.
        ValueError
            If there is no such activation.
        """
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise TypeError(f"module is a {type(module).__name__}, expected a batch norm layer of torch.nn")
        _arrays.activation(activation, negative_slope)
        layer = cls.__new__(cls)
        state = dict(module.__dict__)
        for name, value in state.items():
            if isinstance(value, (dict, set)):  # parameters, buffers, hooks: containers of its own, contents shared
                state[name] = value.copy()
        layer.__dict__.update(state, activation=activation, negative_slope=negative_slope)
        return layer


def _traced_as_leaf(layer: _BatchNorm, input: Proxy, residual: Any) -> Any:
    tracer: Any = input.tracer
    args = (input,) if residual is None else (input, residual)
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), args, {})


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Input has shape (N, C) or (N, C, L)."""

    __doc__ = f"{_BatchNorm.__doc__}\n    {__doc__}\n    "


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """Input has shape (N, C, H, W)."""

    __doc__ = f"{_BatchNorm.__doc__}\n    {__doc__}\n    "


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Input has shape (N, C, D, H, W)."""

    __doc__ = f"{_BatchNorm.__doc__}\n    {__doc__}\n    "
