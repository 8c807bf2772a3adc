"""NumPy: the textbook formulas, as one would write them; on one thread, since NumPy has no other."""

from __future__ import annotations

import numpy as np

from pybn.bench.cases import Operation
from pybn.bench.problem import EPS, MOMENTUM, Array, Arrays, Contender, Problem


class NumPy:
    """Half types are computed in float32, with a conversion before and after."""

    name = "numpy"
    allocates = True

    def __init__(self, threads: int) -> None:
        self.version = np.__version__

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Return the operation in whole-array expressions, one new array for most of them."""
        p = problem
        axes = tuple(i for i in range(len(p.dims)) if i != p.axis % len(p.dims))
        wide = p.parameter_dtype
        running_mean, running_var = p.running_mean.copy(), p.running_var.copy()
        n = p.x.size // p.shape.c

        def apply(x: Array, mean: Array, var: Array) -> Array:
            y = (x - p.along(mean)) * p.along(p.weight / np.sqrt(var + EPS)) + p.along(p.bias)
            if operation.add:
                y += p.residual
            if operation.relu:
                np.maximum(y, 0, out=y)
            return y.astype(p.numpy_dtype, copy=False)

        def inference() -> Array:
            return apply(p.x.astype(wide, copy=False), running_mean, running_var)

        def forward() -> Array:
            x = p.x.astype(wide, copy=False)
            mean, var = x.mean(axes), x.var(axes)
            running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
            running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * var * (n / (n - 1))
            return apply(x, mean, var)

        if operation.kind != "backward":
            return Contender(inference if operation.kind == "inference" else forward, lambda y: (y,))

        x = p.x.astype(wide, copy=False)
        mean, var = x.mean(axes), x.var(axes)
        invstd = 1 / np.sqrt(var + EPS)
        y = apply(x, mean, var)

        def backward() -> Arrays:
            dz = p.dy.astype(wide, copy=False)
            if operation.relu:
                dz = dz * (y > 0)
            normalized = (p.x.astype(wide, copy=False) - p.along(mean)) * p.along(invstd)
            dweight, dbias = (dz * normalized).sum(axes), dz.sum(axes)
            dx = (dz - p.along(dbias / n) - normalized * p.along(dweight / n)) * p.along(p.weight * invstd)
            gradients = (dx.astype(p.numpy_dtype, copy=False), dweight, dbias)
            return (*gradients, dz.astype(p.numpy_dtype, copy=False)) if operation.add else gradients

        return Contender(backward, lambda gradients: gradients)
