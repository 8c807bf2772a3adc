"""Sequence batch norm: statistics of every time step, for recurrent networks.

Cooijmans, Ballas, Laurent, Gulcehre, Courville, "Recurrent Batch Normalization", 2017, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn import _arrays, _core
from pybn._arrays import Array
from pybn._merge import Moments
from pybn.functional import Gradients, Saved, apply, batch_norm_backward, forward, require_finite
from pybn.layers import NO_CALL_BEFORE, _BatchNorm


@dataclass(frozen=True, eq=False)
class _Block:
    """Neighbouring steps at which the same examples are there.

    Sequences are (N, C, T), or (N, T, C) if `is_last`; a block of them is a batch (n, channels * steps), in which every
    channel at every step is a channel of its own.
    """

    rows: slice | npt.NDArray[np.int64]
    begin: int
    end: int
    is_last: bool

    def _index(self) -> tuple[Any, ...]:
        steps = slice(self.begin, self.end)
        return (self.rows, steps) if self.is_last else (self.rows, slice(None), steps)

    def of(self, x: Array) -> Array:
        """The block's values; a view where its rows and columns lie so."""
        part = x[self._index()]
        batch: Array = part.reshape(len(part), part.shape[1] * part.shape[2])
        return batch

    def put(self, values: Array, into: Array) -> None:
        """Write the block's values."""
        into[self._index()] = values.reshape(into[self._index()].shape)

    def flat(self, of_steps: Array) -> Array:
        """(steps, C) in the order of the block's channels."""
        return (of_steps if self.is_last else of_steps.T).reshape(-1)

    def by_step(self, flat: Array) -> Array:
        """The opposite."""
        steps = self.end - self.begin
        return flat.reshape(steps, -1) if self.is_last else flat.reshape(-1, steps).T


