"""Ghost batch norm: every part is what batch norm makes of it, and the running statistics move part by part."""

import members
import numpy as np
import pytest
import torch
from conftest import assert_close, assert_same_bits, data_dtypes, images, parameters

import pybn
from pybn.ghost import parts


def trained(rng, ghost_size, **options):
    layer = pybn.GhostBatchNorm(3, ghost_size, **options)
    layer.weight[...], layer.bias[...], layer.running_mean[...], layer.running_var[...] = parameters(rng, 3)
    return layer


def formula(sizes, layer):
    def normalize(x, weight, bias):
        axes = (0, *range(2, x.ndim))
        parts = []
        for part in torch.split(x, sizes):
            mean, var = members.moments(part, axes)
            parts.append((part - mean) / (var + layer.eps).sqrt())
        return torch.cat(parts) * members.along(weight, x) + members.along(bias, x)

    return normalize


@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu6", True), ("silu", True)])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((8, 3), [4, 4]), ((11, 3, 5), [6, 5]), ((7, 3, 2, 3), [7]), ((3, 3, 2, 2, 2), [3]), ((14, 3, 2, 2), [5, 5, 4])],
    ids=str,
)
@data_dtypes
def test_every_part_is_normalized_by_itself(rng, dtype, shape, sizes, with_residual, activation):
    layer = trained(rng, 4, activation=activation)
    x, residual = images(rng, shape, dtype), images(rng, shape, dtype) if with_residual else None
    dy = rng.standard_normal(shape).astype(dtype)
    members.check(layer, formula(sizes, layer), x, residual, dy, dtype, by=10)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_a_batch_is_its_parts_one_after_the_other(rng, channel_axis):
    ghost = trained(rng, 4, channel_axis=channel_axis)
    plain = pybn.BatchNorm2d(3, channel_axis=channel_axis)
    plain.load_state_dict(ghost.state_dict())
    x, dy = (images(rng, (14, 3, 2, 5), np.float32, channel_axis) for _ in range(2))
    y, dx = ghost(x), ghost.backward(dy)
    for part in (slice(0, 5), slice(5, 10), slice(10, 14)):
        assert_same_bits(y[part], plain(x[part]))
        assert_same_bits(dx[part], plain.backward(dy[part]))
    for name, value in plain.state_dict().items():
        assert_same_bits(getattr(ghost, name), value, name)
    assert ghost.num_batches_tracked == 3
    assert_close(ghost.weight_grad, plain.weight_grad, np.float32)
    assert_same_bits(ghost.eval()(x), plain.eval()(x))


def test_running_statistics_follow_the_paper(rng):
    layer = pybn.GhostBatchNorm(3, 4, momentum=0.2, dtype=np.float64)
    x = images(rng, (12, 3, 5), np.float64)
    layer(x)
    mean = sum(0.2 * 0.8 ** (2 - i) * x[4 * i : 4 * i + 4].mean((0, 2)) for i in range(3))
    var = 0.8**3 + sum(0.2 * 0.8 ** (2 - i) * x[4 * i : 4 * i + 4].var((0, 2), ddof=1) for i in range(3))
    assert_close(layer.running_mean, mean, np.float64)
    assert_close(layer.running_var, var, np.float64)


def test_a_cumulative_average_weighs_ghost_batches_alike(rng):
    layer = pybn.GhostBatchNorm(3, 4, momentum=None, dtype=np.float64)
    x = images(rng, (20, 3, 5), np.float64)
    layer(x[:12])
    layer(x[12:])
    assert_close(layer.running_var, np.mean([x[i : i + 4].var((0, 2), ddof=1) for i in range(0, 20, 4)], 0), np.float64)


@pytest.mark.parametrize("examples", [0, 1, 3, 4, 7, 8, 9, 100, 101])
@pytest.mark.parametrize("size", [1, 2, 4, 128])
def test_parts_cover_the_batch_and_none_is_smaller_than_asked(examples, size):
    cut = parts(examples, size)
    lengths = [part.stop - part.start for part in cut]
    assert [i for part in cut for i in range(examples)[part]] == list(range(examples))
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= min(size, examples)


def test_without_running_statistics_evaluation_uses_parts_too(rng):
    layer = pybn.GhostBatchNorm(3, 4, track_running_stats=False)
    x = images(rng, (8, 3, 5))
    expected = layer(x)
    assert_same_bits(layer.eval()(x), expected)


def test_gradients_are_the_numerical_ones(rng):
    layer = pybn.GhostBatchNorm(2, 2, dtype=np.float64, activation="silu")
    x, dy = images(rng, (5, 2, 3), np.float64), rng.standard_normal((5, 2, 3))
    layer(x)
    numerical = members.numerical_gradient(lambda: np.sum(layer(x) * dy), x)
    np.testing.assert_allclose(layer.backward(dy), numerical, rtol=1e-6, atol=1e-8)


def test_out_empty_and_state(rng):
    layer = trained(rng, 2)
    x, dy = (images(rng, (5, 3, 4)) for _ in range(2))
    twin = trained(rng, 2)
    twin.load_state_dict(layer.state_dict())
    y, gradient = twin(x), twin.backward(dy)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    assert_same_bits(out, y)
    assert layer.backward(dy, out=dy) is dy
    assert_same_bits(dy, gradient)
    assert repr(eval(repr(layer), vars(pybn))) == repr(layer)
    empty = np.zeros((0, 3, 4), np.float32)
    before = layer.running_mean.copy()
    assert layer(empty).shape == layer.backward(empty).shape == empty.shape
    assert_same_bits(layer.running_mean, before)


def test_what_is_wrong_is_said_and_changes_nothing(rng):
    layer = pybn.GhostBatchNorm(3, 1, check_finite=True)
    before = layer.state_dict()
    x = images(rng, (5, 3))
    wide = images(rng, (5, 3, 2))
    bad = wide.copy()
    bad[4, 2, 0] = np.inf
    for call, error, message in [
        (lambda: pybn.GhostBatchNorm(3, 0), ValueError, "ghost_size is 0, expected at least 1"),
        (lambda: pybn.GhostBatchNorm(3, 2.0), TypeError, r"ghost_size is 2\.0, expected an integer"),
        (lambda: layer(x), ValueError, r"a ghost batch of x has shape \(1, 3\), one value per channel"),
        (lambda: layer(bad), ValueError, "x is not finite in 1 of 3 channels"),
        (lambda: layer(wide, residual=wide[1:]), ValueError, "residual has shape"),
        (lambda: layer(wide, out=wide[1:]), ValueError, "out has shape"),
        (lambda: layer(wide[:, :2]), ValueError, "expected 3 channels"),
    ]:
        with pytest.raises(error, match=message):
            call()
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)
    layer(wide)
    with pytest.raises(ValueError, match=r"dy has shape \(4, 3, 2\), expected 5 examples"):
        layer.backward(wide[1:])
    assert layer.backward(wide).shape == wide.shape
