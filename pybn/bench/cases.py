"""What is measured: operations on tensors, and the memory traffic that each cannot avoid.

The unit everywhere is the *copy*: the time in which all threads together copy the tensor (one read, one write of it).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

BATCH = 32
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
LAYOUTS = ("nchw", "nhwc")
CACHE_LINE = 64
SMALL = 2**20  # up to here the cost of the call itself is a good part of the time, and the copy stays in cache


class UsageError(ValueError):
    """What was asked for makes no sense; the message names the option and the way out."""


@dataclass(frozen=True)
class Shape:
    """A tensor of `n` images of `c` channels; a plane of 1x1 makes it dense, (n, c)."""

    n: int
    c: int
    h: int
    w: int

    @property
    def plane(self) -> int:
        """Values of one channel of one image."""
        return self.h * self.w

    @property
    def values(self) -> int:
        """Values of the tensor."""
        return self.n * self.c * self.plane

    def dims(self, layout: str) -> tuple[int, ...]:
        """The shape of its array."""
        if self.plane == 1:
            return (self.n, self.c)
        return (self.n, self.c, self.h, self.w) if layout == "nchw" else (self.n, self.h, self.w, self.c)

    def __str__(self) -> str:
        return "x".join(map(str, self.dims("nchw")))


@dataclass(frozen=True)
class Operation:
    """A pass over the tensor: training forward, inference or backward, with what is fused into it."""

    kind: str
    add: bool = False
    relu: bool = False

    @property
    def name(self) -> str:
        """As in ``--ops``."""
        return self.kind + "-add" * self.add + "-relu" * self.relu

    @property
    def slabs(self) -> int:
        """Tensors that are read twice, once to reduce a channel and once to apply the result."""
        return {"forward": 1, "inference": 0, "backward": 2}[self.kind]

    def traffic(self, fits: bool, item_bytes: int) -> float:
        """Reads and writes of a whole tensor that remain if what is read twice stays in L2 (`fits`), or does not.

        The second operand and its gradient count; so does the bit mask that add + ReLU stores in training, one bit
        per value.
        """
        mask = 1 / (8 * item_bytes) if self.add and self.relu and self.kind != "inference" else 0.0
        tensors = {"forward": 2, "inference": 2, "backward": 3}[self.kind] + self.add + mask
        return tensors if fits else tensors + self.slabs


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("forward"),
        Operation("inference"),
        Operation("backward"),
        Operation("forward", relu=True),
        Operation("inference", relu=True),
        Operation("backward", relu=True),
        Operation("forward", add=True, relu=True),
        Operation("inference", add=True, relu=True),
        Operation("backward", add=True, relu=True),
    )
}


@dataclass(frozen=True)
class Case:
    """One operation on one tensor."""

    operation: Operation
    shape: Shape
    dtype: str
    layout: str

    @property
    def bytes(self) -> int:
        """Size of the tensor."""
        return ITEM_BYTES[self.dtype] * self.shape.values

    @property
    def slab_bytes(self) -> int:
        """What the smallest piece that can be reduced on its own takes, of one tensor: a channel, or, where channels
        are neighbours in memory, a cache line of them.
        """
        item = ITEM_BYTES[self.dtype]
        channels_last = self.layout == "nhwc" or self.shape.plane == 1
        row = min(self.shape.c * item, CACHE_LINE) if channels_last else item
        return row * self.shape.n * self.shape.plane

    def fits(self, l2: int) -> bool:
        """Whether what the operation reads twice fits an L2 of that many bytes."""
        return self.operation.slabs * self.slab_bytes <= l2

    def bound(self, l2: int) -> float:
        """The least traffic beyond L2, in copies."""
        return self.operation.traffic(self.fits(l2), ITEM_BYTES[self.dtype]) / 2

    def group(self, l2: int) -> str:
        """The group of shapes that it is averaged with; inference, which reads once, goes with the training forward."""
        if self.bytes <= SMALL:
            return "small"
        if self.layout == "nchw" and 1 < self.shape.plane <= 64:
            return "7x7 planes"
        return "fits L2" if max(1, self.operation.slabs) * self.slab_bytes <= l2 else "exceeds L2"

    def __str__(self) -> str:
        return f"{self.operation.name} {self.shape} {self.dtype} {self.layout}"


GROUPS = {
    "fits L2": "what is read twice, for one channel, fits L2",
    "7x7 planes": "planes of at most 64 values",
    "exceeds L2": "what is read twice, for one channel, exceeds L2",
    "small": "tensors of at most 1 MiB",
}

# Channels and side of the inputs of batch norms, 224x224 images, every distinct one unless said otherwise.
NETWORKS = {
    "resnet50": [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)],
    # MobileNetV2, in the order of its layers.
    "mobilenet": [
        (32, 112), (16, 112), (96, 112), (96, 56), (24, 56), (144, 56), (144, 28), (32, 28), (192, 28), (192, 14),
        (64, 14), (384, 14), (96, 14), (576, 14), (576, 7), (160, 7), (960, 7), (320, 7), (1280, 7),
    ],
    # DenseNet-121: of the inputs of each block's layers, which grow by 32 channels, the first, a middle and the last.
    "densenet": [
        (64, 112), (64, 56), (160, 56), (256, 56), (128, 28), (288, 28), (512, 28), (256, 14), (608, 14), (1024, 14),
        (512, 7), (768, 7), (1024, 7),
    ],
}  # fmt: skip
# Few channels, one image, small and dense tensors: kernels made for the lists above may have nothing to share out here.
EXTRA = [
    (64, 3, 224, 224),
    (32, 64, 56, 56),
    (1, 256, 14, 14),
    (8, 32, 32, 32),
    (256, 512, 1, 1),
    (1, 64, 112, 112),
    (8192, 256, 1, 1),
]
SHAPE_LISTS = (*NETWORKS, "extra")
QUICK_SHAPES = 4


def l2_bytes() -> int:
    """L2 per core; 1 MiB where the system does not tell."""
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or 2**20
    except (ValueError, OSError):
        return 2**20


def shape_list(name: str, batch: int = BATCH) -> list[Shape]:
    """Return the shapes of a list: resnet50, mobilenet, densenet (at that batch size), extra, or those of a file.

    Raises
    ------
    UsageError
        If there is no such list or file, or a line of the file is not a shape.
    """
    if name in NETWORKS:
        return [Shape(batch, channels, side, side) for channels, side in NETWORKS[name]]
    if name == "extra":
        return [Shape(*dims) for dims in EXTRA]
    try:
        text = Path(name).read_text()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not text"
        raise UsageError(
            f"--shapes {name}: {reason.lower()}; give {', '.join(SHAPE_LISTS)} or a file with a line N,C,H,W per shape"
        ) from None
    return parse_shapes(text, name)


def parse_shapes(text: str, name: str) -> list[Shape]:
    """Return the shapes of a file, one ``N,C,H,W`` (or ``N,C`` for a dense tensor) per line; ``#`` begins a comment."""
    shapes = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        parts = [part.strip() for part in line.split(",")]
        if len(parts) not in (2, 4) or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise UsageError(f"--shapes {name}: line {number} is {line!r}, expected N,C,H,W or N,C, all at least 1")
        shape = Shape(*([int(part) for part in parts] + [1, 1])[:4])
        if shape.n * shape.plane < 2:
            raise UsageError(f"--shapes {name}: line {number} is {line!r}, expected several values per channel")
        shapes.append(shape)
    if not shapes:
        raise UsageError(f"--shapes {name}: the file has no shapes, expected a line N,C,H,W for each")
    return shapes


def quick(shapes: list[Shape]) -> list[Shape]:
    """Return a few of the shapes, spread evenly over the list."""
    if len(shapes) <= QUICK_SHAPES:
        return shapes
    step = (len(shapes) - 1) / (QUICK_SHAPES - 1)
    return [shapes[round(i * step)] for i in range(QUICK_SHAPES)]
