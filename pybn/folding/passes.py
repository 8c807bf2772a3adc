"""The fold as a pass of onnx-ir, to be composed with other passes."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from pybn.folding.engine import Options, fold_in_place
from pybn.folding.report import FoldReport


class FoldBatchNorm(ir.passes.InPlacePass):
    """Remove batch norms and other affine nodes from a model, in place.

    Parameters
    ----------
    aggressive, skip, only
        As in `pybn.fold_onnx`.

    Attributes
    ----------
    report : FoldReport or None
        What the latest call folded and left; None before the first.

    Examples
    --------
    >>> import onnx_ir as ir
    >>> from onnx_ir.passes import common
    >>> from pybn.folding.passes import FoldBatchNorm
    >>> passes = ir.passes.Sequential(common.InlinePass(), FoldBatchNorm(), common.RemoveUnusedNodesPass())
    >>> result = passes(model)  # doctest: +SKIP
    """

    def __init__(self, *, aggressive: bool = False, skip: Collection[str] = (), only: Collection[str] = ()) -> None:
        super().__init__()
        self._options = Options(aggressive, skip, only)
        self.report: FoldReport | None = None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the model; ``modified`` says whether anything was folded."""
        self.report = fold_in_place(model, self._options)
        return ir.passes.PassResult(model, modified=bool(self.report.folds))
