"""How far rounding may move the value of an expression: one rule per operator.

For every value ``v`` of an expression, in exact arithmetic, and ``v^`` as computed, a rule keeps a `Majorant`: an array
``M`` and a count ``n`` of roundings with

    |v| <= M    and    |v^ - v| <= gamma_n M,    gamma_n = n u / (1 - n u)

where ``u`` is the unit roundoff. The rules follow Higham, *Accuracy and Stability of Numerical Algorithms*, section 3.1
(``K`` products summed in any order cost ``gamma_K``) and lemma 3.3 (``gamma_i + gamma_j + gamma_i gamma_j <=
gamma_(i+j)``):

- Linear operators with a constant ``W``: ``M = |W| M_x + |c|`` and ``n = n_x + n_W + K``, one more for the bias. They
  are run with the absolute value of every constant; a batch norm, whose mean is subtracted, with ``-|mean|``.
- Sums add their ``M`` and count one; products multiply their ``M`` and add their ``n`` and one; a quotient by a
  constant is a product.
- Operators ``f`` with ``|f(x) - f(y)| <= L max|x - y|`` and ``f(0) = 0``, or bounds that are operands, scale by
  ``L``: Relu, Max, Min, Clip and maximum pooling with ``L = 1``, a slope ``s`` with ``L = max(1, |s|)``.
- What only moves data moves ``M``. Interpolation and averages have weights that are not negative (cubic ones are not:
  there the weights of one axis sum to at most ``1 + |a| / 2`` in absolute value), and both models use the same.

An operator without a rule raises `NoBound`; nothing is guessed.

Underflow: a rounding to a subnormal number is off by up to ``u lambda``, with ``lambda`` the smallest normal number.
So ``lambda`` is added to ``M`` wherever something is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from pybn.folding.affine import Array, is_supported
from pybn.folding.graph import attribute, standard_type
from pybn.folding.runtime import Operator
from pybn.folding.segments import Expression


class NoBound(ValueError):
    """No bound is derived for what the expression contains. The message is one line."""


@dataclass(frozen=True)
class Majorant:
    """What is known of the absolute value of an array, and of its roundings.

    Attributes
    ----------
    size : ndarray
        ``M``, in float32, or float64 for models of that type.
    products : int
        Roundings in sums of products; they happen in the type in which the runtime accumulates.
    others : int
        All other roundings, in the model's own type.
    value : ndarray or None
        The signed values, if they are a constant.
    """

    size: Array
    products: int = 0
    others: int = 0
    value: Array | None = None


# Integers and booleans are exact: their array stands for itself.
Known: TypeAlias = Majorant | Array


def is_float(array: Any) -> bool:
    """Say whether the array is of a type that rounds."""
    return isinstance(array, np.ndarray) and is_supported(array.dtype)


@dataclass(frozen=True)
class Arithmetic:
    """In what the expression is computed.

    Attributes
    ----------
    wide : dtype
        The type of majorants.
    smallest : float
        ``lambda``, the smallest normal number.
    entry_roundings : int
        Roundings of what enters: runtimes may keep what precedes in a wider type than the values that they return.
    constant_roundings : int
        1 if the constants are results of a fold, rounded once; 0 if they are what the model says.
    """

    wide: np.dtype[Any]
    smallest: float
    entry_roundings: int
    constant_roundings: int


class Majorants:
    """Evaluates the majorant of one expression."""

    def __init__(self, expression: Expression, arithmetic: Arithmetic) -> None:
        self._expression = expression
        self._arithmetic = arithmetic
        self._operators: dict[ir.Node, Operator] = {}

    def __call__(self, entries: Mapping[str, Array]) -> Known:
        """Return the majorant of the expression's value.

        Raises
        ------
        NoBound
            If an operator has no rule.
        """
        known: dict[ir.Value, Known] = {}
        for value in self._expression.entries:
            known[value] = self._leaf(entries[value.name or ""], self._arithmetic.entry_roundings)
        for value in self._expression.constants:
            known[value] = self._constant(value)
        for node in self._expression.nodes:
            inputs = [None if value is None else known[value] for value in node.inputs]
            call = Call(node, inputs, self._expression.opset, self._arithmetic, self._operator(node))
            results = self._rule(node, inputs)(call)
            known.update(zip(node.outputs, results, strict=False))
        if self._expression.output not in known:
            raise NoBound(f"no bound is derived for output {self._expression.output.index()} of {node.op_type}")
        return known[self._expression.output]

    def _leaf(self, array: Array, roundings: int) -> Known:
        if not is_float(array):
            return array
        size = self._widened(np.abs(array))
        return (
            Majorant(size + self._widened(self._arithmetic.smallest), others=roundings) if roundings else Majorant(size)
        )

    def _constant(self, value: ir.Value) -> Known:
        array = constant_array(value)
        if not is_float(array):
            return array
        signed = self._widened(array)
        if not self._arithmetic.constant_roundings:
            return Majorant(np.abs(signed), value=signed)
        return Majorant(np.abs(signed) + self._widened(self._arithmetic.smallest), others=1, value=signed)

    def _widened(self, array: Any) -> Array:
        widened: Array = np.asarray(array).astype(self._arithmetic.wide)
        return widened

    def _rule(self, node: ir.Node, inputs: Sequence[Known | None]) -> Rule:
        if any(item.is_ref() for item in node.attributes.values()):
            raise NoBound(f"an attribute of {node.op_type} is a parameter of the local function")
        op_type = standard_type(node, self._expression.facts.model)
        integers = bool(inputs) and not any(isinstance(known, Majorant) for known in inputs)
        if op_type in EXACT or (integers and op_type not in (None, "If", "Loop", "Scan")):
            return exact
        if op_type is None or op_type not in RULES:
            raise NoBound(f"no bound is derived for the operator {node.domain or 'ai.onnx'}::{node.op_type}")
        return RULES[op_type]

    def _operator(self, node: ir.Node) -> Operator:
        if node not in self._operators:
            self._operators[node] = Operator(node, self._expression.opset)
        return self._operators[node]


def constant_array(value: ir.Value) -> Array:
    """Return the array of an initializer, or of the output of a Constant node."""
    producer = value.producer()
    if producer is None:
        assert value.const_value is not None
        array: Array = value.const_value.numpy()
        return array
    name, item = next(iter(producer.attributes.items()))
    if item.is_ref():
        raise NoBound("a Constant is a parameter of the local function")
    if name == "value":
        return np.asarray(item.as_tensor().numpy())
    if name in ("value_float", "value_floats"):
        return np.array(item.value, dtype=np.float32)
    if name in ("value_int", "value_ints"):
        return np.array(item.value, dtype=np.int64)
    raise NoBound(f"no bound is derived for a Constant with {name}")


@dataclass(frozen=True)
class Call:
    """A node with what is known of its inputs."""

    node: ir.Node
    inputs: Sequence[Known | None]
    opset: int
    arithmetic: Arithmetic
    operator: Operator

    def optional(self, index: int) -> Known | None:
        """Return what is known of an input that may be absent."""
        return self.inputs[index] if index < len(self.inputs) else None

    def operand(self, index: int) -> Majorant:
        """Return the majorant of an input; an integer is exact."""
        known = self.optional(index)
        if known is None:
            raise NoBound(f"{self.node.op_type} lacks input {index}")
        return known if isinstance(known, Majorant) else Majorant(np.abs(known), value=known)

    def operands(self) -> list[Majorant]:
        """Return the majorants of all inputs."""
        return [self.operand(index) for index in range(len(self.inputs))]

    def constant(self, index: int) -> Array:
        """Return an input that must be a constant."""
        value = self.operand(index).value
        if value is None:
            raise NoBound(f"no bound is derived for {self.node.op_type} whose input {index} is not a constant")
        return value

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute."""
        return attribute(self.node, name, default)

    def run(self, replaced: Mapping[int, Array] | None = None, *, op_type: str = "", **attributes: Any) -> list[Array]:
        """Run the operator on the majorants of its inputs, some of them and of its attributes replaced."""
        arrays = [known.size if isinstance(known, Majorant) else known for known in self.inputs]
        for index, array in (replaced or {}).items():
            arrays[index] = array
        return self.operator.run(arrays, op_type=op_type, attributes=attributes)

    def rounded(self, size: Array, products: int, others: int) -> list[Majorant]:
        """Make the majorant of a result that has just been rounded."""
        wide = self.arithmetic.wide
        return [Majorant(size.astype(wide) + wide.type(self.arithmetic.smallest), products, others)]


