"""Batch normalization on the CPU: fast kernels, NumPy layers, and a folder that removes it from models ready to be
deployed.
"""

from __future__ import annotations

try:
    from pybn import _core
except ImportError as error:  # most often: imported from a checkout, where the compiled core is not
    raise ImportError(
        f"pybn's compiled core cannot be imported ({error}). In a checkout of pybn, install it with `pip install .` "
        "and run Python from another folder, or with `pytest` rather than `python -m pytest`."
    ) from error

from pybn._config import configure_from_environment, empty_cache, get_num_threads, set_num_threads, show_config
from pybn.functional import (
    Gradients,
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_forward,
    batch_norm_stats,
)
from pybn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

__version__ = _core.__version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Gradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_elemt",
    "batch_norm_forward",
    "batch_norm_stats",
    "empty_cache",
    "get_num_threads",
    "set_num_threads",
    "show_config",
]

configure_from_environment()
