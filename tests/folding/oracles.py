"""What a folded model must survive, whatever the graph: nothing here knows how the folder works.

The oracle is onnx.reference in float64, with torch in its place where it is wrong. The scale of every comparison is the
*majorant* of a value: what the original graph gives if every term of every sum is taken by its absolute value. Rounding
errors are relative to it, not to the value itself, in which terms may cancel.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from fold_models import ONNX_TYPE, runtime, tensor
from onnx import helper, numpy_helper, printer
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_resize

from pybn.folding import fold_onnx
from pybn.folding.onnx import FoldResult
from pybn.folding.report import Check, Timing
from pybn.folding.runtime import CheckError
from pybn.folding.verify import verify

AFFINE_TYPES = ("BatchNormalization", "Mul", "Add", "Sub", "Div", "Neg")
FLOATS = {code: name for name, code in ONNX_TYPE.items()}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SUBNORMAL = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}

# Float64 has 1.1e-16; the rest is for some thousand terms of a sum.
EXACT = 1e-12

Feeds = dict[str, np.ndarray]
Values = dict[str, np.ndarray]


class ConvTranspose(OpRun):
    """By torch: onnx.reference is wrong for several output channels per group."""

    op_domain = ""

    def _run(
        self, x, w, bias=None, auto_pad="NOTSET", dilations=None, group=1, kernel_shape=None, output_padding=None,
        output_shape=None, pads=None, strides=None,
    ):  # fmt: skip
        dims = x.ndim - 2
        strides, dilations, extra = (
            list(given or [default] * dims) for given, default in ((strides, 1), (dilations, 1), (output_padding, 0))
        )
        convolve = getattr(torch.nn.functional, f"conv_transpose{dims}d")
        full = convolve(
            torch.tensor(x.copy()), torch.tensor(w.copy()), None, stride=strides, groups=group, dilation=dilations
        )
        sizes = [size + more for size, more in zip(full.shape[2:], extra, strict=True)]
        wanted = output_shape
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        if wanted:
            total = [size - want for size, want in zip(sizes, wanted[-dims:], strict=True)]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            begin, end = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
        else:
            begin, end = (pads or [0] * 2 * dims)[:dims], (pads or [0] * 2 * dims)[dims:]
        result = np.pad(full.numpy(), [(0, 0), (0, 0), *((0, max(0, more)) for more in extra)])
        inside = tuple(slice(b, size - e) for b, e, size in zip(begin, end, sizes, strict=True))
        result = result[(slice(None), slice(None), *inside)]
        return (result if bias is None else result + bias.reshape(-1, *[1] * dims),)


class Pool(OpRun):
    """Windows by NumPy: onnx.reference is wrong with dilations, auto_pad and ranks other than 4."""

    op_domain = ""

    def windows(self, x: np.ndarray, fill: float, **given: Any) -> np.ndarray:
        """(N, C, *outputs, *kernel), with what is outside the data filled."""
        dims = x.ndim - 2
        kernel, auto = given["kernel_shape"], given.get("auto_pad", "NOTSET")
        strides, dilations = (given.get(name) or [1] * dims for name in ("strides", "dilations"))
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        pads = given.get("pads") or [0] * 2 * dims
        begin, end = pads[:dims], pads[dims:]
        if auto.startswith("SAME"):
            total = [
                max(0, (-(-size // step) - 1) * step + span - size)
                for size, step, span in zip(x.shape[2:], strides, reach, strict=True)
            ]
            small, large = [t // 2 for t in total], [t - t // 2 for t in total]
            begin, end = (small, large) if auto == "SAME_UPPER" else (large, small)
        padded = np.pad(x, [(0, 0), (0, 0), *zip(begin, end, strict=True)], constant_values=fill)
        views = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + dims)))
        steps = (slice(None, None, step) for step in (*strides, *dilations))
        return views[(slice(None), slice(None), *steps)]


class MaxPool(Pool):
    def _run(self, x, **given):
        return (self.windows(x, -np.inf, **given).max(axis=tuple(range(x.ndim, 2 * x.ndim - 2))),)


class AveragePool(Pool):
    def _run(self, x, count_include_pad=0, **given):
        axes = tuple(range(x.ndim, 2 * x.ndim - 2))
        counted = self.windows(np.ones_like(x), float(count_include_pad), **given)
        return (self.windows(x, 0, **given).sum(axis=axes) / counted.sum(axis=axes),)


class GlobalMaxPool(OpRun):
    """onnx.reference takes the maximum over the wrong axes of ranks other than 4."""

    op_domain = ""

    def _run(self, x):
        return (x.max(axis=tuple(range(2, x.ndim)), keepdims=True),)


class Resize(op_resize.Resize):
    """In float64 throughout: the weights of onnx.reference add up to 1 in float32 only."""

    op_domain = ""

    def _run(self, x, roi=None, scales=None, sizes=None, cubic_coeff_a=None, **attributes):
        cubic_coeff_a = -0.75 if cubic_coeff_a is None else float(cubic_coeff_a)
        scales = scales.astype("float64") if scales is not None and scales.size else None
        return super()._run(x, roi, scales, sizes, cubic_coeff_a=cubic_coeff_a, **attributes)


class Upsample(OpRun):
    """Of nearest neighbours, by integer scales, which were an attribute before opset 9."""

    op_domain = ""

    def _run(self, x, scales_input=None, mode="nearest", scales=None):
        assert mode == "nearest"
        for axis, scale in enumerate(scales if scales_input is None else scales_input):
            x = np.repeat(x, int(scale), axis)
        return (x,)


class DequantizeLinear(OpRun):
    """onnx.reference has none for some opsets."""

    op_domain = ""

    def _run(self, x, scale, zero_point=None, axis=1, **attributes):
        along = [1] * x.ndim
        if scale.size > 1:
            along[axis] = -1
        zero = 0 if zero_point is None else zero_point.astype("float64").reshape(along)
        return (((x.astype("float64") - zero) * scale.reshape(along)).astype(scale.dtype),)


class BatchNormalization(OpRun):
    """Evaluation mode before opset 14: there onnx.reference normalises as in training, whatever the mode."""

    op_domain = ""

    def _run(self, x, gamma, beta, mean, variance, epsilon=1e-5, **mode):
        assert not mode.get("training_mode")
        along = (-1,) + (1,) * (x.ndim - 2)
        gamma, beta, mean, variance = (array.reshape(along) for array in (gamma, beta, mean, variance))
        return (gamma * (x - mean) / np.sqrt(variance + epsilon) + beta,)


def evaluate(model: onnx.ModelProto, feeds: Feeds) -> Values:
    """Every value of the main graph, by name: what nodes compute, and the graph outputs."""
    repaired = [ConvTranspose, MaxPool, AveragePool, GlobalMaxPool, Resize, Upsample, DequantizeLinear]
    repaired += [BatchNormalization] if opset(model) < 14 else []
    with np.errstate(all="ignore"):
        evaluator = ReferenceEvaluator(model, new_ops=repaired)
        values = evaluator.run(None, feeds, intermediate=True)
    computed = {name for node in model.graph.node for name in node.output}
    return {name: value for name, value in values.items() if name in computed}


def opset(model: onnx.ModelProto) -> int:
    return next(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))


def fold(model: Any, aggressive: bool = False, **options: Any) -> FoldResult:
    """`fold_onnx`, as it is called with the model alone unless there is more to say."""
    return fold_onnx(model, **({"aggressive": True} if aggressive else {}), **options)


# Models made from models


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and its subgraphs."""
    yield from _nested(model.graph)


