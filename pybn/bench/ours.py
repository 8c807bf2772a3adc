"""pybn's contenders, and the copy that is the unit of all times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pybn
from pybn import _core
from pybn.bench.cases import Operation
from pybn.bench.problem import EPS, MOMENTUM, Array, Arrays, Contender, Problem

COPY, OUT, FRESH = "copy", "pybn", "pybn-fresh"
COPY_ALONE, OUT_ALONE = "copy-1-thread", "pybn-1-thread"
NAMES = (COPY, OUT, FRESH, COPY_ALONE, OUT_ALONE)


def contenders(operation: Operation, problem: Problem, threads: int, out: Array) -> dict[str, Contender]:
    """Return the copy and pybn, into `out` and into fresh (recycled) results, and, with several threads, on one."""
    source = reads_first(operation, problem)
    copy = Contender(lambda: _core.copy(source, out), lambda _: (out,))
    into_out = _operation(operation, problem, out)
    result = {COPY: copy, OUT: into_out, FRESH: _operation(operation, problem, None)}
    if threads > 1:
        result[COPY_ALONE] = _alone(copy, threads)
        result[OUT_ALONE] = _alone(into_out, threads)
    return result


def reads_first(operation: Operation, problem: Problem) -> Array:
    """Return the input that the layer before has just made: in a backward pass the gradient."""
    return problem.dy if operation.kind == "backward" else problem.x


def _operation(operation: Operation, problem: Problem, out: Array | None) -> Contender:
    p = problem
    # Only what is fused is passed.
    fused: dict[str, Any] = {"channel_axis": p.axis}
    if operation.relu:
        fused["activation"] = "relu"
    if operation.add:
        fused["residual"] = p.residual
    if operation.kind == "inference":

        def infer() -> Array:
            return pybn.batch_norm(
                p.x, p.running_mean, p.running_var, p.weight, p.bias, False, MOMENTUM, EPS, out=out, **fused
            )

        return Contender(infer, lambda y: (y,))

    running_mean, running_var = p.running_mean.copy(), p.running_var.copy()

    def forward() -> tuple[Array, pybn.Saved]:
        return pybn.batch_norm_forward(p.x, p.weight, p.bias, running_mean, running_var, eps=EPS, out=out, **fused)

    if operation.kind == "forward":
        return Contender(forward, lambda result: (result[0],))
    _, saved = pybn.batch_norm_forward(p.x, p.weight, p.bias, eps=EPS, **fused)
    return Contender(lambda: pybn.batch_norm_backward(p.dy, saved, out=out), _gradients)


def _gradients(gradients: Any) -> Arrays:
    return tuple(gradient for gradient in gradients if gradient is not None)


def _alone(contender: Contender, threads: int) -> Contender:
    """Return the contender on one thread; the two calls around it take less than a microsecond."""
    run: Callable[[], Any] = contender.run

    def alone() -> Any:
        _core.set_num_threads(1)
        try:
            return run()
        finally:
            _core.set_num_threads(threads)

    return Contender(alone, contender.read)
