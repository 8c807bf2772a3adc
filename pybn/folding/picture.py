"""The picture of the scales of weights before and after folding: its axis, and the PNG.

A row is an operator, a bar reaches from the smallest to the largest scale of its output channels, a line across the
bar is their median (`pybn.folding.report.Spread`). The page draws the same in SVG, which follows the reader's width and
colours.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from pybn.folding.report import FoldReport, Spread, WeightRange

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = (1, 2, 5)
MOST_DECADES_WITH_STEPS, MOST_TICKS = 3, 10

BEFORE_COLOR, AFTER_COLOR = "#9aa5b4", "#0b6e4f"
WIDTH_INCHES, ROW_INCHES, TOP_INCHES, BOTTOM_INCHES, LABEL_INCHES, NUMBER_INCHES = 9.0, 0.2, 0.85, 0.5, 2.6, 0.9
BAR_POINTS = 0.32 * ROW_INCHES * 72
LONGEST_NAME = 40
DPI = 150
# The renderer draws at most 2^16 pixels per side.
MOST_ROWS = 2000


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis; both ends are 1, 2 or 5 times a power of ten."""

    low: float
    high: float

    @classmethod
    def around(cls, ranges: Sequence[WeightRange]) -> LogAxis | None:
        """Return the axis that shows all scales of all operators; None if there is nothing to show."""
        spreads = [spread for item in ranges for spread in (item.before, item.after) if drawable(spread)]
        if not spreads:
            return None
        smallest, largest = min(s.smallest_scale for s in spreads), max(s.largest_scale for s in spreads)
        low = max((value for value in _round_values(smallest) if value <= smallest), default=smallest)
        high = min((value for value in _round_values(largest) if value >= largest), default=largest)
        return cls(low, high) if low < high else cls(low / 10, high * 10)

    def position(self, value: float) -> float:
        """Return where a value is: 0 at `low`, 1 at `high`."""
        return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self) -> list[float]:
        """Return round values on the axis: powers of ten, and 2 and 5 times these where there is room."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        if math.log10(self.high) - math.log10(self.low) <= MOST_DECADES_WITH_STEPS:
            values = [float(f"{step}e{decade}") for decade in decades for step in STEPS]
        else:
            values = [float(f"1e{decade}") for decade in decades[:: 1 + len(decades) // MOST_TICKS]]
        return [value for value in values if self.low <= value <= self.high]


def drawable(spread: Spread) -> bool:
    """Say whether there are scales, and all of them finite."""
    return spread.smallest_scale > 0 and spread.largest_scale < math.inf


def render_png(report: FoldReport) -> bytes:
    """Draw the scales of all weights before and after folding.

    Needs Matplotlib. The same report gives the same bytes with the same Matplotlib.

    Raises
    ------
    ValueError
        If the report has no weights to draw.
    """
    # Imported here, because the page needs the axis without it.
    from matplotlib.figure import Figure

    axis = LogAxis.around(report.weights)
    if axis is None:
        raise ValueError("the report has no weights to draw, expected that of a model with Conv, Gemm or MatMul")
    rows = [item for item in report.weights if drawable(item.before) and drawable(item.after)][:MOST_ROWS]
    height = TOP_INCHES + ROW_INCHES * len(rows) + BOTTOM_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height))
    axes = figure.subplots()
    figure.subplots_adjust(
        left=LABEL_INCHES / WIDTH_INCHES, right=1 - NUMBER_INCHES / WIDTH_INCHES,
        top=1 - TOP_INCHES / height, bottom=BOTTOM_INCHES / height,
    )  # fmt: skip
    _draw_bars(axes, [row.before for row in rows], -0.2, BEFORE_COLOR)
    _draw_bars(axes, [row.after for row in rows], 0.2, AFTER_COLOR)
    for position, row in enumerate(rows):
        axes.annotate(
            _bits(row), (1, position), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=7, va="center",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(axis.low, axis.high)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks(axis.ticks(), [f"{tick:g}" for tick in axis.ticks()], fontsize=7)
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7, parse_math=False)
    axes.tick_params(axis="both", length=2)
    axes.grid(axis="x", color="#e3e3e3", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("largest |w| of a channel: from the smallest channel to the largest; line: median", fontsize=8)
    _draw_head(figure, axes, height, report, len(rows))
    content = io.BytesIO()
    # A fixed set of metadata, so that the same figures make the same file.
    with warnings.catch_warnings():  # of characters that the font lacks: they are drawn as boxes
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def _draw_bars(axes: Axes, spreads: Sequence[Spread], offset: float, color: str) -> None:
    # Lines, of which Matplotlib draws many at once; bars it would draw, and bring up to date, one by one.
    middles = [position + offset for position in range(len(spreads))]
    starts, ends = [spread.smallest_scale for spread in spreads], [spread.largest_scale for spread in spreads]
    medians = [spread.median_scale for spread in spreads]
    axes.hlines(middles, starts, ends, color=color, linewidth=BAR_POINTS, capstyle="butt")

    def upright(values: Sequence[float], reach: float, color: str, width: float) -> None:
        low, high = [middle - reach for middle in middles], [middle + reach for middle in middles]
        axes.vlines(values, low, high, color=color, linewidth=width)

    upright(starts, 0.16, color, 1)  # channels of one scale have no range, but an edge
    upright(medians, 0.22, "#ffffff", 2.2)
    upright(medians, 0.22, "#111111", 0.9)


def _draw_head(figure: Figure, axes: Axes, height: float, report: FoldReport, shown: int) -> None:
    name = f" of {_short(PurePath(report.input.path).name)}" if report.input is not None else ""
    few = f" ({shown} of {len(report.weights)} operators)" if shown < len(report.weights) else ""
    left = 0.1 / WIDTH_INCHES
    figure.text(
        left, 1 - 0.25 / height, f"Scales of the weights{name}{few}", fontsize=10, weight="bold", parse_math=False
    )
    for x, text, color in ((left, "before folding", BEFORE_COLOR), (1.3 / WIDTH_INCHES, "after folding", AFTER_COLOR)):
        figure.text(x, 1 - 0.5 / height, f"■ {text}", fontsize=8, color=color)
    axes.annotate(
        "log2(largest\n/ smallest)", (1, 1), (6, 4), xycoords="axes fraction", textcoords="offset points", fontsize=7
    )


def _bits(row: WeightRange) -> str:
    before, after = f"{row.before.bits:.1f}", f"{row.after.bits:.1f}"
    return before if before == after else f"{before} → {after}"


def _label(row: WeightRange) -> str:
    return _short(f"{row.node} ({row.op_type})" if row.graph == "main" else f"{row.node} ({row.op_type}, {row.graph})")


def _short(text: str) -> str:
    """Shorten a name, to its end, which tells more than its beginning; without what no font can draw."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= LONGEST_NAME else f"…{text[1 - LONGEST_NAME :]}"


def _round_values(near: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten on either side of a value."""
    decade = math.floor(math.log10(near))
    values = [float(f"{step}e{exponent}") for exponent in range(decade - 1, decade + 2) for step in STEPS]
    return [value for value in values if 0 < value < math.inf]
