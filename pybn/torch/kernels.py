"""torch tensors and the C++ core: what it takes as it is, what it takes after a conversion, and what is left to torch.

The core reads tensors where they are, and makes its results itself: large ones in recycled memory, because the pages of
a fresh 100 MB tensor cost more than the kernel that fills it. What it cannot take it declines, before anything is
written; then `convert` may help, and otherwise `composite`, which is torch's own batch norm, sum and activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad
from torch.nn import functional as F

from pybn import _core
from pybn._arrays import Array

Activation = tuple[int, float]  # as the core knows it: an index, and the negative slope
# y, what the backward pass needs (float64 (5, C): mean, invstd, and the map's centre, scale and shift), and a mask of
# bits or None.
Result = tuple[Tensor, Any, Tensor | None]

_connected = _core.connect_torch(
    torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, torch.nn.Parameter, torch.get_num_threads
)
if not _connected:
    raise ImportError("this version of torch passes tensors by another DLPack interface than version 1")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

ACTIVATIONS: dict[str | None, int] = {
    None if name == "none" else name: index for index, name in enumerate(_core.activations)
}
FUNCTIONS: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": F.leaky_relu,
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
}
# Their gradient is more than a choice of two slopes, so it needs z again, and with it the residual.
SMOOTH = (ACTIVATIONS["silu"], ACTIVATIONS["hardswish"])

_transforms_are_active = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling


def is_eager() -> bool:
    """Whether tensors are what they seem: nobody traces, transforms or watches the operations on them."""
    return not (_is_compiling() or _transforms_are_active() or _modes() or is_left_to_torch())


def is_left_to_torch() -> bool:
    """Whether some transformation is under way that only torch's own operations know: vmap, jvp, jit.trace."""
    return _transforms_are_active() or forward_ad._current_level >= 0 or _jit_trace() is not None


def activation_index(activation: str | None) -> int:
    """Raises a ValueError if there is no such activation."""
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}") from None


# x may be a tuple of tensors, which stand for their concatenation along the channels; so is dx then.
forward: Callable[..., Any] = _core.torch_forward  # Result, or None if it declines
backward: Callable[..., Any] = _core.torch_backward  # dx, dweight, dbias and dresidual, or None if it declines


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of the results of batch norm, as torch's own chooses it."""
    return torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)


def is_carried(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the core can take these tensors, if need be after `convert`."""
    if x.dtype not in DTYPES or x.dim() < 2:
        return False
    return all(
        t is None or (t.device.type == "cpu" and t.layout is torch.strided and t.dtype in DTYPES)
        for t in (x, *parameters)
    )


def convert(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same values as the core takes them: in one order of memory, parameters not of a half type."""
    wanted = memory_format(x)
    return (
        x.contiguous(memory_format=wanted),
        None if weight is None else full_precision(weight),
        None if bias is None else full_precision(bias),
        None if residual is None else residual.contiguous(memory_format=wanted),
    )


def full_precision(parameter: Tensor) -> Tensor:
    """Itself, or as float32 if it is of a half type."""
    return parameter if parameter.dtype in (torch.float32, torch.float64) else parameter.float()


def composite(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
) -> Tensor:
    """The same in torch's own operations."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, float(momentum), eps)
    if residual is not None:
        y = y + residual
    return FUNCTIONS[activation](y, negative_slope)


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    saved: Tensor,
    training: bool,
    eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dresidual in torch's operations, so that they can be differentiated in turn.

    `slope` is the activation's derivative where it is a constant; otherwise it is computed from z.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    along = [1, -1] + [1] * (x.dim() - 2)
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    dz = dy.to(compute)
    if training:
        mean = wide.mean(dims, keepdim=True)
        invstd = ((wide - mean).square().mean(dims, keepdim=True) + eps).rsqrt()
    else:
        mean, invstd = saved[0].to(compute).view(along), saved[1].to(compute).view(along)
    normalized = (wide - mean) * invstd
    scale = invstd if weight is None else invstd * weight.to(compute).view(along)
    if activation in SMOOTH:
        z = normalized if weight is None else normalized * weight.to(compute).view(along)
        z = z if bias is None else z + bias.to(compute).view(along)
        z = z if residual is None else z + residual.to(compute)
        dz = dz * _smooth_derivative(z, activation)
    elif slope is not None:
        dz = dz * slope.to(compute)
    dbias, dweight = dz.sum(dims), (dz * normalized).sum(dims)
    dx = dz
    if training:
        count = x.numel() // x.size(1)
        dx = dz - dbias.view(along) / count - normalized * dweight.view(along) / count
    return (
        (dx * scale).to(x.dtype),
        dweight if weight is None else dweight.to(weight.dtype),
        dbias if bias is None else dbias.to(bias.dtype),
        dz.to(x.dtype),
    )


def _smooth_derivative(z: Tensor, activation: int) -> Tensor:
    if activation == ACTIVATIONS["silu"]:
        sigmoid = z.sigmoid()
        return sigmoid * (1 + z * (1 - sigmoid))
    inside = z / 3 + 0.5  # hardswish
    return torch.where(z <= -3, torch.zeros_like(z), torch.where(z >= 3, torch.ones_like(z), inside))


def values_of(x: Tensor) -> Array:
    """A tensor's values as an array; a view of those on the CPU, in float32 if NumPy has no such type."""
    x = x.detach().cpu()
    array: Array = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return array