@dataclass(eq=False)
class _Call:
    """What the backward pass of one call needs."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: list[tuple[_Block, Saved]]


class SequenceBatchNorm(_BatchNorm):
    """Batch normalization of sequences with statistics of every time step.

    In a recurrent network the first steps differ much from those that follow; statistics over all steps fit none.
    Running statistics are kept for every step up to `max_steps`. Where evaluation goes beyond the longest sequence
    seen in training it uses those of the last step that was seen. The weight begins at 0.1: with 1 the gradient
    vanishes through the saturated tanh that follows (section 4 of the paper). In an LSTM the recurrent and the input
    term have a layer each, of which one may do without bias (``layer.bias = None``).

    Whole sequences are one call, ``layer(x, lengths=lengths)``. Inside a recurrence there is a call for every step,
    ``layer(x, step=0)``, ``layer(x, step=1)``, ...; then `backward` is called for the last step first, and so on.

    Where sequences have unequal lengths, the statistics of a step are those of the sequences that are still there, and
    output and gradient beyond the end of a sequence are 0, whatever x is there. If only one is left, which has no
    variance, its statistics are those that evaluation would use after this batch, as constants.

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    max_steps : int
        Steps for which running statistics are kept; at least 1. Later steps use their own statistics in training, and
        move none.
    eps, momentum, affine, activation, negative_slope, channel_axis, dtype, check_finite
        As in `BatchNorm1d`. ``momentum=None`` averages over the batches in which there was that step.

    Attributes
    ----------
    running_mean, running_var : (max_steps, C) arrays
    num_batches_tracked : (max_steps,) int64 array
        Batches that each step was seen in; 0 if never.

    Notes
    -----
    Input has shape (N, C, T), or with ``channel_axis=-1`` (N, T, C); with a step (N, C). Sequences of unequal lengths
    are copied, step by step, unless those that are still there are the first in the batch (as sequences sorted by
    length are) and the channels last.
    """

    _input_ranks = (3,)
    _initial_weight = 0.1

    def __init__(
        self,
        num_features: int,
        max_steps: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        channel_axis: int = 1,
        dtype: npt.DTypeLike = np.float32,
        check_finite: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, activation=activation, negative_slope=negative_slope,
            channel_axis=channel_axis, dtype=dtype, check_finite=check_finite,
        )  # fmt: skip
        self.max_steps = _arrays.at_least_one("max_steps", max_steps)
        self.running_mean = np.zeros((self.max_steps, self.num_features), dtype)
        self.running_var = np.ones((self.max_steps, self.num_features), dtype)
        self.num_batches_tracked = np.zeros(self.max_steps, np.int64)
        self._calls: list[_Call] = []

    def __call__(
        self,
        x: npt.ArrayLike,
        *,
        lengths: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
        step: int | None = None,
        residual: npt.ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize sequences, or one step of them.

        Parameters
        ----------
        x : array of shape (N, C, T) or (N, T, C), with a step (N, C)
        lengths : (N,) integers, optional
            Steps of each sequence, 0 to T; all of them if there is no mask either.
        mask : (N, T) bools, with a step (N,), optional
            Where there is a sequence, in place of lengths.
        step : int, optional
            Which step x is, from 0. A call with step 0, or without step, begins new sequences, and forgets calls for
            which there was no backward pass.
        residual, out
            As in `batch_norm`.

        Raises
        ------
        ValueError
            In training also if at no step of x there are two sequences or more (beyond step 0, if no step has been
            seen in training).
        """
        x = _arrays.as_data_array("x", x)
        is_step = step is not None
        first = 0 if step is None else first_step(step)
        if is_step and (lengths is not None or (mask is not None and np.ndim(mask) != 1)):
            raise ValueError("step is given with lengths or a mask of several steps, expected a mask of shape (N,)")
        if is_step:
            if x.ndim != 2:
                raise ValueError(f"x has shape {_arrays.shape_text(x.shape)}, expected 2 axes, (N, C), with a step")
            x = np.expand_dims(x, self._time_axis)
        self._check_shape(x.shape)
        if residual is not None:
            residual = _arrays.as_data_array("residual", residual)
            residual = np.expand_dims(residual, self._time_axis) if is_step and residual.ndim == 2 else residual
            residual = _arrays.like("residual", residual, x)
        target = out
        if isinstance(out, np.ndarray) and is_step and out.ndim == 2:
            target = np.expand_dims(out, self._time_axis)
        if target is not None:
            target = _arrays.output("out", target, x, {"x": x, "residual": residual})
        steps = x.shape[self._time_axis]
        there = there_of(lengths, mask, len(x), steps)
        if self.check_finite:
            require_finite(x if there is None else np.where(self._along(there), x, 0), self.channel_axis % 3)

        if not self.training or self.frozen:
            y = self._normalize(x, there, first, residual, target, training=False)
        else:
            with self._lock:
                y = self._normalize(x, there, first, residual, target, training=True)
        if out is not None:
            return out
        return y.squeeze(self._time_axis) if is_step else y

    forward = __call__

    def backward(self, dy: npt.ArrayLike, *, out: Array | None = None) -> Array | tuple[Array, Array]:
        """As in `BatchNorm1d`; after calls step by step, of the last step for which there was no backward pass."""
        if not self._calls:
            raise RuntimeError(NO_CALL_BEFORE)
        call = self._calls[-1]
        dy = _arrays.as_data_array("dy", dy)
        is_step = dy.ndim == 2
        dy = np.expand_dims(dy, self._time_axis) if is_step else dy
        if dy.shape != call.shape or dy.dtype != call.dtype:
            raise ValueError(
                f"dy has shape {_arrays.shape_text(dy.shape)} and dtype {dy.dtype}, "
                f"expected {_arrays.shape_text(call.shape)} and {call.dtype}, those of x"
            )
        target = np.zeros_like(dy)
        dresidual = None
        dweight, dbias = np.zeros(self.num_features), np.zeros(self.num_features)
        for block, saved in call.blocks:
            got = batch_norm_backward(block.of(dy), saved)
            assert got.dx is not None
            assert got.dweight is not None
            assert got.dbias is not None
            block.put(got.dx, target)
            dweight += block.by_step(got.dweight).sum(axis=0)
            dbias += block.by_step(got.dbias).sum(axis=0)
            if got.dresidual is not None:
                dresidual = np.zeros_like(dy) if dresidual is None else dresidual
                block.put(got.dresidual, dresidual)
        if is_step:
            target = target.squeeze(self._time_axis)
            dresidual = None if dresidual is None else dresidual.squeeze(self._time_axis)
        if out is not None:
            checked = _arrays.output("out", out, target, {})
            checked[...] = target
            target = checked
        self._calls.pop()
        return self._accumulate(Gradients(target, dweight, dbias, dresidual))

    def _normalize(
        self, x: Array, there: Array | None, first: int, residual: Array | None, out: Array | None, *, training: bool
    ) -> Array:
        blocks = blocks_of(there, len(x), x.shape[self._time_axis], is_last=self._time_axis == 1)
        if training:
            sizes = [count_of(block, len(x)) for block in blocks]
            if blocks and max(sizes) < 2 and (first == 0 or not self._seen.any()):
                raise ValueError(
                    f"x has shape {_arrays.shape_text(x.shape)} and at no step more than one sequence; expected more "
                    "than one when training"
                )
            by_batch = [block for block, size in zip(blocks, sizes, strict=True) if size > 1]
            by_running = [block for block, size in zip(blocks, sizes, strict=True) if size == 1]
        else:
            by_batch, by_running = [], blocks
        if self._observer is not None:
            if first == 0:  # so that a sequence that is left alone uses an earlier step of these, not of any before
                self.reset_running_stats()
            for step, values in arrivals(blocks, x, first, self.max_steps):
                self._observer(values, step)
        y = _core.empty_like(x) if out is None else out
        # Copies, so that an error or an interrupt leaves the layer as it was.
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        state = (self.running_mean.copy(), self.running_var.copy(), self.num_batches_tracked.copy())
        weight = np.ones(self.num_features) if self.weight is None else self.weight.astype(np.float64)
        bias = np.zeros(self.num_features) if self.bias is None else self.bias.astype(np.float64)
        call = _Call(x.shape, x.dtype, [])
        for block in (*by_batch, *by_running):
            steps = block.end - block.begin
            part, summand, into = block.of(x), None if residual is None else block.of(residual), block.of(y)
            target = into if np.may_share_memory(into, y) else None
            parameters = (block.flat(np.tile(weight, (steps, 1))), block.flat(np.tile(bias, (steps, 1))))
            if block in by_batch:
                # With a momentum of 1 the running statistics are those of the batch, the variance unbiased.
                mean, var = np.zeros(part.shape[1]), np.zeros(part.shape[1])
                result, saved = forward(
                    part, *parameters, mean, var, True, 1.0, self.eps, self.activation, self.negative_slope, summand,
                    1, target, False, keeps=True,
                )  # fmt: skip
                assert saved is not None
                self._move(state, block.by_step(mean), block.by_step(var), first + block.begin)
            else:
                rows = rows_of(state[2] > 0, np.arange(first + block.begin, first + block.end))
                result, saved = apply(
                    part, block.flat(state[0][rows]), block.flat(state[1][rows]), *parameters, self.eps,
                    self.activation, self.negative_slope, summand, 1, target, training=False,
                )  # fmt: skip
            if target is None:
                block.put(result, y)
            call.blocks.append((block, saved))
        if there is not None:
            np.copyto(y, 0, where=~self._along(there))
        if training:
            self.running_mean[...], self.running_var[...], self.num_batches_tracked[...] = state
        self._calls = [call] if first == 0 else [*self._calls, call]
        return y

    def _move(self, state: tuple[Array, Array, Array], mean: Array, var: Array, first: int) -> None:
        """Move the running statistics of some steps, from `first` on, towards those of a batch."""
        end = min(first + len(mean), self.max_steps)
        if first >= end:
            return
        counter = state[2][first:end]
        counter += 1
        factor = self.momentum if self.momentum is not None else 1 / counter[:, None]
        for running, batch in zip(state[:2], (mean, var), strict=True):
            running[first:end] = (1 - factor) * running[first:end].astype(np.float64) + factor * batch[: end - first]

    @property
    def _time_axis(self) -> int:
        return 2 if self.channel_axis == 1 else 1

    @property
    def _seen(self) -> Array:
        assert self.num_batches_tracked is not None
        seen: Array = self.num_batches_tracked > 0
        return seen

    def _along(self, there: Array) -> Array:
        return np.expand_dims(there, self.channel_axis % 3)

    def _arguments(self) -> list[str]:
        channels, *others, _ = super()._arguments()
        return [channels, f"max_steps={self.max_steps}", *others]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_calls": []})


