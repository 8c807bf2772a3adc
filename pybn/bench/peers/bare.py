"""Bare loops: the least that a batch norm with float64 sums consists of, without a library around it.

What pybn takes longer than these is left to gain on a machine; a target that they miss, too, is beyond it. They are
compiled when they are asked for, by the compiler that ``CXX`` names, or ``c++``.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pybn.bench.cases import Operation
from pybn.bench.peers import base
from pybn.bench.problem import EPS, Array, Contender, Problem

SOURCE = Path(__file__).with_name("bare_loops.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
LANES = 8


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("outer", ctypes.c_size_t),
        ("channels", ctypes.c_size_t),
        ("inner", ctypes.c_size_t),
        ("threads", ctypes.c_int),
    )


class Bare:
    """The compiled loops; results go to memory that is there before."""

    name = "bare"
    allocates = False

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._library, self.version = _compile()

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Return one call of the loops."""
        p = problem
        if operation.add and operation.kind == "backward":
            raise base.UnsupportedError("their forward pass makes no mask")
        if p.dtype != "float32":
            raise base.UnsupportedError("they have float32 only")
        is_rows = p.axis == -1 or p.shape.plane == 1
        if p.shape.c % LANES if is_rows else p.shape.plane < LANES:
            raise base.UnsupportedError(f"they have planes of {LANES} values or more, and channels last by {LANES}")
        rows, inner = (p.shape.n * p.shape.plane, 1) if is_rows else (p.shape.n, p.shape.plane)
        tensor = ctypes.byref(_Tensor(rows, p.shape.c, inner, self._threads))
        out, eps = p.empty(), ctypes.c_double(EPS)

        def call(name: str, *arguments: Any) -> Contender:
            function = getattr(self._library, name)
            function.restype = None
            pointers = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]

            def run() -> tuple[Any, ...]:
                function(tensor, *pointers)
                return arguments  # whose memory the loops use

            return Contender(run, lambda _: results)

        results: tuple[Array, ...] = (out,)
        relu, residual = ctypes.c_int(operation.relu), p.residual if operation.add else None
        if operation.kind == "inference":
            statistics = (p.running_mean, p.running_var)
            return call("bare_inference", p.x, residual, relu, out, *statistics, p.weight, p.bias, eps)
        if operation.kind == "forward":
            return call("bare_forward", p.x, residual, relu, out, p.weight, p.bias, eps)
        axes = tuple(axis for axis in range(p.x.ndim) if axis != p.axis % p.x.ndim)
        mean, var = p.x.mean(axes, np.float64), p.x.var(axes, np.float64)
        dweight, dbias = np.empty_like(p.weight), np.empty_like(p.bias)
        results = (out, dweight, dbias)
        return call("bare_backward", p.dy, p.x, relu, out, mean, var, p.weight, p.bias, eps, dweight, dbias)


def _compile() -> tuple[ctypes.CDLL, str]:
    """Compile and load the loops; return the compiler's version, too."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        version = subprocess.run([*compiler, "-dumpversion"], check=True, capture_output=True, text=True).stdout
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "bare_loops.so"
            command = [*compiler, *FLAGS, str(SOURCE), "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library)), f"compiled by {compiler[0]} {version.strip()}"
    except FileNotFoundError:
        raise base.AbsentError(f"there is no compiler {compiler[0]!r}; set CXX to a GCC or Clang") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or "no reason given").splitlines()[0]
        raise base.AbsentError(f"{compiler[0]} does not compile them: {reason}") from None
