"""Training and evaluation forward against the float64 reference, on every instruction set."""

import itertools

import numpy as np
import pytest
import reference
from conftest import NETWORK_SHAPES, TAIL_SIZES, assert_close, assert_same_bits, images, parameters, unchanged

import pybn

DTYPES = (np.float32, np.float64)


def check(x, weight, bias, mean, var, training, activation, channel_axis, what):
    """One call, all that it returns and all that it updates."""
    running_mean, running_var = mean.copy(), var.copy()
    with unchanged(x, weight, bias):
        y = pybn.batch_norm(
            x, running_mean, running_var, weight, bias, training, activation=activation, channel_axis=channel_axis
        )
    batch_mean, batch_var = reference.stats(x, channel_axis)
    used = (batch_mean, batch_var) if training else (mean, var)
    expected = reference.normalize(x, *used, weight, bias, activation=activation, channel_axis=channel_axis)
    assert y.dtype == x.dtype, what
    assert y.shape == x.shape, what
    assert_close(y, expected, x.dtype, what)
    if training:
        count = x.size // x.shape[channel_axis]
        assert_close(running_mean, reference.running(mean, batch_mean), mean.dtype, what)
        assert_close(running_var, reference.running(var, reference.unbiased(batch_var, count)), var.dtype, what)
    else:
        assert_same_bits(running_mean, mean, what)
        assert_same_bits(running_var, var, what)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_vector_tail_is_right(instruction_set, rng, dtype, channel_axis, training, activation):
    for channels, inner in itertools.product(TAIL_SIZES, TAIL_SIZES):
        x = images(rng, (3, channels, inner), dtype, channel_axis)
        check(x, *parameters(rng, channels, dtype), training, activation, channel_axis, f"{channels} x {inner}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_axes_have_every_vector_tail_right(instruction_set, rng, dtype, channel_axis, training):
    for channels, rows in itertools.product(TAIL_SIZES, TAIL_SIZES[1:]):
        x = images(rng, (rows, channels), dtype)
        check(x, *parameters(rng, channels, dtype), training, None, channel_axis, f"{rows} x {channels}")


@pytest.mark.parametrize("shape", NETWORK_SHAPES.values(), ids=NETWORK_SHAPES)
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_network_shapes_are_right(instruction_set, rng, dtype, channel_axis, shape):
    x = images(rng, shape, dtype, channel_axis)
    for training, activation in itertools.product([True, False], [None, "relu"]):
        check(x, *parameters(rng, shape[1], dtype), training, activation, channel_axis, (training, activation))


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_every_rank_is_right(rng, rank, channel_axis):
    x = images(rng, (6, 5, 4, 3, 2)[:rank], np.float32, channel_axis)
    for training in (True, False):
        check(x, *parameters(rng, 5), training, None, channel_axis, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_weight", [True, False])
def test_weight_and_bias_are_optional_independently(instruction_set, rng, with_weight, with_bias, training):
    x = images(rng, (4, 7, 5, 5))
    weight, bias, mean, var = parameters(rng, 7)
    check(x, weight if with_weight else None, bias if with_bias else None, mean, var, training, "relu", 1, "")


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_may_be_of_either_type_whatever_the_data_are(rng, dtype, parameter_dtype):
    x = images(rng, (4, 7, 5, 5), dtype)
    weight, bias, mean, var = parameters(rng, 7, parameter_dtype)
    for training in (True, False):
        check(x, weight, bias, mean, var, training, None, 1, training)


def test_float64_data_lose_nothing_to_float32_parameters(rng):
    x = images(rng, (4, 7, 5, 5), np.float64)
    narrow = parameters(rng, 7, np.float32)
    weight, bias, mean, var = (p.astype(np.float64) for p in narrow)
    assert_same_bits(
        pybn.batch_norm(x, narrow[2], narrow[3], narrow[0], narrow[1]), pybn.batch_norm(x, mean, var, weight, bias)
    )


@pytest.mark.parametrize("momentum", [0, 0.0, 0.1, 0.25, 1, np.float32(0.5)])
def test_momentum_is_the_weight_of_the_new_batch(rng, momentum):
    x = images(rng, (4, 7, 5, 5))
    _, _, mean, var = parameters(rng, 7)
    running_mean, running_var = mean.copy(), var.copy()
    pybn.batch_norm(x, running_mean, running_var, training=True, momentum=momentum)
    batch_mean, batch_var = reference.stats(x)
    momentum = float(momentum)
    assert_close(running_mean, reference.running(mean, batch_mean, momentum), np.float32)
    assert_close(running_var, reference.running(var, reference.unbiased(batch_var, 100), momentum), np.float32)
    if momentum == 0:
        assert_same_bits(running_mean, mean)
        assert_same_bits(running_var, var)


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1, 100.0])
def test_eps_is_added_to_the_variance(rng, eps):
    x = images(rng, (4, 7, 5, 5), np.float64)
    y = pybn.batch_norm(x, None, None, training=True, eps=eps)
    assert_close(y, reference.normalize(x, *reference.stats(x), eps=eps), np.float64)


