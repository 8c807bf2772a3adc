"""The fused activations: values and derivatives against the float64 reference and against PyTorch's own.

Masks of activations that follow a residual are in test_residual.py; activations meet every size in test_layouts.py.
"""

import itertools

import numpy as np
import pytest
import reference
import torch
from conftest import (
    DATA_DTYPES,
    TAIL_SIZES,
    assert_close,
    assert_same_bits,
    check_step,
    data_dtypes,
    images,
)
from hypothesis import given
from hypothesis import strategies as st
from test_torch_oracle import ACTIVATIONS, SPECIAL_VALUES, tensor

import pybn

activations = pytest.mark.parametrize("activation", reference.ACTIVATIONS[1:])
SLOPES = (0.01, 0.0, -0.0, -0.5, 1.0, 3.0, 1e30)


def activated(z, activation, negative_slope=0.01, dy=None, channel_axis=1):
    """Activation of z, and its gradient, from the kernels: a batch norm that is the identity."""
    channels = z.shape[channel_axis]
    mean, var, bias = np.zeros(channels), np.full(channels, 0.75), np.full(channels, -0.0)
    y, saved = pybn.batch_norm_forward(
        z, None, bias, mean, var, training=False, eps=0.25, channel_axis=channel_axis,
        activation=activation, negative_slope=negative_slope,
    )  # fmt: skip
    return y, pybn.batch_norm_backward(np.ones_like(z) if dy is None else dy, saved).dx


@activations
@pytest.mark.parametrize("channel_axis", [1, -1])
@data_dtypes
def test_every_vector_tail_is_right(instruction_set, rng, dtype, channel_axis, activation):
    for number, size in enumerate(TAIL_SIZES):
        training = number % 2 == 1
        x = images(rng, (5, 3, size) if channel_axis == 1 else (5, size, 3), dtype, channel_axis)
        x *= dtype(4)  # in evaluation, beyond 6 and -3
        check_step(rng, x, channel_axis, training=training, activation=activation, what=size)


@pytest.mark.parametrize("negative_slope", [0.01, 0, 0.25, -0.5, 1, 3.0, np.float32(0.1), np.float64(-2)])
@pytest.mark.parametrize("channel_axis", [1, -1])
@data_dtypes
def test_the_slope_of_leaky_relu_may_be_any_number(instruction_set, rng, dtype, channel_axis, negative_slope):
    for training, residual in itertools.product((True, False), (True, False)):
        x, added = (images(rng, (4, 17, 5, 7), dtype, channel_axis) for _ in range(2))
        check_step(
            rng, x, channel_axis, training=training, activation="leaky_relu", negative_slope=negative_slope,
            residual=added if residual else None,
        )  # fmt: skip


def test_the_slope_is_that_of_torch_unless_given(rng):
    x = images(rng, (4, 5, 6))
    assert_same_bits(
        pybn.batch_norm(x, None, None, training=True, activation="leaky_relu"),
        pybn.batch_norm(x, None, None, training=True, activation="leaky_relu", negative_slope=0.01),
    )


@pytest.mark.parametrize("activation", [a for a in reference.ACTIVATIONS if a != "leaky_relu"])
def test_the_slope_is_nothing_to_other_activations(rng, activation):
    x, dy = images(rng, (4, 5, 6)), images(rng, (4, 5, 6))
    results = []
    for slope in (0.01, 7.0):
        y, saved = pybn.batch_norm_forward(x, activation=activation, negative_slope=slope)
        results.append([y, *pybn.batch_norm_backward(dy, saved)[:1]])
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


# ---- special values --------------------------------------------------------------------------------------------------


def special_values(dtype):
    """With the neighbours of the kinks; (37, values), so that each value meets whole vectors and tails."""
    kinks = np.array([0, 3, -3, 6, -6], dtype)
    with np.errstate(over="ignore", under="ignore"):
        near = [np.nextafter(kinks, dtype(direction)) for direction in (-np.inf, np.inf)]
        values = np.concatenate([SPECIAL_VALUES.astype(dtype), *near])
    return np.ascontiguousarray(np.broadcast_to(values, (37, len(values))))


def in_torch(activation, negative_slope, z):
    """Activation and derivative, as float64 arrays."""
    z = z.requires_grad_()
    y = ACTIVATIONS[activation](z, negative_slope)
    return [t.detach().double().numpy() for t in (y, *torch.autograd.grad(y.sum(), z))]


