"""What is measured: operations on the shapes of ResNet-50 at batch 32, and who performs them.

Every contender is a function without arguments that performs one operation once; `contenders` builds them for one
shape, on the same data.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import pybn
from pybn import _core

BATCH = 32
# Channels and side of every batch norm input of ResNet-50 (224x224 images), largest planes first.
RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
OPERATIONS = ("forward", "inference", "backward")
# Operands whose one-channel slab has to stay in L2 between the two passes of an operation.
SLABS = {"forward": 1, "inference": 0, "backward": 2}
# Reads and writes of the tensor that an operation cannot avoid if its slabs stay in L2.
TRAFFIC = {"forward": 2, "inference": 2, "backward": 3, "copy": 2}


@dataclass(frozen=True)
class Shape:
    """An NCHW float32 tensor of square planes."""

    channels: int
    side: int

    @property
    def dims(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (BATCH, self.channels, self.side, self.side)

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return 4 * BATCH * self.channels * self.side**2

    def fits(self, operation: str) -> bool:
        """Whether what the operation reads twice, for one channel, fits this machine's L2."""
        return SLABS[operation] * 4 * BATCH * self.side**2 <= l2_bytes()

    def __str__(self) -> str:
        return f"{self.channels}@{self.side}x{self.side}"


def l2_bytes() -> int:
    """L2 per core; 1 MiB where the system does not tell."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (ValueError, OSError):
        return 2**20


def contenders(shape: Shape) -> dict[tuple[str, str], Callable[[], object]]:
    """Functions by (operation, contender): contenders are "out" and "fresh" (ours), "torch" (eager, fresh) and
    "memcpy".
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape.dims, dtype=np.float32)
    dy = rng.standard_normal(shape.dims, dtype=np.float32)
    out = np.zeros_like(x)  # zeros written now: the pages of out= are there before the clock runs
    out[...] = 0
    weight, bias = rng.standard_normal((2, shape.channels)).astype(np.float32)
    running_mean, running_var = np.zeros(shape.channels, np.float32), np.ones(shape.channels, np.float32)
    _, saved = pybn.batch_norm_forward(x, weight, bias)

    tx, tdy, tw, tb, tm, tv = (
        torch.from_numpy(a) for a in (x, dy, weight, bias, running_mean.copy(), running_var.copy())
    )
    _, save_mean, save_invstd = torch.native_batch_norm(tx, tw, tb, tm, tv, True, 0.1, 1e-5)

    def forward(training: bool, target: np.ndarray | None) -> Callable[[], object]:
        return lambda: pybn.batch_norm(x, running_mean, running_var, weight, bias, training, out=target)

    def torch_forward(training: bool) -> Callable[[], object]:
        return lambda: F.batch_norm(tx, tm, tv, tw, tb, training)

    return {
        ("copy", "memcpy"): lambda: _core.copy(x, out),
        ("forward", "out"): forward(True, out),
        ("forward", "fresh"): forward(True, None),
        ("forward", "torch"): torch_forward(True),
        ("inference", "out"): forward(False, out),
        ("inference", "fresh"): forward(False, None),
        ("inference", "torch"): torch_forward(False),
        ("backward", "out"): lambda: pybn.batch_norm_backward(dy, saved, out=out),
        ("backward", "fresh"): lambda: pybn.batch_norm_backward(dy, saved),
        ("backward", "torch"): lambda: torch.ops.aten.native_batch_norm_backward(
            tdy, tx, tw, tm, tv, save_mean, save_invstd, True, 1e-5, [True, True, True]
        ),
    }


def environment() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "pybn": pybn.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "compiler": _core.compiler,
        "instruction set": _core.instruction_set(),
        "threads": f"pybn {pybn.get_num_threads()}, torch {torch.get_num_threads()}",
        "L2 per core": f"{l2_bytes() >> 10} KiB",
    }
