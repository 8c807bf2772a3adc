"""Virtual batch norm: the union's statistics, independence of batch-mates, gradients through both batches."""

import pickle

import members
import numpy as np
import pytest
import torch
from conftest import assert_close, assert_same_bits, data_dtypes, images

import pybn

SHAPES = ((5, 3), (5, 3, 7), (5, 3, 4, 6), (3, 3, 2, 3, 4))


def layer_with_reference(rng, shape=(8, 3, 4, 6), dtype=np.float32, **options):
    layer = pybn.VirtualBatchNorm(shape[1], **options)
    layer.weight[...], layer.bias[...] = rng.uniform(0.5, 2, shape[1]), rng.uniform(-1, 1, shape[1])
    reference = images(rng, shape, dtype, layer.channel_axis)
    return layer, reference, layer.reference_forward(reference)


def formula(reference, layer):
    """Every example with the statistics of the reference batch and itself, put together."""

    def normalize(x, weight, bias):
        rows = []
        for example in x:
            union = torch.cat([torch.movedim(reference, 1, 0).flatten(1), example.reshape(x.shape[1], -1)], 1)
            mean, var = members.moments(union, 1)
            along = [-1] + [1] * (example.ndim - 1)
            rows.append((example - mean.reshape(along)) / (var + layer.eps).sqrt().reshape(along))
        return torch.stack(rows) * members.along(weight, x) + members.along(bias, x)

    return normalize


@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu", True), ("silu", True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@data_dtypes
def test_examples_are_normalized_with_the_union_of_themselves_and_the_reference(
    rng, dtype, shape, with_residual, activation
):
    layer, reference, _ = layer_with_reference(rng, (8, *shape[1:]), dtype, activation=activation)
    x, residual, dy = (images(rng, shape, dtype) for _ in range(3))
    residual = residual if with_residual else None
    members.check(layer, formula(members.leaf(reference), layer), x, residual, dy, dtype, by=4)


def test_a_reference_of_another_size_counts_by_its_values(rng):
    layer, reference, _ = layer_with_reference(rng, (2, 3, 5, 9))
    x, dy = (images(rng, (4, 3, 2, 3)) for _ in range(2))
    members.check(layer, formula(members.leaf(reference), layer), x, None, dy, np.float32, by=4)


def test_the_reference_batch_is_normalized_with_its_own_statistics_only(rng):
    layer, reference, y = layer_with_reference(rng)
    twin = pybn.BatchNorm2d(3)
    twin.weight[...], twin.bias[...] = layer.weight, layer.bias
    assert_same_bits(y, twin(reference))
    mean, var, count = pybn.batch_norm_stats(reference)
    assert_close(layer.reference_mean, mean, np.float64)
    assert_close(layer.reference_var, var, np.float64)
    assert layer.reference_count == count == 8 * 4 * 6


@pytest.mark.parametrize(
    "shape", [(9, 5), (9, 1), (9, 5, 1, 1), (9, 1, 7, 7), (9, 3, 14, 14), (9, 2, 130, 131)], ids=str
)
@pytest.mark.parametrize("channel_axis", [1, -1])
@data_dtypes
def test_an_output_does_not_depend_on_batch_mates_bit_by_bit(instruction_set, rng, dtype, channel_axis, shape):
    layer, _, _ = layer_with_reference(rng, shape, dtype, channel_axis=channel_axis, activation="silu")
    x = images(rng, shape, dtype, channel_axis)
    whole = layer(x)
    mates = images(rng, (6, *shape[1:]), dtype, channel_axis)
    for index in (0, 4, 8):
        alone = layer(x[index : index + 1])
        among_others = layer(np.concatenate([mates[:5], x[index : index + 1], mates[5:]]))
        assert_same_bits(alone[0], whole[index], f"example {index}, alone")
        assert_same_bits(among_others[5], whole[index], f"example {index}, among others")


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradients_go_through_the_reference_batch_too(rng, activation):
    layer, reference, _ = layer_with_reference(rng, dtype=np.float64, activation=activation)
    x, dy = (images(rng, (3, 3, 2, 5), np.float64) for _ in range(2))
    dy_reference = rng.standard_normal(reference.shape)
    layer.reference_forward(reference)
    layer(x)
    layer.backward(dy)
    layer(x * 2)  # a second batch with the same reference
    layer.backward(dy)
    dreference = layer.reference_backward(dy_reference)

    leaves = [members.leaf(reference), members.leaf(layer.weight), members.leaf(layer.bias)]
    activate = members.ACTIVATIONS[activation]
    mean, var = members.moments(leaves[0], (0, 2, 3))
    own = (leaves[0] - mean) / (var + layer.eps).sqrt()
    own = activate(own * members.along(leaves[1], own) + members.along(leaves[2], own))
    loss = (own * torch.tensor(dy_reference)).sum()
    for batch in (x, x * 2):
        y = activate(formula(leaves[0], layer)(torch.tensor(batch), *leaves[1:]))
        loss = loss + (y * torch.tensor(dy)).sum()
    for ours, theirs in zip(
        (dreference, layer.weight_grad, layer.bias_grad), torch.autograd.grad(loss, leaves), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5 if ours.dtype == np.float32 else 1e-9, atol=1e-9)


