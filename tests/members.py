"""The members of the family against their papers' formulas: in float64, differentiated by torch, and numerically."""

import numpy as np
import torch
from conftest import assert_close
from reference import near_a_kink
from torch.nn import functional as F

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def leaf(array):
    return torch.tensor(np.asarray(array, np.float64), requires_grad=True)


def along(values, x):
    """A (C,) or (N, C) tensor, shaped to broadcast against x, (N, C, ...)."""
    return values.reshape(*values.shape, *[1] * (x.ndim - 2)) if values.ndim == 2 else along(values[None], x)


def moments(x, axes):
    """Mean and biased variance, with their axes kept."""
    mean = x.mean(axes, keepdim=True)
    return mean, ((x - mean) ** 2).mean(axes, keepdim=True)


def check(layer, formula, x, residual, dy, dtype, *, by=1.0, **arguments):
    """One forward and one backward pass of a layer against ``formula(x, weight, bias)``, differentiated by torch.

    Gradients are compared in units of `by`, and are 0 where rounding may take z to the other side of a kink.
    """
    leaves = [leaf(x), leaf(layer.weight), leaf(layer.bias)]
    z = formula(*leaves)
    if residual is not None:
        leaves.append(leaf(residual))
        z = z + leaves[3]
    dy = np.where(near_a_kink(z.detach().numpy(), layer.activation), dy.dtype.type(0), dy)
    layer.zero_grad()
    y = layer(x, residual=residual, **arguments)
    got = layer.backward(dy)
    expected = ACTIVATIONS[layer.activation](z)
    gradients = torch.autograd.grad(expected, leaves, torch.tensor(np.asarray(dy, np.float64)))
    assert y.dtype == x.dtype
    assert_close(y, expected.detach().numpy(), dtype, "y")
    gradients = [gradient.numpy() for gradient in gradients]
    dx = got if residual is None else got[0]
    assert dx.dtype == x.dtype
    assert dx.shape == x.shape
    assert_close(dx.astype(float) / by, gradients[0] / by, dtype, "dx")
    if residual is not None:
        assert_close(got[1], gradients[3], dtype, "dresidual")
    per_value = layer.num_features / x.size / by
    assert layer.weight_grad.dtype == layer.weight.dtype
    assert_close(layer.weight_grad * per_value, gradients[1] * per_value, np.float32, "dweight")
    assert_close(layer.bias_grad * per_value, gradients[2] * per_value, np.float32, "dbias")
    return y


def numerical_gradient(value, x, step=1e-6):
    """Of a number that depends on the float64 array x, which is changed and restored."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + step
        above = value()
        x[index] = kept - step
        gradient[index] = (above - value()) / (2 * step)
        x[index] = kept
    return gradient
