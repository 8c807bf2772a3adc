"""bfloat16 models for runtimes that have no kernels for them: every operator in float32, its result rounded.

That is how hardware computes that has the type. Values keep their names and stay bfloat16; only the inputs and outputs
of the model become float32, because Python's side of onnxruntime has no bfloat16 arrays either.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import helper

BFLOAT16 = onnx.TensorProto.BFLOAT16
FLOAT = onnx.TensorProto.FLOAT


def uses_bfloat16(model: onnx.ModelProto) -> bool:
    """Say whether an input, an initializer or a constant of the main graph is bfloat16."""
    graph = model.graph
    constants = (item.t for node in graph.node if node.op_type == "Constant" for item in node.attribute)
    return any(info.type.tensor_type.elem_type == BFLOAT16 for info in graph.input) or any(
        tensor.data_type == BFLOAT16 for tensor in (*graph.initializer, *constants)
    )


def bfloat16_names(model: onnx.ModelProto) -> set[str]:
    """Return the names of the bfloat16 values of the main graph."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = (*graph.input, *graph.output, *graph.value_info)
    names = {info.name for info in infos if info.type.tensor_type.elem_type == BFLOAT16}
    return names | {tensor.name for tensor in graph.initializer if tensor.data_type == BFLOAT16}


def in_float32(model: onnx.ModelProto, halves: set[str]) -> onnx.ModelProto:
    """Put casts around every operator that is given or gives bfloat16.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; it stays as it is.
    halves : set of str
        What `bfloat16_names` returns for it.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    nodes: list[onnx.NodeProto] = []
    for info in graph.input:
        if info.name in halves:
            info.type.tensor_type.elem_type = FLOAT
            nodes.append(_cast(info.name, f"{info.name}.bfloat16", BFLOAT16))
    inputs = {info.name for info in graph.input}
    for position, node in enumerate(graph.node):
        nodes += _around(node, halves, inputs, f"pybn.{position}")
    for info in graph.output:
        if info.name in halves:
            # The value itself takes another name, so that the output keeps its own.
            _rename(nodes, info.name, f"{info.name}.bfloat16")
            nodes.append(_cast(f"{info.name}.bfloat16", info.name, FLOAT))
            info.CopyFrom(helper.make_tensor_value_info(info.name, FLOAT, None))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    return wide


def _around(node: onnx.NodeProto, halves: set[str], inputs: set[str], prefix: str) -> Iterator[onnx.NodeProto]:
    if not any(name in halves for name in node.input):
        yield node
        return
    copy = onnx.NodeProto.FromString(node.SerializeToString())
    for index, name in enumerate(node.input):
        if name in halves:
            copy.input[index] = f"{prefix}.in{index}"
            yield _cast(f"{name}.bfloat16" if name in inputs else name, copy.input[index], FLOAT)
    for index, name in enumerate(node.output):
        if name in halves and node.op_type != "Cast":
            copy.output[index] = f"{prefix}.out{index}"
    yield copy
    for wide, name in zip(copy.output, node.output, strict=True):
        if wide != name:
            yield _cast(wide, name, BFLOAT16)


def _rename(nodes: list[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=to)
