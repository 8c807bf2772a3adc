"""The proof of one fold: the folded operator alone, on the activations of the original model.

The activation ``X`` enters the absorbing operator, the activation ``Y`` leaves the batch norm; both
come from a run of the original model. The folded operator alone is run on ``X`` and compared with
``Y``, element by element, against a bound.

Derivation of the bound. Let ``u`` be the unit roundoff, ``gamma_n = n u / (1 - n u)``, and ``K``
the number of products in one output of the operator. With ``z = W X + c`` and the batch norm
``y = a (z - m) + beta``, let ``M = |a| (|W| |X| + |c| + |m|) + |beta|``. By Higham, *Accuracy and
Stability of Numerical Algorithms*, section 3.1 (inner products, any order of summation) and
lemma 3.3 (``gamma_i + gamma_j + gamma_i gamma_j <= gamma_(i+j)``):

- original: ``K`` for the inner product and 3 for adding the bias and for Gemm's alpha and beta;
  in the batch norm 4 to get ``a`` (add, square root, division, product) and 3 to apply it. An Add
  in between is 1. In total ``gamma_(K+11) M``.
- folded: rounding the folded weights once counts 1, their float64 arithmetic counts at most 7 more
  if the model is itself float64; evaluating them ``K + 3``, and 1 for an Add: ``gamma_(K+12) M``.

The difference is therefore at most ``gamma_(2K+23) M``. Where several batch norms went into one
operator, each further one adds 7 + 8. Rounding to subnormal numbers is absolute rather than
relative: it adds at most half the smallest subnormal per product and per weight, hence the term
``eta (2K+23) (1 + max|X|)``. For float16 and bfloat16 the ``2K`` roundings of the inner products
count in float32, in which onnxruntime's CPU kernels accumulate; the others count in the model's
type. The bound assumes conventional convolutions, not Winograd or FFT ones.

``M`` comes from the *original* operators, not from the rules: the chain from ``X`` to ``Y`` with
the absolute value of every weight, bias and attribute, and with the mean replaced by ``-|m|``, is
run on ``|X|``. It is a sum of non-negative terms, so its own rounding is relative to itself and
covered by the factor ``1 + gamma_(2K+23)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pybn.folding.affine import Array
from pybn.folding.graph import Facts, Scope, attribute, display_name, scopes
from pybn.folding.report import Fold, FoldCheck
from pybn.folding.backward import data_input
from pybn.folding.runtime import CheckError, Session

# Roundings outside the inner products: see the derivation above.
OTHER_ROUNDINGS = 23
ROUNDINGS_PER_FURTHER_BATCH_NORM = 15

# Unit roundoff and smallest subnormal number.
PRECISION = {
    "float16": (2.0**-11, 2.0**-24),
    "bfloat16": (2.0**-8, 2.0**-133),
    "float32": (2.0**-24, 2.0**-149),
    "float64": (2.0**-53, 2.0**-1074),
}


class FoldProof:
    """One fold: the chain of operators before, the chain after, and the worst element so far."""

    def __init__(self, fold: Fold, original: ir.Model, folded: ir.Model) -> None:
        self.fold = fold
        self.entering = _entering(original, fold)
        before, facts = _chain(original, fold, self.entering)
        after, facts_after = _chain(folded, fold, self.entering)
        self.in_main_graph = before.scope.is_main
        weight = facts.constant(before.absorber.inputs[1])
        batch_norm = facts.constant(before.nodes[-1].inputs[1])
        assert weight is not None
        assert batch_norm is not None
        self._weight = weight
        self._entering_shape = _entering_shape(before.absorber, weight, facts)
        # Every output of Conv, ConvTranspose, Gemm and MatMul sums this many products, or fewer.
        self._products = weight.size // max(batch_norm.size, 1)
        count = sum(node.op_type == "BatchNormalization" for node in before.nodes)
        self._others = OTHER_ROUNDINGS + ROUNDINGS_PER_FURTHER_BATCH_NORM * (count - 1)
        self._reference = _segment(before, facts, lambda op, i, array: array)
        self._magnitude = _segment(before, facts, _absolute, widen=True)
        self._folded = _segment(after, facts_after, lambda op, i, array: array)
        self._sessions: dict[str, Session] = {}
        self._worst = FoldCheck(fold.name, 0.0, 0.0, False, "no finite activation to compare")
        self._worst_ratio = -1.0

    @property
    def delta_name(self) -> str:
        """Name of the graph input that moves this fold's output in the probed model."""
        return f"pybn.delta.{self.fold.output}"

    @property
    def element_type(self) -> int:
        """ONNX element type of this fold's output."""
        return int(ir.DataType.from_numpy(self._weight.dtype))

    def compare(self, entering: Array, leaving: Array) -> Array:
        """Run the folded operator on X, compare with Y, and return the bound."""
        actual = self._session("folded").run({"x": entering})[0]
        # The absolute chain runs in float32 or wider, where sums of 16-bit values do not overflow.
        wide = np.abs(entering).astype(_wide(entering.dtype))
        magnitude = self._session("magnitude").run({"x": wide})[0].astype(np.float64)
        finite_x = np.abs(entering[np.isfinite(entering)]).astype(np.float64)
        bound = self._bound(magnitude, finite_x.max(initial=0.0), leaving.dtype)
        self._record(leaving, actual, bound)
        with np.errstate(over="ignore"):
            narrow = bound.astype(leaving.dtype)
        return np.where(np.isfinite(narrow), narrow, np.zeros_like(narrow))

    def compare_on_random_input(self, rng: np.random.Generator) -> None:
        """Check a fold whose activations cannot be seen from outside."""
        entering = rng.standard_normal(self._entering_shape).astype(self._weight.dtype)
        self.compare(entering, self._session("reference").run({"x": entering})[0])

    def result(self) -> FoldCheck:
        """Return the element that came closest to its bound."""
        return self._worst

    def _bound(
        self, magnitude: npt.NDArray[np.float64], largest: float, dtype: np.dtype[Any]
    ) -> npt.NDArray[np.float64]:
        unit, subnormal = PRECISION[dtype.name]
        products, others = 2 * self._products, self._others
        accumulated = min(unit, PRECISION["float32"][0])
        relative = _gamma(products, accumulated) + _gamma(others, unit)
        relative += _gamma(products, accumulated) * _gamma(others, unit)
        bound: npt.NDArray[np.float64] = magnitude * relative * (1 + relative)
        return bound + subnormal * (products + others) * (1 + largest)

    def _record(self, expected: Array, actual: Array, bound: npt.NDArray[np.float64]) -> None:
        if actual.shape != expected.shape:
            shapes = f"the folded operator gives shape {actual.shape}, expected {expected.shape}"
            self._keep_worst(np.inf, FoldCheck(self.fold.name, np.inf, 0.0, False, shapes))
            return
        usable = np.isfinite(expected) & np.isfinite(bound)
        if not usable.any():
            return
        limit = bound[usable]
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(actual[usable].astype(np.float64) - expected[usable].astype(np.float64))
            error[np.isnan(error)] = np.inf
            ratios = error / limit
        at = int(np.argmax(ratios))
        ratio = float(ratios[at])
        self._keep_worst(ratio, FoldCheck(self.fold.name, float(error[at]), float(limit[at]), ratio <= 1))

    def _keep_worst(self, ratio: float, found: FoldCheck) -> None:
        if ratio > self._worst_ratio:
            self._worst_ratio, self._worst = ratio, found

    def _session(self, which: str) -> Session:
        if which not in self._sessions:
            model = {
                "reference": self._reference,
                "magnitude": self._magnitude,
                "folded": self._folded,
            }[which]
            self._sessions[which] = Session(model, f"the fold of {self.fold.name}")
        return self._sessions[which]