def _nested(graph: Any) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inside in [item.g] if item.type == onnx.AttributeProto.GRAPH else item.graphs:
                yield from _nested(inside)


def node_lists(model: onnx.ModelProto) -> Iterator[Any]:
    """Every list of nodes, of graphs, subgraphs and functions, outer ones first; they may be replaced meanwhile."""
    for graph in (model.graph, *model.functions):
        yield from (inside.node for inside in _nested(graph))


def constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every initializer, and the value of every Constant node."""
    for graph in graphs(model):
        yield from graph.initializer
    for nodes in node_lists(model):
        for node in nodes:
            if node.op_type == "Constant":
                yield from (item.t for item in node.attribute if item.name == "value")


def affines(model: onnx.ModelProto) -> Counter[str]:
    """How many affine operators are in a model, by type: batch norms, and arithmetic with a constant."""
    fixed = {t.name for graph in graphs(model) for t in graph.initializer}
    found: Counter[str] = Counter()
    for nodes in node_lists(model):
        for node in nodes:
            if node.op_type in ("Constant", "Identity") and set(node.input) <= fixed:
                fixed.update(node.output)
            elif node.op_type in ("BatchNormalization", "Neg"):
                found[node.op_type] += 1
            elif node.op_type in AFFINE_TYPES:
                found[node.op_type] += bool(fixed.intersection(node.input))
    return found


def copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def retyped(model: onnx.ModelProto, dtype: str) -> onnx.ModelProto:
    """The same model with all its floats of another type, its constants rounded to it."""
    result, code = copy(model), ONNX_TYPE[dtype]
    # These have types of their own.
    kept = {
        name
        for nodes in node_lists(result)
        for node in nodes
        for name in node.input[1 : {"Resize": 3, "Upsample": 2, "DequantizeLinear": 2}.get(node.op_type, 0)]
    }
    for item in constants(result):
        if item.data_type in FLOATS and item.name not in kept:
            array = numpy_helper.to_array(item).astype(helper.tensor_dtype_to_np_dtype(code))
            item.CopyFrom(tensor(item.name, array))
    for graph in graphs(result):
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type in FLOATS:
                info.type.tensor_type.elem_type = code
    for nodes in node_lists(result):
        for node in nodes:
            for item in node.attribute:
                if node.op_type == "Cast" and item.i in FLOATS:
                    item.i = code
    return result


def majorant(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with every term of every sum by its absolute value; to be run on absolute inputs."""
    result = copy(model)
    for item in constants(result):
        if item.data_type in FLOATS:
            item.CopyFrom(tensor(item.name, np.abs(numpy_helper.to_array(item))))
    for nodes in node_lists(result):
        changed = [new for node in nodes for new in _majorant_node(node)]
        del nodes[:]
        nodes.extend(changed)
    return result


