"""Batches out of .npz files: rows are read when they are needed, so that a file need not fit in memory."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from pybn._arrays import Array
from pybn.ghost import parts


class Archives:
    """The rows of several .npz files, one file after the other, as dictionaries of arrays.

    Parameters
    ----------
    files : sequence of paths
        Each has an array of every name, all with as many rows (along the first axis). They may be compressed.
    names : sequence of str
        Which arrays to read.
    batch : int
        Rows in a batch; the batches of a file differ by one row at most, and none is smaller, unless the file is.
    exact : bool
        Every batch must have so many rows.

    Raises
    ------
    ValueError
        A file that cannot be read so, in one line.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str], batch: int, *, exact: bool = False) -> None:
        self._files, self._names = list(files), list(names)
        self._parts: list[list[slice]] = []
        self._sums: list[dict[str, int]] = []
        for file in self._files:
            with _opened(file, self._names) as archive:
                rows = {name: archive.shape(name)[0] for name in self._names}
                self._sums.append({name: archive.checksum(name) for name in self._names})
            if len(set(rows.values())) != 1 or 0 in rows.values():
                raise ValueError(f"{file}: the arrays have {sorted(set(rows.values()))} rows, expected one number")
            total = rows[self._names[0]]
            if exact and total % batch:
                raise ValueError(f"{file}: {total} rows, expected a multiple of the model's batch size {batch}")
            self._parts.append(parts(total, batch))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def fingerprint(self) -> str:
        """Differs for other values (whose checksums the files have in their tables), and for other batches."""
        return hashlib.sha256(repr((self._sums, self._parts)).encode()).hexdigest()

    @property
    def rows(self) -> int:
        """Of all files together."""
        return sum(cut[-1].stop for cut in self._parts)

    def first(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shapes and dtypes of the first file's arrays."""
        with _opened(self._files[0], self._names) as archive:
            return {name: (archive.shape(name), archive.dtype(name)) for name in self._names}

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for file, cut in zip(self._files, self._parts, strict=True):
            with _opened(file, self._names) as archive:
                for part in cut:
                    yield {name: archive.read(name, part.stop - part.start) for name in self._names}


class _opened:
    """The arrays of one open .npz file, each read from its beginning on."""

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        self._file, self._names = file, names
        self._streams: dict[str, IO[bytes]] = {}
        self._headers: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def __enter__(self) -> _opened:
        try:
            self._zip = zipfile.ZipFile(self._file)
        except OSError as error:
            raise ValueError(f"{self._file}: {error.strerror or error}") from error
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self._file}: not a readable .npz file ({error})") from error
        try:
            for name in self._names:
                self._open(name)
        except BaseException:
            self._zip.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self._streams.values():
            stream.close()
        self._zip.close()

    def _open(self, name: str) -> None:
        try:
            stream = self._zip.open(f"{name}.npy")
        except KeyError:
            raise ValueError(
                f"{self._file}: no array {name!r}, expected one for each input: {', '.join(self._names)}"
            ) from None
        self._streams[name] = stream
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(stream)
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self._file}: array {name!r} is not readable ({error})") from error
        if dtype.hasobject or not shape or (is_fortran and len(shape) > 1):
            raise ValueError(f"{self._file}: array {name!r} is not one of numbers with rows in C order")
        self._headers[name] = shape, dtype

    def checksum(self, name: str) -> int:
        return self._zip.getinfo(f"{name}.npy").CRC

    def shape(self, name: str) -> tuple[int, ...]:
        return self._headers[name][0]

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._headers[name][1]

    def read(self, name: str, rows: int) -> Array:
        """The next rows."""
        shape, dtype = self._headers[name]
        shape = (rows, *shape[1:])
        length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        try:
            content = self._streams[name].read(length)
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self._file}: array {name!r} is damaged ({error})") from error
        if len(content) != length:
            raise ValueError(f"{self._file}: array {name!r} ends early")
        return np.frombuffer(content, dtype).reshape(shape)
