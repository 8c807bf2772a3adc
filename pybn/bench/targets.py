"""What pybn promises of these figures; a table marks what misses its target.

Times are of float32 with ``out=``, in copies, geometric means over a group of shapes; speeds are geometric means over
the shapes measured.
"""

from __future__ import annotations

from pybn.bench.cases import Case, Operation
from pybn.bench.peers import YARDSTICKS

# The most copies that an operation may take, by layout, kind and (with a residual) fusion, then by group.
_COPIES = {
    ("nchw", "forward"): {"fits L2": 1.15, "7x7 planes": 1.5, "exceeds L2": 1.6},
    ("nchw", "inference"): {"fits L2": 1.05, "7x7 planes": 1.05, "exceeds L2": 1.05},
    ("nchw", "backward"): {"fits L2": 1.65, "7x7 planes": 2.0, "exceeds L2": 2.5},
    ("nchw", "forward-add-relu"): {"fits L2": 1.7, "7x7 planes": 1.7, "exceeds L2": 2.1},
    ("nhwc", "forward"): {"fits L2": 1.75, "exceeds L2": 1.75},
    ("nhwc", "inference"): {"fits L2": 1.05, "exceeds L2": 1.05},
    ("nhwc", "backward"): {"fits L2": 2.6, "exceeds L2": 2.6},
}
# The least speed against a peer, float32, by layout, peer and operation.
_SPEED = {
    ("nchw", "torch"): {
        "forward": 5.0, "backward": 3.5, "inference": 2.0, "forward-relu": 6.0, "backward-relu": 6.0,
    },
    ("nchw", "compile"): {"forward-relu": 4.0, "backward-relu": 4.0},
    ("nchw", "onednn"): {"forward": 4.0, "backward": 4.0},
    ("nhwc", "onednn"): {"forward": 1.5, "backward": 1.5},
    ("nchw", "onnxruntime"): {"inference": 1.5},
    ("nchw", "openvino"): {"inference": 2.0},
    ("nchw", "jax"): {"forward": 4.0, "inference": 4.0, "backward": 4.0},
}  # fmt: skip
# On every single shape pybn is at least as fast as each peer; NumPy and every case alike.
EVERY_SHAPE = 1.0
# One image of 14x14 planes is all overhead: there the least speed against torch eager.
SMALL_SHAPE, SMALL_SPEED = (1, 256, 14, 14), 2.0
# The most that fresh results may cost relative to `out=`, up to tensors of that size.
FRESH, FRESH_BYTES = 1.25, 256 * 2**20
# The most that a half type may take of float32's time, on tensors that exceed L2.
HALF = 0.6
# The least gain of a second thread, where a copy gains that much.
SECOND_THREAD = 1.8


def copies(operation: Operation, dtype: str, layout: str, group: str) -> float | None:
    """The most copies for a group of shapes, None if nothing is promised."""
    if dtype != "float32":
        return None
    name = operation.name if operation.add else operation.kind
    return _COPIES.get((layout, name), {}).get(group)


def speed(operation: Operation, dtype: str, layout: str, peer: str) -> float | None:
    """The least mean speed against a peer, None if nothing is promised."""
    return _SPEED.get((layout, peer), {}).get(operation.name) if dtype == "float32" else None


def least_speed(case: Case, peer: str) -> float:
    """The least speed against a peer on one shape."""
    if peer in YARDSTICKS:
        return 0.0
    return SMALL_SPEED if peer == "torch" and case.shape.dims("nchw") == SMALL_SHAPE else EVERY_SHAPE