Rule: TypeAlias = Callable[[Call], Sequence[Known]]


def most(operands: Sequence[Majorant]) -> tuple[int, int]:
    """Return the largest counts of several operands."""
    return (
        max((operand.products for operand in operands), default=0),
        max((operand.others for operand in operands), default=0),
    )


def exact(call: Call) -> Sequence[Known]:
    """Integers from integers, or from a shape: computed as in the model; floats are rounded once."""
    wide = call.arithmetic.wide
    return [
        Majorant(np.abs(array).astype(wide), others=1, value=array.astype(wide)) if is_float(array) else array
        for array in call.run()
    ]


def unchanged(call: Call) -> Sequence[Known]:
    """Relu, Neg and the like: no larger than the input, and nothing is rounded."""
    return [replace(call.operand(0), value=None)]


def moved(call: Call) -> Sequence[Known]:
    """Transpose and the like: the operator itself on the majorant of its data."""
    x = call.operand(0)
    sizes = call.run()
    values: Sequence[Array | None] = [None] * len(sizes) if x.value is None else call.run({0: x.value})
    return [Majorant(size, x.products, x.others, value) for size, value in zip(sizes, values, strict=True)]


def greatest(call: Call) -> Sequence[Known]:
    """Maximum pooling and other extremes: the greatest majorant. The indices of maxima are not continuous."""
    x = call.operand(0)
    op_type = "ReduceMax" if call.node.op_type == "ReduceMin" else ""
    return [Majorant(call.run(op_type=op_type)[0], x.products, x.others)]


