"""Statistics of parts merge to those of the whole."""

import itertools

import numpy as np
import pytest
from conftest import assert_same_bits

from pybn._merge import Moments, merge, moments


def parts_of(rng, sizes, mean=0.0):
    values = [rng.standard_normal((n, 4, 3)) * 3 + mean for n in sizes]
    return values, [moments(x) for x in values]


def exact(values, mean):
    """The mean less `mean`, which float64 subtracts exactly, and the variance."""
    whole = np.concatenate([np.moveaxis(x - mean, 1, 0).reshape(4, -1) for x in values], axis=1).astype(np.longdouble)
    return whole.mean(axis=1), whole.var(axis=1)


@pytest.mark.parametrize("mean", [0.0, 1e7, -1e12])
@pytest.mark.parametrize("sizes", [(5,), (3, 4), (1, 1), (7, 0, 1, 100), (0, 0, 2)], ids=str)
def test_merged_moments_are_those_of_the_whole(rng, sizes, mean):
    values, parts = parts_of(rng, sizes, mean)
    merged = merge(parts)
    expected_mean, expected_var = exact(values, mean)
    assert merged.count == sum(sizes) * 3
    spread = np.sqrt(expected_var)
    assert np.all(abs(merged.remainder) <= np.spacing(abs(merged.mean)) / 2)
    assert np.all(abs((merged.mean - mean) + merged.remainder - expected_mean) <= 1e-15 * spread)
    assert np.all(abs(merged.var - expected_var) <= 1e-14 * expected_var)


def test_a_merge_of_merges_is_within_rounding_of_one_merge(rng):
    _, parts = parts_of(rng, (3, 5, 2, 8), 1e3)
    at_once = merge(parts)
    in_steps = merge([merge(parts[:3]), parts[3]])
    assert at_once.count == in_steps.count
    np.testing.assert_allclose(in_steps.mean, at_once.mean, rtol=1e-15)
    np.testing.assert_allclose(in_steps.remainder, at_once.remainder, atol=1e-14)
    np.testing.assert_allclose(in_steps.m2, at_once.m2, rtol=1e-13)


def test_order_moves_rounding_only(rng):
    _, parts = parts_of(rng, (3, 5, 2), 1e3)
    for order in itertools.permutations(parts):
        np.testing.assert_allclose(merge(order).var, merge(parts).var, rtol=1e-13)


def test_empty_parts_change_no_bit(rng):
    _, (empty, *parts) = parts_of(rng, (0, 3, 5))
    for with_empty in ([empty, *parts], [parts[0], empty, parts[1]], [*parts, empty]):
        got, expected = merge(with_empty), merge(parts)
        assert got.count == expected.count
        for name in ("mean", "remainder", "m2"):
            assert_same_bits(getattr(got, name), getattr(expected, name), name)


def test_nothing_merges_to_nothing():
    empty = moments(np.zeros((0, 4)))
    assert merge([empty, empty]).count == 0
    assert_same_bits(merge([empty]).var, np.zeros(4))


def test_a_constant_channel_stays_exactly_constant():
    parts = [moments(np.full((n, 2), 1.2e10 / 7)) for n in (3, 1, 7)]
    merged = merge(parts)
    assert_same_bits(merged.mean, np.full(2, 1.2e10 / 7))
    assert_same_bits(merged.m2, np.zeros(2))


def test_infinity_and_nan_poison_their_channel_only():
    first, second = np.ones((2, 3)), np.ones((2, 3))
    first[0, 0] = np.inf
    second[0, 1] = np.nan
    for order in ((first, second), (second, first)):
        merged = merge([moments(x) for x in order])
        assert np.isnan(merged.mean[:2]).all()  # as those of the whole
        assert np.isnan(merged.var[:2]).all()
        assert (merged.mean[2], merged.var[2]) == (1, 0)


def test_unbiased_variance():
    assert Moments(5, np.zeros(1), np.zeros(1), np.full(1, 8.0)).unbiased_var == [2]
