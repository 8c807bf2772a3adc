"""Layers to and from torch, and state dicts in files: npz, which NumPy reads, and safetensors.

No pickle is ever loaded, and a file is replaced as a whole or not at all.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pybn import _arrays
from pybn._arrays import Array
from pybn.folding.disk import replacing

if TYPE_CHECKING:
    import torch

    from pybn.layers import _BatchNorm

    Layer = TypeVar("Layer", bound=_BatchNorm)


# ---- files


def save_state_dict(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state dict to a file that `load_state_dict`, and every reader of the format, reads.

    Parameters
    ----------
    state : mapping from str to array or torch tensor
        Of numbers or bools; types are kept, bfloat16 and float16 among them.
    path : path
        Its suffix says the format: ".npz" or ".safetensors" (which needs ``pip install "pybn[safetensors]"``). A file
        that exists is replaced as a whole, or is as it was after an error. NumPy has no bfloat16 of its own, so other
        readers of an npz file see its values as two bytes each.

    Raises
    ------
    TypeError, ValueError
        What cannot be written; names the file and the key.
    OSError
    """
    path = Path(path)
    write = _format(path, _WRITERS)
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}, expected a mapping from names to arrays")
    arrays = {_checked_name(path, name): _savable(path, name, value) for name, value in state.items()}
    write(path, arrays)


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read a state dict from an ".npz" or ".safetensors" file, whoever wrote it.

    Returns
    -------
    dict from str to array
        New arrays, of the types in the file; bfloat16 is that of ml_dtypes, which is needed for it.

    Raises
    ------
    ValueError
        If the file is damaged or holds Python objects, which are never unpickled; names the file and the key.
    OSError
        If it cannot be opened.
    """
    path = Path(path)
    state: dict[str, Array] = _format(path, _READERS)(path)
    return state


def _format(path: Path, formats: dict[str, Any]) -> Any:
    try:
        return formats[path.suffix.lower()]
    except KeyError:
        raise ValueError(f"{path} has the suffix {path.suffix!r}, expected '.npz' or '.safetensors'") from None


def _checked_name(path: Path, name: Any) -> str:
    if isinstance(name, str):
        return name
    raise TypeError(f"{path}: the key {name!r} is a {type(name).__name__}, expected a str")


def _savable(path: Path, name: str, value: Any) -> Array:
    """A contiguous array in native byte order."""
    try:
        array = _from_tensor(value) if hasattr(value, "detach") else _arrays.as_plain_array("it", value)
    except TypeError as error:
        raise TypeError(f"{path}: key {name!r}: {error}") from error
    if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
        raise TypeError(f"{path}: key {name!r} has dtype {array.dtype}, expected numbers or bools")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def _write_npz(path: Path, arrays: dict[str, Array]) -> None:
    # Not np.savez, whose keyword arguments leave no room for a key "file".
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _read_npz(path: Path) -> dict[str, Array]:
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read as an npz file: {error}") from error
        with archive:
            return {name: _read_entry(path, archive, name) for name in archive.files}


def _read_entry(path: Path, archive: np.lib.npyio.NpzFile, name: str) -> Array:
    try:
        array = np.asarray(archive[name])
    except Exception as error:  # of damaged data zipfile, zlib and NumPy raise what they will
        raise ValueError(f"{path}: key {name!r} cannot be read: {error}") from error
    if array.dtype.kind == "S":  # the bytes of an entry that is no array
        raise ValueError(f"{path}: key {name!r} is no array")
    if array.dtype == np.dtype("V2"):  # as NumPy writes bfloat16
        return array.view(_bfloat16(path, name))
    return array


def _write_safetensors(path: Path, arrays: dict[str, Array]) -> None:
    safetensors = _import_safetensors()
    try:
        data = safetensors.numpy.save(arrays)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be written as safetensors: {error}") from error
    with replacing(path) as file:
        file.write(data)


def _read_safetensors(path: Path) -> dict[str, Array]:
    safetensors = _import_safetensors()
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    state = {}
    for name, entry in entries:
        dtype = _SAFETENSORS.get(entry["dtype"])
        if dtype is None and entry["dtype"] != "BF16":
            raise ValueError(f"{path}: key {name!r} has the type {entry['dtype']}, which NumPy has not")
        values = np.frombuffer(bytearray(entry["data"]), _bfloat16(path, name) if dtype is None else dtype)
        state[name] = values.reshape(entry["shape"])
    return state


_WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors}
_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}

# Little-endian, as the format is.
_SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip


def _import_safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            'safetensors files need safetensors, which is not installed; run: pip install "pybn[safetensors]"'
        ) from error
    return safetensors


def _bfloat16(path: Path, name: str) -> Any:
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            f"{path}: key {name!r} is bfloat16, which needs ml_dtypes; run: pip install ml-dtypes"
        ) from error
    return ml_dtypes.bfloat16


# ---- torch


def from_torch(kind: type[Layer], module: Any, options: dict[str, Any]) -> Layer:
    """See `pybn.BatchNorm2d.from_torch`."""
    torch = _import_torch()
    general = torch.nn.modules.batchnorm._BatchNorm
    expected = _torch_class(torch, kind)
    # Those for any number of axes, such as torch.nn.SyncBatchNorm, become what is asked for.
    others = tuple(_torch_class(torch, other) for other in _dimensions() if _torch_class(torch, other) is not expected)
    if not isinstance(module, general) or isinstance(module, others):
        raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.{expected.__name__}")
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"module is a {type(module).__name__} that has seen no data, expected one with parameters")
    if module.track_running_stats != (module.running_mean is not None):
        raise ValueError(
            f"module has track_running_stats={module.track_running_stats} "
            f"but running_mean {'None' if module.running_mean is None else 'given'}, expected both or neither"
        )
    if getattr(module, "activation", None) is not None:
        options = {"activation": module.activation, "negative_slope": module.negative_slope, **options}
    state = {name: _from_tensor(value) for name, value in module.state_dict().items()}
    is_double = any(value.dtype == np.float64 for value in state.values())
    layer = kind(
        module.num_features, module.eps, module.momentum, affine=module.weight is not None or module.bias is not None,
        track_running_stats=module.track_running_stats, dtype=np.float64 if is_double else np.float32, **options,
    )  # fmt: skip
    if module.weight is None:
        layer.weight = None
    if module.bias is None:
        layer.bias = None
    layer.load_state_dict(
        {name: value.astype(np.float32) if value.dtype.itemsize == 2 else value for name, value in state.items()}
    )
    return layer.train(module.training)  # type: ignore[return-value]


def to_torch(layer: _BatchNorm) -> torch.nn.modules.batchnorm._BatchNorm:
    """See `pybn.BatchNorm2d.to_torch`."""
    torch = _import_torch()
    if layer.channel_axis != 1:
        raise ValueError(f"the layer has channel_axis={layer.channel_axis}, expected 1, where torch's have channels")
    kind, options = _torch_class(torch, type(layer)), {}
    if layer.activation is not None:
        import pybn.torch

        kind = getattr(pybn.torch, kind.__name__)
        options = {"activation": layer.activation, "negative_slope": layer.negative_slope}
    state = {name: torch.from_numpy(value) for name, value in layer.state_dict().items()}
    module: Any = kind(
        layer.num_features, layer.eps, layer.momentum, affine=layer.affine,
        track_running_stats=layer.track_running_stats, **options,
    )  # fmt: skip
    for name in ("weight", "bias"):
        if getattr(layer, name) is None:
            module.register_parameter(name, None)
    is_double = any(value.dtype == torch.float64 for value in state.values())
    module.to(torch.float64 if is_double else torch.float32)
    module.load_state_dict(state)
    return module.train(layer.training)  # type: ignore[no-any-return]


def _dimensions() -> tuple[type[Any], ...]:
    from pybn import layers

    return layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d


def _torch_class(torch: Any, kind: type[Any]) -> Any:
    """Torch's class for a layer of ours, or one derived from it."""
    ours = next((layer for layer in _dimensions() if issubclass(kind, layer)), None)
    if ours is None:
        raise TypeError(
            f"{kind.__name__} has no counterpart in torch.nn, expected a BatchNorm: make the layer of this name of "
            "pybn.torch, or of pybn, and load the state dict"
        )
    return getattr(torch.nn, ours.__name__)


def _from_tensor(tensor: Any) -> Array:
    """A copy of a torch tensor as an array of the same type."""
    torch = _import_torch()
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        array: Array = tensor.contiguous().view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16)
        return array
    return np.array(tensor.numpy(force=True))


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError('this needs torch, which is not installed; run: pip install "pybn[torch]"') from error
    return torch
