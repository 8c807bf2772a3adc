"""The compiled core: per-channel results are float64, arrays must be what `pybn._arrays` lets through."""

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]
_Normalization = tuple[_Doubles, _Doubles, _Array]

__version__: str
compiler: str
openmp: bool

class Activation(Enum):
    none = 0
    relu = 1

def has_layout(axis: int, *args: _Array) -> bool: ...
def stats(x: _Array, axis: int) -> tuple[_Doubles, _Doubles]: ...
def forward(
    x: _Array,
    y: _Array,
    axis: int,
    weight: _Array | None,
    bias: _Array | None,
    running_mean: _Array | None,
    running_var: _Array | None,
    counter: npt.NDArray[np.int64] | None,
    momentum: float,
    eps: float,
    activation: Activation,
) -> tuple[_Normalization, _Doubles]: ...
def first_negative(values: _Array) -> int: ...
def normalization(
    like: _Array, mean: _Array, var: _Array, weight: _Array | None, bias: _Array | None, eps: float
) -> _Normalization: ...
def elemt(x: _Array, y: _Array, axis: int, normalization: _Normalization, activation: Activation) -> None: ...
def backward(
    dy: _Array, x: _Array, dx: _Array, axis: int, normalization: _Normalization, activation: Activation, training: bool
) -> tuple[_Doubles, _Doubles]: ...
def backward_reduce(
    dy: _Array, x: _Array, axis: int, normalization: _Normalization, activation: Activation
) -> tuple[_Doubles, _Doubles]: ...
def backward_elemt(
    dy: _Array,
    x: _Array,
    dx: _Array,
    axis: int,
    normalization: _Normalization,
    activation: Activation,
    sums: tuple[_Doubles, _Doubles, float] | None,
) -> None: ...
def empty_like(x: _Array) -> _Array: ...
def copy(source: _Array, target: _Array) -> None: ...
def set_num_threads(limit: int) -> None: ...
def get_num_threads() -> int: ...
def empty_cache() -> None: ...
def set_cache_limit(bytes: int) -> None: ...
def cache_statistics() -> tuple[int, int, int, int]: ...
def available_instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def select_instruction_set(name: str) -> bool: ...
