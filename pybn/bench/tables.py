"""The figures of a run in tables; a figure that misses its target carries a mark."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pybn.bench import ours, targets
from pybn.bench.cases import GROUPS, OPERATIONS, Case, Operation
from pybn.bench.peers import TITLES
from pybn.bench.results import Measurement, Run, geometric_mean

MARK = "(!)"
BUSY = 0.2  # distance of the quartiles of the copy's times, relative to their median; 0.08 with little else to do
HALF_TYPES = ("float16", "bfloat16")


@dataclass
class Table:
    """Cells are text; the first column is the row's name."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def all_tables(run: Run) -> list[Table]:
    """Every table, from the single figures to what they amount to."""
    tables = []
    for dtype, layout in run.variants():
        measurements = run.of(dtype, layout)
        for operation in _operations(measurements):
            tables.append(by_shape(run, [m for m in measurements if m.case.operation == operation]))
    for dtype, layout in run.variants():
        measurements = run.of(dtype, layout)
        tables += [overview(run, measurements), by_group(run, measurements)]
        if run.peers:
            tables.append(speeds(run, measurements))
    tables.append(costs(run))
    return tables


def by_shape(run: Run, measurements: Sequence[Measurement]) -> Table:
    """Return the time of every contender on every shape, for one operation in one variant."""
    peers = _peers(run, measurements)
    table = Table(
        f"{_variant(measurements)}, {measurements[0].case.operation.name}: time in copies of the tensor",
        ["shape", "bound", "pybn, out=", "pybn, fresh", *(TITLES[peer] for peer in peers), "the copy"],
    )
    for m in measurements:
        cells = [_marked(_number(m.copies(peer)), _is_slower(run, m, peer)) for peer in peers]
        shape = f"{m.case.shape}{'' if m.case.fits(run.l2) else ' *'}"
        own = [_number(m.copies(name)) for name in (ours.OUT, ours.FRESH)]
        table.rows.append([shape, _number(run.bound(m)), *own, *cells, _seconds(m.seconds[ours.COPY])])
    if any(not m.case.fits(run.l2) for m in measurements):
        table.notes.append("* what the operation reads twice, for one channel, exceeds L2")
    if any(MARK in cell for row in table.rows for cell in row):
        table.notes.append(f"{MARK} too fast; the target is {_every_shape_rule()}")
    return table


def overview(run: Run, measurements: Sequence[Measurement]) -> Table:
    """Return the time with ``out=`` of every operation on every shape, and the speed against torch eager."""
    operations = _operations(measurements)
    found = {(m.case.operation, m.case.shape): m for m in measurements}
    shapes = list(dict.fromkeys(m.case.shape for m in measurements))
    has_torch = "torch" in run.peers
    beside = ", in parentheses times faster than torch eager (fresh results)" if has_torch else ""
    table = Table(
        f"{_variant(measurements)}: copies of the tensor with out={beside}",
        ["shape", *(operation.name for operation in operations)],
    )

    def cell(group: Sequence[Measurement]) -> str:
        copies = _number(geometric_mean(m.copies(ours.OUT) for m in group))
        speed = geometric_mean(run.speed(m, "torch") for m in group) if has_torch else None
        return copies if speed is None else f"{copies} ({_number(speed)}x)"

    for shape in shapes:
        row = [found.get((operation, shape)) for operation in operations]
        stars = ["" if m is None or m.case.fits(run.l2) else " *" for m in row]
        table.rows.append([str(shape), *(cell([m]) + star if m else "" for m, star in zip(row, stars, strict=True))])
    means = [cell([m for m in measurements if m.case.operation == operation]) for operation in operations]
    table.rows.append(["geometric mean", *means])
    if any(cell.endswith("*") for row in table.rows for cell in row):
        table.notes.append("* what the operation reads twice, for one channel, exceeds L2")
    return table


