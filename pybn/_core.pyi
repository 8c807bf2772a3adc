"""The compiled core: per-channel results are float64 (2, C) or (3, C); arrays are what `pybn._arrays` lets through."""

from typing import Any

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
_Doubles = npt.NDArray[np.float64]
_Normalization = tuple[_Doubles, _Array]  # mean and invstd (2, C), affine map (3, C)
_Activation = tuple[int, float]  # index into `activations`, negative slope

__version__: str
compiler: str
openmp: bool

activations: tuple[str, ...]

def layout(axis: int, *args: _Array) -> list[int] | None: ...
def usual_channel_axis(
    x: object,
    channel_axis: object,
    training: object,
    momentum: object,
    eps: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    residual: object,
    out: object,
) -> int: ...
def is_same_memory(a: _Array, b: _Array) -> bool: ...
def has_usual_gradient(dy: object, x: object, out: object) -> bool: ...
def parameter_gradient(sums: _Doubles, factors: _Doubles | None, is_double: bool) -> _Array: ...
def stats(x: _Array, axis: int) -> _Doubles: ...
def forward(
    x: _Array,
    y: _Array,
    axis: int,
    weight: _Array | None,
    bias: _Array | None,
    running_mean: _Array | None,
    running_var: _Array | None,
    counter: npt.NDArray[np.int64] | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: _Activation,
    residual: _Array | None,
    keeps: bool,
) -> tuple[_Normalization | None, _Array | None]: ...
def first_negative(values: _Array) -> int: ...
def normalization(
    like: _Array, mean: _Array, var: _Array, weight: _Array | None, bias: _Array | None, eps: float
) -> _Normalization: ...
def elemt(
    x: _Array, y: _Array, axis: int, normalization: _Normalization, activation: _Activation, residual: _Array | None
) -> None: ...
def backward(
    dy: _Array,
    x: _Array,
    dx: _Array,
    dresidual: _Array | None,
    axis: int,
    normalization: _Normalization,
    activation: _Activation,
    residual: _Array | None,
    mask: _Array | None,
    training: bool,
    overwritten: bool = False,
) -> _Doubles: ...
def backward_reduce(
    dy: _Array,
    x: _Array,
    axis: int,
    normalization: _Normalization,
    activation: _Activation,
    residual: _Array | None,
    mask: _Array | None,
) -> _Doubles: ...
def backward_elemt(
    dy: _Array,
    x: _Array,
    dx: _Array,
    dresidual: _Array | None,
    axis: int,
    normalization: _Normalization,
    activation: _Activation,
    residual: _Array | None,
    mask: _Array | None,
    sums: tuple[_Doubles, _Doubles, float] | None,
) -> None: ...
def empty_like(x: _Array) -> _Array: ...
def copy(source: _Array, target: _Array) -> None: ...
def connect_torch(exchange_api: object, tensor_type: type, parameter_type: type, get_num_threads: object) -> bool: ...

# Each returns None if it cannot take the tensors; nothing has been written then.
def torch_forward(
    x: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    counter: object,
    residual: object,
    training: bool,
    momentum: float,
    eps: float,
    activation: _Activation,
    keeps: bool,
) -> tuple[Any, _Doubles | None, Any] | None: ...
def torch_backward(
    dy: object,
    x: object,
    residual: object,
    mask: object,
    saved: _Doubles,
    weight: object,
    bias: object,
    training: bool,
    activation: _Activation,
    wants_dx: bool,
    wants_dresidual: bool,
) -> tuple[Any, Any, Any, Any] | None: ...
def torch_empty_like(x: object) -> Any | None: ...
def set_num_threads(limit: int) -> None: ...
def get_num_threads() -> int: ...
def empty_cache() -> None: ...
def set_cache_limit(bytes: int) -> None: ...
def cache_statistics() -> tuple[int, int, int, int]: ...
def additions_per_nanosecond() -> float: ...
def available_instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def select_instruction_set(name: str) -> bool: ...
def is_amd() -> bool: ...
def set_is_amd(value: bool) -> None: ...