def test_gradients_are_the_numerical_ones(rng):
    layer, reference, _ = layer_with_reference(rng, (4, 2, 3), np.float64)
    x, dy, dy_reference = (
        images(rng, (2, 2, 3), np.float64),
        rng.standard_normal((2, 2, 3)),
        rng.standard_normal((4, 2, 3)),
    )

    def loss():
        own = np.sum(layer.reference_forward(reference) * dy_reference)
        return own + np.sum(layer(x) * dy)

    loss()
    dx = layer.backward(dy)
    dreference = layer.reference_backward(dy_reference)
    np.testing.assert_allclose(dx, members.numerical_gradient(loss, x), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(dreference, members.numerical_gradient(loss, reference), rtol=1e-6, atol=1e-8)


def test_channels_last_gives_the_same(rng):
    first, reference, _ = layer_with_reference(rng)
    last = pybn.VirtualBatchNorm(3, channel_axis=-1)
    last.weight[...], last.bias[...] = first.weight, first.bias
    last.reference_forward(np.ascontiguousarray(np.moveaxis(reference, 1, -1)))
    x, dy = (images(rng, (5, 3, 4, 6)) for _ in range(2))
    moved = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    assert_close(np.moveaxis(last(moved), -1, 1), first(x), np.float32)
    assert_close(np.moveaxis(last.backward(np.moveaxis(dy, 1, -1)), -1, 1), first.backward(dy), np.float32)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_out_is_written_and_returned(rng, channel_axis):
    layer, _, _ = layer_with_reference(rng, channel_axis=channel_axis)
    x, dy = (images(rng, (5, 3, 4, 6), np.float32, channel_axis) for _ in range(2))
    expected, gradient = layer(x), layer.backward(dy)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    assert_same_bits(out, expected)
    assert layer.backward(dy, out=out) is out
    assert_same_bits(out, gradient)
    assert layer(x, out=x) is x
    assert_same_bits(x, expected)


def test_the_reference_is_in_the_state_dict_and_survives_pickling(rng):
    layer, _, _ = layer_with_reference(rng)
    x = images(rng, (5, 3, 4, 6))
    twin = pybn.VirtualBatchNorm(3)
    twin.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"weight", "bias", "reference_mean", "reference_var", "reference_count"}
    assert_same_bits(twin(x), layer(x))
    assert_same_bits(pickle.loads(pickle.dumps(layer)).eval()(x), layer(x))
    assert repr(eval(repr(layer), vars(pybn))) == repr(layer)
    twin.reset_parameters()
    with pytest.raises(RuntimeError, match="no reference batch yet"):
        twin(x)


def test_an_empty_batch_is_legal_and_a_single_value_too(rng):
    layer, _, _ = layer_with_reference(rng)
    empty = np.zeros((0, 3, 4, 6), np.float32)
    assert layer(empty).shape == layer.backward(empty).shape == empty.shape
    assert layer(np.ones((1, 3, 1, 1), np.float32)).shape == (1, 3, 1, 1)


def test_what_is_wrong_is_said_and_changes_nothing(rng):
    layer, *_ = layer_with_reference(rng, check_finite=True)
    x = images(rng, (5, 3, 4, 6))
    before = layer.state_dict()
    bad = x.copy()
    bad[0, 1, 2, 3] = np.nan
    for call, error, message in [
        (lambda: layer(x[:, :2]), ValueError, r"x has shape .*, expected 3 channels"),
        (lambda: layer(bad), ValueError, "x is not finite in 1 of 3 channels"),
        (lambda: layer(x, residual=x[1:]), ValueError, "residual has shape"),
        (lambda: layer(x, out=x[1:]), ValueError, "out has shape"),
        (lambda: layer.reference_forward(bad), ValueError, "x is not finite"),
        (lambda: layer.reference_forward(x[:0]), ValueError, "expected a reference batch with values"),
        (lambda: layer.reference_forward(x[:1, :, :1, :1]), ValueError, "one value per channel"),
        (lambda: layer.freeze(), ValueError, "track_running_stats is False"),
        (lambda: pybn.VirtualBatchNorm(3).reference_backward(x), RuntimeError, "needs a reference_forward before it"),
    ]:
        with pytest.raises(error, match=message):
            call()
    layer(x)
    with pytest.raises(ValueError, match=r"dy has shape \(4, 3, 4, 6\), expected \(5, 3, 4, 6\)"):
        layer.backward(x[1:])
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)
