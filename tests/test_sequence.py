"""Sequence batch norm: statistics of every step over the sequences that are still there, and their reuse beyond."""

import copy
import pickle

import members
import numpy as np
import pytest
import torch
from conftest import assert_close, assert_same_bits, data_dtypes, images

import pybn

LENGTHS = {
    "all": None,
    "sorted": [7, 6, 6, 3, 2],
    "unsorted": [3, 7, 2, 6, 6],
    "some absent": [0, 4, 0, 4, 2],
}
lengths_of = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
both_layouts = pytest.mark.parametrize("channel_axis", [1, -1])


def sequences(rng, shape, dtype=np.float32, channel_axis=1):
    """(N, C, T), or (N, T, C): every step with a mean and a spread of its own."""
    _, channels, steps = shape
    x = images(rng, shape, dtype) * (1 + np.arange(steps)) + rng.uniform(-2, 2, (1, channels, steps))
    x = x if channel_axis == 1 else np.moveaxis(x, 1, -1)
    return np.ascontiguousarray(x, dtype)


def there_of(lengths, shape):
    examples, _, steps = shape
    return np.arange(steps) < np.asarray([steps] * examples if lengths is None else lengths)[:, None]


def trained(rng, channels=4, max_steps=7, **options):
    layer = pybn.SequenceBatchNorm(channels, max_steps, **options)
    layer.weight[...], layer.bias[...] = rng.uniform(0.5, 2, channels), rng.uniform(-1, 1, channels)
    return layer


def formula(there, layer):
    """Step by step, of the sequences that are there. One alone uses what is known of the step before."""

    def normalize(x, weight, bias):
        first = layer.channel_axis == 1
        x = x if first else torch.movedim(x, -1, 1)
        steps = []
        last = None
        for t in range(x.shape[2]):
            rows = torch.tensor(there[:, t])
            y = torch.zeros_like(x[:, :, t])
            if rows.any():
                part = x[rows, :, t]
                mean, var = part.mean(0), ((part - part.mean(0)) ** 2).mean(0)
                if len(part) == 1:
                    mean, var = last
                else:
                    n = len(part)
                    last = 0.1 * mean.detach(), 0.9 + 0.1 * var.detach() * n / (n - 1)  # the first to move them
                y[rows] = (part - mean) / (var + layer.eps).sqrt() * weight + bias
            steps.append(y)
        y = torch.stack(steps, 2)
        return y if first else torch.movedim(y, 1, -1)

    return normalize


@both_layouts
@lengths_of
@pytest.mark.parametrize("activation", [None, "silu"])
@data_dtypes
def test_every_step_is_normalized_by_itself(rng, dtype, activation, lengths, channel_axis):
    shape = (5, 4, 7)
    parameters = np.float64 if dtype is np.float64 else np.float32
    layer = trained(rng, channel_axis=channel_axis, activation=activation, dtype=parameters)
    x, dy = (sequences(rng, shape, dtype, channel_axis) for _ in range(2))
    y = members.check(layer, formula(there_of(lengths, shape), layer), x, None, dy, dtype, by=40, lengths=lengths)
    gone = ~there_of(lengths, shape)
    by_step = y if channel_axis == -1 else np.moveaxis(y, 1, -1)
    assert not by_step[gone].any()


@both_layouts
@lengths_of
def test_a_residual_is_added_where_there_is_a_sequence(rng, lengths, channel_axis):
    shape = (5, 4, 7)
    layer = trained(rng, channel_axis=channel_axis, activation="silu")
    plain = formula(there_of(lengths, shape), layer)
    x, residual, dy = (sequences(rng, shape, np.float32, channel_axis) for _ in range(3))
    there = there_of(lengths, shape)
    along = there[:, None] if channel_axis == 1 else there[:, :, None]
    residual, dy = residual * along, dy * along
    members.check(layer, plain, x, residual, dy, np.float32, by=40, lengths=lengths)


