"""What a model must be before anything is done with it: complete, valid, of a kind that onnx-ir keeps."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from pybn.folding.external import locate
from pybn.folding.protos import ModelError, first_line, is_external, packed_bytes, size, tensors, without_data

TYPED_DATA = (
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
# The checker sees larger tensors without their data, of which it would make two copies.
CHECKED_WHOLE = 1024


def validate(proto: onnx.ModelProto, folder: Path | None = None) -> None:
    """Raise ModelError unless the model is complete and valid.

    `folder` is where its external data are; without it, there must be none.
    """
    try:
        _require_valid(proto, folder)
    except RecursionError as error:
        raise ModelError("invalid model: it is nested too deeply") from error


def _require_valid(proto: onnx.ModelProto, folder: Path | None) -> None:
    _require_text(proto)
    names: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            raise ModelError(f"invalid model: two initializers are named {tensor.name!r}")
        names.add(tensor.name)
    known = onnx.defs.onnx_opset_version()
    for used in proto.opset_import:
        if used.domain in ("", "ai.onnx") and not 1 <= used.version <= known:
            raise ModelError(f"opset {used.version} is unknown; the installed onnx package knows 1 to {known}")
    if proto.graph.sparse_initializer or proto.training_info:
        raise ModelError("models with sparse initializers or training information are unsupported")
    for tensor in tensors(proto):
        if not is_external(tensor):
            _require_complete(tensor)
        elif folder is not None:
            locate(tensor, folder)
        else:
            raise ModelError(
                f"tensor {tensor.name!r} is in an external file: give the path of the model, "
                "or load it with its external data"
            )
    try:
        onnx.checker.check_model(_small(proto))
    except Exception as error:  # the checker raises its own type, ValueError and others
        raise ModelError(f"invalid model: {first_line(error)}") from error


def _small(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with large tensors empty; `_require_complete` has looked at them."""
    small, _ = without_data(proto, lambda tensor: is_external(tensor) or packed_bytes(tensor) > CHECKED_WHOLE)
    for tensor, original in zip(tensors(small), tensors(proto), strict=True):
        if is_external(original) or tensor.HasField("raw_data") != original.HasField("raw_data"):
            tensor.dims[:] = [0]
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    return small


def _require_text(message: Message) -> None:
    """Raise ModelError where a string is not UTF-8, which protobuf lets pass as bytes."""
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for item in [value] if isinstance(value, Message) else value:
                _require_text(item)
        elif field.type == FieldDescriptor.TYPE_STRING:
            for item in [value] if isinstance(value, (str, bytes)) else value:
                if not isinstance(item, str):
                    raise ModelError(f"invalid model: a {field.name} is not text")


def _require_complete(tensor: onnx.TensorProto) -> None:
    """Compare a tensor's shape with its data, which the ONNX checker leaves to whoever reads it."""
    packed = packed_bytes(tensor)
    values = sum(len(getattr(tensor, name)) for name in TYPED_DATA)
    if tensor.HasField("raw_data"):
        complete = len(tensor.raw_data) == packed and not values
    else:
        count = size(tensor)
        if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
            count *= 2
        # Types of less than a byte are packed; a string has no fixed width.
        complete = values == min(count, packed or count)
    if not complete:
        raise ModelError(
            f"invalid model: the data of tensor {tensor.name!r} does not fill its shape {tuple(tensor.dims)}"
        )
