"""The inputs of a check: random ones, or the user's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from pybn.folding.affine import Array, is_supported
from pybn.folding.files import first_line
from pybn.folding.graph import LINEAR, Facts, attribute
from pybn.folding.majorant import constant_array
from pybn.folding.runtime import CheckError, Feeds, Session
from pybn.folding.segments import Segment

# Sizes for dynamic dimensions by what they seem to be, in the order in which they are tried on the model. Some models
# take only multiples of 32, some only images large enough for all their strides, some only one size.
SIZES = {
    "batch": (1, 2, 3),
    "image": (32, 40, 56, 64, 96, 128, 224, 256, 299, 384, 416, 512, 640),
    "other": (8, 12, 16, 32, 64, 128, 256, 512),
}
VARIETY = 3
CHUNK = 100


def random_inputs(model: onnx.ModelProto, count: int, seed: int = 0, *, folder: Path | None = None) -> list[Feeds]:
    """Draw inputs for a model; dynamic dimensions take several sizes, of those that the model accepts.

    Floating-point inputs are standard normal, uint8 covers 0 to 255, other integers are 0 to 9,
    booleans are fair.

    Parameters
    ----------
    model : onnx.ModelProto
        It is run, if it has dynamic dimensions.
    count : int
        How many inputs to draw.
    seed : int
        The same seed gives the same inputs.
    folder : path, optional
        Where the model's external data are, if it has any.

    Raises
    ------
    CheckError
        If an input is not a tensor of such a type, or the model cannot be loaded.
    """
    rng = np.random.default_rng(seed)
    sizes = _accepted_sizes(model, folder)
    return [
        _draw(model, {kind: some[number % len(some)] for kind, some in sizes.items()}, rng) for number in range(count)
    ]


def _accepted_sizes(model: onnx.ModelProto, folder: Path | None) -> dict[str, list[int]]:
    """Find up to `VARIETY` sizes for each kind of dynamic dimension with which the model runs."""
    kinds = {
        _kind(axis)
        for info in required_inputs(model)
        for axis, dim in enumerate(_dims(info))
        if dim is None or isinstance(dim, str)
    }
    accepted = {kind: list(sizes[:VARIETY]) for kind, sizes in SIZES.items()}
    if not kinds:
        return accepted
    session = Session(model, "the original model", folder=folder)
    rng = np.random.default_rng(0)
    chosen = {kind: sizes[0] for kind, sizes in accepted.items()}
    # Images first: with a size that is none, no batch runs either.
    for kind in sorted(kinds, key=("image", "other", "batch").index):
        found: list[int] = []
        for size in SIZES[kind]:
            feeds = _draw(model, {**chosen, kind: size}, rng)
            with contextlib.suppress(CheckError):
                session.run(feeds)
                found.append(size)
            if len(found) == VARIETY:
                break
        if found:
            accepted[kind], chosen[kind] = found, found[0]
    return accepted


def _draw(model: onnx.ModelProto, sizes: Mapping[str, int], rng: np.random.Generator) -> Feeds:
    return {info.name: _random_array(rng, _input_dtype(info), shape) for info, shape in _input_shapes(model, sizes)}


def load_inputs(model: onnx.ModelProto, path: str | Path) -> tuple[list[Feeds], npt.NDArray[Any] | None]:
    """Read the user's own inputs, and ``labels`` if there are any, from an ``.npz`` file.

    Arrays have the names of the model's inputs and the samples along the first axis. They are run
    in chunks of at most `CHUNK` samples, or of the batch size that the model demands.

    Raises
    ------
    CheckError
        If the file does not fit the model: one line that names what was expected.
    """
    file = Path(path)
    try:
        # Opened here because np.load leaves a damaged file open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            if isinstance(archive, np.ndarray):
                raise CheckError(f"{file}: holds one array without a name, expected an .npz file (numpy.savez)")
            arrays = {name: archive[name] for name in archive.files}
    except CheckError:
        raise
    except OSError as error:
        raise CheckError(f"{file}: {error.strerror or first_line(error)}") from error
    except Exception as error:  # zipfile, zlib, pickle and NumPy each raise their own
        raise CheckError(f"{file}: not a readable .npz file ({first_line(error)})") from error
    labels = arrays.get("labels")
    infos = required_inputs(model)
    names = [info.name for info in infos]
    for info in infos:
        if info.name not in arrays:
            raise CheckError(f"{file}: no array {info.name!r}, expected one for each input: {', '.join(names)}")
        require_fit(info, arrays[info.name], file)
    samples = {arrays[name].shape[0] for name in names}
    if len(samples) != 1 or 0 in samples:
        raise CheckError(f"{file}: the inputs have {sorted(samples)} samples, expected one number")
    total = samples.pop()
    if labels is not None and (labels.shape != (total,) or labels.dtype.kind not in "iu"):
        raise CheckError(
            f"{file}: labels is {labels.dtype} of shape {labels.shape}, expected integers of shape ({total},)"
        )
    batch = required_batch(model)
    if batch is not None and total % batch:
        raise CheckError(f"{file}: {total} samples, expected a multiple of the model's batch size {batch}")
    chunk = batch or CHUNK
    chunks = [{name: arrays[name][start : start + chunk] for name in names} for start in range(0, total, chunk)]
    return chunks, labels


def required_batch(model: onnx.ModelProto) -> int | None:
    """Return the number of samples that the model demands, None if any will do.

    Raises
    ------
    CheckError
        If its inputs demand several.
    """
    sizes = {size for info in required_inputs(model) for size in _dims(info)[:1] if isinstance(size, int)}
    if len(sizes) > 1:
        raise CheckError(f"the model's inputs have batch sizes {sorted(sizes)}, expected one")
    return sizes.pop() if sizes else None


def random_entries(segment: Segment, seen: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Draw the entries of a segment that cannot be seen in a run of the model.

    Their shapes are those that shape inference finds, small where they are dynamic; where it finds none, what the first
    linear operator of the expression accepts.

    Raises
    ------
    CheckError
        If a shape is unknown, or a type is not floating point.
    """
    facts = segment.original.facts
    hidden = [value for value in segment.original.entries if value.name not in seen]
    names = {value.name for value in segment.original.entries} | seen.keys()
    missing = [name for name in segment.entries if name not in names]
    if missing:
        raise CheckError(f"the folded expression starts from {missing[0]!r}, the original one does not")
    drawn: dict[str, Array] = {}
    for value in hidden:
        dtype = _entry_dtype(value, segment)
        shape = facts.shape(value)
        drawn[value.name or ""] = _random_array(rng, dtype, _accepted(segment) if shape is None else _small(shape))
    return drawn


