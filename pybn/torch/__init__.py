"""Batch norm for PyTorch on the CPU: torch's layers and functions on pybn's kernels.

Reading order: kernels (tensors and the C++ core), functional (the operation), operators (the same for torch.compile and
torch.export), modules (the layers), inplace (a layer that overwrites its input), distributed (a layer over several
processes), variants (layers with other statistics, and freezing), population and insertion (`pybn.reestimate` and
`pybn.insert` of modules), memory (what a process keeps).

For whole models: epilogues (what follows a norm in a trace), forwards (when a trace may be run), accelerate (all of
it); fold_trace (what flows in a model), fold_rules (how maps pass its operators), fold_layers (what they do to
weights), fold_walk (where they end), fold_modules (what stands for a folded norm), fold_report (what became of it),
fold (all of it).
"""

from pybn.torch.accelerate import Accelerated, accelerate, restore
from pybn.torch.distributed import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from pybn.torch.fold import FoldResult, fold, unfold
from pybn.torch.functional import batch_norm
from pybn.torch.inplace import InPlaceABN
from pybn.torch.memory import reuse_memory
from pybn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from pybn.torch.variants import (
    BatchRenorm,
    GhostBatchNorm,
    SequenceBatchNorm,
    VirtualBatchNorm,
    freeze,
    unfreeze,
)

__all__ = [
    "Accelerated",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "FoldResult",
    "GhostBatchNorm",
    "InPlaceABN",
    "SequenceBatchNorm",
    "SyncBatchNorm",
    "VirtualBatchNorm",
    "accelerate",
    "batch_norm",
    "convert_sync_batchnorm",
    "fold",
    "freeze",
    "restore",
    "reuse_memory",
    "revert_sync_batchnorm",
    "unfold",
    "unfreeze",
]
