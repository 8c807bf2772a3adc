"""Models in 16-bit types where runtimes are of no use: every operator in float32, its result rounded.

onnxruntime's CPU kernels do not know bfloat16. They know float16, but only on x86 are sums of products in float32, as
the bound of the check assumes; on Arm they may be in float16. In both cases casts are put around every operator. That
is how hardware computes that has the types. Values keep their names and types; only the inputs and outputs of the model
become float32, because Python's side of onnxruntime has no bfloat16 arrays either.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

import onnx
from onnx import helper

FLOAT = onnx.TensorProto.FLOAT
ARM = platform.machine().lower() in ("aarch64", "arm64")
NARROW = {onnx.TensorProto.BFLOAT16, *([onnx.TensorProto.FLOAT16] if ARM else [])}


def uses_narrow_types(model: onnx.ModelProto) -> bool:
    """Say whether an input, an initializer or a constant of the main graph is of a type to be widened."""
    graph = model.graph
    constants = (item.t for node in graph.node if node.op_type == "Constant" for item in node.attribute)
    return any(info.type.tensor_type.elem_type in NARROW for info in graph.input) or any(
        tensor.data_type in NARROW for tensor in (*graph.initializer, *constants)
    )


def narrow_values(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element types of the values of the main graph that are to be widened, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {name: element for name, element in types.items() if element in NARROW}


def in_float32(model: onnx.ModelProto, narrow: Mapping[str, int]) -> onnx.ModelProto:
    """Put casts around every operator that is given or gives a narrow type.

    Parameters
    ----------
    model : onnx.ModelProto
        The model; it stays as it is.
    narrow : mapping
        What `narrow_values` returns for it.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    nodes: list[onnx.NodeProto] = []
    inputs = {info.name for info in graph.input if info.name in narrow}
    for info in graph.input:
        if info.name in narrow:
            info.type.tensor_type.elem_type = FLOAT
            nodes.append(_cast(info.name, _inner(info.name), narrow[info.name]))
    for position, node in enumerate(graph.node):
        nodes += _around(node, narrow, inputs, f"pybn.{position}")
    for info in graph.output:
        if info.name in narrow:
            # The value itself takes another name, so that the output keeps its own.
            _rename(nodes, info.name, _inner(info.name))
            nodes.append(_cast(_inner(info.name), info.name, FLOAT))
            info.CopyFrom(helper.make_tensor_value_info(info.name, FLOAT, None))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    return wide


def _around(node: onnx.NodeProto, narrow: Mapping[str, int], inputs: set[str], prefix: str) -> Iterator[onnx.NodeProto]:
    if not any(name in narrow for name in node.input):
        yield node
        return
    copy = onnx.NodeProto.FromString(node.SerializeToString())
    for index, name in enumerate(node.input):
        if name in narrow:
            copy.input[index] = f"{prefix}.in{index}"
            yield _cast(_inner(name) if name in inputs else name, copy.input[index], FLOAT)
    for index, name in enumerate(node.output):
        if name in narrow and node.op_type != "Cast":
            copy.output[index] = f"{prefix}.out{index}"
    yield copy
    for wide, name in zip(copy.output, node.output, strict=True):
        if wide != name:
            yield _cast(wide, name, narrow[name])


def _inner(name: str) -> str:
    return f"pybn.narrow.{name}"


def _rename(nodes: list[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], to=to)
