"""What a model holds that can be folded: every affine node, what surrounds it, what would become of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from pybn.folding import files
from pybn.folding.graph import scopes
from pybn.folding.neighbours import neighbours
from pybn.folding.report import Fold, FoldReport, Left

SCHEMA = 1


@dataclass(frozen=True)
class Finding:
    """A batch norm or another affine node of a model that is not folded yet.

    Attributes
    ----------
    name, op_type, output, graph : str
        As in `pybn.folding.report.Fold`.
    before, after : tuple of str
        What its input comes from and what uses its output: "Conv stem", "graph output y".
    default : str
        What `pybn fold` would do.
    aggressive : str or None
        What `--aggressive` would do instead; None if the same.
    row : Fold or Left
        The row of the fold's report.
    """

    name: str
    op_type: str
    output: str
    graph: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    default: str
    aggressive: str | None
    row: Fold | Left


def inspect(proto: onnx.ModelProto, report: FoldReport, folder: Path | None = None) -> list[Finding]:
    """Describe every affine node of a model, given the report of its fold."""
    nodes = {
        (scope.label, node.outputs[0].name): node
        for scope in scopes(files.to_ir(proto, folder))
        for node in scope.graph
        if node.outputs
    }
    findings = []
    for row in report.rows:
        before: list[str] = []
        after: list[str] = []
        # The node itself is the first.
        around = neighbours(nodes[row.graph, row.output], steps=1)
        for other in around[1:]:
            side = before if set(other.outputs) & set(around[0].inputs) else after
            side.append(f"{other.op_type} {other.name}")
        would = row.would if isinstance(row, Left) else None
        findings.append(
            Finding(
                row.name, row.op_type, row.output, row.graph, tuple(before), tuple(after), _default(row), would, row
            )
        )
    return findings


def to_dict(findings: list[Finding], report: FoldReport) -> dict[str, Any]:
    """Return findings as plain values, ready for JSON."""
    rows = []
    for finding, row in zip(findings, report.to_dict()["rows"], strict=True):
        values = {key: value for key, value in asdict(finding).items() if key != "row"}
        rows.append(values | {"fold": row})
    source = None if report.input is None else asdict(report.input)
    return {"schema": SCHEMA, "input": source, "counts": report.counts, "rows": rows}


def _default(row: Fold | Left) -> str:
    if isinstance(row, Left):
        return f"stays: {row.sentence}"
    where = {"backward": "back into", "forward": "forward into", "merged": "merged with"}[row.direction]
    return f"folds {where} {', '.join(row.into)}"
