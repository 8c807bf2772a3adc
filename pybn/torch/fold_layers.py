"""Layers that absorb maps: their weights in float64 until all is folded, then rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from pybn.folding.affine import Affine, Array, Float64, is_supported, round_to
from pybn.folding.reasons import FoldError, Reason
from pybn.folding.weights import map_bias, scale_axis, scale_transposed_conv
from pybn.folding.weights_forward import (
    Window,
    absorb_conv,
    absorb_conv_transpose,
    absorb_matrix,
    conv_reach,
    conv_transpose_reach,
)
from pybn.torch.fold_rules import CONVOLUTIONS, NORMS, TRANSPOSED, Carried
from pybn.torch.fold_trace import has_hooks, torch_class

Direction: TypeAlias = Literal["backward", "forward"]

# A torch.nn.Module, of whose attributes its type says nothing.
Layer: TypeAlias = Any


@dataclass(frozen=True)
class Weights:
    """The weight and bias of a layer; those of a norm, which has one value of each per channel, too."""

    weight: Float64
    bias: Float64 | None


def read(module: Layer) -> Weights:
    """Return the weights of a layer, which `require_plain` has found to be its own.

    Raises
    ------
    FoldError
        If they have no values, or are of a type that cannot be folded.
    """
    weight = module.weight
    bias = None if module.bias is None else values_of(module.bias, "the bias")
    if weight is None:  # a norm without affine parameters
        return Weights(np.ones(_channels(module)), bias)
    return Weights(values_of(weight, "the weight"), bias)


def write(module: Layer, weights: Weights) -> None:
    """Give a layer new parameters, of the type, device and memory format that it had."""
    like = module.weight if module.weight is not None else module.running_mean
    for name, array in (("weight", weights.weight), ("bias", weights.bias)):
        if array is None:
            continue
        old = getattr(module, name)
        template = old if old is not None else torch.empty(array.shape, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            new = torch.empty_like(template).copy_(_rounded(array, like.dtype, f"the folded {name}"))
        trains = like.requires_grad if old is None else old.requires_grad
        module.register_parameter(name, nn.Parameter(new, requires_grad=trains))


def absorb(module: Layer, direction: Direction, carried: Carried, before: Weights) -> Weights:
    """Return the weights of a layer that absorbs a map from behind (backward) or from before it (forward).

    Raises
    ------
    FoldError
        If the channels do not match, the shift does not reach padded zeros, or a result is outside the type.
    """
    absorbed = (_absorb_backward if direction == "backward" else _absorb_forward)(module, carried, before)
    dtype = (module.weight if module.weight is not None else module.running_mean).dtype
    for name, array in (("weight", absorbed.weight), ("bias", absorbed.bias)):
        if array is not None:
            _rounded(array, dtype, f"the folded {name}")
    return absorbed


def require_plain(module: Layer) -> None:
    """Raise FoldError if the parameters of a layer are not simply its own, or if somebody watches its calls."""
    what = type(module).__name__
    if torch_class(module) is None:
        raise FoldError(Reason.OVERRIDDEN, f"the {what} overrides what its class in torch.nn does")
    if nn.utils.parametrize.is_parametrized(module):
        raise FoldError(Reason.PARAMETRIZED, f"the parameters of the {what} are parametrized")
    for name in ("weight", "bias"):
        # weight_norm, spectral_norm and pruning leave a plain attribute of that name, computed by a hook.
        if name not in module._parameters:
            raise FoldError(Reason.PARAMETRIZED, f"the {name} of the {what} is computed from others")
    if has_hooks(module):
        raise FoldError(Reason.HOOKS, f"the {what} has hooks, which would see other values")


def values_of(tensor: torch.Tensor, what: str) -> Float64:
    """Return the values of a tensor as float64, exactly.

    Raises
    ------
    FoldError
        If it has none, or is of a type that cannot be folded.
    """
    if tensor.is_meta:
        raise FoldError(Reason.NO_VALUES, f"{what} is on the meta device")
    kind = _numpy_dtype(tensor.dtype)
    if kind is None or not is_supported(kind) or tensor.layout is not torch.strided or tensor.is_quantized:
        raise FoldError(Reason.UNSUPPORTED_DTYPE, f"{what} is {tensor.dtype}")
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise FoldError(Reason.UNSUPPORTED_DTYPE, f"{what} is a {type(tensor).__name__}")
    with torch.no_grad():
        array: Float64 = tensor.detach().to("cpu", torch.float64).numpy()
    return array


def require_types(norm: Layer, module: Layer) -> None:
    """Raise FoldError if a norm's parameters are of another type than a layer's, unless that is half precision."""
    computed, layer = (
        norm.running_mean.dtype,
        (module.weight if module.weight is not None else module.running_mean).dtype,
    )
    mixed = computed is torch.float32 and layer in (torch.float16, torch.bfloat16)
    if computed is not layer and not mixed:
        raise FoldError(Reason.TYPE_MISMATCH, f"the norm is {computed}, the {type(module).__name__} {layer}")


def affine_of(norm: Layer) -> Affine:
    """Return the map that a norm is in evaluation mode.

    Raises
    ------
    FoldError
        If it is none, or not a finite one.
    """
    if norm.training:
        raise FoldError(Reason.TRAINING_MODE, "it is in training mode")
    if norm.running_mean is None or norm.running_var is None:
        raise FoldError(Reason.BATCH_STATISTICS, "it has no running statistics")
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, weight, bias = (
        None if (tensor := getattr(norm, name)) is None else values_of(tensor, name) for name in names
    )
    for name, array in zip(names, (mean, var, weight, bias), strict=True):
        if array is not None and array.shape != (norm.num_features,):
            raise FoldError(Reason.PARAMETER_SHAPE, f"{name} has shape {array.shape}, expected ({norm.num_features},)")
    assert mean is not None
    assert var is not None
    return Affine.from_batch_norm(mean, var, weight, bias, float(norm.eps))


def _channels(module: Layer) -> int:
    """Return how many output channels a layer has."""
    for name in ("out_channels", "out_features", "num_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    raise FoldError(Reason.NO_LINEAR_PRODUCER, f"{type(module).__name__} has no channels")


def _absorb_backward(module: Layer, carried: Carried, before: Weights) -> Weights:
    kind = _kind(module)
    affine = carried.affine.along(1).over(_channels(module), 1)
    if kind in TRANSPOSED:
        weight = scale_transposed_conv(before.weight, affine.scale, module.groups)
    else:
        weight = scale_axis(before.weight, affine.scale, 0)
    if before.bias is None and affine.keeps_zero:
        return Weights(weight, None)
    return Weights(weight, map_bias(before.bias, affine))


def _absorb_forward(module: Layer, carried: Carried, before: Weights) -> Weights:
    kind, affine = _kind(module), carried.affine.along(1)
    if kind in CONVOLUTIONS + TRANSPOSED:
        affine = affine.over(module.in_channels, 1)
        convolve = absorb_conv if kind in CONVOLUTIONS else absorb_conv_transpose
        weight, added = convolve(before.weight, affine, module.groups, _reaches(module, kind, affine))
    else:
        if carried.flat:
            affine = affine.repeated(max(module.in_features // affine.scale.size, 1))
        weight, added = absorb_matrix(before.weight, affine.over(module.in_features, 1), 1)
    added = added.reshape(_channels(module))
    if before.bias is None and not added.any():
        return Weights(weight, None)
    return Weights(weight, added if before.bias is None else before.bias + added)


def _reaches(module: Layer, kind: str, affine: Affine) -> list[Float64]:
    """Return where the taps of a kernel meet data: everywhere, or a shift cannot go forward.

    Padding with copies of the data is data.
    """
    whole = [conv_reach(Window(taps), None) for taps in module.kernel_size]
    if affine.keeps_zero:
        return whole
    if kind in TRANSPOSED:
        # A size of 2 shows whether all outputs are alike.
        windows = [
            Window(taps, stride, dilation, padding, padding)
            for taps, stride, dilation, padding in zip(
                module.kernel_size, module.stride, module.dilation, module.padding, strict=True
            )
        ]
        if all(window == Window(1) for window in windows) and not any(module.output_padding):
            return [conv_transpose_reach(window, 2, 0) for window in windows]
        raise FoldError(Reason.PADDING, f"a shift does not reach all that {kind} makes equally")
    padded = any(module._reversed_padding_repeated_twice)
    if module.padding_mode == "zeros" and padded:
        raise FoldError(Reason.PADDING, f"{kind} pads with zeros, which a shift does not reach")
    return whole


def _kind(module: Layer) -> str:
    known = torch_class(module)
    assert known is not None
    return known.__name__


def is_norm(module: Layer) -> bool:
    """Say whether a layer is a norm that a map can merge into."""
    return _kind(module) in NORMS


def _rounded(array: Float64, dtype: torch.dtype, name: str) -> torch.Tensor:
    kind = _numpy_dtype(dtype)
    assert kind is not None
    rounded: Array = np.ascontiguousarray(round_to(array, kind, name))
    if dtype is torch.bfloat16:  # which torch.from_numpy does not know
        return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rounded)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any] | None:
    if dtype is torch.bfloat16:
        import ml_dtypes  # only those need it who have such weights

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    names = {torch.float16: "float16", torch.float32: "float32", torch.float64: "float64"}
    return np.dtype(names[dtype]) if dtype in names else None
