"""JAX: jitted functions on the CPU, results fresh (donating the input would leave nothing for the next round).

The backward pass is the function that ``jax.vjp`` returns, itself jitted, so that it starts from what the forward pass
kept instead of repeating it.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np

from pybn.bench.cases import Operation
from pybn.bench.peers import base
from pybn.bench.problem import EPS, MOMENTUM, Array, Arrays, Contender, Problem


class Jax:
    """The textbook formulas under `jax.jit`; statistics of half types are float32, as in Flax.

    XLA takes the number of its threads from the environment, once, when it is first used.
    """

    name = "jax"
    allocates = True

    def __init__(self, threads: int) -> None:
        if "jax" not in sys.modules:
            os.environ["NPROC"] = str(threads)  # what XLA's CPU client asks for the size of its pool
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        self._jax = base.require("jax", "jax")
        self._numpy = base.require("jax.numpy", "jax")
        self._jax.config.update("jax_enable_x64", True)
        self.version = base.version("jax")

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Trace and compile the operation for this problem."""
        jax, jnp, p = self._jax, self._numpy, problem
        axes = tuple(i for i in range(len(p.dims)) if i != p.axis % len(p.dims))
        along = (1, -1) + (1,) * (len(p.dims) - 2) if p.axis == 1 else (-1,)
        n = p.x.size // p.shape.c

        def apply(x: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any) -> Any:
            scale = weight * jax.lax.rsqrt(var + EPS)
            z = (x - mean.reshape(along)) * scale.reshape(along) + bias.reshape(along)
            if operation.add:
                z = z + residual
            return (jax.nn.relu(z) if operation.relu else z).astype(x.dtype)

        def statistics(x: Any) -> tuple[Any, Any]:
            wide = x.astype(p.parameter_dtype)
            return wide.mean(axes), wide.var(axes)

        def inference(x: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any) -> Any:
            return (apply(x, weight, bias, mean, var, residual),)

        def forward(x: Any, weight: Any, bias: Any, mean: Any, var: Any, residual: Any) -> Any:
            batch_mean, batch_var = statistics(x)
            moved_mean = (1 - MOMENTUM) * mean + MOMENTUM * batch_mean
            moved_var = (1 - MOMENTUM) * var + MOMENTUM * batch_var * (n / (n - 1))
            return apply(x, weight, bias, batch_mean, batch_var, residual), moved_mean, moved_var

        def training(x: Any, weight: Any, bias: Any, residual: Any) -> Any:
            return apply(x, weight, bias, *statistics(x), residual)

        x, dy, residual, weight, bias, mean, var = (
            jnp.asarray(a) for a in (p.x, p.dy, p.residual, p.weight, p.bias, p.running_mean, p.running_var)
        )
        if operation.kind != "backward":
            compiled = jax.jit(inference if operation.kind == "inference" else forward)
            return Contender(
                lambda: jax.block_until_ready(compiled(x, weight, bias, mean, var, residual)),
                lambda result: (_read(result[0]),),
                pool=self.name,
            )
        pull = jax.jit(lambda *arguments: jax.vjp(training, *arguments)[1])(x, weight, bias, residual)
        backward = jax.jit(lambda pull, dy: pull(dy)[: 3 + operation.add])
        return Contender(lambda: jax.block_until_ready(backward(pull, dy)), _read_all, pool=self.name)


def _read(array: Any) -> Array:
    return np.asarray(array)


def _read_all(arrays: Any) -> Arrays:
    return tuple(map(_read, arrays))
