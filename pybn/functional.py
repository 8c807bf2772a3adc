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

_Normalization = tuple[
    Array, Array, Array
]  # mean (C,), invstd (C,), affine (4, C): what the core calls a normalization


@dataclass(eq=False, slots=True)
class Saved:
    """What `batch_norm_forward` keeps for `batch_norm_backward`.

    It holds a reference to ``x`` (or the copy that the kernels needed), so ``x`` must not be changed before the
    backward pass.

    Attributes
    ----------
    mean, invstd : (C,) float64 arrays
        The statistics that were used: of the batch in training, running in evaluation; invstd is ``1 / sqrt(var +
        eps)``.
    training : bool
    activation : None or "relu"
    channel_axis : int
    """

    mean: Array
    invstd: Array
    training: bool
    activation: str | None
    channel_axis: int
    _x: Array | None = field(repr=False)
    _affine: Array = field(repr=False)
    _weight_dtype: np.dtype[Any] | None = field(repr=False)
    _bias_dtype: np.dtype[Any] | None = field(repr=False)


class Gradients(NamedTuple):
    """Gradients of the input (its shape and dtype), the weight and the bias ((C,), their dtypes); None where there is
    none or none was asked for.
    """

    dx: Array | None
    dweight: Array | None
    dbias: Array | None


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
    channel_axis: int = 1,
    out: Array | None = None,
    check_finite: bool = False,
) -> Array:
    """Batch normalization, as `torch.nn.functional.batch_norm`.

    ``y = activation((x - mean) / sqrt(var + eps) * weight + bias)`` per channel. In training the mean and the biased
    variance are those of the batch, and the running statistics, if given, move towards them (the variance unbiased) in
    place.

    Parameters
    ----------
    x : array of shape (N, C), (N, C, L), (N, C, H, W), ..., float32 or float64
        With ``channel_axis=-1``: (N, ..., C).
    running_mean, running_var : (C,) arrays or None
        Needed in evaluation. In training both or neither; updated in place.
    weight, bias : (C,) arrays or None
        Independently optional; 1 and 0 if None.
    training : bool
    momentum : float in [0, 1]
        Weight of the new batch: ``running = (1 - momentum) * running + momentum * batch``.
    eps : float > 0
    activation : None or "relu"
        Applied in the same pass over memory.
    channel_axis : 1 or -1
    out : array of x's shape and dtype, optional
        May be x itself.
    check_finite : bool
        Raise a ValueError if x has NaN or Inf, before anything is written.

    Returns
    -------
    y : array of x's shape and dtype
        `out` if given; otherwise new, with x's memory layout.

    Raises
    ------
    TypeError
        An argument of a type or dtype that cannot be used. Data are float32 or float64; parameters are either, whatever
        the data are.
    ValueError
        A shape, stride or value that cannot be used; in training also one value per channel. Nothing has been written
        then.
    """
    return forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, channel_axis, out, check_finite
    )[0]


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
    channel_axis: int = 1,
    out: Array | None = None,
    check_finite: bool = False,
) -> tuple[Array, Saved]:
    """`batch_norm`, and what `batch_norm_backward` needs.

    Parameters are those of `batch_norm`. With ``out=x`` the input is gone, so ``saved`` cannot be used for a backward
    pass.

    Returns
    -------
    y : array of x's shape and dtype
    saved : Saved
    """
    return forward(
        x, weight, bias, running_mean, running_var, training, momentum, eps, activation, channel_axis, out, check_finite
    )