@pytest.mark.parametrize("channel_axis", [1, -1])
@activations
@data_dtypes
def test_special_values_are_those_of_torch(instruction_set, dtype, activation, channel_axis):
    """NaN, infinities, zeros, kinks and their neighbours, and z of which exp(-z) overflows.

    As in float64; but PyTorch makes NaN of some infinities, which it multiplies by zero, and in float32 infinity of
    numbers that hardswish multiplies by six, where the limit and the number are right as well.
    """
    z = special_values(dtype)
    z = np.ascontiguousarray(z.T[None] if channel_axis == 1 else z[None])
    arithmetic = np.float64 if dtype == np.float64 else np.float32
    rtol = 1e-14 if dtype == np.float64 else 1e-6 + reference.spacing(np.ones(()), dtype)  # torch's 1 - sigmoid cancels
    atol = max(np.finfo(arithmetic).tiny, reference.spacing(np.zeros(()), dtype))
    for slope in SLOPES if activation == "leaky_relu" else (0.01,):
        ours = activated(z, activation, slope, channel_axis=channel_axis)
        exact = in_torch(activation, slope, torch.from_numpy(z.astype(np.float64)))
        rounded = in_torch(activation, slope, tensor(z))
        for got, expected, same_type in zip(ours, exact, rounded, strict=True):
            with np.errstate(over="ignore"):
                expected = expected.astype(dtype).astype(np.float64)
            free = (np.isinf(z) & np.isnan(expected)) | (np.isfinite(expected) & np.isinf(same_type))
            got = np.where(free, expected, got.astype(np.float64))
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol, err_msg=str(slope))


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
@data_dtypes
def test_piecewise_linear_activations_are_exact(instruction_set, rng, dtype, activation, channel_axis):
    """In the type of the data, ties as in PyTorch; the slope is a power of two."""
    z = np.concatenate([special_values(dtype)[0], rng.uniform(-9, 9, 5000).astype(dtype)])
    z = np.resize(z, (3, 17, 101))
    for slope in (0.25, 0.0, -2.0):
        y, dx = activated(z, activation, slope, channel_axis=channel_axis)
        wide = z.astype(np.float64)
        with np.errstate(over="ignore"):
            expected = reference.activate(wide, activation, slope).astype(dtype)
        np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))
        np.testing.assert_array_equal(dx.astype(np.float64), reference.derivative(wide, activation, slope))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@data_dtypes
def test_a_gradient_that_is_not_finite_stops_where_the_activation_is_flat(
    instruction_set, dtype, activation, with_residual, bad
):
    """Selected, as in PyTorch, not multiplied by zero."""
    x = np.ascontiguousarray(np.broadcast_to(np.array([-1, 0, 2, 9], dtype), (19, 4)))
    mean, var, bias = np.zeros(4), np.full(4, 0.75), np.zeros(4)
    _, saved = pybn.batch_norm_forward(
        x, None, bias, mean, var, training=False, eps=0.25,
        activation=activation, residual=np.zeros_like(x) if with_residual else None,
    )  # fmt: skip
    dy = np.full_like(x, bad)
    expected = np.broadcast_to([0, 0, bad, 0 if activation == "relu6" else bad], x.shape)
    got = pybn.batch_norm_backward(dy, saved)
    np.testing.assert_array_equal(got.dx.astype(np.float64), expected)
    np.testing.assert_array_equal(got.dbias, expected.astype(np.float64).sum(0))
    if with_residual:
        np.testing.assert_array_equal(got.dresidual.astype(np.float64), expected)