@both_layouts
def test_what_lies_beyond_the_end_of_a_sequence_does_not_matter(rng, channel_axis):
    lengths = LENGTHS["unsorted"]
    shape = (5, 4, 7)
    x, dy = (sequences(rng, shape, np.float32, channel_axis) for _ in range(2))
    gone = ~there_of(lengths, shape)
    along = np.broadcast_to(gone[:, None] if channel_axis == 1 else gone[:, :, None], x.shape)
    spoiled = np.where(along, np.float32(np.nan), x)
    layer = trained(rng, channel_axis=channel_axis, check_finite=True)
    twin = copy.deepcopy(layer)
    for mode in (True, False):
        y, expected = layer.train(mode)(spoiled, lengths=lengths), twin.train(mode)(x, lengths=lengths)
        assert_same_bits(y, expected)
        assert_same_bits(layer.backward(np.where(along, np.float32(np.nan), dy)), twin.backward(dy))
        assert_same_bits(layer.weight_grad, twin.weight_grad)
    for name, value in twin.state_dict().items():
        assert_same_bits(getattr(layer, name), value, name)
    out = spoiled.copy()
    assert layer(out, lengths=lengths, out=out) is out
    assert_same_bits(out, twin(x, lengths=lengths))


def test_lengths_are_a_mask(rng):
    layer, twin = trained(rng), None
    twin = copy.deepcopy(layer)
    x = sequences(rng, (5, 4, 7))
    mask = there_of(LENGTHS["unsorted"], x.shape)
    assert_same_bits(layer(x, lengths=LENGTHS["unsorted"]), twin(x, mask=mask))
    padded_left = layer(x[:, :, ::-1], mask=mask[:, ::-1])  # single sequences first: what is known of later steps
    assert np.isfinite(padded_left).all()


def test_running_statistics_are_kept_by_step(rng):
    layer = trained(rng, max_steps=9, momentum=0.25, dtype=np.float64)
    x = sequences(rng, (5, 4, 7), np.float64)
    layer(x, lengths=LENGTHS["unsorted"])
    there = there_of(LENGTHS["unsorted"], x.shape)
    assert layer.num_batches_tracked.tolist() == [1] * 6 + [0] * 3, "step 6 has one sequence, 7 and 8 none"
    for t in range(6):
        assert_close(layer.running_mean[t], 0.25 * x[there[:, t], :, t].mean(0), np.float64)
        assert_close(layer.running_var[t], 0.75 + 0.25 * x[there[:, t], :, t].var(0, ddof=1), np.float64)
    assert np.all(layer.running_mean[6:] == 0)
    assert np.all(layer.running_var[6:] == 1)


def test_a_cumulative_average_counts_the_batches_of_each_step(rng):
    layer = trained(rng, momentum=None, dtype=np.float64)
    long, short = sequences(rng, (5, 4, 7), np.float64), sequences(rng, (5, 4, 3), np.float64)
    layer(long)
    layer(short)
    assert layer.num_batches_tracked.tolist() == [2] * 3 + [1] * 4
    assert_close(layer.running_mean[1], (long[:, :, 1].mean(0) + short[:, :, 1].mean(0)) / 2, np.float64)
    assert_close(layer.running_mean[5], long[:, :, 5].mean(0), np.float64)


@both_layouts
def test_beyond_the_longest_step_seen_the_last_one_s_statistics_are_used(rng, channel_axis):
    layer = trained(rng, max_steps=12, channel_axis=channel_axis, momentum=1.0)
    layer(sequences(rng, (6, 4, 5), np.float32, channel_axis))
    x = sequences(rng, (2, 4, 9), np.float32, channel_axis)
    y = np.moveaxis(layer.eval()(x), channel_axis, 1)
    for t in range(9):
        seen = min(t, 4)
        expected = pybn.batch_norm(
            np.moveaxis(x, channel_axis, 1)[:, :, t], layer.running_mean[seen], layer.running_var[seen], layer.weight,
            layer.bias,
        )  # fmt: skip
        assert_close(y[:, :, t], expected, np.float32)


def test_training_beyond_max_steps_moves_no_statistics(rng):
    layer, wide = trained(rng, max_steps=3), trained(rng, max_steps=7)
    wide.weight[...], wide.bias[...] = layer.weight, layer.bias
    x = sequences(rng, (5, 4, 7))
    assert_same_bits(layer(x), wide(x))
    assert_same_bits(layer.running_mean, wide.running_mean[:3])
    assert np.isfinite(layer.eval()(x)).all()


