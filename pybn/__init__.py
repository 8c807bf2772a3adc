"""Batch normalization on the CPU: fast kernels, NumPy layers, and a folder that removes it from models ready to be
deployed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from pybn import _core
except ImportError as error:
    if any(path.suffix != ".pyi" for path in Path(__file__).parent.glob("_core.*")):
        raise
    raise ImportError(
        "this is pybn's source tree, which has no compiled core; run `pip install .` in it, then start Python in "
        "another folder (and use `pybn` rather than `python -m pybn`, `pytest` rather than `python -m pytest`)"
    ) from error

from pybn._config import configure_from_environment, empty_cache, get_num_threads, set_num_threads, show_config
from pybn.folding import FoldError, fold_conv, fold_linear, fold_state_dict
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
from pybn.ghost import GhostBatchNorm
from pybn.insertion import insert
from pybn.interchange import load_state_dict, save_state_dict
from pybn.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from pybn.population import Population, reestimate
from pybn.renorm import BatchRenorm, Ramp
from pybn.sequence import SequenceBatchNorm
from pybn.virtual import VirtualBatchNorm

if TYPE_CHECKING:
    from pybn.folding.onnx import FoldResult, fold_onnx

__version__ = _core.__version__

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "FoldError",
    "FoldResult",
    "GhostBatchNorm",
    "Gradients",
    "Population",
    "Ramp",
    "Saved",
    "SequenceBatchNorm",
    "VirtualBatchNorm",
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
    "fold_state_dict",
    "get_num_threads",
    "insert",
    "load_state_dict",
    "reestimate",
    "save_state_dict",
    "set_num_threads",
    "show_config",
]

configure_from_environment()


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


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
