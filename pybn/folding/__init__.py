"""Removing evaluation-mode batch norms by pushing their affine map into linear operators.

Read in this order; each file uses only those above it:

- ``reasons``          why a node is left alone: the codes, and what would unlock each
- ``affine``           the map ``y = scale * x + shift`` that a batch norm is, and its rounding
- ``weights``          the array algebra: a map absorbed by the weights of a linear operator before it,
- ``weights_forward``  or after it
- ``state_dict``       the same for a dictionary of arrays
- ``protos``         ONNX messages: their graphs and tensors, how large these are, and copies without them
- ``graph``            what a rule may ask of an ONNX graph: constants, shapes, types
- ``steps``            what a rule is, and what it answers
- ``sources``          the nodes that are maps themselves: read, and written
- ``axes``             one rule per operator that moves axes, in both directions
- ``backward``         one rule per operator: how a map that follows it passes through it
- ``forward``          one rule per operator: how a map that precedes it passes through it
- ``walk``             from operator to operator, until all of a map is absorbed
- ``choice``           all ways to fold one node, by what they cost
- ``editor``           changing a graph: new constants, a node taken out
- ``effects``          where each fold shows in the end
- ``report``           what was folded, what was left, and what the check found
- ``neighbours``       what surrounds a node that is left
- ``ranges``           how large weights are before and after, for the report
- ``sketch``           a small graph laid out
- ``picture``          the ranges as a picture
- ``html``             the report as a page, from ``templates``
- ``engine``           the fold of a model in place: every node in its turn
- ``passes``           the same as a pass of onnx-ir
- ``disk``             regular files, and how they are replaced so that a failure changes nothing
- ``external``         tensors in files beside a model, checked before they are read
- ``validity``         what a model must be before anything is done with it
- ``files``            reading models without trusting them, writing them so that a failure changes nothing
- ``reversible``       what a folded model carries so that its original can be restored
- ``onnx``             `fold_onnx`
- ``segments``         where two models differ: values of both that they compute in different ways
- ``inlining``         local functions put where they are called, so that this can be seen
- ``widening``         bfloat16 models for runtimes that do not know the type
- ``runtime``          running models and single operators, and timing them
- ``majorant``         how far rounding may move a value: one rule per operator
- ``inputs``           what to run models on
- ``fold_proof``       the rounding bound of one difference, and the comparison with it
- ``probing``          graphs changed to look into them, and to move values inside
- ``verify``           the comparison of a folded model with its original
- ``inspection``       what a model holds that can be folded, and what would become of it

Importing this package needs NumPy only; `fold_onnx` needs ``pybn[onnx]``.
"""

from __future__ import annotations

from typing import Any

from pybn.folding.affine import Affine
from pybn.folding.reasons import FoldError, Reason
from pybn.folding.state_dict import fold_state_dict
from pybn.folding.weights import fold_conv, fold_linear

__all__ = ["Affine", "FoldError", "Reason", "fold_conv", "fold_linear", "fold_onnx", "fold_state_dict"]


def __getattr__(name: str) -> Any:
    if name == "fold_onnx":  # imported on first use, because it needs onnx
        from pybn.folding.onnx import fold_onnx

        return fold_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