def by_group(run: Run, measurements: Sequence[Measurement]) -> Table:
    """Return the geometric means over groups of shapes, with bounds and targets."""
    peers = _peers(run, measurements)
    table = Table(
        f"{_variant(measurements)}: copies of the tensor with out=, geometric means",
        ["operation", "shapes", "number", "bound", "target", "pybn", *(TITLES[peer] for peer in peers)],
    )
    for operation in _operations(measurements):
        for group in GROUPS:
            members = [m for m in measurements if m.case.operation == operation and run.group(m) == group]
            if not members:
                continue
            copies = geometric_mean(m.copies(ours.OUT) for m in members)
            case = members[0].case
            target = targets.copies(operation, case.dtype, case.layout, group)
            table.rows.append([
                operation.name, group, str(len(members)),
                _number(geometric_mean(map(run.bound, members))), _number(target),
                _marked(_number(copies), copies is not None and target is not None and copies > target),
                *(_number(geometric_mean(m.copies(peer) for m in members)) for peer in peers),
            ])  # fmt: skip
    shown = dict.fromkeys(row[1] for row in table.rows)
    table.notes.append("; ".join(f"{group}: {GROUPS[group]}" for group in shown))
    table.notes += _mark_note(table)
    return table


def speeds(run: Run, measurements: Sequence[Measurement]) -> Table:
    """Return how many times faster pybn is than each peer: geometric mean, then least and most."""
    peers = _peers(run, measurements)
    table = Table(
        f"{_variant(measurements)}: times faster than each peer, geometric mean (least-most)",
        ["operation", *(TITLES[peer] for peer in peers)],
    )
    wanted: dict[str, list[str]] = {}
    for operation in _operations(measurements):
        members = [m for m in measurements if m.case.operation == operation]
        row = [operation.name]
        for peer in peers:
            values = [speed for m in members if (speed := run.speed(m, peer)) is not None]
            mean = geometric_mean(values)
            if mean is None:
                row.append("")
                continue
            target = targets.speed(operation, members[0].case.dtype, members[0].case.layout, peer)
            missed = (target is not None and mean < target) or any(_is_slower(run, m, peer) for m in members)
            spread = f"{_number(min(values))}-{_number(max(values))}"
            if target is not None:
                wanted.setdefault(peer, []).append(f"{operation.name} {target:g}")
                spread += f"; bound {_number(geometric_mean(run.speed_at_bound(m, peer) for m in members))}"
            row.append(_marked(f"{_number(mean)}x ({spread})", missed))
        table.rows.append(row)
    fresh = [TITLES[peer] for peer in peers if run.peers[peer].allocates]
    into_out = [TITLES[peer] for peer in peers if not run.peers[peer].allocates]
    sides = [f"{', '.join(names)}: {how}" for names, how in ((fresh, "fresh results on both sides"),
             (into_out, "memory for the results given on both sides")) if names]  # fmt: skip
    table.notes.append("; ".join(sides))
    table.notes.append(f"targets: {_every_shape_rule()}")
    table.notes += [f"targets against {TITLES[peer]}: {', '.join(names)}" for peer, names in wanted.items()]
    if wanted:
        table.notes.append("bound: how many times faster a call would be that takes just its traffic bound")
    table.notes += _mark_note(table)
    return table


def costs(run: Run) -> Table:
    """Return what fresh results cost, what a second thread and a half type gain, for every operation and variant."""
    many = f"1 to {run.threads} threads"
    table = Table(
        "What fresh results cost, and what threads and half types gain",
        ["operation", "variant", "fresh / out= (most)", f"pybn, {many}", f"copy, {many}", "time / float32"],
    )
    float32 = {
        (m.case.operation, m.case.shape, m.case.layout): m for m in run.measurements if m.case.dtype == "float32"
    }
    for dtype, layout in run.variants():
        for operation in _operations(run.of(dtype, layout)):
            members = [m for m in run.of(dtype, layout) if m.case.operation == operation]
            large = [m for m in members if run.l2 < m.case.bytes <= targets.FRESH_BYTES]
            fresh = [ratio for m in large if (ratio := m.ratio(ours.FRESH, ours.OUT)) is not None]
            pairs = [
                (m, float32[operation, m.case.shape, layout])
                for m in members
                if dtype != "float32" and (operation, m.case.shape, layout) in float32
            ]
            exceed = [(half, full) for half, full in pairs if half.case.bytes > run.l2]
            relative = geometric_mean(half.seconds[ours.OUT] / full.seconds[ours.OUT] for half, full in exceed)
            pybn_gain = geometric_mean(m.ratio(ours.OUT_ALONE, ours.OUT) for m in members if m.case.bytes > run.l2)
            copy_gain = geometric_mean(m.ratio(ours.COPY_ALONE, ours.COPY) for m in members if m.case.bytes > run.l2)
            lags = run.threads == 2 and _scales_less(pybn_gain, copy_gain)
            mean = geometric_mean(fresh)
            table.rows.append([
                operation.name, f"{dtype} {layout}",
                _marked(f"{_number(mean)} ({_number(max(fresh))})", mean is not None and mean > targets.FRESH)
                if fresh else "",
                _marked(_times(pybn_gain), lags), _times(copy_gain),
                _marked(_number(relative), dtype in HALF_TYPES and relative is not None and relative > targets.HALF),
            ])  # fmt: skip
    table.notes.append(
        f"over tensors that exceed L2 ({run.l2 >> 10} KiB); targets: fresh at most {targets.FRESH}, "
        f"half types at most {targets.HALF}, a second thread at least {targets.SECOND_THREAD}x where a copy gains that"
    )
    table.notes += _mark_note(table)
    return table


