"""An ONNX model cut at its batch norms, so that these can be computed here: with the statistics of each batch.

Values have a stage: those that depend on no batch norm the first, what follows a batch norm that of its input and one
more. All nodes of a stage are one model, which onnxruntime runs; between two stages pybn computes the batch norms. So
every node runs once per batch, whatever surrounds the batch norms.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from pybn._merge import Moments
from pybn.folding import files
from pybn.folding.affine import Array, round_to
from pybn.folding.graph import Facts, attribute, display_name, scopes, standard_type
from pybn.folding.inputs import required_inputs
from pybn.folding.reasons import Refusal
from pybn.folding.runtime import Session
from pybn.folding.sources import DEFAULT_EPSILON, read
from pybn.functional import batch_norm
from pybn.population import Observe


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm of the main graph, whose parameters are constants; `index` is its place among the nodes."""

    name: str
    index: int
    x: str
    y: str
    weight: Array
    bias: Array
    eps: float
    mean_dtype: np.dtype[Any]
    var_dtype: np.dtype[Any]


@dataclass(frozen=True)
class Stage:
    """Nodes that run together, what they need and what others need of them, and the batch norms after them."""

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]
    batch_norms: list[BatchNorm]


class OnnxModel:
    """An ONNX model as a `pybn.population.Subject`.

    Parameters
    ----------
    model : path or onnx.ModelProto
        Left untouched.
    folder : Path, optional
        Where the external data of a ModelProto are, if it has any.

    Attributes
    ----------
    names : list of str
        Of the batch norms that can be re-estimated.
    left : dict from str to str
        Those that cannot, and why.
    """

    def __init__(self, model: str | os.PathLike[str] | onnx.ModelProto, folder: Path | None = None) -> None:
        if isinstance(model, onnx.ModelProto):
            files.validate(model, folder)
            self.proto, self.folder = model, folder
        elif isinstance(model, (str, os.PathLike)):
            loaded = files.load(model)
            self.proto, self.folder = loaded.proto, loaded.outside
        else:
            raise TypeError(f"model is a {type(model).__name__}, expected a path or an onnx.ModelProto")
        self.batch_norms, self.left = _batch_norms(files.to_ir(self.proto, self.folder))
        self.names = [batch_norm.name for batch_norm in self.batch_norms]
        self.optional: Collection[str] = ()
        self._stages = _stages(self.proto, self.batch_norms)

    @contextlib.contextmanager
    def running(self, observe: Observe) -> Iterator[Any]:
        """See `pybn.population.Subject`."""
        sessions: dict[int, Session] = {}

        def run(feeds: Mapping[str, Array]) -> None:
            values: dict[str, Array] = dict(feeds)
            for number, stage in enumerate(self._stages):
                if stage.outputs:
                    given = {name: values[name] for name in stage.inputs}
                    if number not in sessions:  # types of values in between are known when they are there
                        sessions[number] = Session(self._model_of(stage, given), "the model", folder=self.folder)
                    values.update(zip(stage.outputs, sessions[number].run(given), strict=True))
                for bn in stage.batch_norms:
                    observe(bn.name, values[bn.x], 1)
                    values[bn.y] = batch_norm(values[bn.x], None, None, bn.weight, bn.bias, training=True, eps=bn.eps)

        yield run

    def fingerprint(self) -> str:
        """See `pybn.population.Subject`."""
        return hashlib.sha256(self.proto.SerializeToString(deterministic=True)).hexdigest()

    def finish(self, statistics: Mapping[str, Moments]) -> onnx.ModelProto:
        """A copy of the model with these statistics. ONNX's running variance is the population's, as this one is."""
        result = onnx.ModelProto()
        result.CopyFrom(self.proto)
        for bn in self.batch_norms:
            node, found = result.graph.node[bn.index], statistics[bn.name]
            for position, values, dtype in ((3, found.mean, bn.mean_dtype), (4, found.var, bn.var_dtype)):
                what = "the mean" if position == 3 else "the variance"
                set_constant(result, node, position, round_to(values, dtype, f"{what} of {bn.name!r}"))
        files.validate(result, self.folder)
        return result

    def _model_of(self, stage: Stage, given: Mapping[str, Array]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self._shell())
        del model.graph.input[:], model.graph.output[:]
        model.graph.node.extend(stage.nodes)
        used = {name for node in stage.nodes for name in _names_used(node)}
        constants = [tensor for tensor in self.proto.graph.initializer if tensor.name in used | set(stage.outputs)]
        model.graph.initializer.extend(constants)
        for name, array in given.items():
            element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, element, None))
        if self.proto.ir_version < 4:  # initializers had to be inputs
            model.ir_version = 4
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in stage.outputs)
        return model

    def _shell(self) -> onnx.ModelProto:
        """The model without what its main graph holds."""
        shell = onnx.ModelProto(
            ir_version=self.proto.ir_version,
            opset_import=self.proto.opset_import,
            functions=self.proto.functions,
        )
        shell.graph.name = self.proto.graph.name or "graph"
        return shell


