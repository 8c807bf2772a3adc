"""One thread for what others compute, so that its bits do not depend on how many there are.

torch's operators and NumPy's matrix products add up in an order that depends on the number of threads, which Dask sets
to one for its workers and nobody for a machine alone. pybn's own sums do not depend on it, and keep their threads.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_blas = contextlib.ExitStack()
_users = 0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch, if it was imported, and NumPy's BLAS, if threadpoolctl is there, use one thread inside."""
    with _one_blas_thread(), _one_torch_thread():
        yield


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """The number is the process's: it is restored when nobody needs it to be one any more."""
    global _users
    with _lock:
        if _users == 0:
            with contextlib.suppress(ImportError):
                from threadpoolctl import threadpool_limits

                _blas.enter_context(threadpool_limits(1, "blas"))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _blas.close()


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The number is the thread's."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