def _entry_dtype(value: ir.Value, segment: Segment) -> np.dtype[Any]:
    if value.dtype is not None:
        return value.dtype.numpy()
    weights = [constant_array(constant) for constant in segment.original.constants]
    floats = [weight.dtype for weight in weights if is_supported(weight.dtype)]
    if not floats:
        raise CheckError(f"the type of {value.name!r} is unknown")
    return floats[0]


def _small(shape: ir.Shape) -> list[int]:
    """Replace dynamic dimensions: 2 for the first, 12 for the others."""
    return [size if isinstance(size, int) else 12 if axis else 2 for axis, size in enumerate(shape)]


def _accepted(segment: Segment) -> list[int]:
    """Return a shape that the segment's first linear operator accepts: a small batch, just larger than the kernel."""
    facts = segment.original.facts
    for node in segment.original.nodes:
        weight = facts.constant(node.inputs[1]) if node.op_type in LINEAR else None
        if weight is not None:
            return _entering_shape(node, weight, facts)
    raise CheckError("the shape of what enters is unknown")


def _entering_shape(node: ir.Node, weight: Array, facts: Facts) -> list[int]:
    if node.op_type == "MatMul":
        return [4, weight.shape[0]]
    if node.op_type == "Gemm":
        features = weight.shape[1 if attribute(node, "transB", 0) else 0]
        bias = facts.constant(node.inputs[2] if len(node.inputs) > 2 else None)
        # A bias with several rows fixes the number of rows of the product.
        rows = bias.shape[0] if bias is not None and bias.ndim == 2 and bias.shape[0] > 1 else 4
        return [features, rows] if attribute(node, "transA", 0) else [rows, features]
    groups = attribute(node, "group", 1)
    channels = weight.shape[0] if node.op_type == "ConvTranspose" else weight.shape[1] * groups
    kernel = weight.shape[2:]
    dilations = attribute(node, "dilations", (1,) * len(kernel))
    spatial = [(size - 1) * step + 4 for size, step in zip(kernel, dilations, strict=True)]
    return [2, channels, *spatial]


def required_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    defaults = {tensor.name for tensor in model.graph.initializer}
    return [info for info in model.graph.input if info.name not in defaults]


def _input_dtype(info: onnx.ValueInfoProto) -> np.dtype[Any]:
    element = info.type.tensor_type.elem_type
    if not info.type.HasField("tensor_type") or not element:
        raise CheckError(f"input {info.name!r} is not a tensor; only tensors can be checked")
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element))


def _dims(info: onnx.ValueInfoProto) -> list[int | str | None]:
    """Return sizes, names of dynamic dimensions, and None for dimensions without a name."""
    _input_dtype(info)
    if not info.type.tensor_type.HasField("shape"):
        raise CheckError(f"input {info.name!r} has no declared shape")
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in info.type.tensor_type.shape.dim
    ]


def _input_shapes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> Iterator[tuple[onnx.ValueInfoProto, list[int]]]:
    named: dict[str, int] = {}
    for info in required_inputs(model):
        shape: list[int] = []
        for axis, dim in enumerate(_dims(info)):
            size = dim if isinstance(dim, int) else sizes[_kind(axis)]
            # One name is one size, wherever it appears.
            shape.append(named.setdefault(dim, size) if isinstance(dim, str) else size)
        yield info, shape


def _kind(axis: int) -> str:
    return "batch" if axis == 0 else "image" if axis > 1 else "other"


def _random_array(rng: np.random.Generator, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    if dtype == np.bool_:
        return np.asarray(rng.random(shape) < 0.5)
    if dtype == np.uint8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    if dtype.kind in "iu":
        return rng.integers(0, 10, shape).astype(dtype)
    if is_supported(dtype):
        return rng.standard_normal(shape).astype(dtype)
    raise CheckError(f"inputs of type {dtype} cannot be drawn at random; use --check-data")


def require_fit(info: onnx.ValueInfoProto, array: Array, file: Path) -> None:
    dtype, dims = _input_dtype(info), _dims(info)
    shape = "(" + ", ".join(str(dim if dim is not None else "?") for dim in dims) + ")"
    if array.dtype != dtype:
        raise CheckError(f"{file}: {info.name!r} is {array.dtype}, expected {dtype}")
    # The first axis is free: a fixed batch size is honoured by the chunks.
    fits = array.ndim == len(dims) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(dims[1:], array.shape[1:], strict=True)
    )
    if not dims or not fits:
        raise CheckError(f"{file}: {info.name!r} has shape {array.shape}, expected {shape}")