def identity(call: Call) -> Sequence[Known]:
    """Identity: all that is known of the input."""
    return [call.operand(0)]


def dropout(call: Call) -> Sequence[Known]:
    """Dropout in evaluation mode."""
    mode = call.optional(2)
    if mode is not None and not (isinstance(mode, np.ndarray) and not mode.any()):
        raise NoBound("no bound is derived for Dropout in training mode")
    return unchanged(call)


def concat(call: Call) -> Sequence[Known]:
    """Concat: the data of several."""
    return [Majorant(call.run()[0], *most(call.operands()))]


def extreme(call: Call) -> Sequence[Known]:
    """Max and Min: a constant on its own side of zero makes no value larger (Max with one below zero, say)."""
    sign = 1 if call.node.op_type == "Max" else -1
    return _limited(call, call.operands(), [sign] * len(call.inputs))


def clip(call: Call) -> Sequence[Known]:
    """Clip is Max with its lower and Min with its upper bound."""
    if call.opset < 11:
        low, high = (np.array(call.attribute(name, end)) for name, end in (("min", -np.inf), ("max", np.inf)))
        limits = [Majorant(np.abs(low), value=low), Majorant(np.abs(high), value=high)]
        return _limited(call, [call.operand(0), *limits], [0, 1, -1])
    given = [index for index in range(3) if call.optional(index) is not None]
    return _limited(call, [call.operand(index) for index in given], [(0, 1, -1)[index] for index in given])


def _limited(call: Call, operands: Sequence[Majorant], signs: Sequence[int]) -> Sequence[Known]:
    """Bound ``max`` or ``min`` of operands; a constant counts where its value has the given sign.

    ``max(x, c)`` with ``c < 0`` is ``c`` only where ``|c| < |x|``, so that there its rounding is relative to ``|x|``.
    """
    data = [operand for operand in operands if operand.value is None] or operands
    size = data[0].size
    for operand, sign in zip(operands, signs, strict=True):
        limit = operand.size if operand.value is None or data is operands else sign * operand.value
        size = np.maximum(size, limit)
    return call.rounded(size, *most(operands))