def set_constant(model: onnx.ModelProto, node: onnx.NodeProto, position: int, array: Array) -> None:
    """Give a node of the main graph another constant, in place: its own initializer's data, or a new initializer."""
    name = node.input[position]
    uses = sum(other == name for one in model.graph.node for other in _names_used(one))
    is_output = any(output.name == name for output in model.graph.output)
    own = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    if own is not None and uses == 1 and not is_output:
        own.CopyFrom(onnx.numpy_helper.from_array(array, name))
        return
    new = unused_name(model, f"{name}.reestimated")
    add_initializer(model, new, array)
    node.input[position] = new


def add_initializer(model: onnx.ModelProto, name: str, array: Array) -> None:
    """Add a constant to the main graph, in place."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if model.ir_version < 4:  # initializers had to be inputs
        element = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, element, array.shape))


def unused_name(model: onnx.ModelProto, base: str) -> str:
    """A name that no value or node of the main graph has."""
    graph = model.graph
    taken = {name for node in graph.node for name in (node.name, *_names_used(node), *node.output)}
    taken |= {item.name for items in (graph.input, graph.output, graph.initializer) for item in items}
    name, count = base, 2
    while name in taken:
        name, count = f"{base}{count}", count + 1
    return name


def _batch_norms(model: ir.Model) -> tuple[list[BatchNorm], dict[str, str]]:
    facts = Facts(model)
    found: list[BatchNorm] = []
    left: dict[str, str] = {}
    for scope in scopes(model):
        for index, node in enumerate(scope.graph):
            if standard_type(node, model) != "BatchNormalization":
                continue
            name = display_name(node)
            source = read(node, facts)
            if not scope.is_main:
                left[name] = f"it is in {scope.label}, expected in the main graph"
            elif source is None or isinstance(source, Refusal):
                left[name] = "it is not in evaluation mode" if source is None else source.detail
            else:
                weight, bias, mean, var = (facts.constant(value) for value in node.inputs[1:5])
                x, y = node.inputs[0], node.outputs[0]
                assert weight is not None
                assert bias is not None
                assert mean is not None
                assert var is not None
                assert x is not None
                assert x.name is not None
                assert y.name is not None
                eps = float(attribute(node, "epsilon", DEFAULT_EPSILON))
                if name in {other.name for other in found}:
                    name = y.name
                found.append(
                    BatchNorm(
                        name,
                        index,
                        x.name,
                        y.name,
                        weight.astype(np.float64),
                        bias.astype(np.float64),
                        eps,
                        mean.dtype,
                        var.dtype,
                    )
                )
    return found, left


def _stages(proto: onnx.ModelProto, batch_norms: list[BatchNorm]) -> list[Stage]:
    """Cut the main graph. What no batch norm needs does not run."""
    graph = proto.graph
    cut = {batch_norm.index: batch_norm for batch_norm in batch_norms}
    needed = {batch_norm.x for batch_norm in batch_norms}
    wanted: set[int] = set()
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if index not in cut and needed.intersection(node.output):
            wanted.add(index)
            needed.update(_names_used(node))

    constants = {tensor.name for tensor in graph.initializer}
    at: dict[str, int] = {info.name: 0 for info in required_inputs(proto)}
    nodes: dict[int, list[onnx.NodeProto]] = {}
    after: dict[int, list[BatchNorm]] = {}
    for index, node in enumerate(graph.node):
        level = max((at.get(name, 0) for name in _names_used(node)), default=0)
        if index in cut:
            after.setdefault(level, []).append(cut[index])
            at[cut[index].y] = level + 1
        elif index in wanted:
            nodes.setdefault(level, []).append(node)
            at.update(dict.fromkeys(filter(None, node.output), level))

    levels = range(1 + max(after, default=-1))
    uses = {level: {name for node in nodes.get(level, []) for name in _names_used(node)} for level in levels}
    for level in levels:
        uses[level] |= {batch_norm.x for batch_norm in after.get(level, [])}
    stages: list[Stage] = []
    for level in levels:
        own = {name for node in nodes.get(level, []) for name in node.output if name}
        read_here = {name for node in nodes.get(level, []) for name in _names_used(node)}
        later = {name for other in levels if other > level for name in uses[other]}
        bn_inputs = {batch_norm.x for batch_norm in after.get(level, [])}
        stages.append(
            Stage(
                nodes.get(level, []),
                sorted(name for name in read_here - own - constants if name in at),
                sorted(own & (later | bn_inputs)),
                after.get(level, []),
            )
        )
    return stages


def _names_used(node: onnx.NodeProto) -> list[str]:
    """Values that a node reads, those that its subgraphs take from around them included."""
    names = [name for name in node.input if name]
    for item in node.attribute:
        for graph in (item.g, *item.graphs):
            names += _names_used_inside(graph)
    return names


def _names_used_inside(graph: onnx.GraphProto) -> list[str]:
    inner = {tensor.name for tensor in graph.initializer} | {info.name for info in graph.input}
    inner |= {name for node in graph.node for name in node.output}
    used = [name for node in graph.node for name in _names_used(node)] + [info.name for info in graph.output]
    return [name for name in used if name not in inner]