def forward(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None,
    running_mean: npt.ArrayLike | None,
    running_var: npt.ArrayLike | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    channel_axis: int,
    out: Array | None,
    check_finite: bool,
    counter: Array | None = None,
) -> tuple[Array, Saved]:
    """`batch_norm_forward` with positional arguments; raises `counter`, an int64 of shape (), with the statistics."""
    x, axis = _arrays.data("x", x, channel_axis)
    channels = x.shape[axis]
    weight = _arrays.per_channel("weight", weight, channels, axis)
    bias = _arrays.per_channel("bias", bias, channels, axis)
    training = _arrays.flag("training", training)
    eps = _arrays.positive("eps", eps)
    momentum = _arrays.factor(momentum)
    act = _arrays.activation(activation)
    if training:
        running_mean, running_var = _arrays.running_statistics(running_mean, running_var, channels, axis)
        _arrays.require_several_values(x, axis)
    elif running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{missing} is None, expected an array of shape ({channels},) in evaluation (training=False)")
    else:
        running_mean = _arrays.required_per_channel("running_mean", running_mean, channels, axis)
        running_var = _arrays.variance("running_var", running_var, channels, axis)
    if out is not None:
        parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
        out = _arrays.output("out", out, x, {"x": x, **parameters})
    if check_finite:
        _require_finite(x, axis)

    result = _arrays.Result(axis, out, x)
    (source,) = result.inputs
    normalization: _Normalization
    if training and x.size:
        normalization, _ = _core.forward(
            source, result.target, axis, weight, bias, running_mean, running_var, counter, momentum, eps, act
        )
    else:
        if training and counter is not None:
            counter += 1  # an empty batch is a batch, as in PyTorch
        mean, var = (running_mean, running_var) if not training else (np.zeros(channels), np.ones(channels))
        assert mean is not None
        assert var is not None
        normalization = _core.normalization(source, mean, var, weight, bias, eps)
        _core.elemt(source, result.target, axis, normalization, act)
    y = result.finish()

    mean, invstd, affine = normalization
    overwritten = out is not None and _arrays.is_same_memory(source, out)
    saved = Saved(
        mean, invstd, training, activation, axis,
        None if overwritten else source, affine,
        None if weight is None else weight.dtype, None if bias is None else bias.dtype,
    )  # fmt: skip
    return y, saved


def _require_finite(x: Array, axis: int) -> None:
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


