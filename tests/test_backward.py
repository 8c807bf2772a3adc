"""Gradients against the float64 reference and against finite differences."""

import itertools

import numpy as np
import pytest
import reference
from conftest import NETWORK_SHAPES, TAIL_SIZES, assert_close, assert_same_bits, images, parameters, unchanged

import pybn

DTYPES = (np.float32, np.float64)


def check(rng, x, training, activation, channel_axis, what=""):
    """Forward, then all three gradients; the reference's mask is the sign of our own output (see test_forward.py)."""
    channels = x.shape[channel_axis]
    weight, bias, mean, var = parameters(rng, channels, x.dtype)
    dy = rng.standard_normal(x.shape).astype(x.dtype)
    y, saved = pybn.batch_norm_forward(
        x, weight, bias, mean.copy(), var.copy(), training=training, activation=activation, channel_axis=channel_axis
    )
    with unchanged(x, dy, weight, bias):
        got = pybn.batch_norm_backward(dy, saved)
    used = reference.stats(x, channel_axis) if training else (mean, var)
    expected = reference.backward(
        dy, x, *used, weight, 1e-5, training, channel_axis, active=y > 0 if activation else True
    )
    assert got.dx.dtype == got.dweight.dtype == got.dbias.dtype == x.dtype, what
    # dx is a difference of three terms of the order of scale * dy, which the absolute tolerance is for.
    assert_close(got.dx / 4, expected.dx / 4, x.dtype, what)
    count = x.size // channels
    assert_close(got.dweight / count, expected.dweight / count, x.dtype, what)
    assert_close(got.dbias / count, expected.dbias / count, x.dtype, what)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_vector_tail_is_right(instruction_set, rng, dtype, channel_axis, training, activation):
    for channels, inner in itertools.product(TAIL_SIZES, TAIL_SIZES):
        x = images(rng, (3, channels, inner), dtype, channel_axis)
        check(rng, x, training, activation, channel_axis, f"{channels} x {inner}")


@pytest.mark.parametrize("shape", NETWORK_SHAPES.values(), ids=NETWORK_SHAPES)
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_network_shapes_are_right(instruction_set, rng, dtype, channel_axis, shape):
    x = images(rng, shape, dtype, channel_axis)
    for training, activation in itertools.product([True, False], [None, "relu"]):
        check(rng, x, training, activation, channel_axis, (training, activation))


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_every_rank_is_right(rng, rank, channel_axis):
    x = images(rng, (6, 5, 4, 3, 2)[:rank], np.float32, channel_axis)
    for training in (True, False):
        check(rng, x, training, None, channel_axis, training)


def numerical_gradient(f, at):
    """Central differences of a scalar function of an array."""
    gradient = np.empty_like(at)
    step = 1e-5
    for index in np.ndindex(at.shape):
        above, below = at.copy(), at.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (f(above) - f(below)) / (2 * step)
    return gradient


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_gradients_are_those_of_finite_differences(rng, channel_axis, training, activation):
    x = images(rng, (4, 3, 2, 3), np.float64, channel_axis)
    weight, bias, mean, var = parameters(rng, 3, np.float64)
    dy = rng.standard_normal(x.shape)

    def forward(x, weight, bias):
        return pybn.batch_norm_forward(
            x, weight, bias, mean.copy(), var.copy(),
            training=training, activation=activation, channel_axis=channel_axis,
        )  # fmt: skip

    z = pybn.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, channel_axis=channel_axis)
    assert not np.any(reference.near_a_kink(z, activation, 1e-3)), "a value at the kink has no derivative"

    def loss(x, weight, bias):
        return np.sum(forward(x, weight, bias)[0] * dy)

    got = pybn.batch_norm_backward(dy, forward(x, weight, bias)[1])
    np.testing.assert_allclose(got.dx, numerical_gradient(lambda a: loss(a, weight, bias), x), atol=1e-8)
    np.testing.assert_allclose(got.dweight, numerical_gradient(lambda a: loss(x, a, bias), weight), atol=1e-8)
    np.testing.assert_allclose(got.dbias, numerical_gradient(lambda a: loss(x, weight, a), bias), atol=1e-8)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_output_mask_leaves_out_what_is_not_wanted_and_changes_nothing_else(rng, training, activation):
    x = images(rng, (8, 6, 20, 20))
    weight, bias, mean, var = parameters(rng, 6)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    _, saved = pybn.batch_norm_forward(x, weight, bias, mean, var, training=training, activation=activation)
    everything = pybn.batch_norm_backward(dy, saved)
    for mask in itertools.product([True, False], repeat=3):
        got = pybn.batch_norm_backward(dy, saved, output_mask=mask)
        assert got.dresidual is None, "there was no residual"
        for name, wanted, value, full in zip(got._fields[:3], mask, got[:3], everything[:3], strict=True):
            if wanted:
                assert_same_bits(value, full, (name, mask))
            else:
                assert value is None, (name, mask)


