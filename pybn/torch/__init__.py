"""Batch norm for PyTorch on the CPU: torch's layers and functions on pybn's kernels.

Reading order: kernels (tensors and the C++ core), functional (the operation), operators (the same for torch.compile and
torch.export), modules (the layers), distributed (a layer over several processes), variants (layers with other
statistics, and freezing), population and insertion (`pybn.reestimate` and `pybn.insert` of modules).
"""

from pybn.torch.distributed import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from pybn.torch.functional import batch_norm
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
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchRenorm",
    "GhostBatchNorm",
    "SequenceBatchNorm",
    "SyncBatchNorm",
    "VirtualBatchNorm",
    "batch_norm",
    "convert_sync_batchnorm",
    "freeze",
    "revert_sync_batchnorm",
    "unfreeze",
]
