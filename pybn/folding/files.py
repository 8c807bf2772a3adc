"""Reading model files without trusting them, and writing them so that a failure changes nothing.

A model is one file, or a file and its external data, which stay in a folder with it. External data
become part of a model that is read, if one protobuf message can hold them all; beyond 2 GB they stay
where they are, and every function here takes the folder they are in.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from pybn.folding import disk, external
from pybn.folding.protos import (
    MAX_BYTES,
    ModelError,
    first_line,
    is_external,
    packed_bytes,
    tensors,
    without_data,
)
from pybn.folding.report import FileInfo
from pybn.folding.validity import validate

__all__ = ["Loaded", "ModelError", "first_line", "load", "parse", "read_model", "to_ir", "validate", "write_model"]

# What is smaller stays in the model, as in onnx.save_model.
EXTERNAL_FROM = 1024
# Tensors begin at multiples of a page, so that a runtime can map them into memory.
ALIGNMENT = 4096
# A model whose weights are elsewhere is smaller than this; larger ones are not searched for names of data files.
SEARCHED = 2**26


@dataclass(frozen=True)
class Loaded:
    """A model as it was read.

    Attributes
    ----------
    proto : onnx.ModelProto
        The model, with its external data moved into it if all is below 2 GB.
    info : FileInfo
        The file.
    folder : Path or None
        Where external data are; None for a model that does not come from a file.
    data_files : set of Path
        The resolved paths of the files in which the model keeps tensors.
    content : bytes
        The file's bytes, if they were asked for.
    """

    proto: onnx.ModelProto
    info: FileInfo
    folder: Path | None
    data_files: frozenset[Path]
    content: bytes = b""

    @property
    def outside(self) -> Path | None:
        """The folder of the data that are not in `proto`; None if all are."""
        return self.folder if any(map(is_external, tensors(self.proto))) else None

    def data(self) -> dict[str, bytes]:
        """Read the data files, by the names that the model in `content` has for them."""
        names = {external.location(tensor) for tensor in tensors(onnx.ModelProto.FromString(self.content))}
        return {name: (self.folder / name).read_bytes() for name in sorted(names) if name and self.folder is not None}


def read_model(path: str | os.PathLike[str]) -> tuple[onnx.ModelProto, FileInfo]:
    """Read and validate a model, with its external data moved into it if all is below 2 GB.

    Raises
    ------
    ModelError
        Whatever is wrong with the file, in one line.
    """
    loaded = load(path)
    return loaded.proto, loaded.info


def load(path: str | os.PathLike[str], *, keep: bool = False) -> Loaded:
    """Read and validate a model; `keep` keeps its bytes, too. Errors are those of `read_model`."""
    file = Path(path)
    try:
        if file.is_dir():
            raise ModelError(f"{file}: is a directory, expected an ONNX file")
        with disk.open_regular(file) as stream:
            length = os.fstat(stream.fileno()).st_size
            if length > MAX_BYTES:
                raise ModelError(f"{file}: {length} bytes, but an ONNX file holds at most {MAX_BYTES}")
            content = stream.read()
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror or first_line(error)}") from error
    except ModelError:
        raise
    except ValueError as error:  # a NUL in the name
        raise ModelError(f"{str(file)!r}: {first_line(error)}") from error
    return parse(content, str(file), file.parent, keep=keep)


def parse(content: bytes, name: str, folder: Path | None = None, *, keep: bool = False) -> Loaded:
    """Read and validate a model from its bytes; `name` is for messages. Errors are those of `read_model`."""
    if not content:
        raise ModelError(f"{name}: the file is empty")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"{name}: not an ONNX model (damaged, or another format)") from error
    info = _file_info(Path(name), content)
    kept = content if keep else b""
    del content  # validation needs memory of its own
    try:
        data_files = frozenset[Path]()
        if folder is not None:
            data_files = frozenset(external.files_of(proto, folder))
            if info.bytes + _external_bytes(proto) <= MAX_BYTES:
                external.embed(proto, folder)
        validate(proto, folder)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    return Loaded(proto, info, folder, data_files, kept)


def to_ir(proto: onnx.ModelProto, folder: Path | None = None) -> ir.Model:
    """Convert a valid model, whose external data in `folder` are read when they are asked for.

    Raises
    ------
    ModelError
        If onnx-ir rejects the model, or the data.
    """
    if folder is not None:
        for file in external.files_of(proto, folder):
            if file.stat().st_nlink > 1:
                raise ModelError(f"external data {file.name} has several hard links, which onnx-ir does not read")
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx-ir has no common base class for what it rejects
        raise ModelError(f"invalid model: {first_line(error)}") from error
    if folder is not None:
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        for graph in graphs:
            ir.external_data.set_base_dir(graph, folder.resolve())
    return model


def write_model(
    proto: onnx.ModelProto,
    path: str | os.PathLike[str],
    *,
    folder: Path | None = None,
    with_data_file: bool = False,
) -> FileInfo:
    """Write a model so that the target holds the old bytes or the new ones, never a mixture.

    A temporary file beside the target is written, flushed to disk and renamed. A symbolic link
    is replaced, not followed.

    Parameters
    ----------
    proto : onnx.ModelProto
        Left untouched.
    path : path
        The target.
    folder : path, optional
        Where the model's external data are, if it has any. They are copied, never referred to.
    with_data_file : bool
        Put weights into a file beside the target, ``<target>.data``, as is done in any case beyond
        2 GB. If that file is there and differs, the data go to another, ``<target>.1.data`` and so
        on, so that the old model can be read until the new one takes its place. A data file of such
        a name that the old model used, and no other model in the folder mentions, is then removed.

    Raises
    ------
    ModelError
        If the target is not a regular file, or external data cannot be read.
    OSError
        If writing fails. The target is as it was, and the temporary files are gone.
    """
    target = Path(path)
    require_replaceable(target)
    if with_data_file or not fits_one_file(proto):
        model, outside = _moved_outside(proto)
        if outside:
            return _write_two_files(model, outside, target, folder)
        if not fits_one_file(proto):
            raise ModelError(f"without tensors of {EXTERNAL_FROM} bytes the model exceeds the {MAX_BYTES} of one file")
    content = proto.SerializeToString(deterministic=True)
    with disk.replacing(target) as file:
        file.write(content)
    return _file_info(target, content)


def require_replaceable(target: Path) -> None:
    """Raise ModelError unless a file may be written to that path."""
    if target.exists() and not target.is_file():
        raise ModelError(f"{target}: exists and is not a regular file")


def fits_one_file(proto: onnx.ModelProto) -> bool:
    """Say whether a valid model has no external data and is below the 2 GB of one ONNX file."""
    small, left_out = without_data(proto, lambda tensor: True)
    whole = small.ByteSize() + sum(packed_bytes(tensor) for tensor, _ in left_out)
    # A few bytes of every field are its tag and length.
    return whole + 16 * len(left_out) <= MAX_BYTES and not any(map(is_external, tensors(proto)))


def unused_data_files(before: Collection[Path], path: Path) -> list[Path]:
    """Return those of the files `before` that neither the model at `path` nor one beside it uses any more."""
    now = external.files_of(onnx.ModelProto.FromString(path.read_bytes()), path.parent)
    left = [file for file in before if file not in now and file.exists()]
    return sorted(file for file in left if not _is_mentioned(file.name, path))


def _write_two_files(
    model: onnx.ModelProto,
    outside: list[tuple[onnx.TensorProto, onnx.TensorProto]],
    target: Path,
    folder: Path | None,
) -> FileInfo:
    old = _own_data_files(target)
    data, is_new = _write_data(target, outside, folder, like=min(old, default=None))
    for tensor, _ in outside:
        tensor.external_data[0].value = data.name
    content = model.SerializeToString(deterministic=True)
    try:
        # Until here the old model and its data are as they were; after it, the new ones are complete.
        with disk.replacing(target) as file:
            file.write(content)
    except BaseException:
        if is_new:
            data.unlink(missing_ok=True)
        raise
    for stale in old - {data}:
        if not _is_mentioned(stale.name, target):
            # The new model is in place: litter is no failure.
            with contextlib.suppress(OSError):
                stale.unlink()
    return _file_info(target, content)


def _moved_outside(
    proto: onnx.ModelProto,
) -> tuple[onnx.ModelProto, list[tuple[onnx.TensorProto, onnx.TensorProto]]]:
    """Copy a model with its large tensors made external, of a file without a name yet; pair them with the originals."""

    def goes_outside(tensor: onnx.TensorProto) -> bool:
        return is_external(tensor) or (tensor.HasField("raw_data") and packed_bytes(tensor) >= EXTERNAL_FROM)

    model, moved = without_data(proto, goes_outside)
    for tensor, _ in moved:
        tensor.data_location = onnx.TensorProto.EXTERNAL
    # Tensors in attributes are moved only if they were outside before.
    outside = [pair for pair in zip(tensors(model), tensors(proto), strict=True) if is_external(pair[0])]
    position = 0
    for tensor, original in outside:
        length = packed_bytes(original)
        del tensor.external_data[:]
        for key, entry in (("location", ""), ("offset", str(position)), ("length", str(length))):
            tensor.external_data.add(key=key, value=entry)
        position += -(-length // ALIGNMENT) * ALIGNMENT
    return model, outside


def _write_data(
    target: Path, outside: list[tuple[onnx.TensorProto, onnx.TensorProto]], folder: Path | None, like: Path | None
) -> tuple[Path, bool]:
    """Write the data file of a model under a name that nothing has, as readable as `like`; say whether it is new.

    One that is there already with the same bytes is used instead.
    """
    taken: list[Path] = []
    for file in _data_names(target):
        if not os.path.lexists(file):
            break
        taken.append(file)
    places = [external.locate(tensor, _require(folder)) if is_external(tensor) else None for _, tensor in outside]
    with disk.replacing(file, like) as stream:
        for (tensor, original), place in zip(outside, places, strict=True):
            stream.seek(int(tensor.external_data[1].value))
            if place is None:
                stream.write(original.raw_data)
            else:
                external.copy(place, stream)
        stream.truncate(stream.tell())
    for earlier in taken:
        if disk.has_same_bytes(earlier, file):
            file.unlink()
            return earlier, False
    return file, True


def _require(folder: Path | None) -> Path:
    if folder is None:
        raise ModelError("the model has external data, whose folder is not known")
    return folder


def _data_names(target: Path) -> Iterator[Path]:
    yield target.with_name(f"{target.name}.data")
    for number in count(1):
        yield target.with_name(f"{target.name}.{number}.data")


def _own_data_files(target: Path) -> set[Path]:
    """Return the data files of the model that is at the target now whose names say that they are its own."""
    try:
        if target.is_symlink() or target.stat().st_size > SEARCHED:
            return set()
        proto = onnx.ModelProto.FromString(target.read_bytes())
        names = {external.location(tensor) for tensor in tensors(proto) if is_external(tensor)}
    except (OSError, DecodeError, ValueError):  # whatever was there is not a model of ours
        return set()
    own = re.compile(re.escape(target.name) + r"(\.\d+)?\.data")
    files = {target.with_name(name) for name in names if own.fullmatch(name)}
    return {file for file in files if file.is_file() and not file.is_symlink()}


def _is_mentioned(name: str, target: Path) -> bool:
    """Say whether a model in the target's folder, other than the target, may use that data file."""
    try:
        others = [file for file in target.parent.glob("*.onnx") if file.name != target.name and file.is_file()]
        return any(file.stat().st_size > SEARCHED or name.encode() in file.read_bytes() for file in others)
    except OSError:
        return True


def _external_bytes(proto: onnx.ModelProto) -> int:
    return sum(packed_bytes(tensor) for tensor in tensors(proto) if is_external(tensor))


def _file_info(file: Path, content: bytes) -> FileInfo:
    return FileInfo(str(file), len(content), hashlib.sha256(content).hexdigest())
