"""Running models of the zoo: what to feed them, and by whom they are run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from zoo.net import Array


def feeds(model: onnx.ModelProto, batch: int = 2) -> dict[str, Array]:
    """Draw a value for every input: standard normal, or any byte; so many samples if the batch size is free."""
    rng = np.random.default_rng(0)
    defaults = {tensor.name for tensor in model.graph.initializer}
    drawn: dict[str, Array] = {}
    for info in model.graph.input:
        if info.name in defaults:
            continue
        tensor = info.type.tensor_type
        sizes = [dim.dim_value or batch for dim in tensor.shape.dim]
        if tensor.elem_type == onnx.TensorProto.UINT8:
            drawn[info.name] = rng.integers(0, 256, sizes, dtype=np.uint8)
        else:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            drawn[info.name] = rng.standard_normal(sizes).astype(dtype)
    return drawn


def run(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """Run a model by onnxruntime as it is written, without onnxruntime's own folds."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))
