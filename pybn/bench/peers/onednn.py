"""oneDNN, through its C interface (version 3): batch normalization primitives on plain nchw and nhwc memory.

The library is the file that ``PYBN_BENCH_DNNL`` names, that of an installed ``onednn*`` package, or the system's. ReLU
is fused by its own flag, with a workspace for the mask in training. Adding a residual is a second primitive, an
in-place sum with ReLU fused into it, and in the backward pass ReLU's gradient is one before: its CPU kernels do not
have the fused form. Results go to memory that is there before; running statistics are not updated (the library leaves
that to the framework), which is in its favour.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
from pathlib import Path
from typing import Any

import numpy as np

from pybn.bench.cases import Operation
from pybn.bench.peers import base
from pybn.bench.problem import EPS, Array, Arrays, Contender, Problem

LIBRARY = "PYBN_BENCH_DNNL"
INSTALL = f"pip install onednn-cpu-gomp, or set {LIBRARY} to the path of a libdnnl.so"

# Values of dnnl_types.h and dnnl_common_types.h, the same in all of version 3.
CPU = 1
IN_ORDER = 1
DATA_TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT, FUSE_RELU = 1, 2, 4, 8
RELU, RELU_USE_DST, ADD = 0x20, 0x100, 0x1FFF0
WORKSPACE_MD = 135
SRC, SRC_1, DST, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 1, 2, 17, 49, 50, 51, 52, 64
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256
MAX_DIMS = 12


class _ExecArg(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Version(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("patch", ctypes.c_int),
        ("hash", ctypes.c_char_p),
        ("cpu_runtime", ctypes.c_uint),
        ("gpu_runtime", ctypes.c_uint),
    )


class OneDNN:
    """One engine and one stream for all problems."""

    name = "onednn"
    allocates = False

    def __init__(self, threads: int) -> None:
        self._library = _load()
        self._library.dnnl_version.restype = ctypes.POINTER(_Version)
        version = self._library.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != 3:
            raise base.AbsentError(f"libdnnl is version {self.version}, expected 3; {INSTALL}")
        if not hasattr(self._library, "omp_set_num_threads"):
            raise base.AbsentError(f"libdnnl does not use OpenMP, so its threads cannot be set; {INSTALL}")
        self._library.omp_set_num_threads(threads)  # of the OpenMP runtime that the library itself is linked with
        self._engine = self._new("dnnl_engine_create", CPU, ctypes.c_size_t(0))
        self._stream = self._new("dnnl_stream_create", self._engine, ctypes.c_uint(IN_ORDER))

    def contender(self, operation: Operation, problem: Problem) -> Contender:
        """Return a sequence of primitives on the problem's memory."""
        if problem.dtype not in DATA_TYPES:
            raise base.UnsupportedError("its CPU kernels have no float64")
        return _Builder(self, operation, problem).contender()

    def _new(self, function: str, *arguments: Any) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self.check(function, getattr(self._library, function)(ctypes.byref(handle), *arguments))
        return handle

    def check(self, function: str, status: int) -> None:
        """Raise for a status of the library that is not success."""
        if status:
            meaning = {1: "out of memory", 2: "invalid arguments", 3: "not implemented"}.get(status, f"status {status}")
            raise base.UnsupportedError(f"{function.removeprefix('dnnl_')}: {meaning}")

    def descriptor(self, problem: Problem, data_type: int) -> ctypes.c_void_p:
        """Describe the problem's tensors: always (n, c, ...) to the library, the layout is in the strides."""
        dims = problem.shape.dims("nchw")
        strides = [stride // problem.x.itemsize for stride in problem.x.strides]
        if problem.axis == -1:
            strides = [strides[0], strides[-1], *strides[1:-1]]
        return self._described(dims, data_type, strides)

    def vector(self, length: int) -> ctypes.c_void_p:
        """Describe a float32 value per channel."""
        return self._described((length,), DATA_TYPES["float32"], [1])

    def _described(self, dims: tuple[int, ...], data_type: int, strides: list[int]) -> ctypes.c_void_p:
        dnnl_dims = ctypes.c_int64 * MAX_DIMS
        return self._new(
            "dnnl_memory_desc_create_with_strides", len(dims), dnnl_dims(*dims), data_type, dnnl_dims(*strides)
        )

    def memory(self, descriptor: ctypes.c_void_p, array: Array) -> ctypes.c_void_p:
        """Make a memory object of an array."""
        return self._new("dnnl_memory_create", descriptor, self._engine, ctypes.c_void_p(array.ctypes.data))

    def primitive_descriptor(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        """Choose an implementation."""
        return self._new(f"dnnl_{kind}_primitive_desc_create", self._engine, *arguments)

    def workspace(self, primitive_descriptor: ctypes.c_void_p) -> tuple[ctypes.c_void_p, Array]:
        """Make the workspace that a primitive asks for, empty if it does not."""
        query = self._library.dnnl_primitive_desc_query_md
        query.restype = ctypes.c_void_p
        descriptor = ctypes.c_void_p(query(primitive_descriptor, WORKSPACE_MD, 0))
        size = self._library.dnnl_memory_desc_get_size
        size.restype = ctypes.c_size_t
        array = np.zeros(max(1, size(descriptor)), np.uint8)
        return self.memory(descriptor, array), array

    def relu_post_op(self) -> ctypes.c_void_p:
        """Make attributes that apply ReLU to what a primitive writes."""
        post_ops = self._new("dnnl_post_ops_create")
        append = self._library.dnnl_post_ops_append_eltwise
        append.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_float)
        self.check("dnnl_post_ops_append_eltwise", append(post_ops, RELU, 0, 0))
        attributes = self._new("dnnl_primitive_attr_create")
        status = self._library.dnnl_primitive_attr_set_post_ops(attributes, post_ops)
        self.check("dnnl_primitive_attr_set_post_ops", status)
        return attributes

    def step(self, primitive_descriptor: ctypes.c_void_p, memories: dict[int, ctypes.c_void_p]) -> Any:
        """Return a function that queues one primitive on its memories."""
        primitive = self._new("dnnl_primitive_create", primitive_descriptor)
        arguments = (_ExecArg * len(memories))(*(_ExecArg(key, memory) for key, memory in memories.items()))
        execute, count, stream = self._library.dnnl_primitive_execute, len(memories), self._stream

        def run() -> None:
            self.check("dnnl_primitive_execute", execute(primitive, stream, count, arguments))

        return run

    def wait(self) -> None:
        """Wait for what is queued; on the CPU it has run already."""
        self.check("dnnl_stream_wait", self._library.dnnl_stream_wait(self._stream))


class _Builder:
    """The memories and primitives of one operation on one problem.

    What is made stays until the process ends: a few hundred bytes each; the arrays go with the contender.
    """

    def __init__(self, library: OneDNN, operation: Operation, problem: Problem) -> None:
        self.dnn, self.operation, self.problem = library, operation, problem
        self.tensor = library.descriptor(problem, DATA_TYPES[problem.dtype])
        self.vector = library.vector(problem.shape.c)
        self.kept: list[Array] = []
        self.out = problem.empty()
        self.mean, self.var = problem.running_mean.copy(), problem.running_var.copy()
        self.statistics = {MEAN: self._channel(self.mean), VARIANCE: self._channel(self.var)}
        self.affine = {SCALE: self._channel(problem.weight), SHIFT: self._channel(problem.bias)}

    def _data(self, array: Array) -> ctypes.c_void_p:
        self.kept.append(array)
        return self.dnn.memory(self.tensor, array)

    def _channel(self, array: Array) -> ctypes.c_void_p:
        self.kept.append(array)
        return self.dnn.memory(self.vector, array)

    def contender(self) -> Contender:
        training = self.operation.kind != "inference"
        fused = FUSE_RELU if self.operation.relu and not self.operation.add else 0
        flags = USE_SCALE | USE_SHIFT | fused | (0 if training else USE_GLOBAL_STATS)
        eps = ctypes.c_float(EPS)
        normalize = self.dnn.primitive_descriptor(
            "batch_normalization_forward",
            FORWARD_TRAINING if training else FORWARD_INFERENCE,
            self.tensor, self.tensor, eps, ctypes.c_uint(flags), None,
        )  # fmt: skip
        out = self._data(self.out)
        memories = {SRC: self._data(self.problem.x), DST: out, **self.statistics, **self.affine}
        workspace = {}
        if training and fused:
            workspace[WORKSPACE], array = self.dnn.workspace(normalize)
            self.kept.append(array)
        steps = [self.dnn.step(normalize, memories | workspace)]
        if self.operation.add:
            add = self.dnn.primitive_descriptor(
                "binary", ADD, self.tensor, self.tensor, self.tensor, self.dnn.relu_post_op()
            )
            steps.append(self.dnn.step(add, {SRC: out, SRC_1: self._data(self.problem.residual), DST: out}))
        if self.operation.kind != "backward":
            return self._sequence(steps, (self.out,))
        for step in steps:
            step()
        return self._backward(normalize, flags, workspace, out)

    def _backward(
        self, forward: ctypes.c_void_p, flags: int, workspace: dict[int, ctypes.c_void_p], y: ctypes.c_void_p
    ) -> Contender:
        dnn, tensor = self.dnn, self.tensor
        dx = self.problem.empty()
        dweight, dbias = np.empty_like(self.problem.weight), np.empty_like(self.problem.bias)
        results: Arrays = (dx, dweight, dbias)
        dz = self._data(self.problem.dy)
        steps = []
        if self.operation.add:
            dresidual = self.problem.empty()
            results += (dresidual,)
            slope = (ctypes.c_float(0), ctypes.c_float(0))
            hint = dnn.primitive_descriptor(
                "eltwise_forward", FORWARD_TRAINING, RELU_USE_DST, tensor, tensor, *slope, None
            )
            relu = dnn.primitive_descriptor(
                "eltwise_backward", RELU_USE_DST, tensor, tensor, tensor, *slope, hint, None
            )
            steps.append(dnn.step(relu, {DST: y, DIFF_DST: dz, DIFF_SRC: self._data(dresidual)}))
            dz = self._data(dresidual)
        normalize = dnn.primitive_descriptor(
            "batch_normalization_backward",
            BACKWARD, tensor, tensor, tensor, ctypes.c_float(EPS), ctypes.c_uint(flags), forward, None,
        )  # fmt: skip
        memories = {
            SRC: self._data(self.problem.x), DIFF_DST: dz, DIFF_SRC: self._data(dx),
            **self.statistics, SCALE: self.affine[SCALE], **workspace,
            DIFF_SCALE: self._channel(dweight), DIFF_SHIFT: self._channel(dbias),
        }  # fmt: skip
        steps.append(dnn.step(normalize, memories))
        return self._sequence(steps, results)

    def _sequence(self, steps: list[Any], results: Arrays) -> Contender:
        wait, kept = self.dnn.wait, self.kept

        def run() -> list[Array]:
            for step in steps:
                step()
            wait()
            return kept  # whose memory the primitives use

        return Contender(run, lambda _: results)


def _load() -> Any:
    """Load the library that is asked for, installed or the system's, in this order."""
    candidates = [os.environ.get(LIBRARY), _packaged(), ctypes.util.find_library("dnnl")]
    path = next((candidate for candidate in candidates if candidate), None)
    if path is None:
        raise base.AbsentError(f"libdnnl is not installed; run: {INSTALL}")
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        raise base.AbsentError(f"libdnnl cannot be loaded: {error}; {INSTALL}") from None


def _packaged() -> str | None:
    for distribution in importlib.metadata.distributions():
        if str(distribution.metadata["Name"]).lower().startswith("onednn"):
            for file in distribution.files or ():
                path = Path(str(file.locate()))
                if path.name.startswith("libdnnl.so") and path.exists():
                    return str(path.resolve())
    return None
