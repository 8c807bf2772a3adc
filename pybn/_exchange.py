"""What the ranks of a group tell one another in one pass of a synchronised layer, and how they notice disagreement.

Every rank sends one block of float64 values to every other. Its length is the same whatever the rank is about to do, so
that even ranks that disagree about the layer, the number of channels or the type of data understand each other, and all
raise the same error, rather than wait for bytes that never come. The block holds a header and up to `_VALUES` values; a
layer of more channels sends the rest in a second block, once the headers agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, Protocol

import numpy as np

from pybn._arrays import Array

_PROTOCOL = 1  # to be raised when the header changes: ranks may run different versions of pybn
_VALUES = 3 * 512  # what a forward pass of 512 channels sends; 12 KiB take little longer than an empty message
_DTYPES = ("float32", "float64", "float16", "bfloat16")


class Transport(Protocol):
    """Carries blocks between the ranks of a group."""

    size: int
    names: list[int]  # how errors call the ranks

    def swap(self, block: Array, what: str) -> Array:
        """The blocks of all ranks, (size, n), given this rank's, (n,) float64.

        Raises TimeoutError if a rank sends nothing in time, ConnectionError if it is gone; `what` is for their text.
        """


class Direction(IntEnum):
    """Which pass the ranks are in."""

    forward = 1
    backward = 2


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one rank gives: a count and a number of its choice, and float64 values per channel, (k, C)."""

    count: int
    number: int
    values: Array


class _Header(NamedTuple):
    protocol: int
    has_failed: int
    direction: int
    call: int
    channels: int
    dtype: int
    values: int  # per channel
    number: int


class Exchange:
    """The exchange of one pass; a context, so that the other ranks are told if this one raises before its part of it.

    Parameters
    ----------
    transport : Transport
    layer : str
        How errors call the layer.
    direction : Direction
    call : int
        How often this rank has used the layer; differs between ranks if one of them left a call out.
    """

    def __init__(self, transport: Transport, layer: str, direction: Direction, call: int) -> None:
        self._transport = transport
        self._direction = direction
        self._call = call
        self._what = f"{layer}, call {call}, {direction.name}"
        self._has_spoken = False

    @property
    def ranks(self) -> list[int]:
        """The ranks of the group, as errors call them."""
        return self._transport.names

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not self._has_spoken:
            with contextlib.suppress(TimeoutError, ConnectionError):  # the error that is under way says more
                self._swap(self._header(has_failed=1), np.zeros(0))

    def gather(self, dtype: str, own: Contribution) -> list[Contribution]:
        """The contributions of all ranks, in the order of ranks.

        Raises
        ------
        ValueError
            If ranks differ in what they are doing: on every rank, with what each of them does.
        RuntimeError
            If another rank has raised an error before its part of the exchange.
        TimeoutError, ConnectionError
        """
        channels = own.values.shape[1]
        header = self._header(
            channels=channels, dtype=_DTYPES.index(dtype), values=own.count, number=own.number, has_failed=0
        )
        values = np.ravel(own.values)
        headers, first = self._swap(header, values[:_VALUES])
        self._require_agreement(headers)
        if values.size > _VALUES:
            rest = self._transport.swap(np.ascontiguousarray(values[_VALUES:]), self._what)
            first = np.concatenate([first, rest], axis=1)
        gathered = first[:, : values.size].reshape(-1, *own.values.shape)
        return [Contribution(h.values, h.number, v) for h, v in zip(headers, gathered, strict=True)]

    def _header(
        self, *, has_failed: int, channels: int = 0, dtype: int = 0, values: int = 0, number: int = 0
    ) -> _Header:
        return _Header(_PROTOCOL, has_failed, self._direction, self._call, channels, dtype, values, number)

    def _swap(self, header: _Header, values: Array) -> tuple[list[_Header], Array]:
        self._has_spoken = True
        block = np.zeros(len(header) + _VALUES)
        block[: len(header)] = np.asarray(header, np.float64)
        block[len(header) : len(header) + values.size] = values
        blocks = self._transport.swap(block, self._what)
        return [_Header(*map(int, row[: len(header)])) for row in blocks], blocks[:, len(header) :]

    def _require_agreement(self, headers: list[_Header]) -> None:
        if len({h.protocol for h in headers}) > 1:
            raise ValueError(f"{self._what}: the ranks run different versions of pybn, expected one")
        if failed := [rank for rank, h in zip(self.ranks, headers, strict=True) if h.has_failed]:
            raise RuntimeError(f"{self._what}: {ranks_text(failed)} raised an error there, which its output shows")
        for what, of in _AGREED.items():
            found = [of(h) for h in headers]
            if len(set(found)) > 1:
                each = ", ".join(f"{value} (rank {rank})" for rank, value in zip(self.ranks, found, strict=True))
                raise ValueError(f"{self._what}: the ranks differ in {what}, expected the same on each: {each}")


# In the order in which they explain one another.
_AGREED: dict[str, Callable[[_Header], object]] = {
    "direction": lambda h: Direction(h.direction).name,
    "the number of channels": lambda h: h.channels,
    "how often they have called the layer": lambda h: h.call,
    "the dtype of their data": lambda h: _DTYPES[h.dtype],
}


def absence(what: str, ranks: list[int], size: int, seconds: float) -> TimeoutError:
    """The error for ranks that stay away."""
    return TimeoutError(
        f"{what}: waited {seconds:.3g} s for {ranks_text(ranks)} of {size}, which did not come. Every rank must call "
        "the layer equally often, one without data with an empty batch; if a rank is only slow, raise timeout="
    )


def loss(what: str, ranks: list[int], size: int, reason: str) -> ConnectionError:
    """The error for ranks that are gone."""
    return ConnectionError(
        f"{what}: lost the connection to {ranks_text(ranks)} of {size}, which ended or gave up; its output says why. "
        f"Here: {reason}"
    )


def ranks_text(ranks: list[int]) -> str:
    """'rank 3', or 'ranks 1, 3'."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