@activations
@data_dtypes
def test_nan_and_infinity_stay_where_they_are(instruction_set, rng, dtype, activation):
    x = images(rng, (3, 5, 67), dtype)
    spoiled = x.copy()
    at = [(0, 1, 3), (2, 4, 66), (1, 0, 0)]
    for index, bad in zip(at, (np.nan, np.inf, -np.inf), strict=True):
        spoiled[index] = bad
    clean, got = (activated(a, activation) for a in (x, spoiled))
    for ours, expected in zip(got, clean, strict=True):
        for index in at:
            ours[index] = expected[index]
        assert_same_bits(ours, expected)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def across_the_range(rng, dtype):
    """Numbers of every sign and exponent, and many where the activations bend."""
    info = np.finfo(dtype)
    exponents = rng.uniform(np.log2(info.smallest_subnormal) + 2, info.maxexp - 0.01, 4000)
    return np.concatenate(
        [
            np.exp2(exponents) * rng.choice([-1, 1], 4000),
            rng.uniform(-10, 10, 8000),
            rng.uniform(-1.25, 0.1, 6000) * -np.log(float(info.tiny)),
            rng.uniform(-1.25, -0.95, 2000) * -np.log(float(info.tiny)),
        ]
    ).astype(dtype)


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_silu_is_accurate_to_4_spacings_over_the_whole_range(instruction_set, rng, dtype, channel_axis):
    """Down to the denormals that z * exp(z) reaches at -106 in float32 and at -750 in float64.

    Over 10^7 values 3.5 spacings at the result were measured. The derivative crosses zero at -1.28, so its unit is
    eps * max(|derivative|, 1): 2.0 were measured.
    """
    z = across_the_range(rng, dtype).reshape(40, 5, -1)
    y, dx = activated(z, "silu", channel_axis=channel_axis)
    wide = z.astype(np.longdouble)
    assert np.isfinite(y).all()
    assert reference.error_in_spacings(y, reference.activate(wide, "silu")) <= 4
    assert np.isfinite(dx).all()
    assert reference.error_in_ulp(dx, reference.derivative(wide, "silu").astype(np.float64)) <= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hardswish_is_accurate_to_2_ulp(instruction_set, rng, dtype):
    """In units of eps * max(|y|, 1), since z + 3 cancels near -3."""
    z = across_the_range(rng, dtype)
    z = z[np.abs(z) < np.finfo(dtype).max / 8].reshape(1, 1, -1)  # z is multiplied by six on the way, as in PyTorch
    y, dx = activated(z, "hardswish")
    wide = z.astype(np.float64)
    assert reference.error_in_ulp(y, reference.activate(wide, "hardswish")) <= 2
    smooth = ~reference.near_a_kink(wide, "hardswish", 1e-6)
    assert reference.error_in_ulp(dx[smooth], reference.derivative(wide, "hardswish")[smooth]) <= 2


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize(("activation", "kink"), [(a, kink) for a, kinks in reference.KINKS.items() for kink in kinks])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_backward_takes_the_side_of_a_kink_that_forward_took(
    instruction_set, rng, dtype, activation, kink, channel_axis, with_residual
):
    """Every z lies within a few spacings of the kink, on it or beside it."""
    shape = (6, 13, 37)
    weight = rng.uniform(0.5, 2, 13).astype(dtype) * rng.choice([-1, 1], 13).astype(dtype)
    bias = rng.uniform(-1, 1, 13).astype(dtype)
    mean, var = rng.uniform(-1, 1, 13), rng.uniform(0.5, 2, 13)
    residual = (rng.integers(-64, 64, shape) / 64).astype(dtype) if with_residual else np.zeros(shape, dtype)
    bias[0] = residual[:, 0] = 0
    scale = weight / np.sqrt(var + 1e-5)
    x = (mean[:, None] + (kink - bias[:, None] - residual) / scale[:, None]).astype(dtype)
    x += rng.integers(-4, 5, shape) * np.spacing(np.abs(x))
    x, residual = (np.ascontiguousarray(np.moveaxis(a, 1, channel_axis)) for a in (x, residual))
    scale = scale if channel_axis == -1 else scale[:, None]
    options = {"channel_axis": channel_axis, "residual": residual if with_residual else None}
    z = pybn.batch_norm(x, mean, var, weight, bias, **options)

    options.update(activation=activation, negative_slope=0.25)
    y, saved = pybn.batch_norm_forward(x, weight, bias, mean, var, training=False, **options)
    if activation != "hardswish":
        np.testing.assert_array_equal(y, reference.activate(z, activation, 0.25))
    active = reference.derivative(z, activation, 0.25)
    assert 0.05 < np.mean(active == active.max()) < 0.95, "no kink"
    dy, zeros = np.ones_like(x), np.zeros(13)
    gradients = pybn.batch_norm_backward(dy, saved)
    elemt = pybn.batch_norm_backward_elemt(dy, x, mean, var, zeros, zeros, 1, weight, bias, **options)
    sum_dy, _ = pybn.batch_norm_backward_reduce(dy, x, mean, var, weight, bias, **options)
    for dx in (gradients.dx, elemt):
        assert_close(dx / scale, active, dtype)
    axes = (0, 2) if channel_axis == 1 else (0, 1)
    for dbias in (gradients.dbias, sum_dy):
        np.testing.assert_allclose(dbias, active.sum(axes), atol=1e-3)
    if with_residual:
        assert_close(gradients.dresidual, active, dtype)


@given(
    st.sampled_from(reference.ACTIVATIONS),
    st.sampled_from(DATA_DTYPES),
    st.floats(-2, 2),
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([1, -1]),
    st.booleans(),
    st.booleans(),
)
def test_any_shape_and_fusion_is_right(
    activation, dtype, negative_slope, seed, channels, inner, channel_axis, training, with_residual
):
    rng = np.random.default_rng(seed)
    x, residual = (images(rng, (2, channels, inner), dtype, channel_axis) for _ in range(2))
    check_step(
        rng, x, channel_axis, training=training, activation=activation, negative_slope=negative_slope,
        residual=residual if with_residual else None,
    )  # fmt: skip


def test_a_spoiled_reference_would_be_noticed(rng):
    """That the checks of this file do look at every value."""
    x = images(rng, (4, 5, 33), np.float16)
    y, _ = activated(x, "silu")
    expected = reference.activate(x.astype(np.float64), "silu")
    assert_close(y, expected, np.float16)
    expected[3, 4, 32] *= 1.002
    with pytest.raises(AssertionError):
        assert_close(y, expected, np.float16)
