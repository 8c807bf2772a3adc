"""Threads, instruction set, and what this build is."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import numpy as np

from pybn import _core


def set_num_threads(n: int) -> None:
    """Use at most `n` threads from now on.

    Upper bounds that apply below it: OpenMP's own (``OMP_NUM_THREADS``, threadpoolctl) and the CPUs that this process
    may run on. Results do not depend on the number of threads.

    Raises
    ------
    TypeError, ValueError
        If n is not an integer, or is less than 1.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise TypeError(f"n is {n!r}, expected an integer >= 1")
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    _core.set_num_threads(min(int(n), 2**30))


def get_num_threads() -> int:
    """The number of threads that a large enough call uses; 1 in a forked child, where OpenMP's threads do not exist."""
    return _core.get_num_threads()


def show_config() -> dict[str, object]:
    """Print and return versions, compiler, instruction sets and threads: what a bug report needs."""
    cached, limit, recycled, fresh = _core.cache_statistics()
    config: dict[str, object] = {
        "pybn": _core.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "compiler": _core.compiler,
        "instruction set": _core.instruction_set(),
        "available instruction sets": ", ".join(_core.available_instruction_sets()),
        "openmp": _core.openmp,
        "threads": get_num_threads(),
        "cached bytes": f"{cached} of at most {limit}; {recycled} results recycled, {fresh} new",
    }
    width = max(map(len, config))
    print("\n".join(f"{key:{width}}  {value}" for key, value in config.items()))
    return config


def empty_cache() -> None:
    """Return to the system the memory that is kept for future results.

    Results of at least 1 MiB live in memory that is recycled when the arrays are gone: a fresh 100 MB array costs more
    in page faults than the kernel that fills it. At most ``PYBN_CACHE_BYTES`` (an environment variable read at import;
    1 GiB by default, 0 for none) are kept. Those that nobody has wanted for 5 seconds are offered to the system, which
    takes their pages if it runs short; that is seen to whenever a result is dropped. Arrays in use are never touched.
    """
    _core.empty_cache()


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """CPUs that the container's quota amounts to, rounded up, or None if there is no quota (cgroup v2, then v1)."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max": unlimited
        return None


def configure_from_environment() -> None:
    """Apply PYBN_ISA, PYBN_NUM_THREADS, PYBN_CACHE_BYTES and the container's CPU quota; called once, at import."""
    isa = os.environ.get("PYBN_ISA")
    if isa and not _core.select_instruction_set(isa):
        available = ", ".join(_core.available_instruction_sets())
        raise ValueError(f"PYBN_ISA is {isa!r}, expected one of the sets that this CPU supports: {available}")
    if threads := os.environ.get("PYBN_NUM_THREADS"):
        if not threads.isdecimal() or int(threads) < 1:
            raise ValueError(f"PYBN_NUM_THREADS is {threads!r}, expected an integer >= 1")
        set_num_threads(int(threads))
    elif quota := cpu_quota():
        set_num_threads(quota)
    cache = os.environ.get("PYBN_CACHE_BYTES", "").strip() or str(2**30)
    if not cache.isdecimal():
        raise ValueError(f"PYBN_CACHE_BYTES is {cache!r}, expected a number of bytes >= 0")
    _core.set_cache_limit(min(int(cache), 2**62))