@pytest.mark.parametrize("training", [True, False])
def test_there_are_no_gradients_of_parameters_that_do_not_exist(rng, training):
    x = images(rng, (4, 6, 5, 5))
    weight, bias, mean, var = parameters(rng, 6)
    dy = rng.standard_normal(x.shape).astype(np.float32)

    def gradients(weight, bias):
        _, saved = pybn.batch_norm_forward(x, weight, bias, mean.copy(), var.copy(), training=training)
        return pybn.batch_norm_backward(dy, saved)

    both = gradients(weight, bias)
    assert gradients(None, bias).dweight is None
    assert_same_bits(gradients(None, bias).dbias, both.dbias)
    assert gradients(weight, None).dbias is None
    assert_same_bits(gradients(weight, None).dweight, both.dweight)
    assert_same_bits(gradients(weight, None).dx, both.dx)
    ones = gradients(np.ones(6, np.float32), np.zeros(6, np.float32))
    assert_same_bits(gradients(None, None).dx, ones.dx)


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_types_of_what_they_belong_to(rng, dtype, parameter_dtype):
    x = images(rng, (4, 6, 5, 5), dtype)
    weight, bias, _, _ = parameters(rng, 6, parameter_dtype)
    _, saved = pybn.batch_norm_forward(x, weight, bias.astype(np.float64))
    got = pybn.batch_norm_backward(np.ones_like(x), saved)
    assert (got.dx.dtype, got.dweight.dtype, got.dbias.dtype) == (dtype, parameter_dtype, np.float64)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (300, 17), (2, 3, 40000)])
def test_dx_may_be_written_to_out_to_dy_and_to_x(rng, shape, channel_axis, training, activation):
    x = images(rng, shape, np.float32, channel_axis)
    weight, bias, mean, var = parameters(rng, shape[1])
    dy = rng.standard_normal(x.shape).astype(np.float32)

    def saved_of(x):
        return pybn.batch_norm_forward(
            x, weight, bias, mean.copy(), var.copy(),
            training=training, activation=activation, channel_axis=channel_axis,
        )[1]  # fmt: skip

    expected = pybn.batch_norm_backward(dy, saved_of(x))
    for target in ("out", "dy", "x"):
        x_copy, dy_copy = x.copy(), dy.copy()
        out = {"out": np.full_like(x, np.nan), "dy": dy_copy, "x": x_copy}[target]
        got = pybn.batch_norm_backward(dy_copy, saved_of(x_copy), out=out)
        assert got.dx is out, target
        for name in ("dx", "dweight", "dbias"):
            assert_same_bits(getattr(got, name), getattr(expected, name), (name, target))


def test_out_may_have_any_strides(rng):
    x = images(rng, (6, 4, 5, 5))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    _, saved = pybn.batch_norm_forward(x)
    whole = np.full((6, 8, 5, 10), 7, np.float32)
    out = whole[::-1, ::2, :, 1::2]
    assert pybn.batch_norm_backward(dy, saved, out=out).dx is out
    assert_same_bits(np.ascontiguousarray(out), pybn.batch_norm_backward(dy, saved).dx)
    out[...] = 7
    assert np.all(whole == 7), "elements beside out were written"


def test_a_forward_pass_in_place_cannot_be_passed_back(rng):
    x = images(rng, (4, 3, 5, 5))
    _, saved = pybn.batch_norm_forward(x, out=x)
    with pytest.raises(ValueError, match=r"x was overwritten by a pass with out=x, expected"):
        pybn.batch_norm_backward(np.ones_like(x), saved)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)])
def test_an_empty_batch_has_zero_gradients(rng, shape, training):
    weight, bias, mean, var = parameters(rng, shape[1])
    x = np.zeros(shape, np.float32)
    _, saved = pybn.batch_norm_forward(x, weight, bias, mean, var, training=training)
    got = pybn.batch_norm_backward(x, saved)
    assert got.dx.shape == shape
    assert_same_bits(got.dweight, np.zeros(shape[1], np.float32))
    assert_same_bits(got.dbias, np.zeros(shape[1], np.float32))


def test_a_backward_pass_can_be_repeated(rng):
    x = images(rng, (4, 3, 5, 5))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    _, saved = pybn.batch_norm_forward(x)
    assert_same_bits(pybn.batch_norm_backward(dy, saved).dx, pybn.batch_norm_backward(dy, saved).dx)


def test_the_weight_may_change_between_the_passes(rng):
    x = images(rng, (4, 3, 5, 5))
    weight, bias, _, _ = parameters(rng, 3)
    _, saved = pybn.batch_norm_forward(x, weight, bias)
    before = pybn.batch_norm_backward(x, saved).dx
    weight[...] = np.nan
    assert_same_bits(pybn.batch_norm_backward(x, saved).dx, before)


@pytest.mark.parametrize("step", [1, 2], ids=["contiguous", "strided dy"])
def test_a_backward_pass_into_x_is_the_last_one(rng, step):
    x = rng.standard_normal((4, 3, 5)).astype(np.float32)
    dy = rng.standard_normal((4, 3, 5 * step)).astype(np.float32)[:, :, ::step]
    _, saved = pybn.batch_norm_forward(x)
    pybn.batch_norm_backward(dy, saved, out=x)
    with pytest.raises(ValueError, match="x was overwritten by a pass with out=x"):
        pybn.batch_norm_backward(dy, saved)
