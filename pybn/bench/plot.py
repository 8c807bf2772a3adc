"""The picture: the time of everyone for every operation, in copies, against the operation's traffic bound.

A row of panels is an operation, a column a group of shapes, a bar the geometric mean of a contender over the group. The
axis is logarithmic, since times span a factor of a hundred, and the same in all panels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pybn.bench import ours
from pybn.bench.cases import GROUPS, OPERATIONS, Operation
from pybn.bench.peers import TITLES
from pybn.bench.results import Measurement, Run, geometric_mean

NUMBER_WIDTH = 0.11  # of a number behind a bar, as a part of the panel
LOWEST = 0.5  # where bars begin, unless one is shorter; inference has been seen at 0.8 copies
OWN_COLORS = {ours.OUT: "#0b6e4f", ours.FRESH: "#6bbf9c"}
PEER_COLOR = "#a9b4c2"
BOUND_COLOR = "#c1121f"
OWN_TITLES = {ours.OUT: "pybn, out=", ours.FRESH: "pybn, fresh"}
BAR_INCHES, PANEL_INCHES, MARGIN_INCHES, CAPTION_LINE_INCHES = 0.2, 3.3, 1.15, 0.16
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
WIDE = 400  # a span from which on powers of ten are ticks enough


def plot(run: Run, path: Path) -> list[Path]:
    """Write one picture per dtype and layout, return their paths; with several, each name says which it is."""
    paths = []
    for dtype, layout in run.variants():
        several = len(run.variants()) > 1
        target = path.with_stem(f"{path.stem}-{dtype}-{layout}") if several else path
        figure = draw(run, run.of(dtype, layout))
        # A fixed set of metadata, so that the same figures make the same file.
        figure.savefig(target, dpi=150, metadata={"Software": None} if target.suffix == ".png" else None)
        paths.append(target)
    return paths


def draw(run: Run, measurements: Sequence[Measurement]) -> Figure:
    """Return the picture of one variant."""
    measured = {m.case.operation for m in measurements}
    operations = [operation for operation in OPERATIONS.values() if operation in measured]
    groups = [group for group in GROUPS if any(run.group(m) == group for m in measurements)]
    names = [*OWN_TITLES, *(name for name in run.peers if any(name in m.seconds for m in measurements))]
    values = [value for m in measurements for name in names if (value := m.copies(name)) is not None]
    start, highest = min(LOWEST, 0.8 * min(values)), max(values)
    end = highest * 2  # room for the number behind the longest bar

    width = MARGIN_INCHES + PANEL_INCHES * len(groups) + 0.15
    caption = textwrap.wrap(_caption(run, measurements), int(width * 17.5))
    # From the top: title, one row of panels per operation, the axis' label, the caption.
    panel_height = BAR_INCHES * len(names) + 0.1
    top, gap, bottom = 0.85, 0.34, 0.62 + CAPTION_LINE_INCHES * len(caption)
    height = top + panel_height * len(operations) + gap * (len(operations) - 1) + bottom
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(len(operations), len(groups), squeeze=False, sharex=True, sharey=True)
    figure.subplots_adjust(
        left=MARGIN_INCHES / width, right=1 - 0.15 / width, top=1 - top / height, bottom=bottom / height,
        wspace=0.06, hspace=gap / panel_height,
    )  # fmt: skip
    for row, operation in zip(axes, operations, strict=True):
        for axis, group in zip(row, groups, strict=True):
            members = [m for m in measurements if m.case.operation == operation and run.group(m) == group]
            _panel(axis, run, members, names, start, end)
            axis.set_title(_title(operation, members), fontsize=8, loc="left", pad=3)
    for axis, group in zip(axes[0], groups, strict=True):
        _column_title(axis, group)
    ticks = [tick for tick in TICKS if start <= tick <= highest * 1.7]
    if highest / start > WIDE:
        ticks = [tick for tick in ticks if f"{tick:e}".startswith("1")]
    axes[0][0].set_xscale("log")
    axes[0][0].set_xlim(start, end)
    for axis in axes.flat:
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False, fontsize=7)
        axis.minorticks_off()
    variant = f"{measurements[0].case.dtype} {measurements[0].case.layout.upper()}"
    figure.text(
        0.1 / width, 1 - 0.22 / height, f"Batch normalization on the CPU, {variant}", fontsize=11, weight="bold"
    )
    figure.text(
        (MARGIN_INCHES + width) / 2 / width, (bottom - 0.38) / height,
        f"time in copies of the tensor (logarithmic, from {start:.2g}; less is better)", fontsize=8, ha="center",
    )  # fmt: skip
    figure.text(
        0.1 / width, 0.08 / height, "\n".join(caption), fontsize=7, va="bottom", linespacing=1.25, color="#333333"
    )
    return figure


def _panel(
    axis: Axes, run: Run, members: Sequence[Measurement], names: Sequence[str], start: float, end: float
) -> None:
    for position, name in enumerate(names):
        value = geometric_mean(m.copies(name) for m in members)
        if value is None:
            why = "does not do this" if any(name in m.unsupported for m in members) else "not timed"
            axis.text(start * 1.05, position, why if members else "", va="center", fontsize=6.5, color="#777777")
            continue
        axis.barh(position, value - start, left=start, height=0.74, color=OWN_COLORS.get(name, PEER_COLOR))
        bound = geometric_mean(map(run.bound, [m for m in members if name in m.seconds])) or value
        axis.plot([bound, bound], [position - 0.46, position + 0.46], color=BOUND_COLOR, linewidth=1.4)
        # The number stands behind the bar, and behind the line where that would cross it.
        behind = bound if value * 0.97 < bound < value * (end / start) ** NUMBER_WIDTH else value
        weight = "bold" if name in OWN_COLORS else "normal"
        axis.text(behind * 1.05, position, _number(value), va="center", fontsize=7, weight=weight)
    axis.set_yticks(range(len(names)), [OWN_TITLES.get(name) or TITLES[name] for name in names], fontsize=7.5)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="both", length=2)
    axis.grid(axis="x", color="#e3e3e3", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if not members:
        axis.text(0.5, 0.5, "no shapes", transform=axis.transAxes, ha="center", fontsize=7, color="#777777")


def _title(operation: Operation, members: Sequence[Measurement]) -> str:
    count = len(members)
    shapes = "1 shape" if count == 1 else f"{count} shapes"
    return f"{operation.name} ({shapes})"


def _column_title(axis: Axes, group: str) -> None:
    axis.annotate(
        GROUPS[group], (0, 1), (0, 19), xycoords="axes fraction", textcoords="offset points",
        fontsize=8, weight="bold", va="bottom",
    )  # fmt: skip


def _caption(run: Run, measurements: Sequence[Measurement]) -> str:
    shapes = dict.fromkeys(str(m.case.shape) for m in measurements)
    listed = ", ".join(shapes) if len(shapes) <= 10 else f"{len(shapes)} shapes from {next(iter(shapes))} on"
    environment = run.environment
    peers = ", ".join(f"{TITLES[name]} {peer.version}" for name, peer in run.peers.items())
    threads = "1 thread" if run.threads == 1 else f"{run.threads} threads"
    return (
        "Red lines: the least memory traffic of each operation, beyond L2, in copies. Bars: geometric means over "
        f"{listed}; each figure the median, over {run.rounds} interleaved rounds, of its ratio to a parallel copy of "
        f"the tensor. {environment.get('processor')}, {threads}, L2 {run.l2 >> 10} KiB per core, "
        f"{environment.get('instruction set')}; pybn {environment.get('pybn')} ({environment.get('compiler')})"
        f"{', ' + peers if peers else ''}, Python {environment.get('python')}. Made by `pybn bench --plot`."
    )


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