def batch_norm_backward(
    dy: npt.ArrayLike,
    saved: Saved,
    *,
    out: Array | None = None,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    """Gradients of `batch_norm_forward`.

    In training ``dx = (dy - dbias/n - (x - mean) * invstd^2 * sum((x - mean) * dy)/n) * invstd * weight``; in
    evaluation ``dx = dy * invstd * weight``. ``dweight = sum((x - mean) * dy) * invstd``, ``dbias = sum(dy)``. With a
    fused activation, dy is first passed back through it, its mask recomputed from x.

    Parameters
    ----------
    dy : array of x's shape and dtype
    saved : Saved
        From `batch_norm_forward`.
    out : array of x's shape and dtype, optional
        For dx; may be dy itself.
    output_mask : three bools
        Which of dx, dweight and dbias are wanted; the others are None.

    Returns
    -------
    Gradients
        dweight and dbias are None also where the forward pass had no weight or bias.

    Raises
    ------
    TypeError, ValueError
        As in `batch_norm`; also if x was overwritten by the forward pass (``out=x``).
    """
    if not isinstance(saved, Saved):
        raise TypeError(f"saved is a {type(saved).__name__}, expected the second result of batch_norm_forward")
    x, axis = saved._x, saved.channel_axis
    if x is None:
        raise ValueError("x was overwritten by a pass with out=x, expected passes with another out, or none")
    dy = _arrays.like("dy", dy, x)
    wants_dx, wants_dweight, wants_dbias = _output_mask(output_mask)
    wants_dweight = wants_dweight and saved._weight_dtype is not None
    wants_dbias = wants_dbias and saved._bias_dtype is not None
    if out is not None:
        if not wants_dx:
            raise ValueError("out is given but output_mask says that dx is not wanted, expected one without the other")
        out = _arrays.output("out", out, x, {"dy": dy, "x": x})
    act = _arrays.activation(saved.activation)
    normalization = (saved.mean, saved.invstd, saved._affine)

    dx: Array | None = None
    sum_dy = sum_dy_xmu = np.zeros(x.shape[axis])
    if x.size == 0:
        dx = (np.empty_like(x) if out is None else out) if wants_dx else None
    elif not wants_dx:
        if wants_dweight or wants_dbias:
            dy, x = _arrays.for_kernels(axis, dy, x)
            sum_dy, sum_dy_xmu = _core.backward_reduce(dy, x, axis, normalization, act)
    else:
        result = _arrays.Result(axis, out, dy, x)
        if out is not None and _arrays.is_same_memory(x, out):
            saved._x = None  # before the first byte of it changes
        dy, x = result.inputs
        if saved.training or wants_dweight or wants_dbias:
            sum_dy, sum_dy_xmu = _core.backward(dy, x, result.target, axis, normalization, act, saved.training)
        else:
            _core.backward_elemt(dy, x, result.target, axis, normalization, act, None)
        dx = result.finish()
    with np.errstate(over="ignore"):  # a sum beyond float32 becomes Inf, as in PyTorch
        return Gradients(
            dx,
            (sum_dy_xmu * saved.invstd).astype(saved._weight_dtype) if wants_dweight else None,
            sum_dy.astype(saved._bias_dtype) if wants_dbias else None,
        )


def _output_mask(mask: tuple[bool, bool, bool]) -> tuple[bool, bool, bool]:
    try:
        dx, dweight, dbias = (bool(wanted) for wanted in mask)
    except (TypeError, ValueError):
        raise ValueError(f"output_mask is {mask!r}, expected three bools: for dx, dweight and dbias") from None
    return dx, dweight, dbias


def batch_norm_stats(x: npt.ArrayLike, *, channel_axis: int = 1) -> tuple[Array, Array, int]:
    """Mean and biased variance of every channel, in one pass over x.

    The sums are float64 and shifted, so neither a large mean nor large values cost precision, and their order depends
    on the shape of x only, so the result is the same for any number of threads. Moments of several batches merge by
    Chan's formula (Chan, Golub, LeVeque, 1979).

    Parameters
    ----------
    x : array of at least 2 axes, float32 or float64
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
    (x,) = _arrays.for_kernels(axis, x)
    mean, var = _core.stats(x, axis)
    return mean, var, x.size // channels


def batch_norm_elemt(
    x: npt.ArrayLike,
    mean: npt.ArrayLike,
    var: npt.ArrayLike,
    weight: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Array:
    """``activation((x - mean) / sqrt(var + eps) * weight + bias)`` with given statistics: the application step.

    Parameters are those of `batch_norm`; ``mean`` and ``var`` (biased) have shape (C,), float32 or float64. Pass the
    float64 statistics of `batch_norm_stats` as they are: a large mean rounded to float32 would cost the precision that
    they have kept.
    """
    x, axis = _arrays.data("x", x, channel_axis)
    mean, var, weight, bias = _statistics(mean, var, weight, bias, x.shape[axis], axis)
    eps = _arrays.positive("eps", eps)
    act = _arrays.activation(activation)
    if out is not None:
        out = _arrays.output("out", out, x, {"x": x, "mean": mean, "var": var, "weight": weight, "bias": bias})
    result = _arrays.Result(axis, out, x)
    (source,) = result.inputs
    _core.elemt(source, result.target, axis, _core.normalization(source, mean, var, weight, bias, eps), act)
    return result.finish()


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
    eps = _arrays.positive("eps", eps)
    act = _arrays.activation(activation)
    if x.size == 0:
        return np.zeros(channels), np.zeros(channels)
    dy, x = _arrays.for_kernels(axis, dy, x)
    sums: tuple[Array, Array] = _core.backward_reduce(
        dy, x, axis, _core.normalization(x, mean, var, weight, bias, eps), act
    )
    return sums


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
    eps = _arrays.positive("eps", eps)
    act = _arrays.activation(activation)
    sums = (
        np.ascontiguousarray(_arrays.required_per_channel("sum_dy", sum_dy, channels, axis), np.float64),
        np.ascontiguousarray(_arrays.required_per_channel("sum_dy_xmu", sum_dy_xmu, channels, axis), np.float64),
    )
    count = _arrays.positive("count", count)
    if out is not None:
        inputs = {"dy": dy, "x": x, "mean": mean, "var": var, "weight": weight, "bias": bias}
        out = _arrays.output("out", out, x, {**inputs, "sum_dy": sums[0], "sum_dy_xmu": sums[1]})
    result = _arrays.Result(axis, out, dy, x)
    dy, x = result.inputs
    normalization = _core.normalization(x, mean, var, weight, bias, eps)
    _core.backward_elemt(dy, x, result.target, axis, normalization, act, (*sums, count))
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
        _arrays.per_channel("weight", weight, channels, axis),
        _arrays.per_channel("bias", bias, channels, axis),
    )
