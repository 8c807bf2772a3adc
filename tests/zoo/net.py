"""A builder of ONNX networks with random parameters: one method an operator, one value a name.

A `Value` carries its shape without the batch axis, which stays dynamic, and the root mean square
that its elements are expected to have. Weights are drawn for the latter (a convolution brings its
output to 1), and so are statistics, so that activations keep the order of 1 to any depth, as those
of trained networks do. Errors of a fold are then neither drowned nor magnified.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

NEGATIVE_GAMMAS, ZERO_GAMMAS = 0.15, 0.04

Array = npt.NDArray[Any]
Sizes = int | Sequence[int]


@dataclass(frozen=True)
class Value:
    """A value of the network: its name, its shape without the batch axis, its expected root mean square."""

    name: str
    shape: tuple[int, ...]
    rms: float

    @property
    def channels(self) -> int:
        """The size of axis 1."""
        return self.shape[0]


class Net:
    """A network under construction.

    Parameters
    ----------
    name : str
        Name of the graph.
    shape : sequence of int
        Shape of the input "x", without the batch axis.
    seed : int
        Of all weights and statistics.
    epsilon : float
        Of all batch norms.
    """

    def __init__(self, name: str, shape: Sequence[int], *, seed: int = 0, epsilon: float = 1e-5, opset: int = 17):
        self.name = name
        self.epsilon = epsilon
        self.opset = opset
        self.rng = np.random.default_rng(seed)
        self.input = Value("x", tuple(shape), 1.0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def model(self, *outputs: Value) -> onnx.ModelProto:
        """Return the network as a model, whose graph outputs are the given values."""
        graph = helper.make_graph(
            self.nodes, self.name, [_info(self.input)], [_info(output) for output in outputs], self.constants
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def node(self, op_type: str, inputs: Sequence[Value | str], like: Value, **attributes: Any) -> Value:
        """Append a node. Its output has the shape and root mean square of `like`, and the name of the node."""
        name = f"{op_type.lower()}_{len(self.nodes)}"
        names = [value if isinstance(value, str) else value.name for value in inputs]
        self.nodes.append(helper.make_node(op_type, names, [name], name=name, **attributes))
        return replace(like, name=name)

    def constant(self, what: str, array: npt.ArrayLike) -> str:
        """Add an initializer of the node that comes next: floats as float32, integers as int64."""
        values = np.asarray(array)
        values = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
        name = f"{what}_{len(self.nodes)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, x: Value, shape: Sequence[int], products: int) -> str:
        """Draw a weight with which a sum of so many products with `x` has a root mean square of 1."""
        return self.constant("weight", self.rng.standard_normal(shape, np.float32) / (math.sqrt(products) * x.rms))

    # Linear operators

    def conv(
        self, x: Value, channels: int, kernel: Sizes = 3, stride: Sizes = 1, *,
        pad: Sizes | None = None, groups: int = 1, bias: bool = False,
    ) -> Value:  # fmt: skip
        """Conv of any dimension. Padding keeps the size (at stride 1) unless given."""
        kernels, strides, pads = _window(x, kernel, stride, pad)
        spatial = _slid(x.shape[1:], kernels, strides, pads)
        fan_in = x.channels // groups
        inputs: list[Value | str] = [x, self.weight(x, (channels, fan_in, *kernels), fan_in * math.prod(kernels))]
        if bias:
            inputs.append(self.constant("bias", 0.2 * self.rng.standard_normal(channels)))
        return self.node(
            "Conv", inputs, Value("", (channels, *spatial), 1.0),
            kernel_shape=kernels, strides=strides, pads=pads * 2, group=groups,
        )  # fmt: skip

    def conv_transpose(self, x: Value, channels: int, kernel: int, stride: int, pad: int = 0) -> Value:
        """ConvTranspose in two dimensions, without bias."""
        spatial = [(size - 1) * stride + kernel - 2 * pad for size in x.shape[1:]]
        # Every output element sums only the products whose kernel element hits it.
        products = x.channels * math.ceil(kernel / stride) ** 2
        weight = self.weight(x, (x.channels, channels, kernel, kernel), products)
        return self.node(
            "ConvTranspose", [x, weight], Value("", (channels, *spatial), 1.0),
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4,
        )  # fmt: skip

    def gemm(self, x: Value, features: int) -> Value:
        """Gemm with a bias and the weight transposed, as frameworks export linear layers of matrices."""
        weight = self.weight(x, (features, x.channels), x.channels)
        bias = self.constant("bias", 0.2 * self.rng.standard_normal(features))
        return self.node("Gemm", [x, weight, bias], Value("", (features,), 1.0), transB=1)

    def matmul(self, x: Value, features: int) -> Value:
        """MatMul over the last axis, then Add, as frameworks export linear layers of anything but matrices."""
        weight = self.weight(x, (x.shape[-1], features), x.shape[-1])
        y = self.node("MatMul", [x, weight], Value("", (*x.shape[:-1], features), 1.0))
        return self.node("Add", [self.constant("bias", 0.2 * self.rng.standard_normal(features)), y], y)

    # Affine maps

    def bn(self, x: Value) -> Value:
        """BatchNormalization with statistics that fit `x` roughly, some gammas negative and a few zero."""
        rng, channels = self.rng, x.channels
        gamma = rng.uniform(0.5, 1.5, channels)
        gamma[rng.random(channels) < NEGATIVE_GAMMAS] *= -1
        gamma[rng.random(channels) < ZERO_GAMMAS] = 0
        parameters = {
            "gamma": gamma,
            "beta": 0.3 * rng.standard_normal(channels),
            "mean": 0.3 * x.rms * rng.standard_normal(channels),
            "var": x.rms**2 * rng.uniform(0.5, 2.0, channels),
        }
        inputs: list[Value | str] = [x, *(self.constant(name, array) for name, array in parameters.items())]
        return self.node("BatchNormalization", inputs, replace(x, rms=1.2), epsilon=self.epsilon)

    def scalar(self, op_type: str, x: Value, number: float) -> Value:
        """Mul, Div or Add of `x` and a constant of shape (1,)."""
        rms = {"Mul": x.rms * abs(number), "Div": x.rms / abs(number), "Add": math.hypot(x.rms, number)}[op_type]
        return self.node(op_type, [x, self.constant("scalar", [float(number)])], replace(x, rms=rms))

    def standardise(self, x: Value, mean: Sequence[float], deviation: Sequence[float]) -> Value:
        """Sub and Div with one constant per channel, as exported with the preprocessing of images."""
        along = (1, x.channels, *[1] * (len(x.shape) - 1))
        y = self.node("Sub", [x, self.constant("mean", np.reshape(mean, along))], x)
        rms = math.sqrt(np.mean([(x.rms**2 + m**2) / d**2 for m, d in zip(mean, deviation, strict=True)]))
        return self.node("Div", [y, self.constant("deviation", np.reshape(deviation, along))], replace(x, rms=rms))

    # Activations

    def relu(self, x: Value) -> Value:
        """Relu."""
        return self.node("Relu", [x], replace(x, rms=0.7 * x.rms))

    def leaky_relu(self, x: Value, slope: float) -> Value:
        """LeakyRelu."""
        return self.node("LeakyRelu", [x], replace(x, rms=0.7 * x.rms), alpha=slope)

    def clip(self, x: Value, low: float = 0.0, high: float = 6.0) -> Value:
        """Clip; with the bounds left out, what mobile networks call ReLU6."""
        bounds = [self.constant("low", np.float32(low)), self.constant("high", np.float32(high))]
        return self.node("Clip", [x, *bounds], replace(x, rms=0.7 * x.rms))

    def sigmoid(self, x: Value) -> Value:
        """Sigmoid."""
        return self.node("Sigmoid", [x], replace(x, rms=0.55))

    def hard_sigmoid(self, x: Value) -> Value:
        """HardSigmoid with the slope 1/6 of MobileNetV3."""
        return self.node("HardSigmoid", [x], replace(x, rms=0.55), alpha=1 / 6)

    def hardswish(self, x: Value) -> Value:
        """HardSwish."""
        return self.node("HardSwish", [x], replace(x, rms=0.6 * x.rms))

    def silu(self, x: Value) -> Value:
        """``x * sigmoid(x)``, as exporters spell SiLU."""
        return self.mul(x, self.sigmoid(x))

    def tanh(self, x: Value) -> Value:
        """Tanh."""
        return self.node("Tanh", [x], replace(x, rms=0.6))

    # Of two values and more

    def add(self, a: Value, b: Value) -> Value:
        """Add of two values of one shape."""
        return self.node("Add", [a, b], replace(a, rms=math.hypot(a.rms, b.rms)))

    def mul(self, a: Value, b: Value) -> Value:
        """Mul of two values, the second of which may have sizes of 1."""
        return self.node("Mul", [a, b], replace(a, rms=a.rms * b.rms))

    def concat(self, *values: Value) -> Value:
        """Concat along the channels."""
        channels = sum(value.channels for value in values)
        rms = math.sqrt(sum(value.rms**2 * value.channels for value in values) / channels)
        return self.node("Concat", values, Value("", (channels, *values[0].shape[1:]), rms), axis=1)

    def halves(self, x: Value) -> tuple[Value, Value]:
        """Split into two equal parts along the channels."""
        sizes = self.constant("sizes", [x.channels // 2] * 2)
        name = f"split_{len(self.nodes)}"
        self.nodes.append(helper.make_node("Split", [x.name, sizes], [f"{name}.0", f"{name}.1"], name=name, axis=1))
        shape = (x.channels // 2, *x.shape[1:])
        return Value(f"{name}.0", shape, x.rms), Value(f"{name}.1", shape, x.rms)

    # Pooling and resizing

    def max_pool(self, x: Value, kernel: Sizes = 2, stride: Sizes = 2, pad: Sizes = 0) -> Value:
        """MaxPool."""
        return self._pool("MaxPool", x, kernel, stride, pad)

    def average_pool(self, x: Value, kernel: Sizes = 2, stride: Sizes = 2, pad: Sizes = 0, **attributes: Any) -> Value:
        """AveragePool."""
        return self._pool("AveragePool", x, kernel, stride, pad, **attributes)

    def _pool(self, op_type: str, x: Value, kernel: Sizes, stride: Sizes, pad: Sizes, **attributes: Any) -> Value:
        kernels, strides, pads = _window(x, kernel, stride, pad)
        like = replace(x, shape=(x.channels, *_slid(x.shape[1:], kernels, strides, pads)))
        return self.node(op_type, [x], like, kernel_shape=kernels, strides=strides, pads=pads * 2, **attributes)

    def global_pool(self, x: Value) -> Value:
        """GlobalAveragePool; sizes of 1 remain."""
        return self.node("GlobalAveragePool", [x], replace(x, shape=(x.channels, *[1] * (len(x.shape) - 1))))

    def upsample(self, x: Value, factor: int = 2) -> Value:
        """Resize of both spatial axes to a multiple, nearest neighbour."""
        scales = self.constant("scales", [1.0, 1.0, float(factor), float(factor)])
        like = replace(x, shape=(x.channels, *(factor * size for size in x.shape[1:])))
        return self.node(
            "Resize", [x, "", scales], like,
            mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip

    # Shapes

    def flatten(self, x: Value) -> Value:
        """Flatten into a matrix."""
        return self.node("Flatten", [x], replace(x, shape=(math.prod(x.shape),)))

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Reshape to a shape given without the batch axis, which stays."""
        assert math.prod(shape) == math.prod(x.shape)
        return self.node("Reshape", [x, self.constant("shape", [0, *shape])], replace(x, shape=tuple(shape)))

    def transpose(self, x: Value, axes: Sequence[int]) -> Value:
        """Transpose. The axes, batch axis included, are ONNX's ``perm``, so axis 0 stays first."""
        assert axes[0] == 0
        return self.node("Transpose", [x], replace(x, shape=tuple(x.shape[axis - 1] for axis in axes[1:])), perm=axes)

    def squeeze(self, x: Value, axis: int) -> Value:
        """Squeeze of one axis of size 1, the batch axis being number 0."""
        assert x.shape[axis - 1] == 1
        shape = x.shape[: axis - 1] + x.shape[axis:]
        return self.node("Squeeze", [x, self.constant("axes", [axis])], replace(x, shape=shape))


def scaled(channels: int, width: float, multiple: int = 4) -> int:
    """Scale a number of channels by a width, to a multiple of 4 or of what is given."""
    return max(multiple, round(channels * width / multiple) * multiple)


def _info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, ["N", *value.shape])


def _window(x: Value, kernel: Sizes, stride: Sizes, pad: Sizes | None) -> tuple[list[int], list[int], list[int]]:
    """Spell out kernel, strides and pads along every spatial axis of `x`."""
    dims = len(x.shape) - 1
    kernels, strides = _each(kernel, dims), _each(stride, dims)
    return kernels, strides, [size // 2 for size in kernels] if pad is None else _each(pad, dims)


def _each(sizes: Sizes, dims: int) -> list[int]:
    return [sizes] * dims if isinstance(sizes, int) else list(sizes)


def _slid(sizes: Sequence[int], kernels: list[int], strides: list[int], pads: list[int]) -> list[int]:
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(sizes, kernels, strides, pads, strict=True)]
