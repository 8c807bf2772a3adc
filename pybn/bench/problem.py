"""The data that all contenders are given, and what a contender is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pybn.bench.cases import Case, Operation, Shape, UsageError

Array = npt.NDArray[Any]
Arrays = tuple[Array, ...]

EPS = 1e-5
MOMENTUM = 0.1
# The largest difference between two contenders' results, relative to the norm of the result. Where z is almost 0, two
# correct implementations may disagree on its sign, and then on a whole value of a ReLU's gradient: 0.1 was seen with
# bfloat16 and a residual, which torch adds to a rounded value; 0.012 with float32 and oneDNN, whose float32 sums over a
# channel of 64x3x224x224 make the variance 0.1 % too small. A forgotten ReLU would make 0.7.
TOLERANCE = {"float64": 1e-6, "float32": 0.05, "float16": 0.05, "bfloat16": 0.2}


class WrongResultError(RuntimeError):
    """A contender computes something else, so its time means nothing."""


@dataclass(frozen=True)
class Contender:
    """One way to perform an operation.

    Attributes
    ----------
    run : callable
        Performs it once.
    read : callable
        Makes arrays of what `run` returned, in the layout of the problem: (y,), or (dx, dweight, dbias) and, with a
        residual, dresidual.
    pool : str
        Whose threads it uses. Idle threads of one pool disturb another for a while, those of the same one do not.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Arrays]
    pool: str = "openmp"


class Problem:
    """Data of one shape, dtype and layout, for all operations.

    Attributes
    ----------
    x, dy, residual : arrays
        Of the shape of the layout; channels of x differ in mean and spread.
    weight, bias, running_mean, running_var : (C,) arrays
        float64 for float64 data, otherwise float32. Whoever updates running statistics gets a copy.
    axis : int
        The channels' axis, 1 or -1.
    """

    def __init__(self, shape: Shape, dtype: str, layout: str) -> None:
        self.shape, self.dtype, self.layout = shape, dtype, layout
        self.axis = 1 if layout == "nchw" else -1
        self.dims = shape.dims(layout)
        self.numpy_dtype = numpy_dtype(dtype)
        self.parameter_dtype = np.dtype(np.float64 if dtype == "float64" else np.float32)
        rng = np.random.default_rng(0)

        def parameter(low: float, high: float) -> Array:
            return rng.uniform(low, high, shape.c).astype(self.parameter_dtype)

        self.weight, self.bias = parameter(0.5, 2), parameter(-1, 1)
        self.running_mean, self.running_var = parameter(-1, 1), parameter(0.5, 2)
        self.x = self._data(rng, parameter(0.5, 2), parameter(-1, 1))
        self.dy = self._data(rng)
        self.residual = self._data(rng)

    def _data(self, rng: np.random.Generator, spread: Array | None = None, mean: Array | None = None) -> Array:
        data = rng.standard_normal(self.dims, np.float32)
        if spread is not None and mean is not None:
            data *= self.along(spread)
            data += self.along(mean)
        return data.astype(self.numpy_dtype, copy=False)

    def along(self, values: Array) -> Array:
        """Per-channel values in a shape that broadcasts over the data."""
        return values.reshape((1, -1) + (1,) * (len(self.dims) - 2)) if self.axis == 1 else values

    def empty(self) -> Array:
        """An array for a result, with its pages already there."""
        result = np.empty_like(self.x)
        result.view(np.uint8)[...] = 0xFF  # NaN in every type, so that a value that is never written is noticed
        return result

    def arguments(self, operation: Operation) -> tuple[Array, ...]:
        """What a forward operation reads: x, and the residual if it adds one."""
        return (self.x, self.residual) if operation.add else (self.x,)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a name; bfloat16 is that of ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        ml_dtypes = importlib.import_module("ml_dtypes")
    except ModuleNotFoundError:
        raise UsageError('--dtype bfloat16 needs ml_dtypes; run: pip install "pybn[bench]"') from None
    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def require_equal(who: str, case: Case, actual: Arrays, expected: Arrays) -> None:
    """Raise a `WrongResultError` if the results differ by more than rounding explains."""
    if len(actual) != len(expected):
        raise WrongResultError(f"{who} gave {len(actual)} results for {case}, expected {len(expected)}")
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.shape != b.shape:
            raise WrongResultError(f"{who} gave shape {a.shape} for result {number} of {case}, expected {b.shape}")
        error = _relative_difference(a, b)
        if not error <= TOLERANCE[case.dtype]:
            raise WrongResultError(
                f"{who} differs from pybn in result {number} of {case} by {error:.1e} of its norm, "
                f"expected at most {TOLERANCE[case.dtype]:.0e}"
            )


def _relative_difference(a: Array, b: Array) -> float:
    wide = np.float64 if a.dtype == np.float64 else np.float32
    a, b = np.ravel(a).astype(wide, copy=False), np.ravel(b).astype(wide, copy=False)
    norm = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / norm if norm else float(np.abs(a).max(initial=0))
