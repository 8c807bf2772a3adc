"""The report as one HTML page: nothing is fetched, nothing runs but the script in it, it opens from a file.

Jinja escapes every value. Should it not, the page's own policy stops the rest: it allows no request, and no script and
no style but those whose hashes it names.
"""

from __future__ import annotations

import base64
import hashlib
import math
from pathlib import PurePath
from typing import Any

import jinja2
from markupsafe import Markup

from pybn.folding.picture import LogAxis, drawable
from pybn.folding.report import (
    BATCH_NORM,
    GRAPH_INPUT,
    GRAPH_OUTPUT,
    Fold,
    FoldCheck,
    FoldReport,
    Left,
    Spread,
    closeness,
)
from pybn.folding.sketch import BOX_HEIGHT, BOX_WIDTH, sketch

# What fits into a box of the sketch, in characters.
LONGEST_TYPE, LONGEST_NAME = 19, 23


def render_html(report: FoldReport) -> str:
    """Return the page: a summary, a table of all rows, the scales of the weights, sketches of what was left.

    Parameters
    ----------
    report : FoldReport
        With `weights`, if these are to be drawn.

    Returns
    -------
    str
        To be written as UTF-8. The same report gives the same page.
    """
    style, script = _source("report.css"), _source("report.js")
    axis = LogAxis.around(report.weights)
    checks = {} if report.check is None else report.check.by_fold
    return _ENVIRONMENT.get_template("report.html").render(
        report=report,
        title=PurePath(report.input.path).name if report.input is not None else "ONNX model",
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        checks=checks,
        reasons=sorted({row.reason.value for row in report.left}),
        axis=axis,
        ticks=[] if axis is None else _ticks(axis),
        sketches=[
            (number, row, sketch(row.neighbours))
            for number, row in enumerate(report.rows, 1)
            if isinstance(row, Left) and row.op_type == BATCH_NORM and row.neighbours
        ],
    )


def _source(name: str) -> str:
    assert _ENVIRONMENT.loader is not None
    return _ENVIRONMENT.loader.get_source(_ENVIRONMENT, name)[0]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _visible(value: Any) -> Any:
    """Replace what a name may hold to mislead: control characters, and those that turn the direction of text."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "".join(char if char.isprintable() else "\ufffd" for char in value)
    return value


def _ticks(axis: LogAxis) -> list[tuple[float, float, bool]]:
    """Return value, position in per cent, and whether it is one to leave out where there is little room."""
    values = axis.ticks()
    decades = {value for value in values if f"{value:e}".startswith("1.0")}
    return [(value, 100 * axis.position(value), len(decades) > 1 and value not in decades) for value in values]


def _scientific(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if math.isfinite(value) else "not finite"


def _short_number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not finite"


def _bits(spread: Spread) -> str:
    return f"{spread.bits:.1f}" if math.isfinite(spread.bits) else "–"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _change(before: float, after: float) -> str:
    """Say how much longer or shorter a time is, in whole per cent."""
    if not (before > 0 and math.isfinite(after)):
        return ""
    percent = round(100 * (after / before - 1))
    return f"{'+' if percent > 0 else '−' if percent < 0 else '±'}{abs(percent)}%"


def _start_of(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _end_of(text: str, length: int) -> str:
    """Shorten a name to its end, which tells more than its beginning."""
    return text if len(text) <= length else f"…{text[1 - length :]}"


def _part_of_bound(check: FoldCheck) -> str:
    return f"{min(closeness(check), 1e300):g}"  # the script sorts by it, and does not know Python's "inf"


def _passed(check: FoldCheck | None) -> str:
    return "" if check is None else "passed" if check.passed else "failed"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("pybn.folding"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_visible,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(
    scientific=_scientific, number=_short_number, bits=_bits, size=_size, start_of=_start_of, end_of=_end_of,
    passed=_passed, part_of_bound=_part_of_bound,
)  # fmt: skip
_ENVIRONMENT.globals.update(
    change=_change, drawable=drawable, is_folded=lambda row: isinstance(row, Fold), BATCH_NORM=BATCH_NORM,
    ENDS=(GRAPH_INPUT, GRAPH_OUTPUT), BOX_WIDTH=BOX_WIDTH, BOX_HEIGHT=BOX_HEIGHT, LONGEST_TYPE=LONGEST_TYPE,
    LONGEST_NAME=LONGEST_NAME,
)  # fmt: skip