def sloped(call: Call) -> Sequence[Known]:
    """LeakyRelu and PRelu: ``max(1, |slope|)`` times as large."""
    x = call.operand(0)
    slopes = call.operand(1) if len(call.inputs) > 1 else Majorant(np.zeros(()))
    negative = np.abs(call.run({0: -x.size})[0])
    return call.rounded(np.maximum(x.size, negative), x.products + slopes.products, x.others + slopes.others + 1)


def add(call: Call) -> Sequence[Known]:
    """Add and Sub: the sum of sizes."""
    products, others = most(call.operands())
    return call.rounded(call.run(op_type="Add")[0], products, others + 1)


def total(call: Call) -> Sequence[Known]:
    """Sum of any number of operands."""
    products, others = most(call.operands())
    return call.rounded(call.run()[0], products, others + len(call.inputs) - 1)


def multiply(call: Call) -> Sequence[Known]:
    """Mul: the product of sizes."""
    a, b = call.operands()
    return call.rounded(call.run()[0], a.products + b.products, a.others + b.others + 1)


def divide(call: Call) -> Sequence[Known]:
    """Div by a constant."""
    a, b = call.operands()
    quotient = call.run({1: np.abs(call.constant(1))})[0]
    return call.rounded(quotient, a.products + b.products, a.others + b.others + 1)


def batch_normalization(call: Call) -> Sequence[Known]:
    """BatchNormalization: 3 roundings for the scale, 1 for its product with the mean, 3 to apply both; -|mean|."""
    training = call.opset < 14 and any(output.name for output in call.node.outputs[1:])
    if training or call.attribute("training_mode", 0) or (call.opset < 7 and not call.attribute("is_test", 0)):
        raise NoBound("no bound is derived for BatchNormalization in training mode")
    x, *parameters = call.operands()
    size = call.run({3: -call.operand(3).size, 4: call.constant(4)})[0]
    others = x.others + sum(parameter.others for parameter in parameters) + 7
    return call.rounded(size, x.products + most(parameters)[0], others)


def convolution(call: Call) -> Sequence[Known]:
    """Conv and ConvTranspose: an output sums one product for each weight of its channel."""
    x, weight = call.operand(0), call.operand(1)
    transposed = call.node.op_type == "ConvTranspose"
    channels = weight.size.shape[1] * call.attribute("group", 1) if transposed else weight.size.shape[0]
    products = x.products + weight.products + weight.size.size // max(channels, 1)
    others = x.others + weight.others
    if call.optional(2) is not None:
        bias = call.operand(2)
        products, others = max(products, bias.products), max(others, bias.others) + 1
    return call.rounded(call.run()[0], products, others)


def gemm(call: Call) -> Sequence[Known]:
    """Gemm: 3 roundings for alpha, beta and the sum."""
    a, b = call.operand(0), call.operand(1)
    products = a.products + b.products + a.size.shape[0 if call.attribute("transA", 0) else 1]
    others = a.others + b.others
    if call.optional(2) is not None:
        c = call.operand(2)
        products, others = max(products, c.products), max(others, c.others)
    size = call.run(alpha=abs(call.attribute("alpha", 1.0)), beta=abs(call.attribute("beta", 1.0)))[0]
    return call.rounded(size, products, others + 3)


def matmul(call: Call) -> Sequence[Known]:
    """MatMul: sums over the last axis of the left operand."""
    a, b = call.operands()
    products = a.products + b.products + a.size.shape[-1]
    return call.rounded(call.run()[0], products, a.others + b.others)


def average(call: Call) -> Sequence[Known]:
    """AveragePool, GlobalAveragePool, ReduceMean and ReduceSum: a sum, and a division."""
    x = call.operand(0)
    size = call.run()[0]
    kernel = call.attribute("kernel_shape", None)
    terms = int(np.prod(kernel)) if kernel is not None else x.size.size // max(size.size, 1)
    return call.rounded(size, x.products + terms, x.others + 1)


