"""Ghost batch norm: statistics of parts of a batch.

Hoffer, Hubara, Soudry, "Train longer, generalize better: closing the generalization gap in large batch training of
neural networks", 2017, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn import _arrays, _core
from pybn._arrays import Array
from pybn.functional import Gradients, Saved, batch_norm_backward, forward, require_finite
from pybn.layers import _BatchNorm


@dataclass(eq=False)
class _Ghosts:
    """Where the ghost batches are on the first axis, and what each needs for its backward pass."""

    parts: list[slice]
    saved: list[Saved]


class GhostBatchNorm(_BatchNorm):
    """Batch normalization with the statistics of ghost batches: consecutive parts of the batch.

    A large batch is then as noisy as small ones are, which regularizes: Hoffer et al. train with batches of 4096 and
    ghost batches of 128 without the loss of accuracy that large batches otherwise cost.

    The N examples of a batch are cut into ``max(1, N // ghost_size)`` ghost batches, in the order in which they come,
    whose sizes differ by one at most; none is smaller than `ghost_size`, unless N is. They are views: nothing is
    copied. The running statistics move towards those of one ghost batch after the other, so that with momentum m the
    k-th of K contributes ``m * (1 - m)**(K - k)``, as in the paper (which averages standard deviations, where these
    are unbiased variances, as in `BatchNorm2d`); `num_batches_tracked` counts ghost batches. Evaluation is that of
    `BatchNorm2d`.

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    ghost_size : int
        Examples in a ghost batch; at least 1.
    eps, momentum, affine, track_running_stats, activation, negative_slope, channel_axis, dtype, check_finite
        As in `BatchNorm2d`. Without running statistics evaluation uses ghost batches, too.

    Notes
    -----
    Input has shape (N, C) to (N, C, D, H, W), or with ``channel_axis=-1`` (N, ..., C).
    """

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
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
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation=activation,
            negative_slope=negative_slope, channel_axis=channel_axis, dtype=dtype, check_finite=check_finite,
        )  # fmt: skip
        self.ghost_size = _arrays.at_least_one("ghost_size", ghost_size)

    def _train(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        return self._in_parts(x, residual, out)

    def _evaluate(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        if self.track_running_stats:
            return super()._evaluate(x, residual, out)
        return self._in_parts(x, residual, out)

    def _in_parts(self, x: Array, residual: npt.ArrayLike | None, out: Array | None) -> Array:
        """Normalize every part by itself. What may be wrong with any of them is found before the first."""
        cut = parts(len(x), self.ghost_size)
        x, axis = _arrays.data("x", x, self.channel_axis)
        _arrays.require_several_values(x[cut[-1]], axis, "a ghost batch of x")  # none is smaller
        residual = None if residual is None else _arrays.like("residual", residual, x)
        weight, bias = (None if p is None else p.astype(np.float64) for p in (self.weight, self.bias))
        if out is not None:
            out = _arrays.output("out", out, x, {"x": x, "residual": residual})
        if self.check_finite:
            require_finite(x, axis)
        y = _core.empty_like(x) if out is None else out

        # Copies, so that an interrupt between two parts leaves the layer as it was.
        names = ("running_mean", "running_var", "num_batches_tracked")
        own: dict[str, Array | None] = {name: getattr(self, name) for name in names}
        new = {name: None if value is None else value.copy() for name, value in own.items()}
        counter = new["num_batches_tracked"]
        saved: list[Saved] = []
        for part in cut:
            momentum = self.momentum
            if momentum is None:
                momentum = 0.0 if counter is None else 1 / (int(counter) + 1)
            _, kept = forward(
                x[part], weight, bias, new["running_mean"], new["running_var"], True, momentum, self.eps,
                self.activation, self.negative_slope, None if residual is None else residual[part], axis, y[part],
                False, keeps=True, counter=counter,
            )  # fmt: skip
            assert kept is not None
            saved.append(kept)
        for name, value in own.items():
            if value is not None:
                value[...] = new[name]
        self._saved = _Ghosts(cut, saved)
        return y

    def _gradients(self, dy: npt.ArrayLike, saved: Any, out: Array | None) -> Gradients:
        if not isinstance(saved, _Ghosts):
            return super()._gradients(dy, saved, out)
        dy = _arrays.as_data_array("dy", dy)
        examples = saved.parts[-1].stop
        if dy.ndim == 0 or len(dy) != examples:
            raise ValueError(f"dy has shape {_arrays.shape_text(dy.shape)}, expected {examples} examples, as x has")
        if out is not None:
            out = _arrays.output("out", out, dy, {"dy": dy})
        dx = _core.empty_like(dy) if out is None else out
        of_parts = [
            batch_norm_backward(dy[part], kept, out=dx[part])
            for part, kept in zip(saved.parts, saved.saved, strict=True)
        ]
        dweights, dbiases, dresiduals = (
            [gradient for gradient in one if gradient is not None] for one in list(zip(*of_parts, strict=True))[1:]
        )
        return Gradients(
            dx,
            np.sum(dweights, axis=0) if dweights else None,
            np.sum(dbiases, axis=0) if dbiases else None,
            np.concatenate(dresiduals) if dresiduals else None,
        )

    def _arguments(self) -> list[str]:
        channels, *others = super()._arguments()
        return [channels, f"ghost_size={self.ghost_size}", *others]


def parts(examples: int, size: int) -> list[slice]:
    """Consecutive parts of at least `size`, the larger ones first."""
    count = max(1, examples // size)
    least, larger = divmod(examples, count)
    ends = np.cumsum([least + (number < larger) for number in range(count)]).tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
