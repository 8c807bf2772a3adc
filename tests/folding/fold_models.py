"""Small ONNX models for the folding tests, and the two oracles that run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper
from onnx.reference import ReferenceEvaluator

from pybn.folding.graph import scopes, standard_type

ONNX_TYPE = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
}
PARAMETERS = ("gamma", "beta", "mean", "var")


def batch_norm(rng: np.random.Generator, channels: int, dtype: Any = "float32") -> dict[str, Any]:
    """Parameters with negative and zero gammas among them."""
    gamma = rng.normal(size=channels)
    gamma[rng.random(channels) < 0.2] = 0.0
    values = {
        "gamma": gamma,
        "beta": rng.normal(size=channels),
        "mean": rng.normal(size=channels),
        "var": rng.uniform(0.1, 3.0, channels),
    }
    return {name: value.astype(dtype) for name, value in values.items()}


def bn_node(x: str, y: str, prefix: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(
        "BatchNormalization",
        [x, *(prefix + name for name in PARAMETERS)],
        [y],
        name=f"bn_{y}",
        **attributes,
    )


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    return ir.to_proto(ir.tensor(array, name=name))


def value(name: str, shape: Any, dtype: str = "float32") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_TYPE[dtype], shape)


def model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    x: Any,
    y: Any = None,
    *,
    dtype: str = "float32",
    opset: int = 17,
    ir_version: int = 8,
    outputs: list[onnx.ValueInfoProto] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
    **extra: Any,
) -> onnx.ModelProto:
    """A model from "x" to "y"; x and y are shapes."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("x", x, dtype), *(inputs or [])],
        outputs or [value("y", y, dtype)],
        [tensor(name, array) for name, array in constants.items()],
    )
    imports = extra.pop("opset_imports", [helper.make_opsetid("", opset)])
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, **extra)


def conv_model(dtype: str = "float32", **options: Any) -> onnx.ModelProto:
    """The plain case: Conv, BatchNormalization."""
    rng = np.random.default_rng(7)
    constants = {
        "w": rng.normal(size=(4, 3, 3, 3)).astype(dtype),
        **batch_norm(rng, 4, dtype),
    }
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), bn_node("c", "y")]
    return model(nodes, constants, ["N", 3, 8, 8], ["N", 4, 6, 6], dtype=dtype, **options)


def net_model() -> onnx.ModelProto:
    """Conv, BN, Relu, pool, MatMul, BN: two folds and operators between them."""
    rng = np.random.default_rng(3)
    constants = {
        "w": rng.normal(size=(6, 3, 3, 3)).astype("float32"),
        "m": rng.normal(size=(6, 5)).astype("float32"),
        **batch_norm(rng, 6),
        **{"2" + name: array for name, array in batch_norm(rng, 5).items()},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        bn_node("c", "n"),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["l"], name="linear"),
        bn_node("l", "y", "2"),
    ]
    return model(nodes, constants, ["N", 3, 8, 8], ["N", 5])


def batch_norms(proto: onnx.ModelProto) -> int:
    """How many batch norms are in a model, its subgraphs and its functions."""
    graph = ir.from_proto(proto)
    return sum(standard_type(node, graph) == "BatchNormalization" for scope in scopes(graph) for node in scope.graph)


def reference(proto: onnx.ModelProto, **feeds: np.ndarray) -> list[Any]:
    with np.errstate(all="ignore"):
        return list(ReferenceEvaluator(proto).run(None, feeds))


def runtime(proto: onnx.ModelProto, **feeds: np.ndarray) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))
