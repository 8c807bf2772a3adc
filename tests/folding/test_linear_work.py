"""The work of a fold grows as the model does: counted, line by line of the folder, not timed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import pytest
from fold_models import PARAMETERS, batch_norm, bn_node, model
from onnx import helper

import pybn.folding
from pybn.folding.onnx import fold_onnx

FOLDER = str(Path(pybn.folding.__file__).parent)


def multiplications(count: int) -> onnx.ModelProto:
    """A chain of which every fold moves on what all folds before it did."""
    nodes = [helper.make_node("Mul", [f"v{at}", "k"], [f"v{at + 1}"]) for at in range(count)]
    return whole(nodes, {"k": np.float32(1.01)}, count)


def multiplications_and_additions_after_a_convolution(count: int) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", ["v0", "w"], ["v1"])]
    nodes += [helper.make_node(("Mul", "Add")[at % 2], [f"v{at}", "k"], [f"v{at + 1}"]) for at in range(1, count)]
    return whole(nodes, {"w": np.ones((4, 4, 1, 1), np.float32), "k": np.float32(1.01)}, count)


def layers_that_share_their_weights(count: int) -> onnx.ModelProto:
    nodes = []
    for at in range(count):
        nodes += [helper.make_node("Conv", [f"v{at}", "w"], [f"c{at}"]), bn_node(f"c{at}", f"b{at}")]
        nodes.append(helper.make_node("Relu", [f"b{at}"], [f"v{at + 1}"]))
    return whole(nodes, {"w": np.ones((4, 4, 1, 1), np.float32), **batch_norm(np.random.default_rng(1), 4)}, count)


def batch_norms_of_one_value(count: int) -> onnx.ModelProto:
    """None can be folded; each has all the others around it."""
    nodes = [helper.make_node("Sigmoid", ["v0"], ["s"])]
    for at in range(count):
        nodes += [bn_node("s", f"b{at}"), helper.make_node("Tanh", [f"b{at}"], [f"t{at}"])]
    nodes.append(helper.make_node("Sum", [f"t{at}" for at in range(count)], [f"v{count}"]))
    return whole(nodes, batch_norm(np.random.default_rng(1), 4), count)


def whole(nodes: list[onnx.NodeProto], constants: dict[str, Any], count: int) -> onnx.ModelProto:
    for item in nodes:
        item.input[:] = ["x" if name == "v0" else name for name in item.input]
        item.output[:] = ["y" if name == f"v{count}" else name for name in item.output]
    assert set(constants) <= {"k", "w", *PARAMETERS}
    return model(nodes, constants, [1, 4, 3, 3], [1, 4, 3, 3])


def lines_run(proto: onnx.ModelProto) -> Counter[tuple[str, int]]:
    """How often a fold runs each line of the folder."""
    counts: Counter[tuple[str, int]] = Counter()

    def inside(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line":
            counts[Path(frame.f_code.co_filename).name, frame.f_lineno] += 1
        return inside

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return inside if frame.f_code.co_filename.startswith(FOLDER) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        fold_onnx(proto)
    finally:
        sys.settrace(before)
    return counts


@pytest.mark.parametrize(
    "build",
    [
        multiplications,
        multiplications_and_additions_after_a_convolution,
        layers_that_share_their_weights,
        batch_norms_of_one_value,
    ],
    ids=lambda build: build.__name__,
)
def test_three_times_the_model_is_three_times_the_work(build):
    few, many = lines_run(build(16)), lines_run(build(48))
    assert sum(few.values()) > 1000
    # What every pair of nodes takes grows ninefold, what begins only after some nodes a little more than threefold.
    worse = {line: (few[line], count) for line, count in many.items() if count > 4 * few[line] + 200}
    assert not worse
