"""The fold of a whole model: find each batch norm, walk back from it, rewrite, clean up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, overload

import numpy as np
import onnx
import onnx_ir as ir

from pybn.folding import files
from pybn.folding.affine import Affine, Array, is_supported
from pybn.folding.editor import Editor
from pybn.folding.graph import (
    AttributeNotConstant,
    Facts,
    Scope,
    attribute,
    display_name,
    scopes,
    standard_type,
    unavailable,
)
from pybn.folding.neighbours import neighbours
from pybn.folding.reasons import FoldError, Reason, Refusal
from pybn.folding.report import Fold, FoldReport, Left
from pybn.folding.rules import BACKWARD, Rewrite, data_input

# ONNX stores attributes as float32, so this is the epsilon of a batch norm that does not name one.
DEFAULT_EPSILON = float(np.float32(1e-5))

M = TypeVar("M", onnx.ModelProto, ir.Model)


@dataclass(frozen=True)
class FoldResult(Generic[M]):
    """A folded model and the report on every batch norm of the original."""

    model: M
    report: FoldReport


@overload
def fold_onnx(model_or_path: str | os.PathLike[str]) -> FoldResult[onnx.ModelProto]: ...
@overload
def fold_onnx(model_or_path: onnx.ModelProto) -> FoldResult[onnx.ModelProto]: ...
@overload
def fold_onnx(model_or_path: ir.Model) -> FoldResult[ir.Model]: ...
def fold_onnx(
    model_or_path: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
) -> FoldResult[onnx.ModelProto] | FoldResult[ir.Model]:
    """Remove the evaluation-mode batch norms of an ONNX model, exactly.

    Parameters
    ----------
    model_or_path : path, onnx.ModelProto or onnx_ir.Model
        Left untouched. External data of a path is read and becomes part of the result.

    Returns
    -------
    FoldResult
        ``model`` is a ModelProto for a path or a ModelProto, and an onnx_ir.Model for one.
        ``report`` has a row for every batch norm: folded into what, or left and why.

    Raises
    ------
    pybn.folding.files.ModelError
        If the model cannot be read or is invalid. A subclass of ValueError. A batch norm that
        cannot be folded is never an error.
    TypeError
        If the argument is none of the three.
    """
    if isinstance(model_or_path, ir.Model):
        clone = model_or_path.clone()
        return FoldResult(clone, _fold_in_place(clone))
    if isinstance(model_or_path, onnx.ModelProto):
        files.validate(model_or_path)
        return _fold_proto(model_or_path)
    if isinstance(model_or_path, (str, os.PathLike)):
        proto, info = files.read_model(model_or_path)
        result = _fold_proto(proto)
        return FoldResult(result.model, replace(result.report, input=info))
    raise TypeError(
        f"model_or_path is {type(model_or_path).__name__}, expected a path, an onnx.ModelProto or an onnx_ir.Model"
    )


def _fold_proto(proto: onnx.ModelProto) -> FoldResult[onnx.ModelProto]:
    """Fold a valid ModelProto into a new one."""
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir has no common base class for what it rejects
        raise files.ModelError(f"invalid model: {files.first_line(error)}") from error
    # onnx-ir shares tensors with the ModelProto, but its graph is new: nothing of `proto` changes.
    report = _fold_in_place(model)
    result = onnx.ModelProto()
    if report.folds:
        result = ir.to_proto(model)
        _restore_descriptions(result.graph, proto.graph)
        files.validate(result)
    else:
        # Nothing to fold: the very same bytes. So folding twice equals folding once.
        result.CopyFrom(proto)
    return FoldResult(result, report)


def _restore_descriptions(result: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Undo what onnx-ir adds to, or does not know of, the types that a model declares."""
    # It writes type information for every initializer, whether there was any or not.
    described = {info.name for graph in _graph_protos(original) for info in graph.value_info}
    for graph in _graph_protos(result):
        constants = {tensor.name for tensor in graph.initializer}
        kept = [v for v in graph.value_info if v.name in described or v.name not in constants]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    # It has no types for maps, which classifiers of the ai.onnx.ml domain return.
    declared = {info.name: info for info in (*original.input, *original.output)}
    constants = {tensor.name for tensor in result.initializer}
    for info in (*result.input, *result.output):
        if info.name in declared and info.name not in constants:
            info.CopyFrom(declared[info.name])


