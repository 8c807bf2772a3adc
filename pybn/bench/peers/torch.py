"""PyTorch eager: the calls that a network makes, fresh results, without autograd's graph around them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pybn.bench.cases import Operation
from pybn.bench.peers import base
from pybn.bench.problem import EPS, MOMENTUM, Array, Arrays, Contender, Problem


class Tensors:
    """A problem as tensors that share its memory; channels last are torch's memory format of that name."""

    def __init__(self, torch: Any, problem: Problem) -> None:
        self._torch, self._problem = torch, problem
        self.x, self.dy, self.residual = (self._data(a) for a in (problem.x, problem.dy, problem.residual))
        self.weight, self.bias = torch.from_numpy(problem.weight), torch.from_numpy(problem.bias)
        self.running_mean = torch.from_numpy(problem.running_mean.copy())
        self.running_var = torch.from_numpy(problem.running_var.copy())

    def _data(self, array: Array) -> Any:
        if self._problem.dtype == "bfloat16":
            tensor = self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)
        else:
            tensor = self._torch.from_numpy(array)
        return tensor.movedim(-1, 1) if self._problem.axis == -1 else tensor

    def read(self, tensor: Any) -> Array:
        """Return a result as an array in the layout of the problem."""
        tensor = tensor.detach()
        if tensor.ndim > 1 and self._problem.axis == -1:
            tensor = tensor.movedim(1, -1)
        if tensor.dtype == self._torch.bfloat16:
            half: Array = tensor.contiguous().view(self._torch.int16).numpy().view(self._problem.numpy_dtype)
            return half
        array: Array = tensor.numpy()
        return array

    def read_all(self, result: Any) -> Arrays:
        """Return one tensor or several as arrays."""
        return tuple(map(self.read, result)) if isinstance(result, tuple) else (self.read(result),)


class Torch:
    """`F.batch_norm`, the in-place `add_` and `relu_` of torchvision's networks, and in the backward pass the two
    operators that autograd would call.
    """

    name = "torch"
    allocates = True

    def __init__(self, threads: int) -> None:
        self._torch = base.require("torch", "torch")
        self._functional = base.require("torch.nn.functional", "torch")
        self.version = str(self._torch.__version__)
        self._torch.set_num_threads(threads)

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Return the operation in eager mode."""
        torch, functional, t = self._torch, self._functional, Tensors(self._torch, problem)
        training = operation.kind != "inference"

        def forward() -> Any:
            with torch.no_grad():
                y = functional.batch_norm(t.x, t.running_mean, t.running_var, t.weight, t.bias, training, MOMENTUM, EPS)
                if operation.add:
                    y.add_(t.residual)
                return y.relu_() if operation.relu else y

        try:
            y = forward()
            if operation.kind != "backward":
                return Contender(forward, t.read_all)
            _, mean, invstd = torch.native_batch_norm(t.x, t.weight, t.bias, None, None, True, MOMENTUM, EPS)
        except RuntimeError as error:
            raise base.UnsupportedError(str(error).splitlines()[0]) from None

        def backward() -> Any:
            dz = torch.ops.aten.threshold_backward(t.dy, y, 0) if operation.relu else t.dy
            gradients = torch.ops.aten.native_batch_norm_backward(
                dz, t.x, t.weight, t.running_mean, t.running_var, mean, invstd, True, EPS, [True, True, True]
            )
            return (*gradients, dz) if operation.add else gradients

        return Contender(backward, t.read_all)