def first_step(step: int) -> int:
    if isinstance(step, (int, np.integer)) and not isinstance(step, bool) and step >= 0:
        return int(step)
    raise ValueError(f"step is {step!r}, expected an integer >= 0")


def there_of(lengths: npt.ArrayLike | None, mask: npt.ArrayLike | None, examples: int, steps: int) -> Array | None:
    """Where there is a sequence, as (N, T); None if everywhere."""
    if lengths is None and mask is None:
        return None
    if lengths is not None and mask is not None:
        raise ValueError("lengths and mask are both given, expected one of them")
    if mask is not None:
        there = _arrays.as_plain_array("mask", mask)
        there = there[:, None] if there.ndim == 1 and steps == 1 else there
        if there.dtype != bool:
            raise TypeError(f"mask has dtype {there.dtype}, expected bool")
        if there.shape != (examples, steps):
            raise ValueError(f"mask has shape {_arrays.shape_text(there.shape)}, expected ({examples}, {steps})")
    else:
        assert lengths is not None
        ends = _arrays.as_plain_array("lengths", lengths)
        if ends.dtype.kind not in "iu":
            raise TypeError(f"lengths has dtype {ends.dtype}, expected integers")
        if ends.shape != (examples,):
            raise ValueError(f"lengths has shape {_arrays.shape_text(ends.shape)}, expected ({examples},)")
        if ((ends < 0) | (ends > steps)).any():
            raise ValueError(f"lengths has values from {ends.min()} to {ends.max()}, expected 0 to {steps}")
        there = np.arange(steps) < ends[:, None]
    return None if there.all() else there


