"""Batch norm layers for NumPy, with the parameters, buffers and semantics of ``torch.nn``."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pybn import _arrays
from pybn._arrays import Array
from pybn.functional import Gradients, batch_norm_backward, forward

Observer = Callable[[Array, "int | None"], None]  # what arrives at a layer, and at which step if it is of a sequence

NO_CALL_BEFORE = "backward needs a forward call before it, and each forward call serves one backward pass"

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self


class _BatchNorm:
    """Batch normalization over the channel axis of its input.

    In training the input is normalized with its own statistics, and the running statistics move towards them; in
    evaluation the running statistics are used (with ``track_running_stats=False`` always the input's own).

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    eps : float
    momentum : float in [0, 1] or None
        Weight of the new batch in the running statistics; None keeps the average of all batches seen.
    affine : bool
        Whether there are a weight (initially 1) and a bias (initially 0).
    track_running_stats : bool
        Whether there are running statistics (initially mean 0, variance 1).
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
        Applied to the output in the same pass over memory.
    negative_slope : float
        Of "leaky_relu".
    channel_axis : 1 or -1
    dtype : float32 or float64
        Of parameters and running statistics; the data may be of any type that `pybn.batch_norm` takes.
    check_finite : bool
        Raise a ValueError if an input has NaN or Inf, before anything changes.

    Attributes
    ----------
    weight, bias : (C,) arrays or None
    running_mean, running_var : (C,) arrays or None
    num_batches_tracked : int64 array of shape (), or None
    weight_grad, bias_grad : (C,) arrays or None
        Gradients, accumulated by `backward` until `zero_grad`.
    training : bool
    frozen : bool
        Whether evaluation statistics are used in training, too; see `freeze`.

    Notes
    -----
    Calls in evaluation may run in several threads at once; calls in training wait for one another. `backward` belongs
    to the last call.
    """

    _input_ranks: tuple[int, ...] = (2, 3, 4, 5)
    _initial_weight = 1.0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        channel_axis: int = 1,
        dtype: npt.DTypeLike = np.float32,
        check_finite: bool = False,
    ) -> None:
        num_features = _arrays.at_least_one("num_features", num_features)
        if not isinstance(channel_axis, int) or channel_axis not in (1, -1):
            raise ValueError(f"channel_axis is {channel_axis!r}, expected 1 (NCHW) or -1 (NHWC)")
        dtype = _dtype(dtype)
        _, slope = _arrays.activation(activation, negative_slope)
        self.num_features = num_features
        self.eps = _arrays.positive("eps", eps)
        self.momentum = None if momentum is None else _arrays.factor(momentum)
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.activation = activation
        self.negative_slope = slope
        self.channel_axis = channel_axis
        self.check_finite = bool(check_finite)
        self.training = True
        self.frozen = False

        self.weight: Array | None = np.full(num_features, self._initial_weight, dtype) if affine else None
        self.bias: Array | None = np.zeros(num_features, dtype) if affine else None
        self.running_mean: Array | None = np.zeros(num_features, dtype) if track_running_stats else None
        self.running_var: Array | None = np.ones(num_features, dtype) if track_running_stats else None
        self.num_batches_tracked: Array | None = np.zeros((), np.int64) if track_running_stats else None
        self.weight_grad: Array | None = None
        self.bias_grad: Array | None = None
        self._saved: Any = None  # what `_gradients` needs of the last call
        self._observer: Observer | None = None  # told of inputs while statistics are re-estimated
        self._lock = threading.RLock()  # reentrant: a signal handler may call the layer that it interrupts
        _layers.add(self)

    def __call__(self, x: npt.ArrayLike, *, residual: npt.ArrayLike | None = None, out: Array | None = None) -> Array:
        """Normalize `x`, add `residual`, apply the activation; see `pybn.batch_norm` for shapes, types and errors."""
        x = _arrays.as_data_array("x", x)
        self._check_shape(x.shape)
        if self._observer is not None:
            self._observer(x, None)
        if not self.training or self.frozen:
            return self._evaluate(x, residual, out)
        with self._lock:
            return self._train(x, residual, out)

    forward = __call__

    def _train(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        """Normalize with the statistics of the batch, towards which the running statistics move."""
        return self._forward(x, residual, out, self._weight_of_new_batch(), self.num_batches_tracked, training=True)

    def _evaluate(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        """Normalize with the running statistics, if there are any."""
        return self._forward(x, residual, out, momentum=0.0, counter=None, training=not self.track_running_stats)

    def _weight_of_new_batch(self) -> float:
        """In the running statistics."""
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.num_batches_tracked is None else 1 / (int(self.num_batches_tracked) + 1)

    def _forward(
        self,
        x: Array,
        residual: npt.ArrayLike | None,
        out: Array | None,
        momentum: float,
        counter: Array | None,
        *,
        training: bool,
    ) -> Array:
        y, self._saved = forward(
            x, self.weight, self.bias, self.running_mean, self.running_var, training, momentum, self.eps,
            self.activation, self.negative_slope, residual, self.channel_axis, out, self.check_finite, keeps=True,
            counter=counter,
        )  # fmt: skip
        return y

    def backward(self, dy: npt.ArrayLike, *, out: Array | None = None) -> Array | tuple[Array, Array]:
        """Gradient of the last call's input, and of its residual if it had one; adds those of weight and bias to
        `weight_grad` and `bias_grad`.

        Returns
        -------
        dx, or (dx, dresidual)

        Raises
        ------
        RuntimeError
            If there was no call since the last backward pass.
        """
        if self._saved is None:
            raise RuntimeError(NO_CALL_BEFORE)
        gradients = self._gradients(dy, self._saved, out)
        self._saved = None  # frees x
        return self._accumulate(gradients)

    def _gradients(self, dy: npt.ArrayLike, saved: Any, out: Array | None) -> Gradients:
        return batch_norm_backward(dy, saved, out=out)

    def _accumulate(self, gradients: Gradients) -> Array | tuple[Array, Array]:
        """Add the gradients of the parameters to those that there are; return the others."""
        dx, dweight, dbias, dresidual = gradients
        if dweight is not None and self.weight is not None:
            dweight = dweight.astype(self.weight.dtype, copy=False)
            self.weight_grad = dweight if self.weight_grad is None else self.weight_grad + dweight
        if dbias is not None and self.bias is not None:
            dbias = dbias.astype(self.bias.dtype, copy=False)
            self.bias_grad = dbias if self.bias_grad is None else self.bias_grad + dbias
        assert dx is not None
        return dx if dresidual is None else (dx, dresidual)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.weight_grad = self.bias_grad = None

    def train(self, mode: bool = True) -> _BatchNorm:
        """Switch to training (or, with False, to evaluation). Returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> _BatchNorm:
        """Switch to evaluation. Returns the layer."""
        return self.train(False)

    def freeze(self, mode: bool = True) -> _BatchNorm:
        """Use the running statistics in training, too, and leave them as they are; with False, no longer.

        For fine-tuning on few or small batches. The gradients of weight and bias are still computed; to freeze those,
        too, leave them out of the optimizer. `train` and `eval` do not change it. Returns the layer.

        Raises
        ------
        ValueError
            If the layer has no running statistics.
        """
        if mode and not self.track_running_stats:
            raise ValueError("track_running_stats is False, expected True: without running statistics none can freeze")
        self.frozen = bool(mode)
        return self

    def unfreeze(self) -> _BatchNorm:
        """The same as ``freeze(False)``. Returns the layer."""
        return self.freeze(False)

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0, variance 1, no batches."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean[...] = 0
            self.running_var[...] = 1
            self.num_batches_tracked[...] = 0

    def reset_parameters(self) -> None:
        """Set weight and bias to what they are in a new layer, and reset the running statistics."""
        self.reset_running_stats()
        if self.weight is not None:
            self.weight[...] = self._initial_weight
        if self.bias is not None:
            self.bias[...] = 0

    def state_dict(self) -> dict[str, Array]:
        """Copies of parameters and running statistics, under the names and with the shapes of PyTorch's layer."""
        with self._lock:
            return {name: value.copy() for name, value in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Take parameters and running statistics from `state`: arrays or torch tensors, as `state_dict` gives them.

        Values are converted to the layer's dtype. With ``strict=False`` missing and unknown names are passed over.

        Raises
        ------
        KeyError
            A missing or unknown name.
        ValueError
            A value of another shape, or a negative variance. The layer is unchanged after any error.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is a {type(state).__name__}, expected a mapping from names to arrays")
        own = self._state()
        missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
        missing -= {"num_batches_tracked"}  # absent from old checkpoints, as PyTorch allows
        if strict and (missing or unknown):
            raise KeyError(
                f"state has the names {sorted(state)}, expected {list(own)}: names without the prefix that a whole "
                "network's state dict gives them"
            )
        values = {name: _state_value(name, state[name], own[name]) for name in own if name in state}
        with self._lock:
            for name, value in values.items():
                own[name][...] = value

    @classmethod
    def from_torch(cls, module: torch.nn.modules.batchnorm._BatchNorm, **options: Any) -> Self:
        """A layer with copies of the parameters and running statistics of a torch layer, and all of its settings.

        Parameters
        ----------
        module : torch.nn.BatchNorm1d, 2d or 3d, as this class is
            Or pybn.torch's, whose activation comes along, or a SyncBatchNorm of either.
        **options
            Further arguments of this class, such as ``channel_axis``.

        Returns
        -------
        layer
            Of float64 if the module is, otherwise of float32, which holds half types exactly.

        Raises
        ------
        TypeError, ValueError
            Another kind of module, or one in a state that no layer can have.
        """
        from pybn.interchange import from_torch

        return from_torch(cls, module, options)

    def to_torch(self) -> torch.nn.modules.batchnorm._BatchNorm:
        """A torch layer with copies of this one's parameters and running statistics, and its settings.

        `torch.nn.BatchNorm2d` for `BatchNorm2d`, or, with an activation, `pybn.torch.BatchNorm2d`. ``check_finite`` has
        no counterpart; ``channel_axis=-1`` is a ValueError.
        """
        from pybn.interchange import to_torch

        return to_torch(self)

    def _state(self) -> dict[str, Array]:
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if len(shape) not in self._input_ranks:
            ranks = " or ".join(map(str, self._input_ranks))
            raise ValueError(
                f"x has shape {_arrays.shape_text(shape)}, expected {ranks} axes for {type(self).__name__}"
            )
        if shape[self.channel_axis] != self.num_features:
            raise ValueError(
                f"x has shape {_arrays.shape_text(shape)}, expected {self.num_features} channels (num_features) "
                f"on axis {self.channel_axis}"
            )

    def __repr__(self) -> str:
        arguments = self._arguments()
        if self.activation is not None:
            arguments.append(f"activation={self.activation!r}")
        if self.activation == "leaky_relu":
            arguments.append(f"negative_slope={self.negative_slope}")
        if self.channel_axis != 1:
            arguments.append(f"channel_axis={self.channel_axis}")
        return f"{type(self).__name__}({', '.join(arguments)})"

    def _arguments(self) -> list[str]:
        """What `__repr__` shows before the activation."""
        return [
            f"{self.num_features}",
            f"eps={self.eps}",
            f"momentum={self.momentum}",
            f"affine={self.affine}",
            f"track_running_stats={self.track_running_stats}",
        ]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: all but the lock and what is saved for a backward pass."""
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_saved")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _saved=None, _lock=threading.RLock())
        _layers.add(self)


def _dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    try:
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found not in (np.float32, np.float64):
        raise TypeError(f"dtype is {repr(dtype) if found is None else found}, expected float32 or float64")
    return found


def _state_value(name: str, value: Any, own: Array) -> Array:
    """A copy of `value` in the dtype of `own`, checked."""
    array = _arrays.as_plain_array(name, value)
    if array.shape != own.shape:
        raise ValueError(
            f"{name} has shape {_arrays.shape_text(array.shape)}, expected {_arrays.shape_text(own.shape)}"
        )
    if not np.can_cast(array.dtype, own.dtype, "same_kind"):
        raise TypeError(f"{name} has dtype {array.dtype}, expected {own.dtype}")
    if name.endswith(("_var", "_tracked", "_count")) and (array < 0).any():
        raise ValueError(f"{name} has the negative value {array.min()}, expected values >= 0")
    with np.errstate(over="ignore"):
        converted = array.astype(own.dtype)
    if (np.isfinite(array) & ~np.isfinite(converted)).any():
        raise ValueError(f"{name} has values that overflow {own.dtype}, the layer's dtype")
    return converted


# Locks are copied into a forked child as they are, held or not, and nobody there would release them.
_layers: weakref.WeakSet[_BatchNorm] = weakref.WeakSet()


def _renew_locks() -> None:
    for layer in _layers:
        layer._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class BatchNorm1d(_BatchNorm):
    """Input has shape (N, C) or (N, C, L); with ``channel_axis=-1`` (N, C) or (N, L, C)."""

    __doc__ = f"{_BatchNorm.__doc__}\n    {__doc__}\n    "
    _input_ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Input has shape (N, C, H, W); with ``channel_axis=-1`` (N, H, W, C)."""

    __doc__ = f"{_BatchNorm.__doc__}\n    {__doc__}\n    "
    _input_ranks = (4,)


class BatchNorm3d(_BatchNorm):
    """Input has shape (N, C, D, H, W); with ``channel_axis=-1`` (N, D, H, W, C)."""

    __doc__ = f"{_BatchNorm.__doc__}\n    {__doc__}\n    "
    _input_ranks = (5,)