def _gamma(count: int, unit: float) -> float:
    return count * unit / (1 - count * unit) if count * unit < 1 else np.inf


@dataclass(frozen=True)
class _Chain:
    """The operators from the value that enters the absorber to the batch norm's output."""

    scope: Scope
    nodes: tuple[ir.Node, ...]

    @property
    def absorber(self) -> ir.Node:
        return self.nodes[0]


def surviving(folds: Iterable[Fold], folded: ir.Model) -> list[Fold]:
    """Drop folds whose output is gone: a later batch norm was folded into the same operator.

    The later fold has the same input, and its chain in the original holds both batch norms.
    """
    produced = {
        (scope.label, output.name) for scope in scopes(folded) for node in scope.graph for output in node.outputs
    }
    return [fold for fold in folds if (fold.graph, fold.output) in produced]


def _entering(original: ir.Model, fold: Fold) -> str:
    """Return the name of the value that enters the operator which absorbed the fold."""
    facts = Facts(original)
    for scope in scopes(original):
        value: ir.Value | None = _output(scope, fold) if scope.label == fold.graph else None
        while value is not None and (producer := value.producer()) is not None:
            value = producer.inputs[data_input(producer, facts)]
            if display_name(producer) in fold.into:
                return (value.name if value is not None else None) or ""
    raise CheckError(f"fold {fold.name}: {fold.output} does not depend on {', '.join(fold.into)}")


