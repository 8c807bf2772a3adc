"""Reading model files without trusting them, and writing them so that a failure changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from pybn.folding.report import FileInfo

# The most that one protobuf message can hold.
MAX_BYTES = 2**31 - 1
TYPED_DATA = (
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)


class ModelError(ValueError):
    """A model cannot be read, is invalid, or cannot be written. The message is one line."""


def read_model(path: str | os.PathLike[str]) -> tuple[onnx.ModelProto, FileInfo]:
    """Read and validate a model, with its external data moved into it.

    Raises
    ------
    ModelError
        Whatever is wrong with the file, in one line.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise ModelError(f"{file}: is a directory, expected an ONNX file")
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise ModelError(f"{file}: {size} bytes, but an ONNX file holds at most {MAX_BYTES}")
        content = file.read_bytes()
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror or error}") from error
    if not content:
        raise ModelError(f"{file}: the file is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{file}: not an ONNX model (damaged, or another format)") from error
    try:
        _embed_external_data(proto, file.parent, len(content))
        validate(proto)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    return proto, _file_info(file, content)


def external_data_files(path: str | os.PathLike[str]) -> set[Path]:
    """Return the resolved paths of the files in which a readable model keeps tensors."""
    file = Path(path)
    proto = onnx.ModelProto.FromString(file.read_bytes())
    return {
        _locate(tensor, file.parent)[0]
        for tensor in _tensors(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


def validate(proto: onnx.ModelProto) -> None:
    """Raise ModelError unless the model is complete, valid, and of a kind that onnx-ir keeps."""
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
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(
                f"tensor {tensor.name!r} is in an external file: give the path of the model, "
                "or load it with its external data"
            )
        _require_complete(tensor)
    try:
        onnx.checker.check_model(proto)
    except Exception as error:  # the checker raises its own type, ValueError and others
        raise ModelError(f"invalid model: {first_line(error)}") from error


def write_model(proto: onnx.ModelProto, path: str | os.PathLike[str]) -> FileInfo:
    """Write a model so that the target holds the old bytes or the new ones, never a mixture.

    A temporary file beside the target is written, flushed to disk and renamed. A symbolic link
    is replaced, not followed.

    Raises
    ------
    ModelError
        If the model is too large for one file.
    OSError
        If writing fails. The target is as it was, and the temporary file is gone.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise ModelError(f"{target}: exists and is not a regular file")
    if proto.ByteSize() > MAX_BYTES:
        raise ModelError(f"the folded model exceeds the {MAX_BYTES} bytes of one ONNX file")
    content = proto.SerializeToString(deterministic=True)
    temporary = target.parent / f".pybn-{secrets.token_hex(8)}.tmp"
    try:
        # os.open rather than tempfile, which would make a file that only its owner can read.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.is_file() and not target.is_symlink():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)  # noqa: PTH105 - the tests make this very call fail
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)
    return _file_info(target, content)


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
    packed = _packed_bytes(tensor)
    if tensor.HasField("raw_data"):
        complete = len(tensor.raw_data) == packed
    else:
        values = sum(len(getattr(tensor, name)) for name in TYPED_DATA)
        count = _size(tensor)
        if tensor.data_type in (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128):
            count *= 2
        # Types of less than a byte are packed; a string has no fixed width.
        complete = values == min(count, packed or count)
    if not complete:
        raise ModelError(
            f"invalid model: the data of tensor {tensor.name!r} does not fill its shape {tuple(tensor.dims)}"
        )


def _packed_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes that a tensor's shape and type ask for; 0 for strings."""
    try:
        data_type = ir.DataType(tensor.data_type)
        bits = 0 if data_type == ir.DataType.STRING else int(data_type.bitwidth)
    except (ValueError, TypeError) as error:
        raise ModelError(f"invalid model: tensor {tensor.name!r} has the unknown type {tensor.data_type}") from error
    if min(tensor.dims, default=0) < 0:
        raise ModelError(f"invalid model: tensor {tensor.name!r} has a negative dimension")
    # Integer arithmetic: absurd dimensions must not overflow a float.
    return -(-_size(tensor) * bits // 8)


def _size(tensor: onnx.TensorProto) -> int:
    return math.prod(int(dim) for dim in tensor.dims)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _file_info(file: Path, content: bytes) -> FileInfo:
    return FileInfo(str(file), len(content), hashlib.sha256(content).hexdigest())


def _sync_directory(directory: Path) -> None:
    # The rename itself reaches the disk with the directory. Windows cannot open directories.
    if os.name != "posix":
        return
    # The file is in place already: a folder that cannot be opened or synced is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _embed_external_data(proto: onnx.ModelProto, folder: Path, size: int) -> None:
    """Move external data into the model. Everything is checked before anything is read."""
    pending: list[tuple[onnx.TensorProto, Path, int, int]] = []
    for tensor in _tensors(proto):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            pending.append((tensor, *_locate(tensor, folder)))
    total = size + sum(length for _, _, _, length in pending)
    if total > MAX_BYTES:
        raise ModelError(
            f"with its external data the model has {total} bytes; more than {MAX_BYTES} is not supported yet"
        )
    for tensor, file, offset, length in pending:
        try:
            with file.open("rb") as stream:
                stream.seek(offset)
                data = stream.read(length)
        except OSError as error:
            raise ModelError(f"external data {file.name}: {error.strerror or error}") from error
        if len(data) != length:
            raise ModelError(f"external data {file.name} became shorter while being read")
        tensor.raw_data = data
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _locate(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """Return file, offset and length of external data, having checked all three."""
    what = f"external data of {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not location or "\0" in location:
        raise ModelError(f"{what} has no valid location")
    if posix.is_absolute() or windows.anchor or ".." in posix.parts + windows.parts:
        raise ModelError(f"{what} is outside the model's folder: {location!r}")
    try:
        file = (folder / location).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise ModelError(f"{what} is a link out of the model's folder: {location!r}")
        if not file.is_file():
            raise ModelError(f"{what}: no file {location!r} beside the model")
        available = file.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ModelError(f"{what}: {first_line(error)}") from error
    expected = _packed_bytes(tensor)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(expected)))
    except ValueError as error:
        raise ModelError(f"{what} has an invalid offset or length") from error
    if length != expected:
        raise ModelError(f"{what} has length {length}, but shape {tuple(tensor.dims)} needs {expected}")
    if offset < 0 or offset + length > available:
        raise ModelError(f"{what}: bytes {offset} to {offset + length} of {location!r}, which has only {available}")
    return file, offset, length


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)
