"""Memory of the program that asks, for the benchmarks that start one for every figure."""

from __future__ import annotations

from pathlib import Path


def memory(kind: str) -> int:
    """Return bytes of this program: "VmRSS" now, "VmHWM" at its peak; Linux only.

    getrusage would count those of the process that started it, too.
    """
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0])