def _output(scope: Scope, fold: Fold) -> ir.Value:
    return next(output for node in scope.graph for output in node.outputs if output.name == fold.output)


def _chain(model: ir.Model, fold: Fold, entering: str) -> tuple[_Chain, Facts]:
    facts = Facts(model)
    scope = next(scope for scope in scopes(model) if scope.label == fold.graph)
    value: ir.Value | None = _output(scope, fold)
    nodes: list[ir.Node] = []
    while value is not None and value.name != entering:
        producer = value.producer()
        if producer is None:
            raise CheckError(f"fold {fold.name}: {fold.output} does not depend on {entering}")
        nodes.append(producer)
        value = producer.inputs[data_input(producer, facts)]
    return _Chain(scope, tuple(reversed(nodes))), facts


def _segment(
    chain: _Chain,
    facts: Facts,
    change: Callable[[str, int, Array], Array],
    *,
    widen: bool = False,
) -> onnx.ModelProto:
    """Make a model of the chain alone, from "x" to "y", with its constants changed."""
    weight = facts.constant(chain.absorber.inputs[1])
    assert weight is not None
    dtype = _wide(weight.dtype) if widen else weight.dtype
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.from_numpy(dtype)))
    value = x
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    for position, node in enumerate(chain.nodes):
        data = data_input(node, facts)
        inputs: list[ir.Value | None] = []
        for index, source in enumerate(node.inputs):
            if index == data:
                inputs.append(value)
                continue
            array = facts.constant(source)
            if array is None:
                inputs.append(None)
                continue
            if array.dtype.name in PRECISION:
                array = change(node.op_type, index, array)
                array = array.astype(_wide(array.dtype)) if widen else array
            name = f"{position}.{index}"
            constant = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            constant.shape, constant.dtype = (
                ir.Shape(array.shape),
                ir.DataType.from_numpy(array.dtype),
            )
            initializers.append(constant)
            inputs.append(constant)
        attributes = [item for item in node.attributes.values() if not item.is_ref()]
        if widen:
            attributes = [
                ir.AttrFloat32(item.name, abs(attribute(node, item.name, 1.0)))
                if item.name in ("alpha", "beta")
                else item
                for item in attributes
            ]
        copy = ir.Node("", node.op_type, inputs, attributes, num_outputs=1, name=f"n{position}")
        nodes.append(copy)
        value = copy.outputs[0]
        value.name = f"v{position}"
    value.name = "y"
    value.type = ir.TensorType(ir.DataType.from_numpy(dtype))
    graph = ir.Graph(
        [x],
        [value],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": chain.scope.opset},
        name="segment",
    )
    return ir.to_proto(ir.Model(graph, ir_version=max(facts.model.ir_version, 4)))


def _absolute(op_type: str, index: int, array: Array) -> Array:
    """Make every term of the chain non-negative: see the derivation of M above."""
    if op_type == "BatchNormalization" and index == 3:
        return -np.abs(array)
    if op_type == "BatchNormalization" and index == 4:
        return array
    return np.abs(array)


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _entering_shape(node: ir.Node, weight: Array, facts: Facts) -> list[int]:
    """Return a shape that the operator accepts: a small batch, just larger than the kernel."""
    if node.op_type == "MatMul":
        return [4, weight.shape[0]]
    if node.op_type == "Gemm":
        features = weight.shape[1 if attribute(node, "transB", 0) else 0]
        bias = facts.constant(node.inputs[2] if len(node.inputs) > 2 else None)
        # A bias with several rows fixes the number of rows of the product.
        rows = bias.shape[0] if bias is not None and bias.ndim == 2 and bias.shape[0] > 1 else 4
        return [features, rows] if attribute(node, "transA", 0) else [rows, features]
    groups = attribute(node, "group", 1)
    channels = weight.shape[0] if node.op_type == "ConvTranspose" else weight.shape[1] * groups
    kernel = weight.shape[2:]
    dilations = attribute(node, "dilations", (1,) * len(kernel))
    spatial = [(size - 1) * step + 4 for size, step in zip(kernel, dilations, strict=True)]
    return [2, channels, *spatial]
