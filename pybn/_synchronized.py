"""Batch norm over the batches of all ranks of a group, on NumPy arrays: the split operations, and an exchange between
reducing and applying.

`pybn.mpi` and `pybn.torch` carry the blocks; here is what is in them. In the forward pass the local moments, in the
backward pass the local sums; every rank merges them in the order of ranks, so all have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pybn import _arrays, _core
from pybn._arrays import Array
from pybn._exchange import Contribution, Exchange, ranks_text
from pybn._merge import Moments, merge, moments
from pybn.functional import Gradients, require_finite

# What a rank will do in the backward pass, as others must know who wait for its sums there.
NOTHING, GIVES_SUMS, WANTS_SUMS = 0, 1, 3


@dataclass(eq=False, slots=True)
class Synchronized:
    """What a forward pass keeps for its backward pass, besides x and the residual.

    Attributes
    ----------
    count : int
        Values per channel on all ranks together.
    intentions : dict from int to int
        NOTHING, GIVES_SUMS or WANTS_SUMS, of every rank.
    """

    axis: int
    normalization: tuple[Array, Array] = field(repr=False)
    activation: tuple[int, float]
    count: int
    intentions: dict[int, int]

    @property
    def invstd(self) -> Array:
        """``1 / sqrt(var + eps)`` of all ranks' values, (C,) float64."""
        invstd: Array = self.normalization[0][1]
        return invstd

    def needs_exchange(self) -> bool:
        """Whether any rank wants dx, for which it needs the sums of every rank.

        Raises
        ------
        RuntimeError
            If one does, but another will have no backward pass. All that have one raise it, so nobody waits.
        """
        if WANTS_SUMS not in self.intentions.values():
            return False
        if idle := [rank for rank, intention in self.intentions.items() if intention == NOTHING]:
            raise RuntimeError(
                f"the gradient of x needs sums from every rank, but {ranks_text(idle)} of {len(self.intentions)} made "
                "the forward pass under no_grad, or with nothing that requires a gradient"
            )
        return True


def forward(
    exchange: Exchange,
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Array | None,
    running_var: Array | None,
    counter: Array | None,
    momentum: float,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Any,
    channel_axis: int,
    out: Array | None = None,
    check_finite: bool = False,
    intention: int = WANTS_SUMS,
) -> tuple[Array, Synchronized]:
    """`pybn.functional.forward` in training, with the statistics of all ranks together."""
    x, axis = _arrays.data("x", x, channel_axis)
    weight, bias = _arrays.affine_parameters(weight, bias, x.shape[axis], axis)
    running_mean, running_var = _arrays.running_statistics(running_mean, running_var, x, axis, training=True)
    residual = None if residual is None else _arrays.like("residual", residual, x)
    if out is not None:
        parameters = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
        out = _arrays.output("out", out, x, {"x": x, "residual": residual, **parameters})
    eps, momentum = _arrays.positive("eps", eps), _arrays.factor(momentum)
    act = _arrays.activation(activation, negative_slope)
    if check_finite:
        require_finite(x, axis)
    result = _arrays.Result(axis, out, x, residual)
    source, summand = result.inputs

    local = moments(source, axis)
    values = np.stack([local.mean, local.remainder, local.m2])
    gathered = exchange.gather(x.dtype.name, Contribution(local.count, intention, values))
    total = merge([Moments(part.count, *part.values) for part in gathered])
    if total.count == 1:
        raise ValueError(
            f"x has one value per channel on all {len(gathered)} ranks together, expected more than one when training"
        )
    normalization = _core.normalization(source, total.mean, total.var, weight, bias, eps)
    _core.elemt(source, result.target, axis, normalization, act, summand)
    y = result.finish()

    if total.count and running_mean is not None and running_var is not None:
        _move(running_mean, total.mean, momentum)
        _move(running_var, total.unbiased_var, momentum)
    if counter is not None:
        counter += 1
    intentions = {rank: part.number for rank, part in zip(exchange.ranks, gathered, strict=True)}
    return y, Synchronized(axis, normalization, act, total.count, intentions)


def _move(running: Array, batch: Array, momentum: float) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        running[...] = (1 - momentum) * running.astype(np.float64) + momentum * batch


def backward(
    exchange: Exchange | None,
    saved: Synchronized,
    dy: Any,
    x: Array,
    residual: Array | None,
    weight_dtype: np.dtype[Any] | None,
    bias_dtype: np.dtype[Any] | None,
    out: Array | None = None,
) -> Gradients:
    """`pybn.batch_norm_backward`, with the sums of all ranks together in dx, which is None without an exchange.

    dweight and dbias are sums over the local values: those of all ranks add up to what one process gives on all values.
    """
    axis, normalization, act = saved.axis, saved.normalization, saved.activation
    dy = _arrays.like("dy", dy, x)
    if out is not None:
        out = _arrays.output("out", out, x, {"dy": dy, "x": x, "residual": residual})
    result = _arrays.Result(axis, out, x, dy, residual)
    source, gradient, summand = result.inputs
    if x.size:
        local = _core.backward_reduce(gradient, source, axis, normalization, act, summand, None)
    else:
        local = np.zeros((2, x.shape[axis]))
    total = None if exchange is None else _sum(exchange, x.dtype.name, local)

    dx = dz = dresidual = None
    if residual is not None and act[0] != 0:
        dz = dresidual = _core.empty_like(result.target)
    elif residual is not None:
        dresidual = dy if out is None else np.array(dy)
    if exchange is not None or dz is not None:
        sums = None if total is None else (total[0], total[1], max(saved.count, 1))
        _core.backward_elemt(gradient, source, result.target, dz, axis, normalization, act, summand, None, sums)
        dx = result.finish() if exchange is not None else None
    dweight = dbias = None
    if weight_dtype is not None:
        dweight = _core.parameter_gradient(local[1], saved.invstd, weight_dtype == np.float64)
    if bias_dtype is not None:
        dbias = _core.parameter_gradient(local[0], None, bias_dtype == np.float64)
    return Gradients(dx, dweight, dbias, dresidual)


def _sum(exchange: Exchange, dtype: str, local: Array) -> Array:
    total = np.zeros_like(local)
    for part in exchange.gather(dtype, Contribution(0, 0, local)):  # NumPy's sum may add in any order
        total += part.values
    return total
