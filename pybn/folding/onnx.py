"""`fold_onnx`: a model in, a folded model and a report out."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar, overload

import onnx
import onnx_ir as ir

from pybn.folding import files, protos
from pybn.folding.engine import Options, Progress, fold_in_place
from pybn.folding.report import FoldReport

M = TypeVar("M", onnx.ModelProto, ir.Model)


@dataclass(frozen=True)
class FoldResult(Generic[M]):
    """A folded model and the report on every batch norm of the original."""

    model: M
    report: FoldReport


@overload
def fold_onnx(
    model_or_path: str | os.PathLike[str] | onnx.ModelProto,
    *,
    aggressive: bool = False,
    skip: Collection[str] = (),
    only: Collection[str] = (),
    progress: Progress | None = None,
    folder: Path | None = None,
) -> FoldResult[onnx.ModelProto]: ...
@overload
def fold_onnx(
    model_or_path: ir.Model,
    *,
    aggressive: bool = False,
    skip: Collection[str] = (),
    only: Collection[str] = (),
    progress: Progress | None = None,
) -> FoldResult[ir.Model]: ...
def fold_onnx(
    model_or_path: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    aggressive: bool = False,
    skip: Collection[str] = (),
    only: Collection[str] = (),
    progress: Progress | None = None,
    folder: Path | None = None,
) -> FoldResult[onnx.ModelProto] | FoldResult[ir.Model]:
    """Remove the evaluation-mode batch norms of an ONNX model, and other affine nodes, exactly.

    Parameters
    ----------
    model_or_path : path, onnx.ModelProto or onnx_ir.Model
        Left untouched. External data of a path becomes part of the result if it stays below the 2 GB of one
        message; else what the fold leaves alone still refers to the files beside that path.
    aggressive : bool
        Also make rewrites that save no operator, such as an Add for a batch norm.
    skip : collection of str
        Names of nodes that must stay as they are: affine nodes, or operators that would absorb one.
        A node without a name goes by that of its first output.
    only : collection of str
        Names of the affine nodes that are to be folded; empty: all.
    progress : callable, optional
        Called with the number of affine nodes that have been looked at, and with that of all.
    folder : Path, optional
        Where the external data of a ModelProto is, if it has any.

    Returns
    -------
    FoldResult
        ``model`` is a ModelProto for a path or a ModelProto, and an onnx_ir.Model for one.
        ``report`` has a row for every affine node: folded into what, or left and why.

    Raises
    ------
    pybn.folding.files.ModelError
        If the model cannot be read or is invalid. A subclass of ValueError. A batch norm that
        cannot be folded is never an error.
    ValueError
        If `skip` or `only` has a name that no such node has.
    TypeError
        If the argument is none of the three, or `skip` or `only` is a string.
    """
    options = Options(aggressive, skip, only, progress)
    if isinstance(model_or_path, ir.Model):
        clone = model_or_path.clone()
        return FoldResult(clone, fold_in_place(clone, options))
    if isinstance(model_or_path, onnx.ModelProto):
        files.validate(model_or_path, folder)
        return _fold_proto(model_or_path, folder, options)
    if isinstance(model_or_path, (str, os.PathLike)):
        proto, info = files.read_model(model_or_path)
        result = _fold_proto(proto, Path(model_or_path).parent, options)
        return FoldResult(result.model, replace(result.report, input=info))
    raise TypeError(
        f"model_or_path is {type(model_or_path).__name__}, expected a path, an onnx.ModelProto or an onnx_ir.Model"
    )


def _fold_proto(proto: onnx.ModelProto, folder: Path | None, options: Options) -> FoldResult[onnx.ModelProto]:
    """Fold a valid ModelProto into a new one."""
    model = files.to_ir(proto, folder)
    # onnx-ir shares tensors with the ModelProto, but its graph is new: nothing of `proto` changes.
    report = fold_in_place(model, options)
    result = onnx.ModelProto()
    if report.folds:
        result = _serialize(model)
        _restore_descriptions(result.graph, proto.graph)
        files.validate(result, folder)
    else:
        # Nothing to fold: the very same bytes. So folding twice equals folding once.
        result.CopyFrom(proto)
    return FoldResult(result, report)


def _serialize(model: ir.Model) -> onnx.ModelProto:
    """Turn a model, which is spent by it, into a ModelProto.

    The new weights move there one after the other, so that they are never all in memory twice.
    """
    moving: dict[str, ir.TensorProtocol] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor):
            moving[name] = tensor
            stub = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
            value.const_value = ir.TensorProtoTensor(stub)
        del tensor
    result = ir.to_proto(model)
    for initializer in result.graph.initializer:
        if initializer.name in moving:
            initializer.raw_data = moving.pop(initializer.name).tobytes()
    return result


def _restore_descriptions(result: onnx.GraphProto, original: onnx.GraphProto) -> None:
    """Undo what onnx-ir adds to, or does not know of, the types that a model declares."""
    # It writes type information for every initializer, whether there was any or not.
    described = {info.name for graph in protos.graphs(original) for info in graph.value_info}
    for graph in protos.graphs(result):
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


__all__ = ["FoldResult", "fold_onnx"]
