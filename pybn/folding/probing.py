"""Looking into a model, and moving values inside it: graphs changed for the check."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pybn.folding.affine import Array, is_supported
from pybn.folding.runtime import Feeds, Session

# Runs with random signs, besides the one with the signs as they are.
PROBES = 2

SEEN = "pybn.seen."
STILL = "pybn.still."
DELTA = "pybn.delta."


def expose(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Add values of the main graph to the outputs of the model, in place."""
    for name in names:
        # Identity, because a value may be an input or an output of the graph already.
        model.graph.node.append(onnx.helper.make_node("Identity", [name], [SEEN + name]))
        model.graph.output.append(onnx.ValueInfoProto(name=SEEN + name))
    return model


class Probe:
    """A model whose values of the main graph can be moved.

    Parameters
    ----------
    copy : callable
        Makes a copy of the model, to be changed. Called once, when it is known which values to move.
    folder : path or None
        Where the external data of the model are.
    """

    def __init__(self, copy: Callable[[], onnx.ModelProto], folder: Path | None) -> None:
        self._copy = copy
        self._folder = folder
        self._session: Session | None = None

    def movement(
        self, feeds: Feeds, base: Sequence[Any], deltas: Mapping[str, Array], rng: np.random.Generator
    ) -> list[float]:
        """Measure how far each output moves when values move by `deltas`, all at once.

        Differences that are alike everywhere (the rounding of a weight) add up; others cancel. So the values are moved
        once as they are, and `PROBES` times with random signs; what counts is the largest movement.

        Parameters
        ----------
        feeds : dict
            The inputs of the model.
        base : sequence
            The outputs for them.
        deltas : mapping
            Differences, by the name of the value; always for the same names.
        rng : numpy.random.Generator
            For the signs.
        """
        deltas = {name: delta for name, delta in deltas.items() if is_supported(delta.dtype)}
        moved = [0.0] * len(base)
        if not deltas:
            return moved
        if self._session is None:
            self._session = Session(_movable(self._copy(), deltas), "the folded model, probed", folder=self._folder)
        for probe in range(1 + PROBES):
            given = {DELTA + name: _with_random_signs(rng, a) if probe else a for name, a in deltas.items()}
            results = self._session.run({**feeds, **given})
            moved = [max(far, _distance(value, was)) for far, value, was in zip(moved, results, base, strict=True)]
        return moved


def _movable(model: onnx.ModelProto, deltas: Mapping[str, Array]) -> onnx.ModelProto:
    """Add an input to each of these values of the main graph, in place."""
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(delta.dtype) for name, delta in deltas.items()}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            element = types.get(name)
            if element is None:
                continue
            node.output[index] = STILL + name
            nodes.append(onnx.helper.make_node("Add", [STILL + name, DELTA + name], [name]))
            model.graph.input.append(onnx.helper.make_tensor_value_info(DELTA + name, element, None))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    return model


def _with_random_signs(rng: np.random.Generator, delta: Array) -> Array:
    negative = np.unpackbits(rng.integers(0, 256, -(-delta.size // 8), dtype=np.uint8), count=delta.size)
    return np.where(negative.reshape(delta.shape), -delta, delta).astype(delta.dtype)


def _distance(value: Any, base: Any) -> float:
    """Return the largest finite difference of two tensors of floats; 0 for anything else."""
    if not isinstance(base, np.ndarray) or not is_supported(base.dtype):
        return 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(value.astype(np.float64) - base.astype(np.float64))
    return float(np.where(np.isfinite(distance), distance, 0.0).max(initial=0.0))
