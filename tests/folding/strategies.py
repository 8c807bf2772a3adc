"""Graphs drawn at random: a graph under construction, and one function per operator of the folding table.

All is float64 and of concrete shape; `oracles.retyped` makes models of other types. Attributes and shapes are drawn by
hypothesis, so that a failure shrinks; the numbers come from a generator with a drawn seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from fold_models import tensor
from hypothesis import settings
from hypothesis import strategies as st
from onnx import defs, helper, shape_inference

NEWEST = defs.onnx_opset_version()
DOUBLE = onnx.TensorProto.DOUBLE

Draw = Callable[[st.SearchStrategy[Any]], Any]


def examples(share: float) -> settings:
    """A share of the examples that the profile asks for: each costs as much as dozens of small arrays."""
    return settings(max_examples=max(2, round(settings().max_examples * share)))


@dataclass(frozen=True)
class Case:
    """A model and what to run it on."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]


class Net:
    """A graph under construction, which knows the type and shape of all its values."""

    def __init__(self, draw: Draw, since: int = 7, until: int = NEWEST, prefix: str = "") -> None:
        self.draw = draw
        self.opset = draw(st.integers(since, until))
        self.rng = np.random.default_rng(draw(st.integers(0, 2**20)))
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: dict[str, np.ndarray] = {}
        self.constants: dict[str, onnx.TensorProto] = {}
        self.types: dict[str, onnx.TypeProto] = {}
        self.declared: dict[str, list[Any]] = {}
        self._count = 0

    def name(self, base: str) -> str:
        self._count += 1
        return f"{self.prefix}{base}{self._count}"

    def input(self, shape: Sequence[int], symbolic: Sequence[int] = ()) -> str:
        """A graph input; the `symbolic` axes are declared by a name instead of a size."""
        name = self.name("x")
        self.inputs[name] = self.rng.standard_normal(shape)
        self.types[name] = helper.make_tensor_type_proto(DOUBLE, shape)
        self.declared[name] = [f"{name}_{axis}" if axis in symbolic else size for axis, size in enumerate(shape)]
        return name

    def constant(self, array: Any) -> str:
        array = np.asarray(array)
        name = self.name("k")
        self.constants[name] = tensor(name, array)
        self.types[name] = helper.make_tensor_type_proto(self.constants[name].data_type, array.shape)
        return name

    def normal(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape))

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append an operator and return the name of its output, or a list of names."""
        names = [self.name(op_type.lower()) for _ in range(outputs)]
        while inputs and not inputs[-1] and not self.draw(st.booleans()):
            inputs = inputs[:-1]  # an absent last input may be named "" or be missing
        node = helper.make_node(op_type, inputs, names, name=f"{op_type}_{names[0]}", **attributes)
        used = {name for name in inputs if name}
        self.types |= shape_inference.infer_node_outputs(
            defs.get_schema(op_type, self.opset, ""),
            node,
            {name: self.types[name] for name in used},
            {name: self.constants[name] for name in used if name in self.constants},
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
        )
        self.nodes.append(node)
        return names if outputs > 1 else names[0]

    def since(self, opset: int, op_type: str, x: str, old: dict[str, Any], new: Sequence[Any], **both: Any) -> str:
        """An operator whose attributes became inputs at an opset."""
        if self.opset < opset:
            return self.node(op_type, x, **{name: value for name, value in old.items() if value is not None}, **both)
        inputs = ["" if value is None else self.constant(value) for value in new]
        return self.node(op_type, x, *inputs, **both)

    def shape(self, name: str) -> tuple[int, ...]:
        dims = self.types[name].tensor_type.shape.dim
        assert all(dim.HasField("dim_value") for dim in dims), name
        return tuple(dim.dim_value for dim in dims)

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    @property
    def ir_version(self) -> int:
        return max(4, helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)]))

    def case(self, *outputs: str) -> Case:
        """The finished model, with these outputs."""
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(name, DOUBLE, self.declared[name]) for name in self.inputs],
            [self.described(name) for name in outputs],
            list(self.constants.values()),
        )
        imports = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version)
        return Case(model, self.inputs)

    def described(self, name: str) -> onnx.ValueInfoProto:
        """An output declared by type and rank alone."""
        kind = self.types[name].tensor_type
        return helper.make_tensor_value_info(name, kind.elem_type, [None] * len(kind.shape.dim))


# The affine map


def scales(net: Net, channels: int, sign: str, uniform: bool, wide: bool) -> np.ndarray:
    """Scales of one sign or any, zeros among them if they may be; all equal if `uniform`."""
    size = net.draw(st.sampled_from([1e-6, 1, 1e6])) if wide else 1
    values = size * net.rng.uniform(0.25, 2, channels)
    if sign == "any":
        values *= net.rng.choice([1, -1], channels)
    if sign != "positive" and not uniform:
        values[net.rng.random(channels) < 0.2] = 0
    return np.full(channels, values[0]) if uniform else values


def batch_norm(
    net: Net, x: str, *, sign: str = "any", shift: bool = True, uniform: bool = False, wide: bool = False
) -> str:
    """BatchNormalization with a scale of the given signs; its shift is zero unless there may be one."""
    channels = net.shape(x)[1]
    epsilon = net.draw(st.sampled_from([1e-5, 1e-3]))
    variance = net.rng.uniform(0.1, 3, 1 if uniform else channels) * np.ones(channels)
    gamma = scales(net, channels, sign, uniform, wide)
    beta, mean = (net.rng.standard_normal(1 if uniform else channels) * shift * np.ones(channels) for _ in range(2))
    parameters = [net.constant(array) for array in (gamma, beta, mean, variance)]
    return net.node("BatchNormalization", x, *parameters, epsilon=epsilon)


def operand(net: Net, x: str, axis: int, values: np.ndarray) -> str:
    """A constant of one value for all, or one per channel, of any shape that is broadcast so."""
    rank, axis = net.rank(x), axis % net.rank(x)
    if len(set(values)) == 1 and net.draw(st.booleans()):
        shape = net.draw(st.sampled_from([(), (1,), (1,) * rank]))
        return net.constant(values[0].reshape(shape))
    leading = net.draw(st.integers(0, axis))
    return net.constant(values.reshape((1,) * leading + (-1,) + (1,) * (rank - axis - 1)))


def arithmetic(
    net: Net, x: str, kind: str, axis: int = 1, *, sign: str = "any", uniform: bool = False, wide: bool = False
) -> str:
    """One operator of an affine chain, the constant first or second."""
    channels = net.shape(x)[axis]
    if kind == "neg":
        return net.node("Neg", x)
    if kind in ("mul", "div"):
        values = scales(net, channels, "positive" if kind == "div" and sign != "any" else sign, uniform, wide)
        if kind == "div":
            values = np.where(values == 0, 0.5, values)
            return net.node("Div", x, operand(net, x, axis, values))
    else:
        values = net.rng.standard_normal(1 if uniform else channels) * np.ones(channels)
    other = operand(net, x, axis, values)
    if kind == "rsub":
        return net.node("Sub", other, x)
    if kind == "sub":
        return net.node("Sub", x, other)
    pair = [x, other] if net.draw(st.booleans()) else [other, x]
    return net.node({"mul": "Mul", "add": "Add"}[kind], *pair)


def chain(
    net: Net, x: str, axis: int = 1, *, sign: str = "any", shift: bool = True, uniform: bool = False,
    wide: bool = False, least: int = 1,
) -> str:  # fmt: skip
    """One to three operators of constant arithmetic."""
    kinds = ["mul", "div"] + ["neg"] * (sign == "any") + ["add", "sub"] * shift
    kinds += ["rsub"] * (shift and sign == "any")
    for kind in net.draw(st.lists(st.sampled_from(kinds), min_size=least, max_size=3)):
        x = arithmetic(net, x, kind, axis, sign=sign, uniform=uniform, wide=wide)
    return x


def affine(net: Net, x: str, **limits: Any) -> str:
    """A batch norm, a chain of constant arithmetic, or both."""
    form = net.draw(st.sampled_from(["batch norm", "chain", "both"]))
    if form != "chain":
        x = batch_norm(net, x, **limits)
    return x if form == "batch norm" else chain(net, x, **limits)


# Operators that absorb the map


def window(net: Net, size: Sequence[int], *, padding: str = "any", dilated: bool = True) -> dict[str, Any]:
    """Attributes of a convolution or pooling that fit the spatial size; padding is "any", "none" or "some"."""
    draw, dims = net.draw, len(size)
    # At opset 7 to 9 the same as ever; auto_pad excludes explicit pads.
    auto = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"] if padding == "any" else ["NOTSET"]))
    kernel = [draw(st.integers(1, min(3, s))) for s in size]
    dilations = [
        draw(st.integers(1, 2)) if dilated and 2 * (k - 1) < s else 1 for k, s in zip(kernel, size, strict=True)
    ]
    if auto.startswith("SAME"):
        dilations = [1] * dims
    attributes = {"kernel_shape": kernel, "strides": [draw(st.integers(1, 2)) for _ in size]}
    if dilated:
        attributes["dilations"] = dilations
    if auto != "NOTSET":
        attributes["auto_pad"] = auto
    elif padding != "none":
        pads = [draw(st.integers(0, k - 1)) for k in kernel * 2]
        attributes["pads"] = pads
    return attributes


def groups_of(net: Net, channels: int) -> int:
    """A number of groups: one, some, or as many as there are channels."""
    return net.draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))


def bias_name(net: Net, size: int) -> str:
    return net.normal(size) if net.draw(st.booleans()) else ""


def conv(net: Net, x: str, outputs: int | None = None, **limits: Any) -> str:
    """Conv of any dims, groups, strides, dilations and pads, with or without bias."""
    channels, size = net.shape(x)[1], net.shape(x)[2:]
    groups = groups_of(net, channels)
    multiple = net.draw(st.integers(1, 3)) if outputs is None else outputs // groups
    if outputs is not None and outputs % groups:
        groups, multiple = 1, outputs
    attributes = window(net, size, **limits)
    weight = net.normal(groups * multiple, channels // groups, *attributes["kernel_shape"])
    return net.node("Conv", x, weight, bias_name(net, groups * multiple), group=groups, **attributes)


def conv_transpose(net: Net, x: str) -> str:
    """ConvTranspose of any groups and strides, with pads, output_padding, auto_pad or output_shape."""
    draw, channels, size = net.draw, net.shape(x)[1], net.shape(x)[2:]
    groups, multiple = groups_of(net, channels), draw(st.integers(1, 3))
    strides = [draw(st.integers(1, 2)) for _ in size]
    # At least the stride, so that SAME padding is never negative.
    kernel = [draw(st.integers(s, 3)) for s in strides]
    attributes = {"kernel_shape": kernel, "strides": strides, "group": groups}
    forms = ["plain", "pads", "output_padding", "dilations", "output_shape", "SAME_UPPER", "SAME_LOWER"]
    form = draw(st.sampled_from(forms))
    if form == "pads":
        attributes["pads"] = [draw(st.integers(0, (k - 1) // 2)) for k in kernel * 2]
    elif form == "dilations":
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in size]
    elif form == "output_padding":
        attributes["output_padding"] = [s - 1 for s in strides]
    elif form == "output_shape":
        full = [step * (length - 1) + k for step, length, k in zip(strides, size, kernel, strict=True)]
        attributes["output_shape"] = [draw(st.integers(max(1, most - 2), most)) for most in full]
    elif form != "plain":
        attributes["auto_pad"] = form
    weight = net.normal(channels, multiple, *kernel)
    return net.node("ConvTranspose", x, weight, bias_name(net, groups * multiple), **attributes)


def gemm(net: Net, x: str, *, transposed: bool = False) -> str:
    """Gemm with any alpha, beta, transB and C; `transposed` is transA."""
    draw, shape = net.draw, net.shape(x)
    rows, inner = (shape[1], shape[0]) if transposed else shape
    outputs, trans_b = draw(st.integers(1, 4)), draw(st.integers(0, 1))
    weight = net.normal(*((outputs, inner) if trans_b else (inner, outputs)))
    shapes = [(), (1,), (outputs,), (1, outputs), (rows, outputs), (rows, 1), (1, 1)]
    shapes += [None, None] if net.opset >= 11 else []  # C became optional then
    shape_c = draw(st.sampled_from(shapes))
    attributes = {
        name: draw(st.sampled_from(values))
        for name, values in {"alpha": [1.0, 0.5, -2.0], "beta": [1.0, 0.25, -1.5, 0.0]}.items()
        if draw(st.booleans())
    }
    bias = "" if shape_c is None else net.normal(*shape_c)
    return net.node("Gemm", x, weight, bias, transA=int(transposed), transB=trans_b, **attributes)


def matmul(net: Net, x: str, outputs: int | None = None) -> str:
    """MatMul with a constant matrix on the right."""
    outputs = net.draw(st.integers(1, 4)) if outputs is None else outputs
    return net.node("MatMul", x, net.normal(net.shape(x)[-1], outputs))


def absorber(net: Net, x: str, **limits: Any) -> str:
    """Whatever absorbs a map of the channels of axis 1 from either side at no cost."""
    if net.rank(x) == 2:
        return net.draw(st.sampled_from([gemm, matmul]))(net, x)
    return conv(net, x, **{"padding": "none", **limits})


# Operators that the map passes


def relu(net: Net, x: str) -> str:
    return net.node("Relu", x)


def leaky_relu(net: Net, x: str) -> str:
    return net.node("LeakyRelu", x, alpha=net.draw(st.sampled_from([0.01, 0.3, 0.0, 1.0, -0.5])))


def prelu(net: Net, x: str) -> str:
    """PRelu; the slope is broadcast from the right, as constants are."""
    values = net.rng.uniform(-1, 2, net.shape(x)[1])
    if net.draw(st.booleans()):
        values[:] = values[0]
    return net.node("PRelu", x, operand(net, x, 1, values))


def clip(net: Net, x: str) -> str:
    """Clip with both bounds, one, or none; attributes before opset 11."""
    low, high = net.draw(
        st.sampled_from([(0.0, 6.0), (-0.5, 0.5), (None, 1.0), (-1.0, None), (0.25, 2.0), (None, None)])
    )
    arrays = [None if bound is None else np.array(bound) for bound in (low, high)]
    return net.since(11, "Clip", x, {"min": low, "max": high}, arrays)


def max_pool(net: Net, x: str) -> str:
    attributes = window(net, net.shape(x)[2:], dilated=net.opset >= 10)
    return net.node("MaxPool", x, **attributes)


def average_pool(net: Net, x: str, *, counted: bool | None = None) -> str:
    """AveragePool; `counted` says whether padding counts as data."""
    counted = net.draw(st.booleans()) if counted is None else counted
    attributes = window(net, net.shape(x)[2:], dilated=net.opset >= 19)
    return net.node("AveragePool", x, count_include_pad=int(counted), **attributes)


def global_average_pool(net: Net, x: str) -> str:
    return net.node("GlobalAveragePool", x)


def global_max_pool(net: Net, x: str) -> str:
    return net.node("GlobalMaxPool", x)


def upsample(net: Net, x: str) -> str:
    """What Resize was up to opset 9."""
    scales = [1.0, 1.0, *(net.draw(st.sampled_from([1.0, 2.0, 3.0])) for _ in net.shape(x)[2:])]
    return net.since(9, "Upsample", x, {"scales": scales}, [np.array(scales, "float32")], mode="nearest")


def reduce(net: Net, x: str, op_type: str = "ReduceMean") -> str:
    """The mean, or an extreme, over some of the spatial axes, which keep their place or go."""
    rank = net.rank(x)
    axes = net.draw(st.lists(st.sampled_from(range(2, rank)), min_size=1, unique=True)) if rank > 2 else [0]
    if net.opset >= 11 and net.draw(st.booleans()):
        axes = [axis - rank for axis in axes]
    keep = 1 if rank == 2 else net.draw(st.integers(0, 1))
    return net.since(18, op_type, x, {"axes": axes}, [np.array(axes)], keepdims=keep)


def resize(net: Net, x: str) -> str:
    """Resize of the spatial axes, without extrapolation."""
    mode = net.draw(st.sampled_from(["nearest", "linear"] + ["cubic"] * (net.opset >= 11 and net.rank(x) == 4)))
    # Powers of two, and never to nothing: with others, rounding decides on the size.
    factors = [1.0, 1.0] + [net.draw(st.sampled_from([1.0, 2.0] + [0.5] * (size > 1))) for size in net.shape(x)[2:]]
    sizes = [math.floor(size * f) for size, f in zip(net.shape(x), factors, strict=True)]
    array = np.array(factors, "float32")
    if net.opset == 10:
        return net.node("Resize", x, net.constant(array), mode="nearest")
    how = net.draw(st.sampled_from(["half_pixel", "asymmetric", "align_corners"]))
    roi = "" if net.opset >= 13 else net.constant(np.zeros(0, "float32"))
    attributes = {"mode": mode, "coordinate_transformation_mode": how}
    if net.draw(st.booleans()):
        return net.node("Resize", x, roi, net.constant(array), **attributes)
    scales = "" if net.opset >= 13 else net.constant(np.zeros(0, "float32"))
    sizes = sizes[:2] + [size + net.draw(st.integers(0, 2)) for size in sizes[2:]]
    return net.node("Resize", x, roi, scales, net.constant(np.array(sizes, "int64")), **attributes)


def transpose(net: Net, x: str, perm: Sequence[int] | None = None) -> str:
    """Any order of the axes behind the channels."""
    rank = net.rank(x)
    if perm is None:
        perm = [0, 1, *net.draw(st.permutations(range(2, rank)))]
    return net.node("Transpose", x, perm=list(perm))


def reshape(net: Net, x: str, shape: Sequence[int]) -> str:
    return net.node("Reshape", x, net.constant(np.array(shape, "int64")))


def join_space(net: Net, x: str) -> str:
    """Reshape to (N, C, rest), whatever N and the rest are."""
    return reshape(net, x, [0, net.draw(st.sampled_from([net.shape(x)[1], 0])), -1])


def flatten(net: Net, x: str) -> str:
    return net.node("Flatten", x, axis=1)


def squeeze(net: Net, x: str, axes: Sequence[int]) -> str:
    return net.since(13, "Squeeze", x, {"axes": list(axes)}, [np.array(axes, "int64")])


def unsqueeze(net: Net, x: str, axes: Sequence[int]) -> str:
    return net.since(13, "Unsqueeze", x, {"axes": list(axes)}, [np.array(axes, "int64")])


def expand(net: Net, x: str) -> str:
    """Expand of the last axis if it is single, else to the shape that it has."""
    shape = list(net.shape(x))
    if shape[-1] == 1 and len(shape) > 2:
        shape[-1] = net.draw(st.integers(1, 3))
    return net.node("Expand", x, net.constant(np.array(shape, "int64")))


def depth_to_space(net: Net, x: str) -> str:
    mode = {"mode": net.draw(st.sampled_from(["DCR", "CRD"]))} if net.opset >= 11 else {}
    return net.node("DepthToSpace", x, blocksize=2, **mode)


def space_to_depth(net: Net, x: str) -> str:
    return net.node("SpaceToDepth", x, blocksize=2)


def pad(net: Net, x: str, mode: str = "constant", value: float | None = None) -> str:
    """Pad of the spatial axes."""
    size = net.shape(x)[2:]
    pads = [0, 0, *(net.draw(st.integers(0, 1)) for _ in size)] * 2
    kinds = {} if mode == "constant" else {"mode": mode}
    constant = None if value is None else np.array(value)
    return net.since(11, "Pad", x, {"pads": pads, "value": value}, [np.array(pads), constant], **kinds)


def identity(net: Net, x: str) -> str:
    return net.node("Identity", x)


def dropout(net: Net, x: str) -> str:
    """Dropout in evaluation mode: its ratio does not matter."""
    if net.opset < 12:
        return net.node("Dropout", x, ratio=0.5)
    mode = net.constant(np.array(False)) if net.draw(st.booleans()) else ""
    return net.node("Dropout", x, net.constant(np.array(0.5)), mode)


def cast(net: Net, x: str) -> str:
    return net.node("Cast", x, to=DOUBLE)


def tanh(net: Net, x: str) -> str:
    """What no map passes: a wall between two folds."""
    return net.node("Tanh", x)


def slice_axes(net: Net, x: str, axis: int) -> str:
    """Part of one axis, forwards or (where there are steps) backwards."""
    size = net.shape(x)[axis]
    start = net.draw(st.integers(0, size - 1))
    end = net.draw(st.integers(start + 1, size))
    if net.opset < 10:
        return net.node("Slice", x, axes=[axis], starts=[start], ends=[end])
    step = net.draw(st.sampled_from([1, 1, 2, -1]))
    if step == -1:
        start, end = end - 1, (start - 1 if start else -size - 1)
    return net.node("Slice", x, *(net.constant(np.array([value])) for value in (start, end, axis, step)))


def split(net: Net, x: str, axis: int = 1) -> list[str]:
    """Two parts of one axis, of sizes that are given, or equal."""
    size = net.shape(x)[axis]
    first = net.draw(st.integers(1, size - 1))
    if 2 * first == size and net.draw(st.booleans()):
        return net.node("Split", x, outputs=2, axis=axis, **({"num_outputs": 2} if net.opset >= 18 else {}))
    if net.opset < 13:
        return net.node("Split", x, outputs=2, axis=axis, split=[first, size - first])
    return net.node("Split", x, net.constant(np.array([first, size - first])), outputs=2, axis=axis)


def images(net: Net, dims: int | None = None, channels: int | None = None, static: bool = False) -> str:
    """A graph input (N, C, ...) with one to three spatial axes; some sizes are not known in advance."""
    draw = net.draw
    dims = draw(st.integers(1, 3)) if dims is None else dims
    channels = draw(st.integers(1, 4)) if channels is None else channels
    shape = [draw(st.integers(1, 2)), channels, *(draw(st.integers(3, 5)) for _ in range(dims))]
    known = [(), (0,)] + ([] if static else [(0, *range(2, dims + 2))])
    return net.input(shape, draw(st.sampled_from(known)))


def rows(net: Net, static: bool = False) -> str:
    """A graph input (N, F)."""
    draw = net.draw
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    return net.input(shape, draw(st.sampled_from([()] if static else [(), (0,)])))
