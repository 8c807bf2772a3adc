"""The way back: a folded model carries what restores its original, bit for bit.

Most of an original is weights, and most of what a fold does to them is to scale them, by channel. So
a weight is predicted from the folded one: divided by the scales, which are found by comparing the two,
in float64, and rounded. What is stored is by how many units in the last place the prediction misses,
mostly 0 and sometimes 1. Everything else of the original's files is stored as it is, and all is compressed.

The text is one entry of the folded model's metadata. A hash of the rest of the model is in it, because a
model that has been changed since would restore to something that never was.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pybn.folding.affine import is_supported
from pybn.folding.external import require_inside
from pybn.folding.protos import MAX_BYTES, ModelError, is_external, tensors, without_data

KEY = "pybn.reversible"
VERSION = "1"
# A smaller tensor is left where it is, among what is stored as it is.
SMALLEST = 64
# The mantissa of a stored scale: 2**-32 is well below the rounding of float32 divided by its elements.
SCALE_MASK = np.uint64(2**64 - 2**20)
BITS_PER_SCALE = 48
# Differences are digits, four in a byte; this one says that the difference is among the large ones, which follow.
ESCAPE = 3
# How many tensors of the right type and shape are tried if none has the right name.
CANDIDATES = 4
# What a stored text may grow to: a damaged or hostile one must not fill the memory.
LARGEST_GROWTH = 8
ALWAYS_ALLOWED = 2**26

Doubles = npt.NDArray[np.float64]
Factor = tuple[int, ...]


@dataclass(frozen=True)
class Payload:
    """The raw data of a tensor: which bytes of a file they are, and their type and shape."""

    start: int
    name: str
    data_type: int
    dims: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Part:
    """How one payload is restored.

    Attributes
    ----------
    start, length : int
        Its bytes in the original file.
    source : int or None
        The folded tensor it is predicted from, counted in the order of the model; None if it is stored as it is.
    view : tuple of int
        The shape in which the scales are found.
    factors : tuple of tuple of int
        The axes of `view` along which each array of scales varies. Without any, the source is the original.
    """

    start: int
    length: int
    source: int | None = None
    view: tuple[int, ...] = ()
    factors: tuple[Factor, ...] = ()


@dataclass
class _File:
    """One file of the original: the model (whose name is empty) or a data file."""

    name: str
    length: int
    sha256: str
    parts: list[Part] = field(default_factory=list)


def is_reversible(proto: onnx.ModelProto) -> bool:
    """Say whether a model carries its original."""
    return any(entry.key == KEY for entry in proto.metadata_props)


def forget(proto: onnx.ModelProto) -> None:
    """Remove what a model carries of its original."""
    kept = [entry for entry in proto.metadata_props if entry.key != KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)


def store(folded: onnx.ModelProto, original: bytes, data_files: Mapping[str, bytes] | None = None) -> None:
    """Put into a folded model what `restore` needs.

    Parameters
    ----------
    folded : onnx.ModelProto
        Without external data. Its metadata get one more entry.
    original : bytes
        The file of the original model, which is valid.
    data_files : mapping of str to bytes
        Its data files, by the location that its tensors name.

    Raises
    ------
    ModelError
        If the models do not fit into memory as one message each.
    """
    forget(folded)
    if any(map(is_external, tensors(folded))):
        raise ModelError(f"a model above {MAX_BYTES} bytes cannot carry its original")
    sources = list(tensors(folded))
    layouts = _Layouts(
        {attribute.i for node in folded.graph.node for attribute in node.attribute if attribute.name == "group"}
    )
    header: list[_File] = []
    plain, differences = [b""], []
    for name, content in {"": original, **(data_files or {})}.items():
        file = _File(name, len(content), hashlib.sha256(content).hexdigest())
        header.append(file)
        end = 0
        for payload in _payloads(name, content, original):
            if payload.start < end:
                continue  # tensors may share their bytes
            plain.append(content[end : payload.start])
            part, scales, missed = _predict(payload, sources, layouts)
            file.parts.append(part)
            plain.append(scales)
            differences.append(missed)
            end = payload.start + part.length
        plain.append(content[end:])
    described = json.dumps({"folded": content_hash(folded), "files": [asdict(file) for file in header]}).encode()
    plain[0] = len(described).to_bytes(4, "little") + described
    # Differences are noise: what helps is a code of few bits for the few values there are, not a search for repeats.
    noise = zlib.compressobj(6, strategy=zlib.Z_FILTERED)
    streams = [zlib.compress(b"".join(plain), 9), noise.compress(b"".join(differences)) + noise.flush()]
    text = base64.b64encode(len(streams[0]).to_bytes(4, "little") + b"".join(streams)).decode()
    folded.metadata_props.add(key=KEY, value=f"{VERSION} {text}")
    restore(folded)


def restore(folded: onnx.ModelProto) -> dict[str, bytes]:
    """Return the files of the original: the model under the empty name, data files under theirs.

    Raises
    ------
    ModelError
        If the model does not carry its original, was changed since, or what it carries is damaged.
    """
    texts = [entry.value for entry in folded.metadata_props if entry.key == KEY]
    if not texts:
        raise ModelError("does not carry its original: it was not folded with --reversible")
    version, _, text = texts[0].partition(" ")
    if version != VERSION:
        raise ModelError(
            f"carries its original in the format {version[:20]!r}, which this version of pybn does not know"
        )
    try:
        files, described = _decode(text, folded)
    except ModelError:
        raise
    except Exception as error:  # a damaged text may fail anywhere
        raise ModelError("what the model carries of its original is damaged") from error
    for file in described:
        if hashlib.sha256(files[file["name"]]).hexdigest() != file["sha256"]:
            raise ModelError("what the model carries of its original is damaged: it restores to something else")
    return files


def content_hash(proto: onnx.ModelProto) -> str:
    """Hash a model without its entry for the way back, and wherever its tensors are stored."""
    small, left_out = without_data(proto, lambda tensor: tensor.HasField("raw_data"))
    forget(small)
    digest = hashlib.sha256(small.SerializeToString(deterministic=True))
    for _, tensor in left_out:
        digest.update(tensor.raw_data)
    return digest.hexdigest()


def _decode(text: str, folded: onnx.ModelProto) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    blob = base64.b64decode(text, validate=True)
    first = int.from_bytes(blob[:4], "little")
    allowed = ALWAYS_ALLOWED + LARGEST_GROWTH * folded.ByteSize()
    plain = _Reader(_decompress(blob[4 : 4 + first], allowed))
    differences = _Reader(_decompress(blob[4 + first :], allowed))
    header = json.loads(plain.read(int.from_bytes(plain.read(4), "little")))
    if header["folded"] != content_hash(folded):
        raise ModelError("was changed after it was folded, so that its original cannot be restored")
    sources = list(tensors(folded))
    files: dict[str, bytes] = {}
    for file in header["files"]:
        pieces: list[bytes] = []
        end = 0
        for row in file["parts"]:
            part = Part(**{**row, "view": tuple(row["view"]), "factors": tuple(map(tuple, row["factors"]))})
            pieces.append(plain.read(part.start - end))
            pieces.append(_restore_part(part, sources, plain, differences))
            end = part.start + part.length
        pieces.append(plain.read(file["length"] - end))
        if file["name"] in files or (file["name"] and not files):
            raise ValueError("two files of one name, or no model")
        if file["name"]:
            require_inside(file["name"], "a data file of the original")
        files[file["name"]] = b"".join(pieces)
    return files, header["files"]


class _Reader:
    """Takes bytes off the front of a stream, and never fewer than asked for."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._position = 0

    def read(self, count: int) -> bytes:
        end = self._position + count
        if count < 0 or end > len(self._data):
            raise ValueError("the stream is too short")
        taken = bytes(self._data[self._position : end])
        self._position = end
        return taken