def missed(tables: Iterable[Table]) -> int:
    """Return how many figures carry a mark."""
    return sum(MARK in cell for table in tables for row in table.rows for cell in row)


def peer_lines(run: Run) -> list[str]:
    """Say who takes part, who is absent and how to change that, and what nobody measured."""
    lines = [f"{TITLES[name]} {peer.version}" for name, peer in run.peers.items()]
    lines += [f"{TITLES[name]}: absent, {reason}" for name, reason in run.absent.items()]
    reasons: dict[tuple[str, str], list[Case]] = {}
    for m in run.measurements:
        for peer, reason in m.unsupported.items():
            reasons.setdefault((peer, reason), []).append(m.case)
    for (peer, reason), cases in reasons.items():
        names = _joined(case.operation.name for case in cases)
        variants = _joined(f"{case.dtype} {case.layout}" for case in cases)
        lines.append(f"{TITLES[peer]} does not do {names} ({variants}): {reason}")
    return lines + [f"not timed: {reason}" for m in run.measurements for reason in m.wrong.values()]


def noise_line(run: Run) -> str | None:
    """Say that the machine was busy, if the copy's own times are far apart."""
    spreads = [m.spread[ours.COPY] for m in run.measurements if ours.COPY in m.spread]
    typical = statistics.median(spreads or [0.0])
    if typical <= BUSY:
        return None
    return (
        f"the machine was busy: in half of the cases the copy's quartiles are {typical:.0%} or more apart; "
        "these figures are not worth keeping"
    )


def additions_line(run: Run) -> str | None:
    """Say how much of a core there was: what is bound by instructions depends on it, the copy hardly."""
    rates = sorted(m.additions for m in run.measurements)
    if not rates:
        return None
    return (
        f"{statistics.median(rates):.1f} additions per ns on a core ({rates[0]:.1f} to {rates[-1]:.1f}); "
        "one that runs nothing else does about four per cycle"
    )


def environment_line(run: Run) -> str:
    """Return what the figures depend on, in one line."""
    own = [f"{key} {value}" for key, value in run.environment.items()]
    threads = "1 thread" if run.threads == 1 else f"{run.threads} threads"
    return ", ".join([*own, threads, f"medians of {run.rounds} rounds"])


def _scales_less(pybn: float | None, copy: float | None) -> bool:
    limit = targets.SECOND_THREAD
    return pybn is not None and copy is not None and copy >= limit and pybn < limit


def _is_slower(run: Run, m: Measurement, peer: str) -> bool:
    speed = run.speed(m, peer)
    return speed is not None and speed < targets.least_speed(m.case, peer)


def _every_shape_rule() -> str:
    small = "x".join(map(str, targets.SMALL_SHAPE))
    return f"no slower than a peer on any shape ({targets.SMALL_SPEED:g}x torch eager on {small})"


def _mark_note(table: Table) -> list[str]:
    return [f"{MARK} misses its target"] if any(MARK in cell for row in table.rows for cell in row) else []


def _operations(measurements: Sequence[Measurement]) -> list[Operation]:
    measured = {m.case.operation for m in measurements}
    return [operation for operation in OPERATIONS.values() if operation in measured]


def _peers(run: Run, measurements: Sequence[Measurement]) -> list[str]:
    return [name for name in run.peers if any(name in m.seconds for m in measurements)]


def _variant(measurements: Sequence[Measurement]) -> str:
    return f"{measurements[0].case.dtype} {measurements[0].case.layout.upper()}"


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _marked(text: str, mark: bool) -> str:
    return f"{text} {MARK}" if mark else text


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{_number(value)}x"


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
