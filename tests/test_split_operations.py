"""The steps of batch norm: composed they are the whole, merged over parts of a batch they are the union."""

import numpy as np
import pytest
import reference
from conftest import DATA_DTYPES as DTYPES
from conftest import NETWORK_SHAPES, TAIL_SIZES, assert_close, assert_same_bits, images, parameters, unchanged

import pybn

SHAPES = {**NETWORK_SHAPES, "small": (3, 5, 7, 2), "two axes": (33, 17)}


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_reference_at_every_vector_tail(instruction_set, rng, dtype, channel_axis):
    for channels in TAIL_SIZES:
        for inner in TAIL_SIZES:
            x = images(rng, (3, channels, inner), dtype, channel_axis)
            mean, var, count = pybn.batch_norm_stats(x, channel_axis=channel_axis)
            expected_mean, expected_var = reference.stats(x, channel_axis)
            np.testing.assert_allclose(mean, expected_mean, rtol=1e-13, atol=1e-14, err_msg=f"{channels} x {inner}")
            np.testing.assert_allclose(var, expected_var, rtol=1e-12, err_msg=f"{channels} x {inner}")
            assert (mean.dtype, var.dtype, count) == (np.float64, np.float64, 3 * inner)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("channel_axis", [1, -1])
def test_statistics_are_those_of_the_reference(instruction_set, rng, channel_axis, shape):
    x = images(rng, shape, np.float32, channel_axis)
    mean, var, count = pybn.batch_norm_stats(x, channel_axis=channel_axis)
    expected_mean, expected_var = reference.stats(x, channel_axis)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(var, expected_var, rtol=1e-12)
    assert count == x.size // shape[1]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_steps_composed_equal_the_whole_bit_for_bit(rng, dtype, channel_axis, shape, activation):
    x = images(rng, shape, dtype, channel_axis)
    dy = rng.standard_normal(x.shape).astype(dtype)
    weight, bias, _, _ = parameters(rng, shape[1], dtype)
    options = {"activation": activation, "channel_axis": channel_axis}

    y, saved = pybn.batch_norm_forward(x, weight, bias, **options)
    mean, var, count = pybn.batch_norm_stats(x, channel_axis=channel_axis)
    assert_same_bits(mean, saved.mean)
    assert_same_bits(pybn.batch_norm_elemt(x, mean, var, weight, bias, **options), y)

    dx, dweight, dbias, _ = pybn.batch_norm_backward(dy, saved)
    sum_dy, sum_dy_xmu = pybn.batch_norm_backward_reduce(dy, x, mean, var, weight, bias, **options)
    assert_same_bits(sum_dy.astype(dbias.dtype), dbias)
    assert_close(sum_dy_xmu / np.sqrt(var + 1e-5) / count, dweight / count, dweight.dtype)
    split_dx = pybn.batch_norm_backward_elemt(dy, x, mean, var, sum_dy, sum_dy_xmu, count, weight, bias, **options)
    assert_same_bits(split_dx, dx)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_on_two_halves_of_a_batch_merge_to_the_union(rng, dtype, activation):
    """What a distributed batch norm does; moments merge by the formula of Chan, Golub and LeVeque (1979)."""
    x = images(rng, (7, 6, 9, 11), dtype)
    dy = rng.standard_normal(x.shape).astype(dtype)
    weight, bias, _, _ = parameters(rng, 6, dtype)
    y, saved = pybn.batch_norm_forward(x, weight, bias, activation=activation)
    dx, dweight, dbias, _ = pybn.batch_norm_backward(dy, saved)

    parts = [slice(0, 3), slice(3, 7)]
    (mean_a, var_a, n_a), (mean_b, var_b, n_b) = (pybn.batch_norm_stats(x[part]) for part in parts)
    count = n_a + n_b
    delta = mean_b - mean_a
    mean = mean_a + delta * n_b / count
    var = (var_a * n_a + var_b * n_b + delta**2 * n_a * n_b / count) / count
    whole_mean, whole_var, whole_count = pybn.batch_norm_stats(x)
    np.testing.assert_allclose(mean, whole_mean, rtol=1e-13)
    np.testing.assert_allclose(var, whole_var, rtol=1e-13)
    assert count == whole_count

    sums = [
        pybn.batch_norm_backward_reduce(dy[part], x[part], mean, var, weight, bias, activation=activation)
        for part in parts
    ]
    sum_dy, sum_dy_xmu = np.sum(sums, axis=0)
    assert_close(sum_dy, dbias, dbias.dtype)
    assert_close(sum_dy_xmu / np.sqrt(var + 1e-5), dweight, dweight.dtype)
    for part in parts:
        half = pybn.batch_norm_elemt(x[part], mean, var, weight, bias, activation=activation)
        assert_close(half, y[part], dtype, roundings=2)
        half = pybn.batch_norm_backward_elemt(
            dy[part], x[part], mean, var, sum_dy, sum_dy_xmu, count, weight, bias, activation=activation
        )
        assert_close(half, dx[part], dtype, roundings=2)


def test_gradient_sums_are_those_of_the_reference(instruction_set, rng):
    x = images(rng, (5, 6, 9, 11))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    mean, var = reference.stats(x)
    expected = reference.backward(dy, x, mean, var)
    with unchanged(x, dy, mean, var):
        sum_dy, sum_dy_xmu = pybn.batch_norm_backward_reduce(dy, x, mean, var)
    np.testing.assert_allclose(sum_dy, expected.dbias, rtol=1e-12)
    np.testing.assert_allclose(sum_dy_xmu, expected.sum_dy_xmu, rtol=1e-12)


def test_out_of_the_applications_may_be_an_input(rng):
    x = images(rng, (5, 6, 9, 11))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    mean, var, count = pybn.batch_norm_stats(x)
    expected = pybn.batch_norm_elemt(x, mean, var)
    in_place = x.copy()
    assert pybn.batch_norm_elemt(in_place, mean, var, out=in_place) is in_place
    assert_same_bits(in_place, expected)

    sums = pybn.batch_norm_backward_reduce(dy, x, mean, var)
    expected = pybn.batch_norm_backward_elemt(dy, x, mean, var, *sums, count)
    for target in ("dy", "x"):
        x_copy, dy_copy = x.copy(), dy.copy()
        out = dy_copy if target == "dy" else x_copy
        assert pybn.batch_norm_backward_elemt(dy_copy, x_copy, mean, var, *sums, count, out=out) is out
        assert_same_bits(out, expected, target)


def test_empty_batches_have_no_statistics_and_no_gradient_sums():
    x = np.zeros((0, 3, 4, 4), np.float32)
    mean, var, count = pybn.batch_norm_stats(x)
    assert np.isnan(mean).all()
    assert np.isnan(var).all()
    assert (mean.shape, var.shape, count) == ((3,), (3,), 0)
    zeros, ones = np.zeros(3), np.ones(3)
    for sums in pybn.batch_norm_backward_reduce(x, x, zeros, ones):
        assert_same_bits(sums, zeros)
    assert pybn.batch_norm_elemt(x, zeros, ones).shape == x.shape
    assert pybn.batch_norm_backward_elemt(x, x, zeros, ones, zeros, zeros, 5).shape == x.shape


def test_one_value_per_channel_has_statistics():
    mean, var, count = pybn.batch_norm_stats(np.array([[3.0, -4.0]]))
    assert_same_bits(mean, np.array([3.0, -4.0]))
    assert_same_bits(var, np.zeros(2))
    assert count == 1
