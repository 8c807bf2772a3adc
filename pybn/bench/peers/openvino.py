"""OpenVINO: a model of one BatchNormInference on the CPU plugin, with input and output tensors set once."""

from __future__ import annotations

from pybn.bench.cases import Operation
from pybn.bench.peers import base
from pybn.bench.problem import EPS, Contender, Problem


class OpenVINO:
    """One request, tuned for latency, computing in the type of the data."""

    name = "openvino"
    allocates = False

    def __init__(self, threads: int) -> None:
        self._openvino = base.require("openvino", "openvino")
        self._operators = base.require("openvino.opset8", "openvino")
        self.version = base.version("openvino")
        self._core = self._openvino.Core()
        self._threads = threads

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Return an infer request that reads and writes the problem's memory."""
        if operation.kind != "inference":
            raise base.UnsupportedError("it has no training pass")
        if problem.layout != "nchw":
            raise base.UnsupportedError("BatchNormInference has its channels on axis 1")
        if problem.dtype != "float32":
            raise base.UnsupportedError(f"its CPU plugin would compute {problem.dtype} as another type")
        ov, op, p = self._openvino, self._operators, problem
        inputs = [op.parameter(list(p.dims), ov.Type.f32, name=name) for name in ("x", "residual")[: 1 + operation.add]]
        constants = [op.constant(array) for array in (p.weight, p.bias, p.running_mean, p.running_var)]
        y = op.batch_norm_inference(inputs[0], *constants, EPS)
        if operation.add:
            y = op.add(y, inputs[1])
        if operation.relu:
            y = op.relu(y)
        settings = {
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = self._core.compile_model(ov.Model([y], inputs), "CPU", settings).create_infer_request()
        out = p.empty()
        for i, array in enumerate(p.arguments(operation)):
            request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        request.set_output_tensor(ov.Tensor(out, shared_memory=True))
        # The bare request: `infer` of the Python class would look at its inputs again.
        return Contender(request.infer, lambda _: (out,), pool=self.name)