def resize(call: Call) -> Sequence[Known]:
    """Resize and Upsample: nearest neighbours, or weighted means of neighbours along each axis."""
    x = call.operand(0)
    mode = call.attribute("mode", "nearest")
    # The scales are float32 whatever the data is, and a factor of 1 means that an axis stays as it is.
    given = {i: call.operand(i) for i in (1, 2) if isinstance(call.optional(i), Majorant)}
    scales = {i: (s.size if s.value is None else s.value).astype(np.float32) for i, s in given.items()}
    size = call.run(scales)[0]
    if mode == "nearest":
        return [Majorant(size, x.products, x.others)]
    if call.attribute("exclude_outside", 0):
        raise NoBound("no bound is derived for Resize with exclude_outside")
    axes = [axis for axis, (before, after) in enumerate(zip(x.size.shape, size.shape, strict=True)) if before != after]
    taps = 4 if mode == "cubic" else 2
    if call.attribute("antialias", 0):
        # At most all that there is along an axis.
        taps = max((x.size.shape[axis] for axis in axes), default=1)
    if mode == "cubic":
        gain = 1 + abs(call.attribute("cubic_coeff_a", -0.75)) / 2
        peak = x.size.max(axis=tuple(axes), keepdims=True, initial=0.0)
        if call.attribute("antialias", 0):
            raise NoBound("no bound is derived for cubic Resize with antialias")
        size = np.broadcast_to(peak * gain ** len(axes), size.shape)
    # A product for each axis and term, and the sum of the terms.
    return call.rounded(size, x.products + taps ** len(axes), x.others + len(axes) + 1)


def pad(call: Call) -> Sequence[Known]:
    """Pad: the data, and the absolute value of what is put around it."""
    x = call.operand(0)
    value = abs(call.attribute("value", 0.0))
    size = call.run(**({"value": value} if call.opset < 11 else {}))[0]
    filling = call.operand(2).others if call.opset >= 11 and call.optional(2) is not None else 0
    return [Majorant(size, x.products, max(x.others, filling))]


def cast(call: Call) -> Sequence[Known]:
    """Cast: one rounding between floats; integers from floats are not continuous."""
    x = call.operand(0)
    if not ir.DataType(call.attribute("to", 0)).is_floating_point():
        raise NoBound("no bound is derived for a Cast of floats to integers")
    [rounded] = call.rounded(x.size, x.products, x.others + 1)
    return [replace(rounded, value=x.value)]


def dequantize(call: Call) -> Sequence[Known]:
    """DequantizeLinear: the exact integer times the scale."""
    scale = call.operand(1)
    size = np.abs(call.run({1: scale.size.astype(np.float32)})[0])
    return call.rounded(size, scale.products, scale.others + 2)


# Operators whose result depends on the shape of their input only.
EXACT = frozenset({"Shape", "Size"})

RULES: dict[str, Rule] = {
    "Abs": unchanged,
    "Add": add,
    "AveragePool": average,
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Conv": convolution,
    "ConvTranspose": convolution,
    "DepthToSpace": moved,
    "DequantizeLinear": dequantize,
    "Div": divide,
    "Dropout": dropout,
    "Expand": moved,
    "Flatten": moved,
    "Gather": moved,
    "Gemm": gemm,
    "GlobalAveragePool": average,
    "GlobalMaxPool": greatest,
    "Identity": identity,
    "LeakyRelu": sloped,
    "MatMul": matmul,
    "Max": extreme,
    "MaxPool": greatest,
    "Min": extreme,
    "Mul": multiply,
    "Neg": unchanged,
    "PRelu": sloped,
    "Pad": pad,
    "ReduceMax": greatest,
    "ReduceMean": average,
    "ReduceMin": greatest,
    "ReduceSum": average,
    "Relu": unchanged,
    "Reshape": moved,
    "Resize": resize,
    "Slice": moved,
    "SpaceToDepth": moved,
    "Split": moved,
    "Squeeze": moved,
    "Sub": add,
    "Sum": total,
    "Tile": moved,
    "Transpose": moved,
    "Unsqueeze": moved,
    "Upsample": resize,
}
