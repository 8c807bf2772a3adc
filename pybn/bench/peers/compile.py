"""torch.compile: the same calls as `torch`, fused by inductor, one compilation for every operation and shape.

The forward pass is compiled as a function without gradients. The backward pass is the one that inductor makes for the
training graph of the whole function, run by ``torch.autograd.grad`` on a graph that is kept; its time includes
autograd's dispatch. On a tensor of 16 values a call takes 0.1 ms forward and 0.2 ms backward, which a network that is
compiled as a whole pays once for all its layers together.
"""

from __future__ import annotations

from typing import Any

from pybn.bench.cases import Operation
from pybn.bench.peers import base
from pybn.bench.peers.torch import Tensors
from pybn.bench.problem import EPS, MOMENTUM, Contender, Problem


class TorchCompile:
    """`torch.compile` with static shapes and no graph breaks; it needs the C++ compiler that built pybn."""

    name = "compile"
    allocates = True

    def __init__(self, threads: int) -> None:
        self._torch = base.require("torch", "torch")
        self._functional = base.require("torch.nn.functional", "torch")
        self.version = str(self._torch.__version__)
        self._torch.set_num_threads(threads)
        # Buffers given to the backward pass could be overwritten by it; here it has to run again.
        base.require("torch._functorch.config", "torch").donated_buffer = False

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Compile the operation for this problem."""
        torch, functional, t = self._torch, self._functional, Tensors(self._torch, problem)
        training = operation.kind != "inference"

        def batch_norm(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any) -> Any:
            y = functional.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS)
            if operation.add:
                y = y + residual
            return functional.relu(y) if operation.relu else y

        torch._dynamo.reset()  # it gives up on a function after eight shapes
        compiled = torch.compile(batch_norm, dynamic=False, fullgraph=True)
        arguments = (t.x, t.running_mean, t.running_var, t.weight, t.bias, t.residual)

        def forward() -> Any:
            with torch.no_grad():
                return compiled(*arguments)

        try:
            if operation.kind != "backward":
                forward()
                return Contender(forward, t.read_all)
            inputs = (t.x, t.weight, t.bias, t.residual)[: 3 + operation.add]
            for tensor in inputs:
                tensor.requires_grad_()
            y = compiled(*arguments)
            torch.autograd.grad(y, inputs, t.dy, retain_graph=True)
        except Exception as error:  # dynamo's and inductor's own, the compiler's, and those of the operators
            raise base.UnsupportedError(_first_line(error)) from None
        return Contender(lambda: torch.autograd.grad(y, inputs, t.dy, retain_graph=True), t.read_all)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
