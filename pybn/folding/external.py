"""External data: tensors in files beside a model. Everything is checked before anything is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import onnx

from pybn.folding import disk
from pybn.folding.protos import ModelError, first_line, is_external, packed_bytes, tensors


@dataclass(frozen=True)
class Place:
    """Where the data of a tensor are: a range of bytes that the file has."""

    file: Path
    offset: int
    length: int


def location(tensor: onnx.TensorProto) -> str:
    """Return what an external tensor names as its file, as it stands there."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def locate(tensor: onnx.TensorProto, folder: Path) -> Place:
    """Return file, offset and length of external data, having checked all three.

    Raises
    ------
    ModelError
        If the file is outside the model's folder, or does not hold what the tensor's shape asks for.
    """
    what = f"external data of {tensor.name!r}"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    name = location(tensor)
    require_inside(name, what)
    try:
        file = (folder / name).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise ModelError(f"{what} is a link out of the model's folder: {name!r}")
        if not file.is_file():
            raise ModelError(f"{what}: no file {name!r} beside the model")
        available = file.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ModelError(f"{what}: {first_line(error)}") from error
    expected = packed_bytes(tensor)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(expected)))
    except ValueError as error:
        raise ModelError(f"{what} has an invalid offset or length") from error
    if length != expected:
        raise ModelError(f"{what} has length {length}, but shape {tuple(tensor.dims)} needs {expected}")
    if offset < 0 or offset + length > available:
        raise ModelError(f"{what}: bytes {offset} to {offset + length} of {name!r}, which has only {available}")
    return Place(file, offset, length)


def require_inside(name: str, what: str) -> None:
    """Raise ModelError unless a location is a path that stays in the model's folder, links aside."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or "\0" in name:
        raise ModelError(f"{what} has no valid location")
    if posix.is_absolute() or windows.anchor or ".." in posix.parts + windows.parts:
        raise ModelError(f"{what} is outside the model's folder: {name!r}")


def files_of(proto: onnx.ModelProto, folder: Path) -> set[Path]:
    """Return the resolved paths of the files in which a model in `folder` keeps tensors."""
    return {locate(tensor, folder).file for tensor in tensors(proto) if is_external(tensor)}


def embed(proto: onnx.ModelProto, folder: Path) -> None:
    """Move external data into the model."""
    # All places are checked before the first is read.
    for tensor, place in [(tensor, locate(tensor, folder)) for tensor in tensors(proto) if is_external(tensor)]:
        with _opened(place) as stream:
            stream.seek(place.offset)
            data = stream.read(place.length)
        if len(data) != place.length:
            raise _shorter(place)
        tensor.raw_data = data
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def copy(place: Place, target: BinaryIO) -> None:
    """Append external data to a file without holding them in memory.

    Raises
    ------
    ModelError
        If they cannot be read.
    OSError
        If they cannot be written.
    """
    with _opened(place) as stream:
        try:
            disk.copy_range(stream, place.offset, place.length, target)
        except EOFError as error:
            raise _shorter(place) from error


@contextlib.contextmanager
def _opened(place: Place) -> Iterator[BinaryIO]:
    with contextlib.ExitStack() as stack:
        try:
            stream = stack.enter_context(disk.open_regular(place.file))
        except OSError as error:
            raise ModelError(f"external data {place.file.name}: {first_line(error)}") from error
        yield stream


def _shorter(place: Place) -> ModelError:
    return ModelError(f"external data {place.file.name} became shorter while being read")