def blocks_of(there: Array | None, examples: int, steps: int, *, is_last: bool) -> list[_Block]:
    """As few blocks as hold all that is there."""
    if examples == 0 or steps == 0:
        return []
    if there is None:
        return [_Block(slice(0, examples), 0, steps, is_last)]
    changes = np.flatnonzero((there[:, 1:] != there[:, :-1]).any(axis=0)) + 1
    bounds = [0, *changes.tolist(), steps]
    blocks = []
    for begin, end in pairwise(bounds):
        rows = np.flatnonzero(there[:, begin])
        if len(rows):
            is_slice = rows[-1] - rows[0] + 1 == len(rows)
            blocks.append(_Block(slice(rows[0], rows[-1] + 1) if is_slice else rows, begin, end, is_last))
    return blocks


def count_of(block: _Block, examples: int) -> int:
    return len(range(*block.rows.indices(examples))) if isinstance(block.rows, slice) else len(block.rows)


def rows_of(seen: Array, steps: Array) -> Array:
    """Whose statistics these steps use: their own, if seen, else those of the last seen before, else the first."""
    known = np.flatnonzero(seen)
    if len(known) == 0:
        return np.minimum(steps, len(seen) - 1)
    found: Array = known[np.maximum(np.searchsorted(known, steps, side="right") - 1, 0)]
    return found


# ---- re-estimated statistics, see pybn.population


def arrivals(blocks: list[_Block], x: Array, first: int, max_steps: int) -> Iterator[tuple[int, Array]]:
    """The values at every step that has running statistics, as (n, C)."""
    for block in blocks:
        for step in range(block.begin, min(block.end, max_steps - first)):
            yield first + step, x[(block.rows, step) if block.is_last else (block.rows, slice(None), step)]


def name_of_step(name: str, step: int) -> str:
    """What the statistics of a step are called, in a network in which the layer has a name."""
    return f"{name}[{step}]"


def names_of_steps(name: str, max_steps: int) -> list[str]:
    """Of all steps that have running statistics."""
    return [name_of_step(name, step) for step in range(max_steps)]


def population(name: str, statistics: Mapping[str, Moments], counter: Array) -> dict[str, Array]:
    """The state that has these statistics; a step with fewer than two values is one that was never seen.

    Raises ValueError if all are.
    """
    found = [statistics[step] for step in names_of_steps(name, len(counter))]
    known = np.array([moments.count > 1 for moments in found])
    if not known.any():
        raise ValueError(f"no values arrived at {name}, expected two at least at some step")
    features = max(len(moments.mean) for moments in found)
    mean, var = np.zeros((len(counter), features)), np.ones((len(counter), features))
    for step in np.flatnonzero(known):
        mean[step], var[step] = found[step].mean, found[step].var
    seen = np.where(known, np.maximum(counter, 1), 0)
    return {"running_mean": mean, "running_var": var, "num_batches_tracked": seen}