@both_layouts
@pytest.mark.parametrize("training", [True, False])
def test_step_by_step_is_the_same_as_whole(rng, training, channel_axis):
    lengths = [7, 6, 6, 3, 2]
    shape = (5, 4, 7)
    layer = trained(rng, channel_axis=channel_axis, activation="silu").train(training)
    twin = copy.deepcopy(layer)
    x, residual, dy = (sequences(rng, shape, np.float32, channel_axis) for _ in range(3))
    there = there_of(lengths, shape)
    at = (lambda a, t: a[:, :, t]) if channel_axis == 1 else (lambda a, t: a[:, t])
    y = layer(x, lengths=lengths, residual=residual)
    for t in range(7):
        part = twin(at(x, t), step=t, mask=there[:, t], residual=at(residual, t))
        assert_close(part, at(y, t), np.float32, t)
    dx, dresidual = layer.backward(dy)
    for t in reversed(range(7)):
        of_x, of_residual = twin.backward(at(dy, t))
        assert_close(of_x / 40, at(dx, t) / 40, np.float32, t)
        assert_close(of_residual, at(dresidual, t), np.float32, t)
    assert_close(twin.weight_grad / 40, layer.weight_grad / 40, np.float32)
    for name, value in twin.state_dict().items():
        assert_close(getattr(layer, name), value, np.float32, name)
    with pytest.raises(RuntimeError, match="backward needs a forward call before it"):
        twin.backward(at(dy, 0))


def test_a_new_sequence_forgets_the_steps_of_the_one_before(rng):
    layer = trained(rng)
    x = sequences(rng, (5, 4, 7))
    for step in (0, 1, 0):
        layer(x[:, :, step], step=step)
    layer.backward(x[:, :, 0])
    with pytest.raises(RuntimeError):
        layer.backward(x[:, :, 0])


