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
        What `--aggressive` would do; None if the same.
    """

    name: str
    op_type: str
    output: str
    graph: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    default: str
    aggressive: str | None


def inspect(
    proto: onnx.ModelProto, default: FoldReport, aggressive: FoldReport, folder: Path | None = None
) -> list[Finding]:
    """Describe every affine node of a model, given the reports of both ways to fold it."""
    nodes = {
        (scope.label, node.outputs[0].name): node
        for scope in scopes(files.to_ir(proto, folder))
        for node in scope.graph
        if node.outputs
    }
    alternatives = {(row.graph, row.output): row for row in aggressive.rows}
    findings = []
    for row in default.rows:
        before: list[str] = []
        after: list[str] = []
        # The node itself is the first.
        around = neighbours(nodes[row.graph, row.output], steps=1)
        for other in around[1:]:
            side = before if set(other.outputs) & set(around[0].inputs) else after
            side.append(f"{other.op_type} {other.name}")
        plain, other_way = _fate(row), _fate(alternatives.get((row.graph, row.output), row))
        findings.append(
            Finding(
                name=row.name,
                op_type=row.op_type,
                output=row.output,
                graph=row.graph,
                before=tuple(before),
                after=tuple(after),
                default=plain,
                aggressive=None if other_way == plain else other_way,
            )
        )
    return findings


def to_dict(findings: list[Finding], report: FoldReport) -> dict[str, Any]:
    """Return findings as plain values, ready for JSON: each with the row of the report of the fold by default."""
    rows = [asdict(finding) | {"fold": row} for finding, row in zip(findings, report.to_dict()["rows"], strict=True)]
    source = None if report.input is None else asdict(report.input)
    return {"schema": SCHEMA, "input": source, "counts": report.counts, "rows": rows}


def _fate(row: Fold | Left) -> str:
    if isinstance(row, Left):
        return f"stays: {row.sentence}"
    where = {"backward": "back into", "forward": "forward into", "merged": "merged with"}[row.direction]
    cost = f", at the cost of {row.cost} new operator{'s' * (row.cost > 1)}" if row.cost else ""
    return f"folds {where} {', '.join(row.into)}{cost}"
