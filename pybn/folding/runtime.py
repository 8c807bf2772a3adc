"""Running models and single operators on the CPU, and timing models.

onnxruntime runs what it has kernels for. The rest is run by ``onnx.reference``: convolutions in float64, and opsets
before 7. Models in bfloat16, for which neither is of use, are run by onnxruntime with every operator in float32 and its
result rounded to bfloat16, as hardware does that has the type.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from pybn.folding.affine import Array
from pybn.folding.files import first_line
from pybn.folding.report import Timing
from pybn.folding.widening import bfloat16_names, in_float32, uses_bfloat16

Feeds = dict[str, Array]

TIMING_SECONDS = 1.0
TIMING_RUNS = (5, 50)


class CheckError(ValueError):
    """The check cannot be run: unusable inputs, or the runtime rejects the model."""


class Session:
    """A model that can be run; failure is reported in one line.

    Parameters
    ----------
    model : onnx.ModelProto
        The model.
    what : str
        What it is, for messages.
    optimise : bool
        Whether onnxruntime may rewrite it first.
    folder : path, optional
        Where its external data is.

    Attributes
    ----------
    is_onnxruntime : bool
        Whether onnxruntime runs it. Then sums of products of 16-bit numbers are in float32.
    """

    def __init__(
        self, model: onnx.ModelProto, what: str, *, optimise: bool = False, folder: Path | None = None
    ) -> None:
        self._what = what
        self._names = [output.name for output in model.graph.output]
        self._halves: set[str] = set()
        if uses_bfloat16(model):
            self._halves = bfloat16_names(model)
            model = in_float32(model, self._halves)
        self.is_onnxruntime = True
        self._session: ort.InferenceSession | ReferenceEvaluator
        try:
            self._session = _onnxruntime(model, optimise, folder)
        except Exception as error:  # onnxruntime raises a class of its own per failure
            if type(error).__name__ != "NotImplemented":
                raise CheckError(_load_failure(error, what, model.ir_version)) from error
            self.is_onnxruntime = False
            self._session = _reference(model, what, folder)

    def run(self, feeds: Mapping[str, Array]) -> list[Any]:
        """Run the model; the outputs are in graph order."""
        given = {name: array.astype(np.float32) if name in self._halves else array for name, array in feeds.items()}
        try:
            with np.errstate(all="ignore"):
                results = list(self._session.run(self._names, given))
        except Exception as error:  # as above; the reference raises whatever its NumPy code does
            shapes = ", ".join(f"{name} {array.shape}" for name, array in feeds.items() if "pybn." not in name)
            runtime = "onnxruntime" if self.is_onnxruntime else "onnx.reference"
            raise CheckError(f"{runtime} cannot run {self._what} on {shapes}: {first_line(error)}") from error
        return [
            result.astype(ml_dtypes.bfloat16) if name in self._halves else result
            for name, result in zip(self._names, results, strict=True)
        ]


class Operator:
    """One node, run by itself on arrays."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self._proto = ir.to_proto(node)
        self._opset = opset
        self._sessions: dict[tuple[Any, ...], Session] = {}

    def run(
        self, inputs: Sequence[Array | None], *, op_type: str = "", attributes: Mapping[str, float] | None = None
    ) -> list[Array]:
        """Run the node, or one of another type with other attributes, and return its outputs."""
        # NumPy turns arrays without axes into scalars, which runtimes do not take.
        feeds = {f"in{i}": np.asarray(array) for i, array in enumerate(inputs) if array is not None}
        types = tuple((name, array.dtype.name) for name, array in feeds.items())
        key = (op_type, types)
        if key not in self._sessions:
            node = onnx.NodeProto.FromString(self._proto.SerializeToString())
            node.domain, node.op_type = "", op_type or node.op_type
            node.input[:] = [f"in{i}" if array is not None else "" for i, array in enumerate(inputs)]
            node.output[:] = [f"out{i}" if name else "" for i, name in enumerate(node.output)]
            for name, value in (attributes or {}).items():
                kept = [item for item in node.attribute if item.name != name]
                del node.attribute[:]
                node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])
            outputs = [name for name in node.output if name]
            model = model_of([node], feeds, outputs, self._opset)
            self._sessions[key] = Session(model, f"{self._proto.op_type} by itself")
        return self._sessions[key].run(feeds)


def model_of(
    nodes: Sequence[onnx.NodeProto], feeds: Mapping[str, Array], outputs: Sequence[str], opset: int
) -> onnx.ModelProto:
    """Make a model of some nodes, with the types of these arrays as its inputs, and any shapes."""
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in feeds.items()
    ]
    graph = onnx.helper.make_graph(nodes, "expression", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
    # IR version 8 is older than every onnxruntime that is supported, and later ones add types only.
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def _onnxruntime(model: onnx.ModelProto, optimise: bool, folder: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    # Idle threads of one session would spin on the cores that another is being timed on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL if optimise else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _reference(model: onnx.ModelProto, what: str, folder: Path | None) -> ReferenceEvaluator:
    whole = model
    if folder is not None:
        whole = onnx.ModelProto.FromString(model.SerializeToString())
        onnx.load_external_data_for_model(whole, str(folder))
    try:
        return ReferenceEvaluator(whole)
    except Exception as error:  # the reference raises whatever its code does
        raise CheckError(f"neither onnxruntime nor onnx.reference can load {what}: {first_line(error)}") from error


def _load_failure(error: Exception, what: str, ir_version: int) -> str:
    if "Unsupported model IR version" in str(error):
        return (
            f"the installed onnxruntime {ort.__version__} cannot load IR version {ir_version}: "
            "upgrade onnxruntime, lower the model's ir_version, or leave out the check"
        )
    return f"onnxruntime cannot load {what}: {first_line(error)}"


def time_models(
    models: tuple[onnx.ModelProto, onnx.ModelProto], folders: tuple[Path | None, Path | None], feeds: Feeds
) -> Timing | None:
    """Time the original and the folded model interleaved, so that a busy moment of the machine hits both.

    None if onnxruntime has no kernels for them: how long the reference takes means nothing.
    """
    sessions = [
        Session(model, "the model", optimise=optimise, folder=folder)
        for optimise in (False, True)
        for model, folder in zip(models, folders, strict=True)
    ]
    if not all(session.is_onnxruntime for session in sessions):
        return None
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