def test_training_without_running_statistics_gives_the_same_output(rng):
    x = images(rng, (4, 7, 5, 5))
    _, _, mean, var = parameters(rng, 7)
    assert_same_bits(pybn.batch_norm(x, None, None, training=True), pybn.batch_norm(x, mean, var, training=True))


def test_batch_norm_forward_gives_the_same_output_and_what_was_used(rng):
    x = images(rng, (4, 7, 5, 5))
    weight, bias, mean, var = parameters(rng, 7)
    y, saved = pybn.batch_norm_forward(x, weight, bias)
    assert_same_bits(y, pybn.batch_norm(x, None, None, weight, bias, training=True))
    batch_mean, batch_var = reference.stats(x)
    np.testing.assert_allclose(saved.mean, batch_mean, rtol=1e-13)
    np.testing.assert_allclose(saved.invstd, 1 / np.sqrt(batch_var + 1e-5), rtol=1e-13)
    assert saved.training

    y, saved = pybn.batch_norm_forward(x, weight, bias, mean, var, training=False)
    assert_same_bits(y, pybn.batch_norm(x, mean, var, weight, bias))
    assert_same_bits(saved.mean, mean.astype(np.float64))
    assert not saved.training


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (300, 17), (2, 3, 40000)])
def test_out_receives_the_same_bits_and_is_returned(rng, shape, channel_axis, training):
    x = images(rng, shape, np.float32, channel_axis)
    weight, bias, mean, var = parameters(rng, shape[1])

    def call(x, out):
        return pybn.batch_norm(
            x, mean.copy(), var.copy(), weight, bias, training, activation="relu", channel_axis=channel_axis, out=out
        )

    expected = call(x, None)
    out = np.full_like(x, np.nan)
    assert call(x, out) is out
    assert_same_bits(out, expected, "out of its own")
    in_place = x.copy()
    assert call(in_place, in_place) is in_place
    assert_same_bits(in_place, expected, "in place")


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a[::-1],
        lambda a: a[:, ::2],
        lambda a: a[..., ::2],
        lambda a: a.transpose(0, 1, 3, 2),
        lambda a: a.transpose(3, 1, 0, 2),
    ],
    ids=["reversed", "every other channel", "every other column", "transposed", "permuted"],
)
@pytest.mark.parametrize("training", [True, False])
def test_out_may_have_any_strides_and_only_its_own_elements_are_written(rng, view, training):
    whole = np.full((6, 8, 4, 10), 7, np.float32)
    out = view(whole)
    x = images(rng, out.shape)
    channels = x.shape[1]
    _, _, mean, var = parameters(rng, channels)
    expected = pybn.batch_norm(x, mean.copy(), var.copy(), training=training)
    assert pybn.batch_norm(x, mean.copy(), var.copy(), training=training, out=out) is out
    assert_same_bits(np.ascontiguousarray(out), expected)
    out[...] = 7
    assert np.all(whole == 7), "elements beside out were written"


def test_a_new_result_has_the_memory_layout_of_the_input(rng):
    channels_last_memory = images(rng, (2, 3, 4, 5), channel_axis=-1).transpose(0, 3, 1, 2)
    y = pybn.batch_norm(channels_last_memory, None, None, training=True)
    assert y.strides == channels_last_memory.strides
    assert_close(
        y, reference.normalize(y * 0 + channels_last_memory, *reference.stats(channels_last_memory)), np.float32
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3), (1, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_result_and_leaves_the_statistics(rng, shape, training):
    x = np.zeros(shape, np.float32)
    weight, bias, mean, var = parameters(rng, shape[1])
    with unchanged(mean, var):
        y = pybn.batch_norm(x, mean, var, weight, bias, training)
    assert y.shape == shape
    assert y.dtype == np.float32


def test_the_last_axis_may_be_named_by_its_number(rng):
    x = images(rng, (2, 3, 4, 5), channel_axis=-1)
    assert_same_bits(
        pybn.batch_norm(x, None, None, training=True, channel_axis=3),
        pybn.batch_norm(x, None, None, training=True, channel_axis=-1),
    )
