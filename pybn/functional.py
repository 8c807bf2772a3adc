"""Batch norm on NumPy arrays, with PyTorch's names and semantics.

Batch norm is three steps, and each is a function of its own here::

    statistics (a reduction)  ->  a per-channel affine map  ->  an application of that map

``batch_norm`` is the whole, as ``torch.nn.functional.batch_norm``; ``batch_norm_forward`` and ``batch_norm_backward``
are the whole with what training needs; ``batch_norm_stats``, ``batch_norm_elemt``, ``batch_norm_backward_reduce`` and
``batch_norm_backward_elemt`` are the steps, for those who must merge statistics in between (several processes, virtual
batches).

Formulas: Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and section 3; conventions as in PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pybn import _arrays, _core
from pybn._arrays import Array


@dataclass(eq=False, slots=True)
class Saved:
    """What `batch_norm_forward` keeps for `batch_norm_backward`.

    It holds a reference to ``x`` (or the copy that the kernels needed), so ``x`` must not be changed before the
    backward pass. The residual may be, unless the activation is "silu" or "hardswish": for the others it is not needed
    again, as a mask of one bit per value is kept.

    Attributes
    ----------
    training : bool
    activation : None or str
    negative_slope : float
    channel_axis : int
    """

    training: bool
    activation: str | None
    negative_slope: float
    channel_axis: int
    _normalization: tuple[Array, Array] = field(repr=False)
    _x: Array | None = field(repr=False)
    _weight_dtype: np.dtype[Any] | None = field(repr=False)
    _bias_dtype: np.dtype[Any] | None = field(repr=False)
    _has_residual: bool = field(repr=False)
    _residual: Array | None = field(repr=False)  # None also where a mask, or nothing of it, is needed
    _mask: Array | None = field(repr=False)
    # Values per channel that the statistics are of, where they are more than those of x: see apply().
    _count: float | None = field(default=None, repr=False)

    @property
    def mean(self) -> Array:
        """The mean that was used, (C,) float64: of the batch in training, the running mean in evaluation."""
        mean: Array = self._normalization[0][0]
        return mean

    @property
    def invstd(self) -> Array:
        """``1 / sqrt(var + eps)`` of the variance that was used, (C,) float64."""
        invstd: Array = self._normalization[0][1]
        return invstd


class Gradients(NamedTuple):
    """Gradients of the input (its shape and dtype), the weight and the bias ((C,), their dtypes) and the residual (as
    the input); None where there is none or none was asked for.
    """

    dx: Array | None
    dweight: Array | None
    dbias: Array | None
    dresidual: Array | None


def batch_norm(
    x: npt.ArrayLike,
    running_mean: npt.ArrayLike | None,
    running_var: npt.ArrayLike | None,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
    check_finite: bool = False,
) -> Array:
    """Batch normalization, as `torch.nn.functional.batch_norm`.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` per channel. In training the mean and
    the biased variance are those of the batch, and the running statistics, if given, move towards them (the variance
    unbiased) in place.

    Parameters
    ----------
    x : array of shape (N, C), (N, C, L), (N, C, H, W), ..., float32, float64, float16 or bfloat16
        With ``channel_axis=-1``: (N, ..., C). bfloat16 is that of ml_dtypes. Half types are computed with in float32,
        statistics always in float64, and results are rounded once.
    running_mean, running_var : (C,) arrays or None
        Needed in evaluation. In training both or neither; updated in place.
    weight, bias : (C,) arrays or None
        Independently optional; 1 and 0 if None.
    training : bool
    momentum : float in [0, 1]
        Weight of the new batch: ``running = (1 - momentum) * running + momentum * batch``.
    eps : float > 0
    activation : None, "relu", "relu6", "leaky_relu", "silu" or "hardswish"
        Applied in the same pass over memory; definitions as in `torch.nn.functional`.
    negative_slope : float
        Of "leaky_relu", for values below 0.
    residual : array of x's shape and dtype, optional
        Added before the activation, in the same pass.
    channel_axis : 1 or -1
    out : array of x's shape and dtype, optional
        May be x or residual itself.
    check_finite : bool
        Raise a ValueError if x has NaN or Inf, before anything is written.

    Returns
    -------
    y : array of x's shape and dtype
        `out` if given; otherwise new, with x's memory layout.

    Raises
    ------
    TypeError
        An argument of a type or dtype that cannot be used. Parameters are float32 or float64, whatever the data are.
    ValueError
        A shape, stride or value that cannot be used; in training also one value per channel. Nothing has been written
        then.
    """
    return forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, negative_slope, residual,
        channel_axis, out, check_finite, keeps=False,
    )[0]  # fmt: skip


def batch_norm_forward(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    running_mean: npt.ArrayLike | None = None,
    running_var: npt.ArrayLike | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
    check_finite: bool = False,
) -> tuple[Array, Saved]:
    """`batch_norm`, and what `batch_norm_backward` needs.

    Parameters are those of `batch_norm`. With ``out=x`` the input is gone, so ``saved`` cannot be used for a backward
    pass; nor can it with ``out=residual`` and "silu" or "hardswish".

    Returns
    -------
    y : array of x's shape and dtype
    saved : Saved
    """
    y, saved = forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, negative_slope, residual,
        channel_axis, out, check_finite, keeps=True,
    )  # fmt: skip
    assert saved is not None
    return y, saved


def forward(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Any,
    channel_axis: int,
    out: Any,
    check_finite: bool,
    *,
    keeps: bool,
    counter: Array | None = None,
) -> tuple[Array, Saved | None]:
    """`batch_norm_forward`, or `batch_norm` if nothing is to be kept for a backward pass.

    Raises `counter`, an int64 of shape (), together with the running statistics.
    """
    axis = _core.usual_channel_axis(
        x, channel_axis, training, momentum, eps, weight, bias, running_mean, running_var, residual, out
    )
    is_usual = axis >= 0  # the checks that follow would find nothing, and take longer than a small kernel
    if not is_usual:
        x, axis = _arrays.data("x", x, channel_axis)
        weight, bias = _arrays.affine_parameters(weight, bias, x.shape[axis], axis)
        training = _arrays.flag("training", training)
        running_mean, running_var = _arrays.running_statistics(running_mean, running_var, x, axis, training)
        if training:
            _arrays.require_several_values(x, axis)
        if residual is not None:
            residual = _arrays.like("residual", residual, x)
        if out is not None:
            parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
            out = _arrays.output("out", out, x, {"x": x, "residual": residual, **parameters})
        eps = _arrays.positive("eps", eps)
        momentum = _arrays.factor(momentum)
    act = _arrays.activation(activation, negative_slope)
    if check_finite:
        require_finite(x, axis)

    if is_usual:
        result, source, target = None, x, _core.empty_like(x) if out is None else out
    else:
        result = _arrays.Result(axis, out, x, residual)
        (source, residual), target = result.inputs, result.target
    if x.size:
        normalization, mask = _core.forward(
            source, target, axis, weight, bias, running_mean, running_var, counter, training, momentum, eps, act,
            residual, keeps,
        )  # fmt: skip
    else:
        if training and counter is not None:
            counter += 1  # an empty batch is a batch, as in PyTorch
        mean, var = (running_mean, running_var) if not training else (np.zeros(x.shape[axis]), np.ones(x.shape[axis]))
        normalization, mask = _core.normalization(source, mean, var, weight, bias, eps), None
    y = target if result is None else result.finish()
    if not keeps:
        return y, None
    assert normalization is not None

    needs_residual = residual is not None and activation in _READ_RESIDUAL_AGAIN
    return y, Saved(
        training, activation, act[1], axis, normalization,
        None if _is_overwritten(source, out) else source,
        None if weight is None else weight.dtype, None if bias is None else bias.dtype,
        residual is not None, residual if needs_residual and not _is_overwritten(residual, out) else None, mask,
    )  # fmt: skip


# Their gradient is more than a choice of two slopes, which a mask could tell.
_READ_RESIDUAL_AGAIN = ("silu", "hardswish")


def _is_overwritten(source: Array, out: Array | None) -> bool:
    return out is not None and _core.is_same_memory(source, out)


def require_finite(x: Array, axis: int) -> None:
    """What `check_finite` asks for: an error that names the channels with NaN or Inf."""
    if x.size == 0:
        return
    mean, var, _ = batch_norm_stats(x, channel_axis=axis)
    bad = ~(np.isfinite(mean) & np.isfinite(var))
    if bad.any():  # or finite, with a variance beyond float64
        bad[bad] = ~np.isfinite(np.moveaxis(x, axis, 0)[bad]).reshape(int(bad.sum()), -1).all(axis=1)
    if bad.any():
        channels = ", ".join(map(str, np.flatnonzero(bad)[:8]))
        raise ValueError(
            f"x is not finite in {int(bad.sum())} of {bad.size} channels ({channels}), expected no NaN or Inf, "
            "as check_finite=True asks"
        )


_ALL_WANTED = (True, True, True, True)


def batch_norm_backward(
    dy: Any,
    saved: Saved,
    *,
    out: Array | None = None,
    output_mask: tuple[bool, ...] = _ALL_WANTED,
) -> Gradients:
    """Gradients of `batch_norm_forward`.

    With ``dz`` the gradient passed back through the activation: in training ``dx = (dz - dbias/n - (x - mean) *
    invstd^2 * sum((x - mean) * dz)/n) * invstd * weight``; in evaluation ``dx = dz * invstd * weight``. ``dweight =
    sum((x - mean) * dz) * invstd``, ``dbias = sum(dz)``, ``dresidual = dz``. What the activation needs is recomputed
    from x, or, with a residual, read from a mask.

    Parameters
    ----------
    dy : array of x's shape and dtype
    saved : Saved
        From `batch_norm_forward`.
    out : array of x's shape and dtype, optional
        For dx; may be dy itself.
    output_mask : three or four bools
        Which of dx, dweight, dbias and dresidual are wanted; the others are None.

    Returns
    -------
    Gradients
        dweight, dbias and dresidual are None also where the forward pass had no weight, bias or residual. Without an
        activation dresidual is dy itself, or, if `out` is dy, a copy.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; also if x, or a residual that is needed again, was overwritten by the forward pass.
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved is a {type(saved).__name__}, expected the second result of batch_norm_forward")
    x, residual, axis = saved._x, saved._residual, saved.channel_axis
    if x is None:
        raise ValueError("x was overwritten by a pass with out=x, expected passes with another out, or none")
    needs_residual = saved._has_residual and saved._mask is None and saved.activation is not None
    if needs_residual and residual is None and x.size:
        raise ValueError(
            f'residual was overwritten by a pass with out=residual, and "{saved.activation}" needs it again, '
            "expected passes with another out, or none"
        )
    is_usual = residual is None and _core.has_usual_gradient(dy, x, out)  # see forward()
    if not is_usual:
        dy = _arrays.like("dy", dy, x)
    wants_dx, wants_dweight, wants_dbias, wants_dresidual = _output_mask(output_mask)
    wants_dweight = wants_dweight and saved._weight_dtype is not None
    wants_dbias = wants_dbias and saved._bias_dtype is not None
    wants_dresidual = wants_dresidual and saved._has_residual
    if out is not None:
        if not wants_dx:
            raise ValueError("out is given but output_mask says that dx is not wanted, expected one without the other")
        if not is_usual:
            out = _arrays.output("out", out, x, {"dy": dy, "x": x, "residual": residual})
    act = _arrays.activation(saved.activation, saved.negative_slope)
    normalization = saved._normalization

    dx = dresidual = sums = None
    if wants_dresidual and saved.activation is None:
        dresidual = dy.copy() if out is not None and np.may_share_memory(dy, out) else dy
    wants_dz = wants_dresidual and saved.activation is not None
    if x.size == 0:
        dx = (np.empty_like(x) if out is None else out) if wants_dx else None
        dresidual = np.empty_like(x) if wants_dresidual else None
        sums = np.zeros((2, x.shape[axis]))
    elif wants_dx or wants_dz:
        if is_usual:
            result, target = None, _core.empty_like(x) if out is None else out
        else:
            result = _arrays.Result(axis, out, x, dy, residual)
            (x, dy, residual), target = result.inputs, result.target
        if not is_usual and _is_overwritten(x, out):
            saved._x = None  # before the first byte of it changes
        if residual is not None and _is_overwritten(residual, out):
            saved._residual = None
        dz = _core.empty_like(target) if wants_dz else None
        if saved._count is not None:
            sums = _core.backward_reduce(dy, x, axis, normalization, act, residual, saved._mask)
            of_all = (sums[0], sums[1], saved._count)
            _core.backward_elemt(dy, x, target, dz, axis, normalization, act, residual, saved._mask, of_all)
        elif saved.training or wants_dweight or wants_dbias:
            sums = _core.backward(dy, x, target, dz, axis, normalization, act, residual, saved._mask, saved.training)
        else:
            _core.backward_elemt(dy, x, target, dz, axis, normalization, act, residual, saved._mask, None)
        if wants_dz:
            dresidual = dz
        if wants_dx:
            dx = target if result is None else result.finish()
    elif wants_dweight or wants_dbias:
        x, dy, residual = _arrays.for_kernels(axis, x, dy, residual)
        sums = _core.backward_reduce(dy, x, axis, normalization, act, residual, saved._mask)
    dweight = dbias = None
    if sums is not None:
        if wants_dweight:
            dweight = _core.parameter_gradient(sums[1], saved.invstd, saved._weight_dtype == np.float64)
        if wants_dbias:
            dbias = _core.parameter_gradient(sums[0], None, saved._bias_dtype == np.float64)
    return Gradients(dx, dweight, dbias, dresidual)


def _output_mask(mask: tuple[bool, ...]) -> tuple[bool, bool, bool, bool]:
    if mask is _ALL_WANTED:
        return _ALL_WANTED
    try:
        dx, dweight, dbias, *rest = (bool(wanted) for wanted in mask)
        (dresidual,) = rest or (True,)
    except (TypeError, ValueError):
        raise ValueError(
            f"output_mask is {mask!r}, expected three or four bools: for dx, dweight, dbias and dresidual"
        ) from None
    return dx, dweight, dbias, dresidual


def batch_norm_stats(x: npt.ArrayLike, *, channel_axis: int = 1) -> tuple[Array, Array, int]:
    """Mean and biased variance of every channel, in one pass over x.

    The sums are float64, shifted where the mean may be large, so neither that nor large values cost precision. Their
    order depends on the shape and strides of x only, so the result is the same for any number of threads. Moments of
    several batches merge by Chan's formula (Chan, Golub, LeVeque, 1979).

    Parameters
    ----------
    x : array of at least 2 axes, of a type that `batch_norm` takes
    channel_axis : 1 or -1

    Returns
    -------
    mean, var : (C,) float64 arrays
        NaN where there are no values.
    count : int
        Values per channel.
    """
    x, axis = _arrays.data("x", x, channel_axis)
    channels = x.shape[axis]
    if x.size == 0:
        return np.full(channels, np.nan), np.full(channels, np.nan), 0
    (source,) = _arrays.for_kernels(axis, x)
    mean, var, _ = _core.stats(source, axis)
    return mean, var, source.size // channels


def batch_norm_elemt(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """``activation((x - mean) / sqrt(var + eps) * weight + bias + residual)`` with given statistics: the application
    step.

    Parameters are those of `batch_norm`; ``mean`` and ``var`` (biased) have shape (C,), float32 or float64. Pass the
    float64 statistics of `batch_norm_stats` as they are: a large mean rounded to float32 would cost the precision that
    they have kept.
    """
    return apply(
        x, mean, var, weight, bias, eps, activation, negative_slope, residual, channel_axis, out, training=False
    )[0]


def apply(
    x: Any,
    mean: Any,
    var: Any,
    weight: Any,
    bias: Any,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Any,
    channel_axis: int,
    out: Any,
    *,
    training: bool,
    count: float | None = None,
) -> tuple[Array, Saved]:
    """`batch_norm_elemt`, and what `batch_norm_backward` needs.

    In training the backward pass takes ``mean`` and ``var`` for the statistics of x, or, with a `count`, of that many
    values per channel, those of x among them; otherwise for constants.
    """
    x, axis = _arrays.data("x", x, channel_axis)
    mean, var, weight, bias = _statistics(mean, var, weight, bias, x.shape[axis], axis)
    residual = None if residual is None else _arrays.like("residual", residual, x)
    eps = _arrays.positive("eps", eps)
    act = _arrays.activation(activation, negative_slope)
    if out is not None:
        parameters = {"mean": mean, "var": var, "weight": weight, "bias": bias}
        out = _arrays.output("out", out, x, {"x": x, "residual": residual, **parameters})
    result = _arrays.Result(axis, out, x, residual)
    source, summand = result.inputs
    normalization = _core.normalization(source, mean, var, weight, bias, eps)
    _core.elemt(source, result.target, axis, normalization, act, summand)
    needs_residual = residual is not None and activation is not None  # there is no mask
    saved = Saved(
        training, activation, act[1], axis, normalization,
        None if _is_overwritten(source, out) else source,
        None if weight is None else weight.dtype, None if bias is None else bias.dtype,
        residual is not None, summand if needs_residual and not _is_overwritten(summand, out) else None, None, count,
    )  # fmt: skip
    return result.finish(), saved


def batch_norm_backward_reduce(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    channel_axis: int = 1,
) -> tuple[Array, Array]:
    """``sum(dy)`` and ``sum((x - mean) * dy)`` of every channel: the reduction step of the backward pass.

    Sums of several processes add up; ``dweight = sum_dy_xmu / sqrt(var + eps)`` and ``dbias = sum_dy``. With an
    activation, dy is first passed back through it, which is what var, weight, bias and eps are needed for.

    Returns
    -------
    sum_dy, sum_dy_xmu : (C,) float64 arrays
    """
    x, axis = _arrays.data("x", x, channel_axis)
    dy = _arrays.like("dy", dy, x)
    channels = x.shape[axis]
    mean, var, weight, bias = _statistics(mean, var, weight, bias, channels, axis)
    residual = None if residual is None else _arrays.like("residual", residual, x)
    eps = _arrays.positive("eps", eps)
    act = _arrays.activation(activation, negative_slope)
    if x.size == 0:
        return np.zeros(channels), np.zeros(channels)
    source, gradient, summand = _arrays.for_kernels(axis, x, dy, residual)
    normalization = _core.normalization(source, mean, var, weight, bias, eps)
    sum_dy, sum_dy_xmu = _core.backward_reduce(gradient, source, axis, normalization, act, summand, None)
    return sum_dy, sum_dy_xmu


def batch_norm_backward_elemt(
    dy: npt.ArrayLike,
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    sum_dy: npt.ArrayLike,
    sum_dy_xmu: npt.ArrayLike,
    count: float,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: npt.ArrayLike | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Gradient of the input in training, given the sums of `batch_norm_backward_reduce`: the application step.

    Parameters are those of `batch_norm_backward_reduce`, and

    sum_dy, sum_dy_xmu : (C,) arrays
    count : number > 0
        Values per channel that the sums run over: of this batch, or of all processes together.
    out : array of x's shape and dtype, optional

    Returns
    -------
    dx : array of x's shape and dtype
    """
    x, axis = _arrays.data("x", x, channel_axis)
    dy = _arrays.like("dy", dy, x)
    channels = x.shape[axis]
    mean, var, weight, bias = _statistics(mean, var, weight, bias, channels, axis)
    residual = None if residual is None else _arrays.like("residual", residual, x)
    eps = _arrays.positive("eps", eps)
    act = _arrays.activation(activation, negative_slope)
    sums = (
        np.ascontiguousarray(_arrays.required_per_channel("sum_dy", sum_dy, channels, axis), np.float64),
        np.ascontiguousarray(_arrays.required_per_channel("sum_dy_xmu", sum_dy_xmu, channels, axis), np.float64),
    )
    count = _arrays.positive("count", count)
    if out is not None:
        inputs = {"dy": dy, "x": x, "residual": residual, "mean": mean, "var": var, "weight": weight, "bias": bias}
        out = _arrays.output("out", out, x, {**inputs, "sum_dy": sums[0], "sum_dy_xmu": sums[1]})
    result = _arrays.Result(axis, out, x, dy, residual)
    source, gradient, summand = result.inputs
    normalization = _core.normalization(source, mean, var, weight, bias, eps)
    _core.backward_elemt(gradient, source, result.target, None, axis, normalization, act, summand, None, (*sums, count))
    return result.finish()


def _statistics(
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    channels: int,
    axis: int,
) -> tuple[Array, Array, Array | None, Array | None]:
    return (
        _arrays.required_per_channel("mean", mean, channels, axis),
        _arrays.variance("var", var, channels, axis),
        *_arrays.affine_parameters(weight, bias, channels, axis),
    )
