"""Batch renormalization: the paper's algorithm, its schedules, and what remains of it where nothing is clipped."""

import members
import numpy as np
import pytest
import torch
from conftest import assert_close, assert_same_bits, data_dtypes, images, parameters

import pybn

SHAPES = ((6, 3), (6, 3, 5), (4, 3, 4, 6))


def trained(rng, **options):
    layer = pybn.BatchRenorm(3, **options)
    layer.weight[...], layer.bias[...], layer.running_mean[...], layer.running_var[...] = parameters(rng, 3)
    return layer


def formula(layer, rmax, dmax):
    running_mean = torch.tensor(layer.running_mean.astype(float))
    running_std = torch.tensor(np.sqrt(layer.running_var.astype(float) + layer.eps))

    def normalize(x, weight, bias):
        mean, var = members.moments(x, (0, *range(2, x.ndim)))
        std = (var + layer.eps).sqrt()
        with torch.no_grad():
            r = (std / members.along(running_std, x)).clamp(1 / rmax, rmax)
            d = ((mean - members.along(running_mean, x)) / members.along(running_std, x)).clamp(-dmax, dmax)
        return ((x - mean) / std * r + d) * members.along(weight, x) + members.along(bias, x)

    return normalize


@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("leaky_relu", True), ("silu", True)])
@pytest.mark.parametrize(("rmax", "dmax"), [(1, 0), (1.2, 0.3), (3, 5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@data_dtypes
def test_training_is_the_paper_s_algorithm(rng, dtype, shape, rmax, dmax, with_residual, activation):
    layer = trained(rng, rmax=rmax, dmax=dmax, activation=activation)
    x, dy = (images(rng, shape, dtype) for _ in range(2))
    residual = images(rng, shape, dtype) if with_residual else None
    members.check(layer, formula(layer, rmax, dmax), x, residual, dy, dtype, by=20)


def test_running_statistics_move_as_those_of_batch_norm(rng):
    layer, plain = trained(rng, rmax=2, dmax=1, momentum=0.3), pybn.BatchNorm2d(3, momentum=0.3)
    plain.load_state_dict(layer.state_dict())
    x = images(rng, (4, 3, 4, 6))
    layer(x)
    plain(x)
    for name, value in plain.state_dict().items():
        assert_same_bits(getattr(layer, name), value, name)
    assert_same_bits(layer.eval()(x), plain.eval()(x))


def test_with_nothing_to_correct_it_is_batch_norm(rng):
    layer, plain = trained(rng, rmax=1, dmax=0, activation="relu"), pybn.BatchNorm2d(3, activation="relu")
    plain.load_state_dict(layer.state_dict())
    x, dy = (images(rng, (4, 3, 4, 6)) for _ in range(2))
    assert_close(layer(x), plain(x), np.float32)
    assert_close(layer.backward(dy), plain.backward(dy), np.float32)


def test_where_nothing_is_clipped_training_computes_what_evaluation_does(rng):
    layer = trained(rng, rmax=np.inf, dmax=np.inf, dtype=np.float64)
    x = images(rng, (4, 3, 4, 6), np.float64)
    evaluated = layer.eval()(x)
    assert_close(layer.train()(x), evaluated, np.float64)


def test_schedules_follow_the_batches_trained_on(rng):
    seen = []

    def rmax(batches):
        seen.append(batches)
        return 1 + batches

    layer = pybn.BatchRenorm(3, rmax=rmax, dmax=pybn.Ramp(0, 4, 1, 3))
    x = images(rng, (4, 3, 5))
    for _ in range(3):
        layer(x)
    layer.eval()(x)
    assert seen == [0, 0, 1, 2]  # first at construction
    twin = pybn.BatchRenorm(3, rmax=rmax)
    twin.load_state_dict(layer.state_dict())
    twin(x)
    assert seen[-1] == 3, "the state dict holds where the schedule is"


def test_a_ramp_is_flat_straight_flat():
    ramp = pybn.Ramp(1, 3, 5_000, 40_000)
    assert [ramp(n) for n in (0, 5_000, 22_500, 40_000, 10**9)] == [1, 1, 2, 3, 3]
    layer = pybn.BatchRenorm(3)
    assert (layer.rmax(0), layer.dmax(0), layer.rmax(40_000), layer.dmax(25_000)) == (1, 0, 3, 5)
    assert repr(eval(repr(layer), vars(pybn))) == repr(layer)


def test_gradients_are_the_numerical_ones_of_the_formula_with_r_and_d_as_constants(rng):
    layer = pybn.BatchRenorm(2, rmax=1.1, dmax=0.1, dtype=np.float64, activation="silu")
    x, dy = images(rng, (4, 2, 3), np.float64), rng.standard_normal((4, 2, 3))
    axes = (0, 2)
    std = np.sqrt(x.var(axes) + layer.eps)
    r, d = np.clip(std, 1 / 1.1, 1.1), np.clip(x.mean(axes), -0.1, 0.1)  # running mean 0, variance 1
    eps_of_running = np.sqrt(1 + layer.eps)
    r, d = np.clip(std / eps_of_running, 1 / 1.1, 1.1), np.clip(x.mean(axes) / eps_of_running, -0.1, 0.1)

    def loss():
        z = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + layer.eps)
        z = z * r[:, None] + d[:, None]
        return np.sum(z / (1 + np.exp(-z)) * dy)

    layer(x)
    np.testing.assert_allclose(layer.backward(dy), members.numerical_gradient(loss, x), rtol=1e-6, atol=1e-8)


def test_an_empty_batch_leaves_the_running_statistics(rng):
    layer = trained(rng)
    before = layer.state_dict()
    empty = np.zeros((0, 3, 4), np.float32)
    assert layer(empty).shape == layer.backward(empty).shape == empty.shape
    assert_same_bits(layer.running_mean, before["running_mean"])
    assert_same_bits(layer.running_var, before["running_var"])
    assert np.all(layer.weight_grad == 0)


def test_what_is_wrong_is_said_and_changes_nothing(rng):
    layer = trained(rng, check_finite=True)
    before = layer.state_dict()
    x = images(rng, (4, 3, 5))
    bad = x.copy()
    bad[0, 0, 0] = np.nan
    falling = pybn.BatchRenorm(3, rmax=lambda batches: 1 - batches)
    falling(x)
    for call, error, message in [
        (lambda: pybn.BatchRenorm(3, rmax=0.5), ValueError, r"rmax is 0\.5, expected a number >= 1"),
        (lambda: pybn.BatchRenorm(3, dmax=-1), ValueError, "dmax is -1, expected a number >= 0"),
        (lambda: pybn.BatchRenorm(3, dmax=np.nan), ValueError, "dmax is nan"),
        (lambda: pybn.BatchRenorm(3, rmax="3"), ValueError, "rmax is '3'"),
        (lambda: falling(x), ValueError, "rmax is 0 after 1 batches"),
        (lambda: pybn.Ramp(0, 1, 5, 5), ValueError, "begin is 5, expected less than end, which is 5"),
        (lambda: layer(x[:1, :, :1]), ValueError, "one value per channel"),
        (lambda: layer(bad), ValueError, "x is not finite in 1 of 3 channels"),
        (lambda: layer(x, residual=x[1:]), ValueError, "residual has shape"),
        (lambda: layer(x, out=x[1:]), ValueError, "out has shape"),
    ]:
        with pytest.raises(error, match=message):
            call()
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)
