"""What a rule is, and what it answers: how a map passes one operator.

A rule is a function of a node, of the index of one of its outputs (backward) or inputs (forward),
and of the map that is there. It answers with a `Step`, or with a `Refusal`.

**Backward.** The map follows the node: of output ``y`` of the node, the graph goes on to use
``affine(y)``. The step makes the node produce ``affine(y)`` itself. What it does not absorb it asks
of its inputs: a carry ``(i, A)`` says that the node now expects ``A(x)`` at input ``i``.

**Forward.** The map precedes the node: it was given ``affine(x)`` at one input and is to be given
``x`` from now on. The step makes it produce what it did from that. What it does not absorb it leaves
to whoever uses its outputs: a carry ``(j, A)`` says that output ``j`` is now ``y``, where it was ``A(y)``.

A rule takes the whole map, or refuses. It does not split the map: the engine asks again with the
scale alone and with the shift alone (`Affine.only_scale`, `Affine.only_shift`) and finds a place
for the rest. Where there are two ways, the second goes into `Step.otherwise`; it is tried if one of
the first one's carries is refused, or costs more.

A rule is pure. It reads constants and shapes through `Facts`, and changes nothing. Three things
are taken care of before it is called: it need not look at who else uses the node's outputs,
at graph outputs, or at subgraphs. Three things can be left to exceptions, which become refusals:
`FoldError` (of `round_to`, `Affine.over`, `Affine.then`) and `AttributeNotConstant` (of `attribute`).
The map may be one that is the same everywhere (``affine.axis is None``): `Affine.over` makes it one
value per channel of an operator, and `Affine.along`, `part`, `repeated`, `tiled` leave it alone.

A forward rule, as an example::

    def max_pool(node: ir.Node, index: int, affine: Affine, facts: Facts) -> Step | Refusal:
        '''``max(a x + b) = a max(x) + b`` for ``a >= 0``.'''
        if (affine.scale < 0).any():
            return Refusal(Reason.NEGATIVE_SCALE, "MaxPool keeps the order only of positive scales")
        return Step(carries=((0, affine),))

    FORWARD: dict[str, Rule] = {"MaxPool": max_pool}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from pybn.folding.affine import Affine, Array
from pybn.folding.graph import Facts
from pybn.folding.reasons import Refusal

AttributeValue: TypeAlias = "int | float | str | tuple[int, ...] | None"


@dataclass(frozen=True)
class Quantized:
    """A constant that stays behind a DequantizeLinear: its integers, and their scale.

    Attributes
    ----------
    values : ndarray of integers
        Of the type of the old ones.
    scale : ndarray of floats
        A scalar, or one value per slice along `axis`.
    axis : int
        The axis of `values` that `scale` belongs to.
    zero_point : ndarray or None
        Of the type of `values` and the shape of `scale`.
    """

    values: Array
    scale: Array
    axis: int
    zero_point: Array | None = None


@dataclass(frozen=True)
class Insert:
    """An operator put behind a node: ``op_type(first output of the node, *constants)``."""

    op_type: str
    constants: tuple[Array, ...]


@dataclass(frozen=True)
class Rewrite:
    """What becomes of one node.

    Attributes
    ----------
    node : ir.Node
        The node. Nothing else of the graph changes: a constant that has other uses is cloned.
    constants : mapping of int to ndarray, Quantized or None
        New constants by input position, in their final type. A position that the node does
        not have yet is added; None takes away what is there.
    op_type : str or None
        Its new operator; None: the same.
    attributes : mapping
        Attributes to set; None removes one.
    after : tuple of Insert
        Operators put behind its first output, in this order. The last one produces
        what the rule promises of output 0.
    """

    node: ir.Node
    constants: Mapping[int, Array | Quantized | None] = field(default_factory=dict)
    op_type: str | None = None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    after: tuple[Insert, ...] = ()


@dataclass(frozen=True)
class Step:
    """How a map passes one operator.

    Attributes
    ----------
    rewrites : tuple of Rewrite
        Empty if the node stays as it is.
    carries : tuple of (int, Affine)
        Input index (backward) or output index (forward), and the map that is left there.
    extra : int
        Operators that become slower, beyond those that `Rewrite.after` adds: a Relu that becomes a
        per-channel Max counts 1.
    otherwise : Step or None
        Another way.
    """

    rewrites: tuple[Rewrite, ...] = ()
    carries: tuple[tuple[int, Affine], ...] = ()
    extra: int = 0
    otherwise: Step | None = None

    @property
    def cost(self) -> int:
        """Operators that this step adds."""
        return self.extra + sum(len(rewrite.after) for rewrite in self.rewrites)


Rule: TypeAlias = Callable[[ir.Node, int, Affine, Facts], "Step | Refusal"]
