"""How figures look: titles that say the outcome, labels at the lines, one colour for one arm everywhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours, which the colour-blind can tell apart.
WITH, WITHOUT = "#0072B2", "#D55E00"
THIRD, FOURTH, FIFTH = "#009E73", "#CC79A7", "#E69F00"
GREY = "#666666"

_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 10,
    "grid.alpha": 0.3,
}


def new_figure(
    title: str = "", panels: int = 1, *, width: float = 6.4, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """A figure that says its outcome above, and its panels side by side."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
    entitle(figure, title)
    return figure, list(axes)


def save(figure: Figure, path: Path) -> None:
    """Write a picture of 64 colours, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def entitle(figure: Figure, title: str) -> None:
    """Say the outcome above a figure."""
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")


def band(
    axes: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], colour: str, label: str = "", *, up: float = 0
) -> None:
    """The median of runs (seeds, len(x)) as a line, all of them as a band; at its end a label, moved `up` points."""
    middle = np.median(runs, axis=0)
    axes.fill_between(x, np.min(runs, axis=0), np.max(runs, axis=0), color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, middle, color=colour, linewidth=2)
    write(axes, x[-1], middle[-1], label, colour, up=up)


def write(
    axes: Axes, x: float, y: float, text: str, colour: str, *, right: float = 5, up: float = 0, align: str = "left"
) -> None:
    """Text beside a point, shifted by points to the right and up; `align` says which end of the text is there."""
    axes.annotate(
        text, (x, y), (right, up), textcoords="offset points", color=colour, va="center", ha=align,
        annotation_clip=False,
    )  # fmt: skip
