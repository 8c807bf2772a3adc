"""Bytes on disk: regular files only, and written so that a failure changes nothing."""

from __future__ import annotations

import contextlib
import filecmp
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

CHUNK = 2**22


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a pipe or device is refused without waiting for its data.

    Raises
    ------
    OSError
        If the file cannot be opened, or is not a regular one.
    """
    # Opened first and looked at then: what a path names may change in between.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(target: Path, like: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file so that `target` holds the old bytes or the new ones, never a mixture.

    A temporary file beside the target is written, flushed to disk and renamed when the block ends.
    If the block, or anything after it, fails, the temporary file is removed and the target is as it
    was. A symbolic link is replaced, not followed. The permissions are those that the target has,
    or else those of the file `like`, if it is given.

    Raises
    ------
    OSError
        If writing fails.
    """
    temporary = target.parent / f".pybn-{secrets.token_hex(8)}.tmp"
    try:
        # os.open rather than tempfile, which would make a file that only its owner can read.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        before = target if like is None or os.path.lexists(target) else like
        if before.is_file() and not before.is_symlink():
            temporary.chmod(stat.S_IMODE(before.stat().st_mode))
        os.replace(temporary, target)  # noqa: PTH105 - the tests make this very call fail
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def sync_directory(directory: Path) -> None:
    """Flush a folder: a rename reaches the disk with it."""
    # Windows cannot open directories.
    if os.name != "posix":
        return
    # The file is in place already: a folder that cannot be opened or synced is no failure.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_same_file(a: Path, b: Path) -> bool:
    """Say whether two paths lead to one file, through whatever links."""
    try:
        return a.resolve() == b.resolve() or a.samefile(b)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return False


def has_same_bytes(a: Path, b: Path) -> bool:
    """Say whether two regular files hold the same bytes; a link counts as different."""
    if a.is_symlink() or b.is_symlink() or not a.is_file() or not b.is_file():
        return False
    return a.stat().st_size == b.stat().st_size and filecmp.cmp(a, b, shallow=False)


def copy_range(source: BinaryIO, offset: int, length: int, target: BinaryIO) -> None:
    """Append bytes of one file to another; holes are not read, and stay holes.

    The target must be truncated to its length at the end: a hole there is only a position.

    Raises
    ------
    EOFError
        If the source ends early.
    """
    end = offset + length
    if source.seek(0, os.SEEK_END) < end:
        raise EOFError
    position = offset
    while position < end:
        start = min(_next_data(source, position), end)
        target.seek(start - position, os.SEEK_CUR)
        source.seek(start)
        chunk = source.read(min(CHUNK, end - start))
        if not chunk and start < end:
            raise EOFError
        target.write(chunk)
        position = start + len(chunk)


def _next_data(stream: BinaryIO, position: int) -> int:
    """Return where the first byte at or after `position` is that is not in a hole."""
    if not hasattr(os, "SEEK_DATA"):
        return position
    try:
        return os.lseek(stream.fileno(), position, os.SEEK_DATA)
    except OSError as error:  # ENXIO: only a hole is left; otherwise the file system knows of no holes
        return 2**63 - 1 if error.errno == 6 else position