@lengths_of
def test_gradients_are_the_numerical_ones(rng, lengths):
    layer = pybn.SequenceBatchNorm(2, 7, momentum=0.0, dtype=np.float64, activation="silu")
    x, dy = sequences(rng, (5, 2, 7), np.float64), rng.standard_normal((5, 2, 7))
    layer(x, lengths=lengths)
    dx = layer.backward(dy)
    numerical = members.numerical_gradient(lambda: np.sum(layer(x, lengths=lengths) * dy), x)
    np.testing.assert_allclose(dx, numerical, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
@both_layouts
def test_out_is_written_and_returned(rng, channel_axis, training):
    layer = trained(rng, channel_axis=channel_axis).train(training)
    x, dy = (sequences(rng, (5, 4, 7), np.float32, channel_axis) for _ in range(2))
    expected, gradient = layer(x), layer.backward(dy)
    out = np.empty_like(x)
    assert layer(x, out=out) is out
    if not training:
        assert_same_bits(out, expected)
    assert layer.backward(dy, out=out) is out
    if not training:
        assert_same_bits(out, gradient)
    step, target = np.ascontiguousarray(x[:, 0] if channel_axis == -1 else x[:, :, 0]), np.empty((5, 4), np.float32)
    assert layer(step, step=0, out=target) is target
    assert np.isfinite(target).all()


def test_the_weight_begins_at_a_tenth_and_returns_to_it():
    layer = pybn.SequenceBatchNorm(4, 7)
    assert_same_bits(layer.weight, np.full(4, 0.1, np.float32))
    layer.weight[...] = 3
    layer.num_batches_tracked[...] = 2
    layer.reset_parameters()
    assert_same_bits(layer.weight, np.full(4, 0.1, np.float32))
    assert not layer.num_batches_tracked.any()


def test_state_and_copies(rng):
    layer = trained(rng)
    layer(sequences(rng, (5, 4, 7)))
    twin = pybn.SequenceBatchNorm(4, 7)
    twin.load_state_dict(layer.state_dict())
    x = sequences(rng, (2, 4, 7))
    assert_same_bits(twin.eval()(x), layer.eval()(x))
    assert_same_bits(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert repr(eval(repr(layer), vars(pybn))) == repr(layer)
    layer.bias = None
    assert "bias" not in layer.state_dict()
    layer.backward(layer(x))
    assert layer.bias_grad is None


def test_nothing_there_is_legal(rng):
    layer = trained(rng)
    for shape in ((0, 4, 7), (3, 4, 0)):
        empty = np.zeros(shape, np.float32)
        assert layer(empty).shape == layer.backward(empty).shape == shape
    assert not layer(np.ones((2, 4, 7), np.float32), lengths=[0, 0]).any()
    assert not layer.num_batches_tracked.any()


def test_what_is_wrong_is_said_and_changes_nothing(rng):
    layer = trained(rng, check_finite=True)
    x = sequences(rng, (5, 4, 7))
    layer(x)
    before = layer.state_dict()
    bad = x.copy()
    bad[0, 1, 2] = np.inf
    for call, error, message in [
        (lambda: pybn.SequenceBatchNorm(4, 0), ValueError, "max_steps is 0, expected at least 1"),
        (lambda: layer(x[:, :, 0]), ValueError, "x has shape .*, expected 3 axes"),
        (lambda: layer(x, step=0), ValueError, "expected 2 axes"),
        (lambda: layer(x[:, :, 0], step=-1), ValueError, "step is -1, expected an integer >= 0"),
        (lambda: layer(x[:, :, 0], step=0, lengths=[1] * 5), ValueError, "step is given with lengths"),
        (lambda: layer(x, lengths=[1, 2]), ValueError, r"lengths has shape \(2,\), expected \(5,\)"),
        (lambda: layer(x, lengths=[1, 2, 3, 4, 8]), ValueError, "lengths has values from 1 to 8, expected 0 to 7"),
        (lambda: layer(x, lengths=[1.0] * 5), TypeError, "lengths has dtype float64, expected integers"),
        (lambda: layer(x, mask=np.ones((5, 6), bool)), ValueError, r"mask has shape \(5, 6\), expected \(5, 7\)"),
        (lambda: layer(x, mask=np.ones((5, 7))), TypeError, "mask has dtype float64, expected bool"),
        (lambda: layer(x, mask=np.ones((5, 7), bool), lengths=[7] * 5), ValueError, "both given"),
        (lambda: layer(x[:1]), ValueError, "at no step more than one sequence"),
        (lambda: layer(x[:1, :, 0], step=0), ValueError, "at no step more than one sequence"),
        (lambda: layer(bad), ValueError, "x is not finite in 1 of 4 channels"),
        (lambda: layer(x, residual=x[1:]), ValueError, "residual has shape"),
        (lambda: layer(x, out=x[1:]), ValueError, "out has shape"),
        (lambda: layer.backward(x[1:]), ValueError, "dy has shape"),
    ]:
        with pytest.raises(error, match=message):
            call()
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)


def ragged(rng, channel_axis, sizes=((6, 5, 5, 2), (3, 6, 1), (7, 7, 7, 4, 1))):
    """Batches of sequences of unequal lengths, whose steps differ, in float64."""
    for lengths in sizes:
        shape = (len(lengths), 4, max(lengths))
        yield sequences(rng, shape, np.float64, channel_axis) * len(lengths), np.array(lengths)


def at_steps(batches, channel_axis):
    """All values that arrive at every step, put together."""
    found = {}
    for x, lengths in batches:
        for sequence, length in zip(np.moveaxis(x, channel_axis, -1), lengths, strict=True):
            for step in range(length):
                found.setdefault(step, []).append(sequence[step])
    return {step: np.array(values) for step, values in found.items()}


@pytest.mark.parametrize("as_mask", [False, True])
@both_layouts
def test_reestimated_statistics_of_a_step_are_those_of_all_sequences_that_reach_it(rng, channel_axis, as_mask):
    layer = trained(rng, max_steps=9, channel_axis=channel_axis, dtype=np.float64)
    batches = list(ragged(rng, channel_axis))
    layer(sequences(rng, (3, 4, 9), np.float64, channel_axis))  # what it knew before plays no part

    def forward(batch):
        x, lengths = batch
        there = np.arange(x.shape[layer._time_axis]) < lengths[:, None]
        layer(
            np.where(np.expand_dims(there, channel_axis % 3), x, np.nan),
            **{"mask": there} if as_mask else {"lengths": lengths},
        )

    found = pybn.reestimate({"norm": layer}, batches, forward=forward)
    expected = at_steps(batches, channel_axis)
    assert list(found.statistics) == [f"norm[{step}]" for step in range(7)]
    for step, values in expected.items():
        assert found.statistics[f"norm[{step}]"].count == len(values)
        np.testing.assert_allclose(layer.running_mean[step], values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(layer.running_var[step], values.var(0), rtol=1e-12)
    assert layer.num_batches_tracked.tolist() == [1] * 7 + [0, 0], "steps beyond are as if never seen"
    beyond = sequences(rng, (2, 4, 9), np.float64, channel_axis)
    at = (lambda a, t: a[:, :, t]) if channel_axis == 1 else (lambda a, t: a[:, t])
    mean, var = layer.running_mean[6], layer.running_var[6]
    expected_y = (at(beyond, 8) - mean) / np.sqrt(var + layer.eps) * layer.weight + layer.bias
    assert_close(at(layer.eval()(beyond), 8), expected_y, np.float64)


def test_a_step_that_one_sequence_reaches_in_the_whole_data_set_has_no_statistics(rng):
    layer = trained(rng, dtype=np.float64)
    data = [(sequences(rng, (3, 4, 5), np.float64), [5, 3, 3]), (sequences(rng, (2, 4, 4), np.float64), [4, 2])]
    found = pybn.reestimate([layer], data, forward=lambda batch: layer(batch[0], lengths=batch[1]))
    assert [found.statistics[f"0[{step}]"].count for step in range(5)] == [5, 5, 4, 2, 1]
    assert layer.num_batches_tracked.tolist() == [1, 1, 1, 1, 0, 0, 0]
    assert np.all(layer.running_var[4:] == 1)


class Recurrent:
    """Steps of a recurrence, and a batch norm after it."""

    def __init__(self, rng):
        self.inputs, self.recurrent = (rng.standard_normal((4, 4)) for _ in range(2))
        self.norm = pybn.SequenceBatchNorm(4, 5, channel_axis=-1, dtype=np.float64)
        self.last = pybn.BatchNorm1d(4, dtype=np.float64)
        self.layers = {"norm": self.norm, "last": self.last}

    def __call__(self, batch):
        x, lengths = batch
        hidden = np.zeros((len(x), 4))
        for step in range(x.shape[1]):
            there = step < lengths
            normalized = self.norm(hidden @ self.recurrent + x[:, step] @ self.inputs, step=step, mask=there)
            hidden = np.where(there[:, None], np.tanh(normalized), hidden)
        return self.last(hidden)


def test_a_recurrence_is_reestimated_step_by_step_and_goes_on_where_it_ended_with_the_same_bits(rng, tmp_path):
    one, other, stale = (Recurrent(np.random.default_rng(3)) for _ in range(3))
    batches = list(ragged(rng, -1, ((5, 5, 2), (3, 1, 1, 1), (2, 5, 5))))  # later steps of the second have one sequence
    stale.norm(rng.standard_normal((4, 5, 4)) * 100)
    found = pybn.reestimate(one.layers, batches, forward=one)

    def failing():
        yield from batches[:2]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pybn.reestimate(other.layers, failing(), forward=other, state=tmp_path / "s.npz", save_every=1)
    assert not other.norm.num_batches_tracked.any(), "nothing has changed"
    pybn.reestimate(other.layers, batches, forward=other, state=tmp_path / "s.npz")
    again = pybn.reestimate(stale.layers, iter(batches), forward=stale)
    for network in (other, stale):
        assert_same_bits(network.norm.running_var, one.norm.running_var)
        assert_same_bits(network.last.running_mean, one.last.running_mean)
    assert [found.statistics[f"norm[{step}]"].count for step in range(5)] == [10, 7, 5, 4, 4]
    assert again.statistics["last"].count == 10
    first = np.concatenate([x[:, 0] @ one.inputs for x, _ in batches])
    np.testing.assert_allclose(one.norm.running_mean[0], first.mean(0), rtol=1e-12)


def test_no_values_at_any_step_is_an_error_that_changes_nothing(rng):
    layer = trained(rng)
    layer(sequences(rng, (5, 4, 7)))
    before = layer.state_dict()
    for data in ([], [np.zeros((0, 4, 7), np.float32)]):
        with pytest.raises(
            ValueError, match="no values arrived at SequenceBatchNorm, expected two at least at some step"
        ):
            pybn.reestimate(layer, data)
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)
