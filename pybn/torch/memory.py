"""Memory that a process keeps instead of asking for it anew at every step.

torch allocates results by malloc, and glibc's gives every block of more than 32 MB back to the system when it is freed,
and the end of its heap when that is large. The next step asks for the same blocks again, and every 4 KB page of them is
cleared and mapped before the first value is written: in a training step on the CPU that can take as long as the batch
norms. pybn's own results are in memory that it recycles; those of convolutions, sums and concatenations are not.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER_TRIM = -1

# What a report says of a call that has been told to do this.
KEPT = "this process keeps the memory that it frees; pybn.torch.reuse_memory(False) ends that"

# glibc's defaults; it adapts the threshold of trimming up to twice its largest for blocks of their own, 32 MB.
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 64 << 20, 65536


def reuse_memory(enabled: bool = True) -> None:
    """Let the process keep all memory that it frees, and use it again; for everything in it, torch and other libraries.

    Training steps and inference that make the same tensors again and again then find their pages mapped. The price: the
    process stays as large as it has been at its largest, and becomes larger than before, because free memory lies in
    pieces between what is in use: by up to a tenth in training (docs/torch.md). What is computed is the same.

    Parameters
    ----------
    enabled : bool
        False gives free memory back to the system now, and glibc its defaults; what later fits into a hole between
        blocks in use stays there, as ever.

    Raises
    ------
    RuntimeError
        If the C library has no such setting: glibc (Linux) has.

    Notes
    -----
    It is the settings ``M_MMAP_MAX`` and ``M_TRIM_THRESHOLD`` of glibc's ``mallopt``; where another malloc has been
    preloaded (jemalloc, tcmalloc) they change nothing. Blocks that are freed and needed in other threads than the main
    one are kept up to 64 MB. A few bytes that glibc cuts off a block to align it may stay in its cache of small blocks
    (tcache), and the block, once freed, is too small for the next tensor of its size: one tensor of 200 MB, made again
    and again and nothing else, was mapped up to seven times (glibc 2.36), as often as that cache keeps a size.
    """
    c = ctypes.CDLL(None) if os.name == "posix" else None
    if c is None or not hasattr(c, "mallopt") or not hasattr(c, "malloc_trim"):
        raise RuntimeError("this platform's C library has no mallopt, expected glibc: memory cannot be kept")
    mmap_max, threshold = (0, _NEVER_TRIM) if enabled else (_DEFAULT_MMAP_MAX, _DEFAULT_TRIM_THRESHOLD)
    if not (c.mallopt(_M_MMAP_MAX, mmap_max) and c.mallopt(_M_TRIM_THRESHOLD, threshold)):
        raise RuntimeError("mallopt has refused to change how memory is freed")
    if not enabled:
        c.malloc_trim(0)
