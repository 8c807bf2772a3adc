"""Virtual batch norm: the statistics of a fixed reference batch and of the example itself.

Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for Training GANs", 2016, section 3.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn import _arrays
from pybn._arrays import Array
from pybn.functional import (
    Gradients,
    Saved,
    apply,
    batch_norm_backward,
    batch_norm_elemt,
    batch_norm_stats,
    forward,
    require_finite,
)
from pybn.layers import _BatchNorm


@dataclass(eq=False)
class _Reference:
    """The reference batch's last pass, and the gradients of its statistics by the examples normalized since."""

    saved: Saved
    var: Array
    count: int
    mean_grad: Array
    var_grad: Array


@dataclass(eq=False)
class Union:
    """What the backward pass of examples needs that were normalized with the reference batch; arrays are (N, C)."""

    saved: Saved
    own: float  # the part that an example's own values have in the statistics it is normalized with
    offset: Array  # its mean, seen from the reference's

    def reference_gradients(self, weight: Array | None, by_std: Array, sum_dy: Array) -> tuple[Array, Array]:
        """Gradients (C,) of the reference's mean and variance, from those of each example's weight and bias (N, C)."""
        invstd = self.saved.invstd.reshape(by_std.shape)
        scale = invstd if weight is None else weight.astype(np.float64) * invstd
        var_grad = -0.5 * scale * invstd * by_std
        mean_grad = -(scale * sum_dy) - 2 * self.own * self.offset * var_grad
        return (1 - self.own) * mean_grad.sum(axis=0), (1 - self.own) * var_grad.sum(axis=0)


def normalize(
    planes: Array,
    examples: int,
    reference: tuple[Array, Array, int],
    weight: Array | None,
    bias: Array | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Array | None,
    out: Array | None,
) -> tuple[Array, Union]:
    """Every example with the moments of its union with the reference batch (mean, variance, values per channel).

    planes, residual and out have shape (1, N * C, values).
    """
    reference_mean, reference_var, reference_count = reference
    channels = len(reference_mean)
    if planes.size:
        mean, var, count = batch_norm_stats(planes)
    else:
        mean, var, count = np.zeros(examples * channels), np.zeros(examples * channels), 1
    own = count / (reference_count + count)
    offset = mean.reshape(examples, channels) - reference_mean  # and now Chan's formula
    mean = reference_mean + own * offset
    var = (1 - own) * (reference_var + own * offset**2) + own * var.reshape(examples, channels)
    scale = np.ones(channels) if weight is None else weight.astype(np.float64)
    shift = np.zeros(channels) if bias is None else bias.astype(np.float64)
    y, saved = apply(
        planes, mean.ravel(), var.ravel(), np.tile(scale, examples), np.tile(shift, examples), eps, activation,
        negative_slope, residual, 1, out, training=True, count=reference_count + count,
    )  # fmt: skip
    return y, Union(saved, own, offset)


@dataclass(eq=False)
class _Examples:
    """What the backward pass of some examples needs, and the reference batch whose gradients it adds to."""

    union: Union
    shape: tuple[int, ...]
    reference: _Reference | None


