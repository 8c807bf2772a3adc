"""Running models by onnxruntime on the CPU, and timing them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import onnx
import onnxruntime as ort

from pybn.folding.affine import Array
from pybn.folding.files import first_line
from pybn.folding.report import Timing

Feeds = dict[str, Array]

TIMING_SECONDS = 1.0
TIMING_RUNS = (5, 50)


class CheckError(ValueError):
    """The check cannot be run: unusable inputs, or the runtime rejects the model."""


class Session:
    """An onnxruntime session on the CPU that reports failure in one line."""

    def __init__(self, model: onnx.ModelProto, what: str, *, optimise: bool = False) -> None:
        self._what = what
        options = ort.SessionOptions()
        options.log_severity_level = 4
        # Idle threads of one session would spin on the cores that another is being timed on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimise else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        )
        try:
            self._session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own per failure
            if "Unsupported model IR version" in str(error):
                raise CheckError(
                    f"the installed onnxruntime {ort.__version__} cannot load IR version {model.ir_version}: "
                    "upgrade onnxruntime, lower the model's ir_version, or leave out the check"
                ) from error
            raise CheckError(f"onnxruntime cannot load {what}: {first_line(error)}") from error

    def run(self, feeds: Mapping[str, Array]) -> list[Any]:
        """Run the model; the outputs are in graph order."""
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as error:  # as above
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items() if "pybn." not in name)
            raise CheckError(f"onnxruntime cannot run {self._what} on {shapes}: {first_line(error)}") from error


def time_models(original: onnx.ModelProto, folded: onnx.ModelProto, feeds: Feeds) -> Timing:
    """Time both models interleaved, so that a busy moment of the machine hits both."""
    sessions = [
        Session(model, "the model", optimise=optimise) for optimise in (False, True) for model in (original, folded)
    ]
    for session in sessions:
        session.run(feeds)  # the first run allocates
    seconds: list[list[float]] = [[] for _ in sessions]
    fewest, most = TIMING_RUNS
    begin = time.perf_counter()
    for run in range(most):
        if run >= fewest and time.perf_counter() - begin > TIMING_SECONDS:
            break
        for session, taken in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(feeds)
            taken.append(time.perf_counter() - start)
    plain_before, plain_after, optimised_before, optimised_after = map(statistics.median, seconds)
    return Timing(
        plain_before=plain_before,
        plain_after=plain_after,
        optimised_before=optimised_before,
        optimised_after=optimised_after,
        runs=len(seconds[0]),
    )