def _graph_protos(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inside in (item.g, *item.graphs):
                if inside.node:
                    yield from _graph_protos(inside)


def _fold_in_place(model: ir.Model) -> FoldReport:
    facts = Facts(model)
    editor = Editor(model)
    rows: list[Fold | Left] = []
    # Graph order is topological, so what is upstream of a batch norm has settled before its turn.
    for scope in list(scopes(model)):
        for node in list(scope.graph):
            if standard_type(node, model) == "BatchNormalization":
                rows.append(_fold_batch_norm(node, scope, facts, editor))
    return FoldReport(tuple(rows))


def _fold_batch_norm(node: ir.Node, scope: Scope, facts: Facts, editor: Editor) -> Fold | Left:
    """Fold one batch norm, or say why not. Nothing changes unless the whole way back is clear."""
    name, output = display_name(node), _first_output(node)
    found = _read_batch_norm(node, scope, facts)
    path = found if isinstance(found, Refusal) else _walk_back(node, found, facts)
    if isinstance(path, Refusal):
        return Left(name, node.op_type, output, scope.label, path.reason, path.detail, neighbours=neighbours(node))
    assert isinstance(found, Affine)
    magnitudes = np.abs(found.scale)
    fold = Fold(
        name=name,
        op_type=node.op_type,
        output=output,
        graph=scope.label,
        direction="backward",
        into=(display_name(path.nodes[-1]),),
        route=tuple(passed.op_type for passed in path.nodes),
        outputs=(output,),
        cost=0,
        scale_range=(float(magnitudes.min(initial=np.inf)), float(magnitudes.max(initial=0.0))),
    )
    editor.apply(path.rewrites)
    editor.remove(node)
    return fold


def _read_batch_norm(node: ir.Node, scope: Scope, facts: Facts) -> Affine | Refusal:
    """Read a BatchNormalization as the affine map that it is in evaluation mode."""
    try:
        not_evaluation = _not_evaluation_mode(node, scope.opset)
        if not_evaluation is not None:
            return not_evaluation
        epsilon = float(attribute(node, "epsilon", DEFAULT_EPSILON))
    except AttributeNotConstant as error:
        return Refusal(Reason.ATTRIBUTE_NOT_CONSTANT, f"{error} is a parameter of the local function")

    arrays: list[Array] = []
    names = ("scale", "B", "input_mean", "input_var")
    inputs: list[ir.Value | None] = [*node.inputs, None, None, None, None]
    for what, value in zip(names, inputs[1:5], strict=True):
        array = facts.constant(value)
        if array is None:
            return unavailable(facts, value, what, parameter=True)
        if not is_supported(array.dtype):
            return Refusal(Reason.UNSUPPORTED_DTYPE, f"{what} is {array.dtype}")
        arrays.append(array)
    gamma, beta, mean, variance = arrays
    for what, array in zip(names, arrays, strict=True):
        if array.ndim != 1 or array.shape != gamma.shape:
            shapes = f"{what} has shape {array.shape}, scale {gamma.shape}"
            return Refusal(Reason.PARAMETER_SHAPE, shapes)
    try:
        return Affine.from_batch_norm(mean, variance, gamma, beta, epsilon)
    except FoldError as error:
        return Refusal(error.reason, str(error))


def _not_evaluation_mode(node: ir.Node, opset: int) -> Refusal | None:
    """Refuse what is not the evaluation mode of its opset; the operator changed at 7, 9 and 14."""
    if opset < 7:
        return Refusal(Reason.OLD_OPSET, f"BatchNormalization of opset {opset} has another definition")
    if opset >= 14 and attribute(node, "training_mode", 0):
        return Refusal(Reason.TRAINING_MODE, "training_mode is 1, so Y depends on the batch")
    extra = [output for output in node.outputs[1:] if output.name]
    if opset < 14 and extra:
        # Before opset 14 the number of outputs is the mode: more than Y means training.
        return Refusal(
            Reason.TRAINING_MODE,
            f"it has the output {extra[0].name!r}, which at opset {opset} means training mode",
        )
    used = [output for output in extra if output.uses() or output.is_graph_output()]
    if used:
        return Refusal(Reason.EXTRA_OUTPUTS, f"its output {used[0].name!r} is used")
    if opset < 9 and not attribute(node, "spatial", 1):
        return Refusal(Reason.SPATIAL_ZERO, "spatial=0 normalises every element by itself")
    return None


@dataclass(frozen=True)
class _Path:
    """The way back: the nodes passed, the absorbing operator last, and what becomes of them."""

    nodes: tuple[ir.Node, ...]
    rewrites: tuple[Rewrite, ...]


def _walk_back(batch_norm: ir.Node, affine: Affine, facts: Facts) -> _Path | Refusal:
    """Carry the map from producer to producer until an operator absorbs it."""
    nodes: list[ir.Node] = []
    rewrites: list[Rewrite] = []
    consumer, index = batch_norm, 0
    carry: Affine | None = affine
    while carry is not None:
        producer = _only_feeds(consumer, index, facts)
        if isinstance(producer, Refusal):
            return producer
        try:
            step = BACKWARD[producer.op_type](producer, carry, facts)
        except FoldError as error:
            return Refusal(error.reason, str(error))
        except AttributeNotConstant as error:
            return Refusal(
                Reason.ATTRIBUTE_NOT_CONSTANT,
                f"{error} of {producer.op_type} is a parameter of the local function",
            )
        if isinstance(step, Refusal):
            return step
        nodes.append(producer)
        if step.rewrite is not None:
            rewrites.append(step.rewrite)
        consumer, index, carry = producer, data_input(producer, facts), step.carry

    before, after = nodes[0].outputs[0].dtype, batch_norm.outputs[0].dtype
    if before is not None and after is not None and before != after:
        return Refusal(
            Reason.TYPE_MISMATCH,
            f"{nodes[0].op_type} produces {before.name}, the batch norm {after.name}",
        )
    return _Path(tuple(nodes), tuple(rewrites))


def _only_feeds(consumer: ir.Node, index: int, facts: Facts) -> ir.Node | Refusal:
    """Return the producer of an input, if its output goes nowhere else and it has a rule."""
    value = consumer.inputs[index] if consumer.inputs else None
    producer = None if value is None else value.producer()
    if value is None or producer is None:
        what = "a graph input" if value is not None and value.is_graph_input() else "not a node's"
        return Refusal(
            Reason.NO_LINEAR_PRODUCER,
            f"its input {value.name if value is not None else ''!r} is {what}",
        )
    op_type = standard_type(producer, facts.model)
    if op_type is None:
        return Refusal(
            Reason.FOREIGN_DOMAIN,
            f"it follows {producer.domain or 'the local function'}::{producer.op_type}",
        )
    if op_type not in BACKWARD:
        return Refusal(Reason.NO_LINEAR_PRODUCER, f"it follows {op_type}")
    if value is not producer.outputs[0]:
        return Refusal(Reason.NO_LINEAR_PRODUCER, f"it follows a secondary output of {op_type}")
    where = f"the output {value.name!r} of {op_type}"
    if value.is_graph_output():
        return Refusal(Reason.GRAPH_OUTPUT, f"{where} is a graph output")
    if producer.graph is not consumer.graph:
        return Refusal(Reason.SUBGRAPH_CAPTURE, f"{where} belongs to an outer graph")
    others = [use.node for use in value.uses() if (use.node, use.idx) != (consumer, index)]
    captured = [node for node in others if node.graph is not producer.graph]
    if captured:
        return Refusal(
            Reason.SUBGRAPH_CAPTURE,
            f"{where} is also used by {display_name(captured[0])} in a subgraph",
        )
    if others:
        return Refusal(
            Reason.OTHER_CONSUMER,
            f"{where} is also used by {others[0].op_type} {display_name(others[0])}",
        )
    return producer


def _first_output(node: ir.Node) -> str:
    return (node.outputs[0].name if node.outputs else None) or ""


__all__ = ["FoldResult", "fold_onnx"]