class VirtualBatchNorm(_BatchNorm):
    """Batch normalization of every example with the statistics of a reference batch and of the example itself.

    An example is normalized, channel by channel, with the mean and variance of the union of the reference batch's
    values and its own, so that its output does not depend on the other examples beside it: it is the same, bit by
    bit, whatever they are and however many. The reference batch is normalized with its own statistics only.

    For generators of images (in which examples of one batch otherwise resemble each other), and wherever an output
    must not depend on what else was asked for at the same time. It costs another pass, of the reference batch.

    In a network the reference batch goes through all layers before each batch does, because what it is at a layer
    depends on the weights before that::

        hidden_reference = layer.reference_forward(reference)
        hidden = layer(x)
        dx = layer.backward(dhidden)
        dreference = layer.reference_backward(dhidden_reference)  # or not at all, to take its statistics as constants

    There are no running statistics: training and evaluation are alike, and use the statistics of the last reference
    batch, which are in the state dict (float64, with their count).

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    eps, affine, activation, negative_slope, channel_axis, dtype, check_finite
        As in `BatchNorm2d`.

    Attributes
    ----------
    reference_mean, reference_var : (C,) float64 arrays
        Of the last reference batch; the variance is biased.
    reference_count : int64 array of shape ()
        Its values per channel; 0 if there was none.

    Notes
    -----
    Input has shape (N, C) to (N, C, D, H, W), or with ``channel_axis=-1`` (N, ..., C), which is copied.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        channel_axis: int = 1,
        dtype: npt.DTypeLike = np.float32,
        check_finite: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, None, affine, track_running_stats=False, activation=activation,
            negative_slope=negative_slope, channel_axis=channel_axis, dtype=dtype, check_finite=check_finite,
        )  # fmt: skip
        self.reference_mean: Array = np.zeros(self.num_features)
        self.reference_var: Array = np.ones(self.num_features)
        self.reference_count: Array = np.zeros((), np.int64)
        self._reference: _Reference | None = None

    def reference_forward(
        self, x: npt.ArrayLike, *, residual: npt.ArrayLike | None = None, out: Array | None = None
    ) -> Array:
        """Make x the reference batch, and normalize it with its own statistics.

        Parameters, errors and the result are those of a call of the layer; x has more than one value per channel.
        """
        x = _arrays.as_data_array("x", x)
        self._check_shape(x.shape)
        x, axis = _arrays.data("x", x, self.channel_axis)
        if x.size == 0:
            raise ValueError(f"x has shape {_arrays.shape_text(x.shape)}, expected a reference batch with values")
        # With a momentum of 1 the running statistics are those of the batch, the variance unbiased.
        mean, var = np.zeros(self.num_features), np.zeros(self.num_features)
        with self._lock:
            y, saved = forward(
                x, self.weight, self.bias, mean, var, True, 1.0, self.eps, self.activation, self.negative_slope,
                residual, axis, out, self.check_finite, keeps=True,
            )  # fmt: skip
            assert saved is not None
            count = x.size // self.num_features
            var *= (count - 1) / count
            self._reference = _Reference(saved, var, count, np.zeros_like(mean), np.zeros_like(var))
            self.reference_mean[...], self.reference_var[...], self.reference_count[...] = mean, var, count
        return y

    def reference_backward(self, dy: npt.ArrayLike, *, out: Array | None = None) -> Array | tuple[Array, Array]:
        """Gradient of the reference batch: through its own output, of which `dy` is the gradient, and through the
        statistics that it lent to the examples whose backward pass there was since.

        Results, parameters' gradients and errors are those of `backward`.
        """
        reference = self._reference
        if reference is None:
            raise RuntimeError("reference_backward needs a reference_forward before it, and each serves one")
        gradients = batch_norm_backward(dy, reference.saved, out=out)
        self._reference = None
        dx, x = gradients.dx, reference.saved._x
        assert dx is not None
        assert x is not None
        # dx += mean_grad / n + var_grad * 2 (x - mean) / n
        batch_norm_elemt(
            x, reference.saved.mean, reference.var,
            2 / reference.count * reference.var_grad * np.sqrt(reference.var + self.eps),
            reference.mean_grad / reference.count, self.eps, residual=dx, channel_axis=reference.saved.channel_axis,
            out=dx,
        )  # fmt: skip
        return self._accumulate(gradients)

    def _train(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        return self._evaluate(x, residual, out)

    def _evaluate(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        if self.reference_count == 0:
            raise RuntimeError("there is no reference batch yet, expected a call of reference_forward before")
        x, axis = _arrays.data("x", x, self.channel_axis)
        residual = None if residual is None else _arrays.like("residual", residual, x)
        if out is not None:
            out = _arrays.output("out", out, x, {"x": x, "residual": residual})
        if self.check_finite:
            require_finite(x, axis)
        planes = planes_of(x, axis)
        target = None if out is None else planes_of(out, axis)
        reference = (self.reference_mean, self.reference_var, int(self.reference_count))
        y, union = normalize(
            planes, len(x), reference, self.weight, self.bias, self.eps, self.activation, self.negative_slope,
            None if residual is None else planes_of(residual, axis),
            target if out is not None and np.may_share_memory(target, out) else None,
        )  # fmt: skip
        self._saved = _Examples(union, x.shape, self._reference)
        return _from_planes(y, x.shape, axis, out)

    def _gradients(self, dy: npt.ArrayLike, saved: Any, out: Array | None) -> Gradients:
        dy = _arrays.as_data_array("dy", dy)
        if dy.shape != saved.shape:
            raise ValueError(
                f"dy has shape {_arrays.shape_text(dy.shape)}, expected {_arrays.shape_text(saved.shape)}, that of x"
            )
        if out is not None:
            out = _arrays.output("out", out, dy, {"dy": dy})
        examples, axis = len(dy), 1 if self.channel_axis == 1 else dy.ndim - 1
        dx, by_std, sum_dy, dresidual = batch_norm_backward(planes_of(dy, axis), saved.union.saved)
        assert dx is not None
        assert by_std is not None
        assert sum_dy is not None
        by_std, sum_dy = by_std.reshape(examples, self.num_features), sum_dy.reshape(examples, self.num_features)
        if saved.reference is not None:
            mean_grad, var_grad = saved.union.reference_gradients(self.weight, by_std, sum_dy)
            saved.reference.mean_grad += mean_grad
            saved.reference.var_grad += var_grad
        return Gradients(
            _from_planes(dx, dy.shape, axis, out),
            by_std.sum(axis=0),
            sum_dy.sum(axis=0),
            None if dresidual is None else _from_planes(dresidual, dy.shape, axis, None),
        )

    def reset_running_stats(self) -> None:
        """Forget the reference batch."""
        self._reference = None
        self.reference_mean[...], self.reference_var[...], self.reference_count[...] = 0, 1, 0

    def _state(self) -> dict[str, Array]:
        return {
            **super()._state(),
            "reference_mean": self.reference_mean,
            "reference_var": self.reference_var,
            "reference_count": self.reference_count,
        }

    def _arguments(self) -> list[str]:
        channels, eps, _, affine, _ = super()._arguments()
        return [channels, eps, affine]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_reference"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_reference": None})


def planes_of(x: Array, axis: int) -> Array:
    """Values as (1, N * C, values): every example and channel a channel of its own; a view if x is contiguous so."""
    # Always contiguous, because the order of sums depends on the layout, which must not depend on N.
    planes = np.ascontiguousarray(np.moveaxis(x, axis, 1))
    return planes.reshape(1, planes.shape[0] * planes.shape[1], math.prod(planes.shape[2:]))


def _from_planes(planes: Array, shape: tuple[int, ...], axis: int, out: Array | None) -> Array:
    """The opposite: in `out` if there is one, into which it is copied unless it is there."""
    first = (shape[0], shape[axis], *shape[1:axis], *shape[axis + 1 :])
    result = np.moveaxis(planes.reshape(first), 1, axis)
    if out is None:
        return result
    if not np.may_share_memory(result, out):
        out[...] = result
    return out
