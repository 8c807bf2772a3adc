"""The times of a run, what is derived from them, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pybn.bench import ours
from pybn.bench.cases import ITEM_BYTES, LAYOUTS, OPERATIONS, Case, Shape, UsageError

FORMAT = 3


@dataclass(frozen=True)
class Measurement:
    """Times of every contender of one case, by name, as `measure.Timing` has them; why the other peers are not among
    them; and who computed something else than pybn, which is not timed. `additions` is how many one thread did per ns.
    """

    case: Case
    seconds: dict[str, float]
    ratios: dict[str, float]
    spread: dict[str, float]
    additions: float
    unsupported: dict[str, str]
    wrong: dict[str, str] = field(default_factory=dict)

    def copies(self, name: str) -> float | None:
        """Time of a contender in copies of the tensor, None if it did not run; one thread against one thread's copy."""
        return self.ratio(name, ours.COPY_ALONE if name == ours.OUT_ALONE else ours.COPY)

    def ratio(self, numerator: str, denominator: str) -> float | None:
        """Ratio of two contenders' times, None if one of them did not run."""
        if numerator not in self.ratios or denominator not in self.ratios:
            return None
        return self.ratios[numerator] / self.ratios[denominator]


@dataclass(frozen=True)
class PeerInfo:
    """A peer that took part."""

    version: str
    allocates: bool


@dataclass
class Run:
    """All of a run; `environment` is what its figures depend on."""

    environment: dict[str, str]
    threads: int
    l2: int
    rounds: int
    peers: dict[str, PeerInfo]
    absent: dict[str, str]
    measurements: list[Measurement] = field(default_factory=list)

    def speed(self, measurement: Measurement, peer: str) -> float | None:
        """How many times faster pybn is than a peer: with fresh results if the peer makes new arrays, too."""
        return measurement.ratio(peer, ours.FRESH if self.peers[peer].allocates else ours.OUT)

    def bound(self, measurement: Measurement) -> float:
        """The traffic bound of a case on the machine of the run, in copies."""
        return measurement.case.bound(self.l2)

    def speed_at_bound(self, measurement: Measurement, peer: str) -> float | None:
        """How many times faster than a peer a call would be that takes just its traffic bound."""
        copies = measurement.copies(peer)
        return None if copies is None else copies / self.bound(measurement)

    def group(self, measurement: Measurement) -> str:
        """The group of shapes of a case on the machine of the run."""
        return measurement.case.group(self.l2)

    def variants(self) -> list[tuple[str, str]]:
        """Return the (dtype, layout) that were measured, in order."""
        return list(dict.fromkeys((m.case.dtype, m.case.layout) for m in self.measurements))

    def of(self, dtype: str, layout: str) -> list[Measurement]:
        """Return the measurements of one variant."""
        return [m for m in self.measurements if (m.case.dtype, m.case.layout) == (dtype, layout)]

    def to_json(self) -> str:
        """Return everything, with the ratios that tables show, so that a reader need not derive them."""
        cases = [
            {
                "operation": m.case.operation.name,
                "shape": list(m.case.shape.dims("nchw")),
                "dtype": m.case.dtype,
                "layout": m.case.layout,
                "group": self.group(m),
                "bound": round(self.bound(m), 4),
                "copies": {name: round(m.copies(name) or 0, 4) for name in m.seconds},
                "speed": {peer: round(self.speed(m, peer) or 0, 4) for peer in self.peers if peer in m.seconds},
                "seconds": m.seconds,
                "ratios": m.ratios,
                "spread": {name: round(value, 4) for name, value in m.spread.items()},
                "additions": round(m.additions, 3),
                "unsupported": m.unsupported,
                "wrong": m.wrong,
            }
            for m in self.measurements
        ]
        record = {
            "format": FORMAT,
            "environment": self.environment,
            "threads": self.threads,
            "l2": self.l2,
            "rounds": self.rounds,
            "peers": {name: vars(peer) for name, peer in self.peers.items()},
            "absent": self.absent,
            "cases": cases,
        }
        return json.dumps(record, indent=1) + "\n"


def load(path: Path, option: str) -> Run:
    """Read what ``--json`` wrote.

    Raises
    ------
    UsageError
        If it is not that; `option` names who wanted it.
    """
    try:
        return _from_record(json.loads(path.read_text()))
    except OSError as error:
        raise UsageError(f"{option} {path}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{option} {path}: not a file that `pybn bench --json` of this version wrote") from None


def _from_record(record: dict[str, Any]) -> Run:
    if record["format"] != FORMAT:
        raise ValueError("another format")
    measurements = [
        Measurement(
            Case(OPERATIONS[case["operation"]], _shape(case["shape"]), case["dtype"], case["layout"]),
            {name: float(value) for name, value in case["seconds"].items()},
            {name: float(value) for name, value in case["ratios"].items()},
            dict(case["spread"]),
            float(case["additions"]),
            dict(case["unsupported"]),
            dict(case["wrong"]),
        )
        for case in record["cases"]
    ]
    if not all(m.case.dtype in ITEM_BYTES and m.case.layout in LAYOUTS for m in measurements):
        raise ValueError("an unknown dtype or layout")
    return Run(
        dict(record["environment"]), int(record["threads"]), int(record["l2"]), int(record["rounds"]),
        {name: PeerInfo(**peer) for name, peer in record["peers"].items()}, dict(record["absent"]), measurements,
    )  # fmt: skip


def _shape(dims: list[int]) -> Shape:
    return Shape(*[*dims, 1, 1][:4])


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Geometric mean of the values that are there, None if none is."""
    present = [value for value in values if value is not None]
    return float(np.exp(np.mean(np.log(present)))) if present else None