def _majorant_node(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    for item in node.attribute:
        if node.op_type in ("Gemm", "LeakyRelu", "Pad", "Clip") and item.type == onnx.AttributeProto.FLOAT:
            item.f = abs(item.f)
    first, out = node.input[0] if node.input else "", node.output[0]
    if node.op_type == "BatchNormalization":
        mean, node.input[3] = node.input[3], f"{out}.mean"
        return [helper.make_node("Neg", [mean], [f"{out}.mean"]), node]
    if node.op_type in ("Sub", "Neg", "Min", "ReduceMin"):
        node.op_type = {"Sub": "Add", "Neg": "Identity", "Min": "Max", "ReduceMin": "ReduceMax"}[node.op_type]
    elif node.op_type in ("Relu", "Tanh", "LeakyRelu", "Abs"):
        return [helper.make_node("Identity", [first], [out])]
    elif node.op_type == "PRelu":
        nodes = [helper.make_node("PRelu", [first, node.input[1]], [f"{out}.1"])]  # the type and shape of the result
        nodes.append(helper.make_node("Mul", [first, node.input[1]], [f"{out}.2"]))
        return [*nodes, helper.make_node("Max", [f"{out}.1", f"{out}.2"], [out])]
    elif node.op_type == "Clip":
        # At a bound the result is the bound: it counts as the data does.
        bounds = [name for name in node.input[1:] if name]
        values = [item.f for item in node.attribute if np.isfinite(item.f)]
        fixed = [
            helper.make_node("Constant", [], [f"{out}.{i}"], value=tensor("", np.array(value)))
            for i, value in enumerate(values)
        ]
        return [*fixed, helper.make_node("Max", [first, *bounds, *(f"{out}.{i}" for i in range(len(values)))], [out])]
    elif node.op_type == "Resize" and any(item.s == b"cubic" for item in node.attribute):
        # Cubic weights are negative in part: the largest value stands for its neighbours.
        nodes = [
            helper.make_node("Sub", [first, first], [f"{out}.zero"]),
            helper.make_node("GlobalMaxPool", [first], [f"{out}.max"]),
            helper.make_node("Add", [f"{out}.zero", f"{out}.max"], [f"{out}.flat"]),
        ]
        node.input[0] = f"{out}.flat"
        return [*nodes, node]
    elif node.op_type == "DequantizeLinear":
        node.output[0] = f"{out}.signed"
        return [node, helper.make_node("Abs", [f"{out}.signed"], [out])]
    return [node]


def describe(model: onnx.ModelProto, result: FoldResult) -> str:
    """Show what was folded into what, for the message of a failure."""
    rows = (
        f"{row.op_type} {row.output}: "
        + (f"{row.reason.value}: {row.detail}" if hasattr(row, "reason") else f"{row.direction} into {row.into}")
        for row in result.report.rows
    )
    return "\n".join(["", printer.to_text(model), "became", printer.to_text(result.model), *rows])


@contextlib.contextmanager
def explained(model: onnx.ModelProto, result: FoldResult) -> Iterator[None]:
    """Add the graphs to the message of a failure inside."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}{describe(model, result)}") from None


# What must hold


def assert_left(model: onnx.ModelProto, result: FoldResult, *most: dict[str, int]) -> None:
    """Compare the affine operators that are left with what may be: any of several counts, or none."""
    left = +affines(result.model)
    if not any(left <= Counter(count) for count in most or ({},)):
        raise AssertionError(f"left: {dict(left)}{describe(model, result)}")


def survive(model: onnx.ModelProto, feeds: Feeds, *, aggressive: bool = False) -> FoldResult:
    """Fold a float64 model and hold the result to everything that is promised of any fold."""
    before = model.SerializeToString(deterministic=True)
    result = fold(model, aggressive)
    assert model.SerializeToString(deterministic=True) == before, "the argument was changed"
    content = result.model.SerializeToString(deterministic=True)
    onnx.checker.check_model(result.model, full_check=True)
    assert_same_interface(model, result.model)
    with explained(model, result):
        assert_same_values(model, result.model, feeds)
    assert_report_is_complete(model, result)
    reread = onnx.ModelProto.FromString(content)
    assert fold(reread, aggressive).model.SerializeToString(deterministic=True) == content, "not idempotent"
    return result


def assert_same_interface(model: onnx.ModelProto, folded: onnx.ModelProto) -> None:
    """Inputs, outputs, opsets and metadata stay."""
    assert list(folded.graph.input) == list(model.graph.input)
    assert list(folded.graph.output) == list(model.graph.output)
    assert list(folded.opset_import) == list(model.opset_import)
    assert folded.ir_version == model.ir_version
    assert list(folded.metadata_props) == list(model.metadata_props)


def assert_same_values(
    model: onnx.ModelProto, folded: onnx.ModelProto, feeds: Feeds, relative: float = EXACT, absolute: float = 1e-300
) -> None:
    """Compare everything that has the same name in both models, the graph outputs among it."""
    expected, actual = evaluate(model, feeds), evaluate(folded, feeds)
    scale = evaluate(majorant(model), {name: magnitude(array) for name, array in feeds.items()})
    assert {output.name for output in model.graph.output} <= set(actual)
    for name in sorted(expected.keys() & actual.keys()):
        assert_close(actual[name], expected[name], scale[name], relative, absolute, name)


def assert_close(actual: Any, expected: Any, scale: Any, relative: float, absolute: float, name: str) -> None:
    """Compare element by element, relative to the majorant. What is not finite must be so in both."""
    assert actual.dtype == expected.dtype, name
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    if expected.dtype.kind != "f":
        assert np.array_equal(actual, expected), name
        return
    with np.errstate(invalid="ignore"):
        close = np.abs(actual - expected) <= relative * scale + absolute
    close |= (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    if not close.all():
        worst = np.unravel_index(int(np.argmax(np.where(close, 0, np.abs(actual - expected)))), close.shape)
        raise AssertionError(
            f"{name}{[int(i) for i in worst]} is {actual[worst]!r}, expected {expected[worst]!r} "
            f"up to {relative:.2g} of {scale[worst]:.4g}; {int((~close).sum())} of {close.size} differ"
        )


def magnitude(array: np.ndarray) -> np.ndarray:
    return np.abs(array) if array.dtype.kind == "f" else array


def assert_report_is_complete(model: onnx.ModelProto, result: FoldResult) -> None:
    """Every batch norm of the original has one row, and as many as were left are in the model."""
    report = result.report
    assert len(report.batch_norms) == affines(model)["BatchNormalization"], report
    assert all(row.detail for row in report.left), report


def survive_rounding(model: onnx.ModelProto, feeds: Feeds, dtype: str, *, aggressive: bool = False) -> FoldResult:
    """Fold a model of another type and compare, first its rounded weights by exact arithmetic, then by the runtime.

    Every constant that a fold makes is rounded once, which changes a result by at most u of its majorant per constant
    that it depends on: one for every affine map, and two (scale and shift) for every operator that takes part.
    """
    narrow = retyped(model, dtype)
    result = fold(narrow, aggressive)
    onnx.checker.check_model(result.model, full_check=True)
    assert_same_interface(narrow, result.model)
    wide = [retyped(item, "float64") for item in (narrow, result.model)]
    exact = {name: array.astype("float64") if array.dtype.kind == "f" else array for name, array in feeds.items()}
    roundings = 2 * sum(len(nodes) for nodes in node_lists(narrow))
    largest = max((np.abs(array).max(initial=1) for array in exact.values()), default=1)
    with explained(narrow, result):
        assert_same_values(*wide, exact, roundings * UNIT[dtype] * 1.01, 1e3 * SUBNORMAL[dtype] * largest)
        survive_check(narrow, result, feeds, dtype)
    return result


def survive_check(narrow: onnx.ModelProto, result: FoldResult, feeds: Feeds, dtype: str) -> Check | None:
    """Hold the fold to the bound that pybn derives; None if onnxruntime has no kernel for the original."""
    code = ONNX_TYPE[dtype]
    inputs = {
        name: array.astype(helper.tensor_dtype_to_np_dtype(code)) if array.dtype.kind == "f" else array
        for name, array in feeds.items()
    }
    no_timing = Timing(0, 0, 0, 0, 0)
    try:
        with mock.patch("pybn.folding.verify.time_models", return_value=no_timing):
            check = verify(narrow, result.model, result.report, [inputs])
    except CheckError as error:
        if "the original model" in str(error) or "IR version" in str(error):
            return None
        raise
    failed = [item for item in (*check.folds, *check.outputs) if not item.passed]
    assert check.passed, failed
    return check


def assert_oracle_agrees_with_onnxruntime(model: onnx.ModelProto, feeds: Feeds) -> None:
    """Compare the graph outputs with those of float32 in onnxruntime, its optimisations off."""
    single = retyped(model, "float32")
    try:
        actual = runtime(single, **{name: array.astype("float32") for name, array in feeds.items()})
    except Exception as error:  # onnxruntime has a class of its own for each failure
        if any(text in str(error) for text in ("IR version", "opset", "NOT_IMPLEMENTED", "non-negative")):
            return
        raise
    expected = evaluate(model, feeds)
    scale = evaluate(majorant(model), {name: magnitude(array) for name, array in feeds.items()})
    for output, array in zip(model.graph.output, actual, strict=True):
        name = output.name
        assert_close(array.astype("float64"), expected[name], scale[name], 2e-5, 1e-30, name)
