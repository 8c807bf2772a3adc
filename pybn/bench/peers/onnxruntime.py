"""onnxruntime: a model of one BatchNormalization, on the CPU provider, with input and output bound once."""

from __future__ import annotations

from typing import Any

from pybn.bench.cases import Operation
from pybn.bench.peers import base
from pybn.bench.problem import EPS, Contender, Problem


class OnnxRuntime:
    """All graph optimisations are on; there is nothing before the batch norm that it could be folded into.

    Its threads do not spin: they would do so for 30 ms on the cores that the others are timed on. A small call takes
    some 3 us longer for it.
    """

    name = "onnxruntime"
    allocates = False

    def __init__(self, threads: int) -> None:
        self._onnx = base.require("onnx", "onnx onnxruntime")
        self._runtime = base.require("onnxruntime", "onnx onnxruntime")
        self.version = str(self._runtime.__version__)
        self._options = self._runtime.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.inter_op_num_threads = 1
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._options.log_severity_level = 4  # what it cannot run is reported once, by us

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Return a session with bound memory."""
        if operation.kind != "inference":
            raise base.UnsupportedError("the packages for inference have no training pass")
        if problem.layout != "nchw":
            raise base.UnsupportedError("ONNX's BatchNormalization has its channels on axis 1")
        if problem.dtype == "bfloat16":
            raise base.UnsupportedError("no CPU kernel for bfloat16")
        model = _model(self._onnx, operation, problem).SerializeToString()
        try:
            session = self._runtime.InferenceSession(model, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # NotImplemented, InvalidGraph and others, which have no common ancestor
            raise base.UnsupportedError(str(error).splitlines()[0]) from None
        y = problem.empty()
        binding = session.io_binding()
        value = self._runtime.OrtValue.ortvalue_from_numpy
        kept = [value(array) for array in problem.arguments(operation)]
        for name, array in zip(("x", "residual"), kept, strict=False):
            binding.bind_ortvalue_input(name, array)
        kept.append(value(y))
        binding.bind_ortvalue_output("y", kept[-1])
        return Contender(lambda: session.run_with_iobinding(binding), lambda _: (kept[-1].numpy(),), pool=self.name)


def _model(onnx: Any, operation: Operation, problem: Problem) -> Any:
    helper = onnx.helper
    element = helper.np_dtype_to_tensor_dtype(problem.numpy_dtype)
    parameters = {
        "scale": problem.weight, "bias": problem.bias, "mean": problem.running_mean, "var": problem.running_var,
    }  # fmt: skip
    names = ["normalized", "sum", "y"]
    nodes = [helper.make_node("BatchNormalization", ["x", *parameters], [names[0]], epsilon=EPS)]
    if operation.add:
        nodes.append(helper.make_node("Add", [names[0], "residual"], [names[1]]))
    if operation.relu:
        nodes.append(helper.make_node("Relu", [nodes[-1].output[0]], [names[2]]))
    nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes,
        "batch_norm",
        [helper.make_tensor_value_info(name, element, problem.dims) for name in ("x", "residual")[: 1 + operation.add]],
        [helper.make_tensor_value_info("y", element, problem.dims)],
        [onnx.numpy_helper.from_array(array, name) for name, array in parameters.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
