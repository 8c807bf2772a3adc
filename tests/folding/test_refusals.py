"""Graphs that must not be folded, each with the reason that must be given; and the mistakes that other tools make.

The graphs are in ONNX's own text format. `BN(c)` stands for a batch norm of ``c`` with the parameters gamma, beta, mean
and var, and `BN2` for one with others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from fold_models import PARAMETERS, tensor
from onnx import helper, parser
from oracles import fold, retyped, survive

from pybn.folding.reasons import OF_MODULES, UNLOCK, Reason

RNG = np.random.default_rng(21)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def parameters(channels: int = 4, number: str = "", **changes: Any) -> dict[str, np.ndarray]:
    """Of a batch norm with scales of both signs."""
    arrays = (normal(channels), normal(channels), normal(channels), RNG.uniform(0.5, 2, channels))
    values = dict(zip(PARAMETERS, arrays, strict=True))
    return {name + number: array for name, array in {**values, **changes}.items()}


CONSTANTS = {
    "w": normal(4, 3, 1, 1), "w3": normal(4, 3, 3, 3), "v": normal(4, 4, 1, 1), "b": normal(4), "k": normal(4, 1, 1),
    "m": normal(3, 4), "square": normal(5, 5), "zero": np.array(0.0),
    **parameters(), **parameters(number="2"), **parameters(5, "5"),
}  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """A graph as text, with an input x, an output y, and the constants that the text names."""

    text: str
    reason: Reason | None = None
    opset: int = 17
    x: str = "2,3,6,6"
    constants: dict[str, Any] = field(default_factory=dict)
    aggressive: bool = False
    dtype: str = "float64"
    inputs: str = ""
    outputs: str = ""
    more: str = ""
    rank: int = 4

    def model(self) -> onnx.ModelProto:
        text = re.sub(r"BN(\d?)\(([\w, ]+)\)", self._batch_norm, self.text)
        values = {**CONSTANTS, **self.constants}
        named = [name for name in values if re.search(rf"\b{name}\b", text)]
        header = f'<ir_version: 8, opset_import: ["": {self.opset}, "com.example": 1]>'
        signature = f"(double[{self.x}] x{self.inputs}) => (double[1] y{self.outputs})"
        proto = parser.parse_model(f"{header} graph {signature} {{ {text} }} {self.more}")
        proto.graph.initializer.extend(tensor(name, np.asarray(values[name])) for name in named)
        if not self.more:
            del proto.opset_import[1:]
        for output in proto.graph.output:  # of whatever shape it has
            output.type.tensor_type.ClearField("shape")
        shapes = {v.name: v for v in onnx.shape_inference.infer_shapes(proto).graph.output}
        for output in proto.graph.output:
            output.CopyFrom(shapes[output.name])
            if not output.type.tensor_type.HasField("shape"):  # where inference does not know the operator
                output.CopyFrom(helper.make_tensor_value_info(output.name, onnx.TensorProto.DOUBLE, [None] * self.rank))
        return retyped(proto, self.dtype) if self.dtype != "float64" else proto

    @staticmethod
    def _batch_norm(match: re.Match[str]) -> str:
        number, inputs = match.groups()
        return f"BatchNormalization({inputs}, {', '.join(name + number for name in PARAMETERS)})"


CONV = "c = Conv(x, w)"

REFUSALS: dict[str, Graph] = {
    # The batch norm itself
    "training mode": Graph(
        f"{CONV} y = BatchNormalization<training_mode = 1>(c, gamma, beta, mean, var)", Reason.TRAINING_MODE
    ),
    "training mode with its statistics": Graph(
        f"{CONV} y, m1, v1 = BatchNormalization<training_mode = 1>(c, gamma, beta, mean, var)", Reason.TRAINING_MODE
    ),
    "more than one output before opset 14": Graph(
        f"{CONV} y, m1, v1, m2, v2 = BN(c)", Reason.TRAINING_MODE, opset=9
    ),
    "is_test missing before opset 7": Graph(f"{CONV} y = BN(c)", Reason.TRAINING_MODE, opset=6),
    "is_test = 0 before opset 7": Graph(
        f"{CONV} y = BatchNormalization<is_test = 0>(c, gamma, beta, mean, var)", Reason.TRAINING_MODE, opset=6
    ),
    "spatial = 0": Graph(
        f"{CONV} y = BatchNormalization<spatial = 0>(c, gamma, beta, mean, var)", Reason.SPATIAL_ZERO, opset=8,
        constants=parameters(gamma=normal(4, 6, 6), beta=normal(4, 6, 6), mean=normal(4, 6, 6), var=np.ones((4, 6, 6))),
    ),
    "negative variance": Graph(
        f"{CONV} y = BN(c)", Reason.INVALID_VARIANCE, constants={"var": np.array([1, 1, -1, 1.0])}
    ),
    "variance + epsilon of zero": Graph(
        f"{CONV} y = BatchNormalization<epsilon = 0.5>(c, gamma, beta, mean, var)", Reason.INVALID_VARIANCE,
        constants={"var": np.array([1, 1, -0.5, 1])},
    ),
    "NaN in the variance": Graph(
        f"{CONV} y = BN(c)", Reason.NOT_FINITE, constants={"var": np.array([1, np.nan, 1, 1])}
    ),
    "NaN in the mean": Graph(f"{CONV} y = BN(c)", Reason.NOT_FINITE, constants={"mean": np.array([1, np.nan, 1, 1])}),
    "infinite gamma": Graph(f"{CONV} y = BN(c)", Reason.NOT_FINITE, constants={"gamma": np.array([1, np.inf, 1, 1])}),
    "infinite variance": Graph(f"{CONV} y = BN(c)", Reason.NOT_FINITE, constants={"var": np.array([1, np.inf, 1, 1])}),
    "statistics that are used": Graph(
        f"{CONV} y, m1, v1 = BN(c)", Reason.EXTRA_OUTPUTS, opset=14, outputs=", double[1] m1"
    ),
    # Its parameters
    "integer parameters": Graph(f"{CONV} y = BN(c)", Reason.UNSUPPORTED_DTYPE, constants={"gamma": np.arange(4)}),
    "a parameter is computed": Graph(
        f"a = Abs(mean) {CONV} y = BatchNormalization(c, gamma, beta, a, var)", Reason.PARAMETER_NOT_CONSTANT
    ),
    "a parameter is an input": Graph(
        f"{CONV} y = BatchNormalization(c, gamma, beta, given, var)", Reason.PARAMETER_NOT_CONSTANT,
        inputs=", double[4] given",
    ),
    "a parameter is an overridable default": Graph(
        f"{CONV} y = BN(c)", Reason.PARAMETER_OVERRIDABLE, inputs=", double[4] gamma"
    ),
    "parameters of different lengths": Graph(
        f"{CONV} y = BN(c)", Reason.PARAMETER_SHAPE, constants={"mean": normal(3)}
    ),
    "parameters of rank 2": Graph(f"{CONV} y = BN(c)", Reason.PARAMETER_SHAPE, constants={"beta": normal(4, 1)}),
    "as many channels as another operator has": Graph(f"{CONV} y = BN5(c)", Reason.PARAMETER_SHAPE),
    # The way back and the way forth
    "nothing before or behind": Graph("y = BN(x)", Reason.NO_LINEAR_PRODUCER, x="2,4,6,6"),
    "a nonlinear operator before": Graph(f"{CONV} s = Sigmoid(c) y = BN(s)", Reason.NO_LINEAR_PRODUCER),
    "softmax before, softmax behind": Graph(
        f"{CONV} s = Softmax(c) n = BN(s) y = Softmax(n)", Reason.NO_LINEAR_PRODUCER
    ),
    "a batch norm of indices": Graph(
        f"{CONV} p, i = MaxPool<kernel_shape = [2, 2]>(c) f = Cast<to = 11>(i) y = BN(f)", Reason.NO_LINEAR_PRODUCER
    ),
    "an operator of another domain": Graph(
        "c = com.example.Conv(x, w) y = BN(c)", Reason.FOREIGN_DOMAIN, more=" ", rank=4
    ),
    "the convolution is a graph output": Graph(f"{CONV} y = BN(c)", Reason.GRAPH_OUTPUT, outputs=", double[1] c"),
    "the convolution has another consumer": Graph(
        f"{CONV} n = BN(c) a = Sigmoid(c) y = Add(n, a)", Reason.OTHER_CONSUMER
    ),
    "the convolution is multiplied by its own batch norm": Graph(
        f"{CONV} n = BN(c) y = Mul(n, c)", Reason.OTHER_CONSUMER
    ),
    "two batch norms on one convolution": Graph(
        f"{CONV} n = BN(c) o = BN2(c) s = Sigmoid(n) t = Sigmoid(o) y = Add(s, t)", Reason.OTHER_CONSUMER
    ),
    "captured by a subgraph": Graph(
        f"{CONV} n = BN(c) z = If(yes)<then_branch = t () => (double[A, B, D, E] r) {{ r = Sigmoid(c) }}, "
        "else_branch = e () => (double[A, B, D, E] q) { q = Sigmoid(c) }> y = Add(n, z)",
        Reason.SUBGRAPH_CAPTURE, inputs=", bool yes",
    ),
    "inside a subgraph, the convolution outside": Graph(
        f"{CONV} y = If(yes)<then_branch = t () => (double[A, B, D, E] r) {{ r = BN(c) }}, "
        "else_branch = e () => (double[A, B, D, E] q) { q = Sigmoid(c) }>",
        Reason.SUBGRAPH_CAPTURE, inputs=", bool yes",
    ),
    "an epsilon that is a parameter of a local function": Graph(
        "y = com.example.Block<eps = 0.1>(x, w, gamma, beta, mean, var)", Reason.ATTRIBUTE_NOT_CONSTANT,
        more='<domain: "com.example", opset_import: ["": 17]> Block<eps>(x, w, gamma, beta, mean, var) => (y) '
        "{ c = Conv(x, w) y = BatchNormalization<epsilon: float = @eps>(c, gamma, beta, mean, var) }",
    ),
    "Dropout in training": Graph(
        f"{CONV} d = Dropout(c, ratio, on) y = BN(d)", Reason.DROPOUT_TRAINING,
        constants={"ratio": np.array(0.5), "on": np.array(True)},
    ),
    "Dropout whose mode is an input": Graph(
        f"{CONV} d = Dropout(c, ratio, on) y = BN(d)", Reason.DROPOUT_TRAINING,
        constants={"ratio": np.array(0.5)}, inputs=", bool on",
    ),
    # Scales and shifts that an operator does not let pass
    "negative scales behind Relu": Graph(
        f"{CONV} r = Relu(c) y = BN(r)", Reason.NEGATIVE_SCALE,
        constants=parameters(gamma=-np.ones(4), beta=np.zeros(4), mean=np.zeros(4)),
    ),
    "shifts behind Relu": Graph(
        f"{CONV} r = Relu(c) y = BN(r)", Reason.SHIFT_STAYS, constants={"gamma": np.ones(4)}
    ),
    "negative scales behind MaxPool": Graph(
        f"{CONV} p = MaxPool<kernel_shape = [2, 2]>(c) y = BN(p)", Reason.NEGATIVE_SCALE,
        constants={"gamma": np.array([1, 1, -1, 1.0])},
    ),
    "shifts behind Pad": Graph(
        f"{CONV} p = Pad(c, pads) y = BN(p)", Reason.PADDING,
        constants={"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
    ),
    "shifts behind an average that counts its padding": Graph(
        f"{CONV} p = AveragePool<kernel_shape = [2, 2], pads = [1, 1, 0, 0], count_include_pad = 1>(c) y = BN(p)",
        Reason.PADDING,
    ),
    "shifts before a padded convolution": Graph(
        "s = Sigmoid(x) n = BN(s) y = Conv<pads = [1, 1, 1, 1]>(n, w4)", Reason.NO_GAIN, x="2,4,6,6",
        constants={"w4": normal(2, 4, 3, 3)},
    ),
    # With the scale of a channel gone, its shift cannot be added before the convolution either.
    "shifts and scales of zero before a padded convolution of unknown size": Graph(
        "s = Sigmoid(x) n = BN(s) y = Conv<pads = [1, 1, 1, 1]>(n, w4)", Reason.PADDING, x="2,4,H,W",
        constants={"w4": normal(2, 4, 3, 3), "gamma": np.array([1, 0, 1, 1.0])}, aggressive=True,
    ),
    "shifts before a padded convolution of a huge image": Graph(
        "s = Sigmoid(x) n = BN(s) y = Conv<pads = [1, 1, 1, 1]>(n, w4)", Reason.TOO_LARGE, x="2,4,20000,20000",
        constants={"w4": normal(2, 4, 3, 3)},
    ),
    "shifts before an average of a huge image that counts its padding": Graph(
        "s = Sigmoid(x) n = BN(s) "
        "p = AveragePool<kernel_shape = [2, 2], pads = [1, 1, 0, 0], count_include_pad = 1>(n) y = Conv(p, v)",
        Reason.TOO_LARGE, x="2,4,20000,20000",
    ),
    "shifts before a padded convolution along an absurdly long axis": Graph(
        "s = Sigmoid(x) n = BN(s) y = Conv<pads = [1, 1]>(n, w4)", Reason.TOO_LARGE, x="2,4,1099511627776", rank=3,
        constants={"w4": normal(2, 4, 3)},
    ),
    "part of absurdly many channels": Graph(
        "s = Sigmoid(x) h = Slice(s, start, end, along) y = Mul(h, row)", Reason.TOO_LARGE, x="1,1099511627776", rank=2,
        constants={
            "start": np.array([0]), "end": np.array([4]), "along": np.array([1]), "row": normal(1, 4),
        },
    ),
    "pads of the wrong number": Graph(
        "s = Sigmoid(x) n = BN(s) p = MaxPool<kernel_shape = [2, 2], pads = [1, 1]>(n) y = Conv(p, v)",
        Reason.PARAMETER_SHAPE, x="2,4,6,6", constants={"gamma": np.ones(4)},
    ),
    "a C of Gemm that fits no product": Graph(
        "s = Sigmoid(x) n = BN(s) y = Gemm(n, v2, c3)", Reason.PARAMETER_SHAPE, x="2,4", rank=2,
        constants={"v2": normal(4, 2), "c3": normal(3)},
    ),
    "scales for other channels than the quantized weight has": Graph(
        "q = DequantizeLinear<axis = 0>(w8, s3) c = Conv(x, q) y = BN(c)", Reason.WEIGHT_NOT_CONSTANT, dtype="float32",
        constants={"w8": np.ones((4, 3, 1, 1), "int8"), "s3": np.full(3, 0.1, "float32")},
    ),
    "zero points for other channels than the scales": Graph(
        "q = DequantizeLinear<axis = 0>(w8, s4, z3) c = Conv(x, q) y = BN(c)", Reason.WEIGHT_NOT_CONSTANT,
        dtype="float32",
        constants={
            "w8": np.ones((4, 3, 1, 1), "int8"), "s4": np.full(4, 0.1, "float32"), "z3": np.zeros(3, "int8"),
        },
    ),
    "a quantized weight behind": Graph(
        "s = Sigmoid(x) n = BN(s) q = DequantizeLinear<axis = 0>(w8, s4) y = Conv(n, q)", Reason.QUANTIZATION,
        x="2,4,6,6", dtype="float32",
        constants={"w8": np.ones((4, 4, 1, 1), "int8"), "s4": np.full(4, 0.1, "float32")},
    ),
    "a residual whose other branch cannot be scaled": Graph(
        "c = Conv(x, v) a = Sigmoid(x) s = Add(c, a) y = BN(s)", Reason.NO_LINEAR_PRODUCER, x="2,4,6,6"
    ),
    "a residual of one convolution and itself through Relu": Graph(
        "c = Conv(x, v) r = Relu(c) s = Add(c, r) y = BN(s)", Reason.OTHER_CONSUMER, x="2,4,6,6"
    ),
    "Resize that extrapolates": Graph(
        f'{CONV} r = Resize<coordinate_transformation_mode = "tf_crop_and_resize", extrapolation_value = 1.0>'
        "(c, roi, scales) y = BN(r)",
        Reason.PADDING,
        constants={
            "roi": np.array([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5]),
            "scales": np.array([1, 1, 1, 1], "float32"),
        },
    ),
    "an average over the channels": Graph(
        f"{CONV} r = ReduceMean<axes = [1]>(c) y = BatchNormalization(r, one, one, one, one)", Reason.CHANNEL_AXIS,
        constants={"one": np.array([2.0])},
    ),
    # Axes
    "a linear layer over (N, C, F) with F equal to C": Graph(
        "c = MatMul(x, square) y = BN5(c)", Reason.CHANNEL_AXIS, x="2,5,5"
    ),
    "a linear layer over (N, C, F) with F equal to C, and its bias": Graph(
        "c = MatMul(x, square) d = Add(c, fb) y = BN5(d)", Reason.AMBIGUOUS_BROADCAST, x="2,5,5",
        constants={"fb": normal(5)},
    ),
    "rows of a transposed product": Graph(
        "c = Gemm(x, square) t = Transpose<perm = [1, 0]>(c) y = BN5(t)", Reason.CHANNEL_AXIS, x="5,5"
    ),
    "space in place of channels": Graph(
        "c = Conv(x, v) t = Transpose<perm = [0, 2, 1, 3]>(c) y = BN(t)", Reason.CHANNEL_AXIS, x="2,4,4,6"
    ),
    "space and channels joined": Graph(
        f"{CONV} f = Flatten(c) y = BatchNormalization(f, g144, b144, m144, v144)", Reason.CHANNEL_AXIS,
        constants={"g144": normal(144), "b144": normal(144), "m144": normal(144), "v144": np.ones(144)},
    ),
    "a reshape that shifts the channels": Graph(
        f"{CONV} r = Reshape(c, to) y = BN(r)", Reason.CHANNEL_AXIS, x="2,3,2,2", constants={"to": np.array([4, 4, 2])},
    ),
    "a linear layer of unknown rank": Graph(
        "r = Reshape(x, to) c = MatMul(r, m4) y = BN(c)", Reason.CHANNEL_AXIS_UNPROVEN, x="4,4",
        inputs=", int64[L] to", constants={"m4": normal(4, 4)},
    ),
    "a flattening of unknown size": Graph(
        f"{CONV} f = Flatten(c) y = BN(f)", Reason.CHANNEL_AXIS_UNPROVEN, x="2,3,H,W",
    ),
    "a constant [C] where the width equals C": Graph(
        "c = Conv(x, w) a = Mul(c, g) y = Sigmoid(a)", Reason.CHANNEL_AXIS, x="2,3,6,4", constants={"g": normal(4)}
    ),
    "a constant [C] where the width equals C, before a batch norm": Graph(
        "c = Conv(x, w) a = Add(c, g) y = BN(a)", Reason.AMBIGUOUS_BROADCAST, x="2,3,6,4", constants={"g": normal(4)}
    ),
    "a constant that adds an axis": Graph(
        "c = Conv(x, w) a = Mul(c, g) y = Sigmoid(a)", Reason.AMBIGUOUS_BROADCAST,
        constants={"g": normal(1, 1, 1, 1, 1)},
    ),
    "a constant that adds an axis, with as many values as channels": Graph(
        "c = Conv(x, w) a = Mul(c, g) y = Sigmoid(a)", Reason.AMBIGUOUS_BROADCAST, x="4,3,6,6",
        constants={"g": normal(1, 4, 1, 1, 1)},
    ),
    "a constant that makes several channels of one": Graph(
        "c = Conv(x, w1) a = Mul(c, k) y = Sigmoid(a)", Reason.CHANNEL_AXIS_UNPROVEN,
        constants={"w1": normal(1, 3, 1, 1)},
    ),
    "a product of unknown rank": Graph(
        "r = Reshape(x, to) c = Mul(r, k) y = Sigmoid(c)", Reason.CHANNEL_AXIS_UNPROVEN, inputs=", int64[L] to"
    ),
    "so far away that nobody looks": Graph(
        f"{CONV} i0 = Identity(c) {' '.join(f'i{n + 1} = Identity(i{n})' for n in range(400))} y = BN(i400)",
        Reason.TOO_FAR,
    ),
    "a matrix of an opset without broadcasting": Graph(
        "c = MatMul(x, m) y = BatchNormalization<is_test = 1>(c, gamma, beta, mean, var)", Reason.OLD_OPSET, opset=6,
        x="2,3",
    ),
    # Weights
    "integer weights": Graph(
        "i = Cast<to = 7>(x) c = MatMul(i, mi) d = Cast<to = 11>(c) y = BN(d)", Reason.NO_LINEAR_PRODUCER, x="2,3",
        constants={"mi": np.arange(12).reshape(3, 4)},
    ),
    "a bias of another type": Graph(
        "c = Conv(x, w, b) y = BN(c)", Reason.TYPE_MISMATCH, constants={"b": normal(4).astype("float32")}
    ),
    "a batch norm in a wider type than the convolution": Graph(
        "n = Cast<to = 1>(x) c = Conv(n, ws) d = Cast<to = 11>(c) y = BN(d)", Reason.NARROWER_TYPE,
        constants={"ws": normal(4, 3, 1, 1).astype("float32")},
    ),
    "a quantized weight that has no opposite": Graph(
        "q = DequantizeLinear(w8, s8, z8) c = Conv(x, q) y = BN(c)", Reason.QUANTIZATION, dtype="float32",
        constants={
            "w8": np.full((4, 3, 1, 1), -128, "int8"), "s8": np.float32(0.1), "z8": np.int8(0), "gamma": -np.ones(4)
        },
    ),
    "the weight is an input": Graph(
        "c = Conv(x, given) y = BN(c)", Reason.WEIGHT_NOT_CONSTANT, inputs=", double[4,3,1,1] given"
    ),
    "the weight is computed": Graph("a = Abs(w) c = Conv(x, a) y = BN(c)", Reason.WEIGHT_NOT_CONSTANT),
    "the bias is computed": Graph("a = Abs(b) c = Conv(x, w, a) y = BN(c)", Reason.WEIGHT_NOT_CONSTANT),
    "the weight is an overridable default": Graph(
        f"{CONV} y = BN(c)", Reason.WEIGHT_OVERRIDABLE, inputs=", double[4,3,1,1] w"
    ),
    "the bias is an overridable default": Graph(
        "c = Conv(x, w, b) y = BN(c)", Reason.WEIGHT_OVERRIDABLE, inputs=", double[4] b"
    ),
    "infinite weights": Graph(f"{CONV} y = BN(c)", Reason.NOT_FINITE, constants={"w": np.full((4, 3, 1, 1), np.inf)}),
    "float16 weights that overflow": Graph(
        f"{CONV} y = BN(c)", Reason.OUTSIDE_DTYPE, dtype="float16",
        constants={"w": np.full((4, 3, 1, 1), 1e4), "gamma": np.full(4, 100.0), "mean": np.zeros(4)},
    ),
    "a float16 bias that overflows": Graph(
        f"{CONV} y = BN(c)", Reason.OUTSIDE_DTYPE, dtype="float16",
        constants={"gamma": np.full(4, 300.0), "mean": np.full(4, 3e3), "var": np.ones(4)},
    ),
    "float32 weights that overflow": Graph(
        f"{CONV} y = BN(c)", Reason.OUTSIDE_DTYPE, dtype="float32",
        constants={"w": np.full((4, 3, 1, 1), 1e30), "gamma": np.full(4, 1e30), "var": np.ones(4)},
    ),
    "float32 weights that overflow, behind": Graph(
        "s = Sigmoid(x) n = BN(s) y = Conv(n, v)", Reason.OUTSIDE_DTYPE, x="2,4,6,6", dtype="float32",
        constants={"v": np.full((4, 4, 1, 1), 1e30), "gamma": np.full(4, 1e30), "var": np.ones(4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusal(case):
    """Nothing is changed, and the reason is named, with what would help."""
    graph = REFUSALS[case]
    model = graph.model()
    onnx.checker.check_model(model)  # what full_check adds would reject some of these before they are refused
    result = fold(model, graph.aggressive)
    rows = result.report.batch_norms or result.report.affines
    assert [row.reason for row in rows if not hasattr(row, "into")][:1] == [graph.reason], rows
    assert not result.report.folds
    assert result.model == model
    assert UNLOCK[graph.reason] in rows[0].sentence
    assert rows[0].detail


def test_refusals_show_every_reason():
    """A reason that no graph shows is one that is not known to be given."""
    elsewhere = {"skipped", "meets-itself", "no-linear-consumer"}
    of_models = {reason.value for reason in Reason} - {reason.value for reason in OF_MODULES}
    assert {graph.reason.value for graph in REFUSALS.values()} | elsewhere >= of_models


# Mistakes of other tools: the right fold, or none


MISTAKES = {
    "grouped ConvTranspose scaled on the wrong axis": Graph(
        "c = ConvTranspose<group = 2>(x, t) y = BN(c)", x="2,4,5,5", constants={"t": normal(4, 2, 2, 2)}
    ),
    "grouped ConvTranspose whose groups are as wide as it is deep": Graph(
        "c = ConvTranspose<group = 2>(x, t) y = BN(c)", x="2,8,5,5", constants={"t": normal(8, 2, 2, 2)}
    ),
    "MatMul, Transpose, batch norm scaled on the wrong axis": Graph(
        "c = MatMul(x, square) t = Transpose<perm = [0, 2, 1]>(c) y = BN5(t)", x="2,5,5", aggressive=True
    ),
    "MatMul, Reshape, batch norm scaled on the wrong axis": Graph(
        "c = MatMul(x, square) r = Reshape(c, to) y = BN5(r)", x="2,5,5", constants={"to": np.array([0, 5, -1])},
        aggressive=True,
    ),
    "Gemm, Reshape, batch norm": Graph(
        "c = Gemm(x, square) r = Reshape(c, to) y = BN5(r)", x="10,5", constants={"to": np.array([2, 5, 5])},
    ),
    "weights shared by two convolutions scaled twice": Graph(
        "c = Conv(x, w) n = BN(c) d = Conv(x, w) o = BN2(d) y = Mul(n, o)"
    ),
    "weights shared with a convolution without batch norm": Graph(
        "c = Conv(x, w) n = BN(c) d = Conv(x, w) y = Mul(n, d)"
    ),
    "a module called twice": Graph("c = Conv(x, v) n = BN(c) d = Conv(n, v) y = BN(d)", x="2,4,6,6"),
    "a bias shared by convolution and batch norm": Graph(
        "c = Conv(x, w, b) n = BatchNormalization(c, gamma, b, b, var) d = Conv(x, w, b) y = Mul(n, d)"
    ),
    "an empty-string bias": Graph('c = Conv(x, w, "") y = BN(c)'),
    "an empty-string C of Gemm": Graph('c = Gemm(x, m, "") y = BN(c)', x="2,3"),
    "a C of Gemm with one value per row": Graph("c = Gemm<beta = 0.5>(x, m, rows) y = BN(c)", x="2,3",
                                                constants={"rows": normal(2, 1)}),
    "a C of Gemm that beta ignores": Graph("c = Gemm<beta = 0.0>(x, m, b) y = BN(c)", x="2,3",
                                           constants={"b": np.full(4, 1e300)}),
    "Div with the constant on the left": Graph("c = Conv(x, w) d = Abs(c) e = Add(d, k2) y = Div(k2, e)",
                                               constants={"k2": np.array(3.0)}),
    "integer arithmetic": Graph("i = Cast<to = 7>(x) j = Mul(i, two) k3 = Div(j, two) y = Cast<to = 11>(k3)",
                                constants={"two": np.array(2)}),
    "a mean of zero sizes": Graph("c = Conv(x, w) y = BN(c)", x="0,3,6,6"),
    "a pool over nothing but padding": Graph(
        "c = Conv(x, w) p = MaxPool<kernel_shape = [2, 2], pads = [1, 1, 1, 1], strides = [2, 2]>(c) y = BN(p)",
        constants={"gamma": np.ones(4)},
    ),
    "Clip with a bound that is an input": Graph(
        "c = Conv(x, w) p = Clip(c, low) y = Mul(p, two)", inputs=", double low", constants={"two": np.array(2.0)}
    ),
    "a Clip with crossed bounds": Graph(
        "c = Conv(x, w) p = Clip(c, high, low) y = Mul(p, two)",
        constants={"two": np.array(-2.0), "high": np.array(1.0), "low": np.array(-1.0)},
    ),
    "Resize by a crop": Graph(
        'c = Conv(x, w) r = Resize<coordinate_transformation_mode = "tf_crop_and_resize", extrapolation_value = 1.0>'
        "(c, roi, scales) y = BN(r)",
        constants={"roi": np.array([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5]), "scales": np.array([1, 1, 1, 1], "float32")},
    ),
    "an average whose last window leaves the data": Graph(
        "s = Sigmoid(x) n = BN(s) p = AveragePool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(n) "
        "y = Conv(p, v)", x="2,4,6,6", opset=10,
    ),
    "a batch norm of vectors": Graph("y = BatchNormalization(x, one, one, one, one)", x="3",
                                     constants={"one": np.array([2.0])}),
    "one value used twice by the same Add": Graph("c = Conv(x, w) a = Add(c, c) y = BN(a)"),
    "one value used twice by the same Concat": Graph(
        "c = Conv(x, w2) a = Concat<axis = 1>(c, c) y = BN(a)", constants={"w2": normal(2, 3, 1, 1)}
    ),
    "a convolution whose weight is its input": Graph("a = Sigmoid(x) c = Conv(x, a) n = BN1(c) y = Sigmoid(n)".replace(
        "BN1(c)", "BatchNormalization(c, one, one, one, one)"), x="1,1,3,3", constants={"one": np.array([2.0])}),
    "a parameter that is the output of the same Relu": Graph("c = Conv(x, w) r = Relu(c) n = BN(r) y = Conv(n, v)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("aggressive", [False, True])
def test_mistake_of_other_tools_is_not_made(case, aggressive):
    graph = MISTAKES[case]
    model = graph.model()
    onnx.checker.check_model(model, full_check=True)
    feeds = {}
    for info in model.graph.input:
        shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        feeds[info.name] = RNG.standard_normal(shape) * 3
    survive(model, feeds, aggressive=aggressive or graph.aggressive)