def _decompress(data: bytes, allowed: int) -> bytes:
    engine = zlib.decompressobj()
    content = engine.decompress(data, allowed)
    if not engine.eof:
        raise ValueError("larger than anything pybn stores, or cut off")
    return content


def _payloads(name: str, content: bytes, original: bytes) -> Iterator[Payload]:
    """Find the raw data of tensors in one of the original's files, in the order of their bytes."""
    proto = onnx.ModelProto.FromString(original)
    found = []
    searched = 0
    for tensor in tensors(proto):
        dims = tuple(tensor.dims)
        if is_external(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries.get("location") != name:
                continue
            start = int(entries.get("offset", "0"))
            data = content[start : start + ir.TensorProtoTensor(tensor).nbytes]
        elif not name and tensor.HasField("raw_data"):
            data = tensor.raw_data
            # Written in the order in which they were read. The same bytes earlier on would serve as well.
            start = content.find(data, searched) if len(data) >= SMALLEST else -1
        else:
            continue
        if len(data) >= SMALLEST and start >= 0:
            found.append(Payload(start, tensor.name, tensor.data_type, dims, data))
            searched = start + len(data) if not name else 0
    return iter(sorted(found, key=lambda payload: payload.start))


class _Layouts:
    """The ways in which a fold may have scaled a weight: along which axes of which view of it."""

    def __init__(self, groups: set[int]) -> None:
        self._groups = sorted(group for group in groups if group > 1)

    def of(self, dims: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[Factor, ...]]]:
        yield dims, ((0,),)
        if len(dims) < 2:
            return
        yield dims, ((1,),)
        if len(dims) > 2:
            yield dims, ((len(dims) - 1,),)
        grouped = [group for group in self._groups if dims[0] % group == 0]
        for group in grouped:
            # Outputs of a transposed convolution, or inputs of another: axis 1, anew in every group of axis 0.
            yield (group, dims[0] // group, dims[1], -1), ((0, 2),)
        # Folded from both sides.
        yield dims, ((0,), (1,))
        for group in grouped:
            yield (group, dims[0] // group, dims[1], -1), ((0, 1), (0, 2))


def _predict(payload: Payload, sources: Sequence[onnx.TensorProto], layouts: _Layouts) -> tuple[Part, bytes, bytes]:
    """Choose how a payload is restored; return the part, its plain bytes and its differences."""
    start, length = payload.start, len(payload.data)
    alike = [
        (number, tensor)
        for number, tensor in enumerate(sources)
        if tensor.data_type == payload.data_type and tuple(tensor.dims) == payload.dims and tensor.HasField("raw_data")
    ]
    named = [item for item in alike if item[1].name == payload.name]
    cloned = [item for item in alike if item[1].name.startswith(f"{payload.name}.")]
    candidates = (named + cloned + alike)[:CANDIDATES]
    for number, tensor in candidates:
        if tensor.raw_data == payload.data:
            return Part(start, length, number), b"", b""
    best = Part(start, length), payload.data, b""
    dtype = ir.DataType(payload.data_type).numpy()
    if not is_supported(dtype) or not payload.dims:
        return best
    original = np.frombuffer(payload.data, dtype)
    fewest = 8.0 * length
    for number, tensor in candidates:
        folded = np.frombuffer(tensor.raw_data, dtype)
        for view, factors in layouts.of(payload.dims):
            scales = _fit(original.reshape(view), folded.reshape(view), factors)
            missed = _zigzag(_ordered(original) - _ordered(_divide(folded.reshape(view), scales).reshape(-1)))
            large = int(np.count_nonzero(missed >= ESCAPE))
            bits = missed.size + 8 * missed.itemsize * large + BITS_PER_SCALE * sum(scale.size for scale in scales)
            if bits < fewest:
                fewest = bits
                stored = b"".join(scale.tobytes() for scale in scales)
                part = Part(start, length, number, folded.reshape(view).shape, factors)
                best = part, stored, _packed(missed)
            if large < missed.size / 2:  # this is how it was scaled; the others are channels that became zero
                return best
    return best


def _restore_part(part: Part, sources: Sequence[onnx.TensorProto], plain: _Reader, differences: _Reader) -> bytes:
    if part.source is None:
        return plain.read(part.length)
    tensor = sources[part.source]
    if not part.factors:
        return tensor.raw_data
    dtype = ir.DataType(tensor.data_type).numpy()
    folded = np.frombuffer(tensor.raw_data, dtype).reshape(part.view)
    scales = []
    for axes in part.factors:
        shape = _scale_shape(part.view, axes)
        scales.append(np.frombuffer(plain.read(8 * int(np.prod(shape))), np.float64).reshape(shape))
    predicted = _ordered(_divide(folded, scales).reshape(-1))
    missed = _unpacked(differences, predicted.size, predicted.dtype)
    return _unordered(predicted + _unzigzag(missed), dtype).tobytes()


def _divide(folded: npt.NDArray[Any], scales: Sequence[Doubles]) -> npt.NDArray[Any]:
    with np.errstate(all="ignore"):  # infinite and NaN weights are restored, too
        values = folded.astype(np.float64)
        for scale in scales:
            values = values / scale
        return values.astype(folded.dtype)


def _fit(original: npt.NDArray[Any], folded: npt.NDArray[Any], factors: Sequence[Factor]) -> list[Doubles]:
    """Find the scales by which the original became the folded weight."""
    with np.errstate(all="ignore"):
        before, after = original.astype(np.float64), folded.astype(np.float64)
        half = _half_spacing(after, folded.dtype)
        if len(factors) == 1:
            return [_fit_factor(before, after, half, factors[0])]
        first, second = factors
        # One slice along the first factor shows the second; then each is found from all that is known of the other.
        axis = next(axis for axis in first if axis not in second)
        others = tuple(other for other in range(before.ndim) if other not in first)
        largest = np.abs(after).sum(axis=others, keepdims=True).argmax(axis=axis, keepdims=True)
        slices = [np.take_along_axis(array, largest, axis=axis) for array in (before, after)]
        scale = _least_squares(slices[0], slices[1], second)
        for _ in range(2):
            other_scale = _fit_factor(before * scale, after, half, first)
            scale = _fit_factor(before * other_scale, after, half, second)
        return [other_scale, scale]


def _fit_factor(before: Doubles, after: Doubles, half: Doubles, axes: Factor) -> Doubles:
    """Return the middle of the scales that round every element right, or the one of least squares if there is none."""
    others = tuple(axis for axis in range(before.ndim) if axis not in axes)
    squares = _least_squares(before, after, axes)
    size = np.abs(before)
    low = np.where(size > 0, (np.abs(after) - half) / size, 0.0).max(axis=others, keepdims=True)
    high = np.where(size > 0, (np.abs(after) + half) / size, np.inf).min(axis=others, keepdims=True)
    middle = np.copysign((low + high) / 2, squares)
    scale = np.where((low <= high) & np.isfinite(middle), middle, squares)
    scale = (np.ascontiguousarray(scale).view(np.uint64) & SCALE_MASK).view(np.float64)
    return np.where(np.isfinite(scale) & (scale != 0), scale, 1.0)


def _least_squares(before: Doubles, after: Doubles, axes: Factor) -> Doubles:
    others = tuple(axis for axis in range(before.ndim) if axis not in axes)
    scale = (before * after).sum(axis=others, keepdims=True) / (before * before).sum(axis=others, keepdims=True)
    return np.where(np.isfinite(scale) & (scale != 0), scale, 1.0)


def _half_spacing(values: Doubles, dtype: np.dtype[Any]) -> Doubles:
    """Return half the distance of neighbouring numbers of a type: how far rounding may have moved a value."""
    kind = ir.DataType.from_numpy(dtype)
    digits = {ir.DataType.FLOAT16: 11, ir.DataType.BFLOAT16: 8, ir.DataType.FLOAT: 24}.get(kind, 53)
    half: Doubles = np.ldexp(1.0, np.frexp(values)[1] - digits - 1)
    return half


def _scale_shape(view: Sequence[int], axes: Factor) -> tuple[int, ...]:
    return tuple(size if axis in axes else 1 for axis, size in enumerate(view))


def _ordered(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Number the values of a floating-point type in their order, so that neighbours differ by 1."""
    bits = values.view(f"u{values.dtype.itemsize}")
    sign = bits.dtype.type(1 << (8 * values.dtype.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _unordered(numbers: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    sign = numbers.dtype.type(1 << (8 * dtype.itemsize - 1))
    return np.where(numbers & sign, numbers & ~sign, ~numbers).view(dtype)


def _zigzag(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Map 0, -1, 1, -2, ... to 0, 1, 2, 3, ...; numbers are modulo a power of two."""
    bits = 8 * numbers.dtype.itemsize
    negative = numbers >> numbers.dtype.type(bits - 1)
    folded: npt.NDArray[Any] = (numbers << numbers.dtype.type(1)) ^ (numbers.dtype.type(0) - negative)
    return folded


def _unzigzag(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    one = numbers.dtype.type(1)
    signed: npt.NDArray[Any] = (numbers >> one) ^ (numbers.dtype.type(0) - (numbers & one))
    return signed


def _packed(numbers: npt.NDArray[Any]) -> bytes:
    """Store four digits in a byte, and after them the numbers that are too large for one.

    A code of whole bits for every byte, as zlib has, then wastes little for every number.
    """
    digits = np.zeros(-(-numbers.size // 4) * 4, np.uint8)
    digits[: numbers.size] = np.minimum(numbers, ESCAPE)
    packed = digits[0::4] | digits[1::4] << 2 | digits[2::4] << 4 | digits[3::4] << 6
    return packed.tobytes() + numbers[numbers >= ESCAPE].tobytes()


def _unpacked(stream: _Reader, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    packed = np.frombuffer(stream.read(-(-count // 4)), np.uint8)
    digits = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)[:count]
    numbers = digits.astype(dtype)
    large = digits == ESCAPE
    numbers[large] = np.frombuffer(stream.read(int(large.sum()) * dtype.itemsize), dtype)
    return numbers


__all__ = ["KEY", "content_hash", "forget", "is_reversible", "restore", "store"]
