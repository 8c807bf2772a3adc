"""Batch normalization on the CPU: fast kernels, NumPy layers, and a folder that removes it from models ready to be
deployed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from pybn import _core
except ImportError as error:  # most often: imported from a checkout, where the compiled core is not
    raise ImportError(
        f"pybn's compiled core cannot be imported ({error}). In a checkout of pybn, install it with `pip install .` "
        "and run Python from another folder, or with `pytest` rather than `python -m pytest`."
    ) from error

from pybn._config import configure_from_environment, empty_cache, get_num_threads, set_num_threads, show_config
from pybn.folding import FoldError, fold_conv, fold_linear
from pybn.functional import (
    Gradients,
    Saved,
    batch_norm,
    batch_norm_backward,
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_forward,
    batch_norm_stats,
)
from pybn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

if TYPE_CHECKING:
    from pybn.folding.onnx import FoldResult, fold_onnx

__version__ = _core.__version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FoldError",
    "FoldResult",
    "Gradients",
    "Saved",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_elemt",
    "batch_norm_forward",
    "batch_norm_stats",
    "empty_cache",
    "fold_conv",
    "fold_linear",
    "fold_onnx",
    "get_num_threads",
    "set_num_threads",
    "show_config",
]

configure_from_environment()


def __getattr__(name: str) -> Any:
    """Import what needs onnx when it is first used, so that `import pybn` needs NumPy alone."""
    if name not in ("FoldResult", "fold_onnx"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from pybn.folding import onnx
    except ModuleNotFoundError as error:
        raise ImportError(
            f'pybn.{name} needs {error.name}, which is not installed; run: pip install "pybn[onnx]"'
        ) from error
    return getattr(onnx, name)
