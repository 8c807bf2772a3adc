"""Batch norm for PyTorch on the CPU: torch's layers and functions on pybn's kernels.

Reading order: kernels (tensors and the C++ core), functional (the operation), operators (the same for torch.compile and
torch.export), modules (the layers), distributed (a layer over several processes).
"""

from pybn.torch.distributed import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from pybn.torch.functional import batch_norm
from pybn.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "batch_norm",
    "convert_sync_batchnorm",
    "revert_sync_batchnorm",
]
