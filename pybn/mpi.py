"""Synchronised batch norm for NumPy over MPI: the layers of `pybn`, with the statistics of all ranks' batches together.

Needs mpi4py and an MPI library: ``pip install "pybn[mpi]"`` brings both. Run a script on four ranks by ``mpiexec -n 4
python -m mpi4py script.py``; ``-m mpi4py`` lets an error on one rank end all of them.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    from mpi4py import MPI
except ImportError as error:  # also one that mpi4py raises because it finds no MPI library
    raise ImportError(f'pybn.mpi needs mpi4py and an MPI library ({error}); run: pip install "pybn[mpi]"') from error

from pybn import _arrays, _core, _synchronized, layers
from pybn._arrays import Array
from pybn._exchange import Direction, Exchange, absence
from pybn._synchronized import Synchronized

__all__ = ["SyncBatchNorm1d", "SyncBatchNorm2d", "SyncBatchNorm3d"]


class _SyncBatchNorm(layers._BatchNorm):
    """Batch normalization in which, in training, mean and variance are those of the batches of all ranks together.

    Outputs, gradients of the input and running statistics are what `pybn.BatchNorm1d`, `2d` or `3d` gives on the
    concatenated batches (statistics to about 1e-15, in float64), the running statistics with the same bits on every
    rank. Batches may differ in size, and be empty: a rank without data must still call the layer. In training
    `__call__` and `backward` are collective: every rank of `comm` calls them equally often, and its layers in the same
    order. `weight_grad` and `bias_grad` are sums over the local values; add up those of all ranks, as for the other
    layers of a network. In evaluation nothing is communicated; nor is it with one rank.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, activation, negative_slope, channel_axis, dtype,
    check_finite
        As in `pybn.BatchNorm2d`.
    comm : mpi4py.MPI.Intracomm, optional
        Whose ranks belong together; default `MPI.COMM_WORLD`. The first synchronised call duplicates it, so that no
        message can meet one of the caller's.
    timeout : float or None
        Seconds to wait for the others; None waits for ever.

    Raises
    ------
    TimeoutError
        From `__call__` and `backward`: a rank stayed away; the error names it. The ranks are out of step then, and the
        program should end (`comm.Abort()`).
    ValueError, RuntimeError
        On every rank, if they differ in the number of channels, the dtype or what they call, or if one raised an error.
    """

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
        comm: MPI.Intracomm | None = None,
        timeout: float | None = 300.0,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, activation=activation,
            negative_slope=negative_slope, channel_axis=channel_axis, dtype=dtype, check_finite=check_finite,
        )  # fmt: skip
        if not isinstance(comm, (MPI.Intracomm, type(None))) or comm == MPI.COMM_NULL:
            raise TypeError(f"comm is {comm!r}, expected an mpi4py.MPI.Intracomm, such as MPI.COMM_WORLD")
        self.comm = MPI.COMM_WORLD if comm is None else comm
        self.timeout = None if timeout is None else _arrays.positive("timeout", timeout)
        self._calls = 0
        self._synchronized: tuple[Synchronized, Array | None, Array | None] | None = None

    def __call__(self, x: npt.ArrayLike, *, residual: npt.ArrayLike | None = None, out: Array | None = None) -> Array:
        """Normalize `x`, add `residual`, apply the activation; in training with all ranks of `comm` together."""
        self._synchronized = None
        if not self.training or self.frozen or self.comm.size == 1:
            return super().__call__(x, residual=residual, out=out)
        with self._lock, self._exchange(Direction.forward) as exchange:
            x = _arrays.as_data_array("x", x)
            self._check_shape(x.shape)
            y, saved = _synchronized.forward(
                exchange, x, self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked,
                self._weight_of_new_batch(), self.eps, self.activation, self.negative_slope, residual,
                self.channel_axis, out, self.check_finite,
            )  # fmt: skip
            residual = None if residual is None else _arrays.as_data_array("residual", residual)
            is_gone = out is not None and any(a is not None and _core.is_same_memory(a, out) for a in (x, residual))
            self._synchronized = saved, None if is_gone else x, residual
            return y

    forward = __call__

    def backward(self, dy: npt.ArrayLike, *, out: Array | None = None) -> Array | tuple[Array, Array]:
        """As `pybn.BatchNorm2d.backward`; after a synchronised call with all ranks of `comm` together."""
        if self._synchronized is None:
            return super().backward(dy, out=out)
        saved, x, residual = self._synchronized
        with self._exchange(Direction.backward) as exchange:
            if x is None:
                raise ValueError("x or residual was overwritten by a call with out=, expected another out, or none")
            weight, bias = (None if p is None else p.dtype for p in (self.weight, self.bias))
            gradients = _synchronized.backward(exchange, saved, dy, x, residual, weight, bias, out)
        self._synchronized = None
        return self._accumulate(gradients)

    def _exchange(self, direction: Direction) -> Exchange:
        self._calls += direction is Direction.forward
        return Exchange(
            _Transport(self.comm, self.timeout), f"{type(self).__name__}({self.num_features})", direction, self._calls
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_synchronized": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> _SyncBatchNorm:
        """A copy with the same communicator, which cannot be copied by one rank alone."""
        memo[id(self.comm)] = self.comm
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


class SyncBatchNorm1d(_SyncBatchNorm, layers.BatchNorm1d):
    """Input has shape (N, C) or (N, C, L); with ``channel_axis=-1`` (N, C) or (N, L, C)."""

    __doc__ = f"{_SyncBatchNorm.__doc__}\n    {__doc__}\n    "


class SyncBatchNorm2d(_SyncBatchNorm, layers.BatchNorm2d):
    """Input has shape (N, C, H, W); with ``channel_axis=-1`` (N, H, W, C)."""

    __doc__ = f"{_SyncBatchNorm.__doc__}\n    {__doc__}\n    "


class SyncBatchNorm3d(_SyncBatchNorm, layers.BatchNorm3d):
    """Input has shape (N, C, D, H, W); with ``channel_axis=-1`` (N, D, H, W, C)."""

    __doc__ = f"{_SyncBatchNorm.__doc__}\n    {__doc__}\n    "


# ---- how blocks travel

_TAG = 1
_SPIN = 2e-4  # seconds in which a rank that is not late will have answered; then sleeping costs little


class _Transport:
    """Blocks from every rank straight to every other, so that it is known who is missing."""

    def __init__(self, comm: MPI.Intracomm, timeout: float | None) -> None:
        self.size, self.names = comm.size, list(range(comm.size))
        self._rank = comm.rank
        self._comm, self._timeout = comm, timeout

    def swap(self, block: Array, what: str) -> Array:
        """See `pybn._exchange.Transport`."""
        comm = _private(self._comm, self._timeout, what)
        blocks = np.empty((self.size, block.size))
        blocks[self._rank] = block
        others = [rank for rank in range(self.size) if rank != self._rank]
        receives = [comm.Irecv(blocks[rank], rank, _TAG) for rank in others]
        sends = [comm.Isend(block, rank, _TAG) for rank in others]
        if not _wait(receives + sends, self._timeout):
            missing = [rank for rank, *pair in zip(others, receives, sends, strict=True) if not _wait(pair, 0)]
            for receive in receives:
                if receive != MPI.REQUEST_NULL:
                    receive.Cancel()
                    receive.Free()
            _unsent.append((block, sends))
            raise absence(what, missing, self.size, self._timeout or 0)
        return blocks


_unsent: list[tuple[Array, list[MPI.Request]]] = []  # which MPI may still read, for ranks that come late
_duplicate_key = MPI.Comm.Create_keyval()


def _private(comm: MPI.Intracomm, timeout: float | None, what: str) -> MPI.Intracomm:
    """The duplicate of `comm` that the layers use, made by the first call of any, which so is collective."""
    known = comm.Get_attr(_duplicate_key)
    if isinstance(known, MPI.Intracomm):
        return known
    own, request = comm.Idup()
    if not _wait([request], timeout):
        raise TimeoutError(
            f"{what}: waited {timeout:.3g} s for all {comm.size} ranks to make their first call of a synchronised "
            "layer; every rank must call it, one without data with an empty batch"
        )
    comm.Set_attr(_duplicate_key, own)
    return own


def _wait(requests: list[MPI.Request], seconds: float | None) -> bool:
    """Whether all are complete within `seconds`."""
    start = time.perf_counter()
    while not MPI.Request.Testall(requests):
        waited = time.perf_counter() - start
        if seconds is not None and waited >= seconds:
            return False
        time.sleep(0 if waited < _SPIN else 5e-5)  # there may be more ranks than cores
    return True
