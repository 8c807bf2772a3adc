"""Re-estimation on NumPy layers: exact pooling, any batch sizes, resumption, partitions; a failure changes nothing."""

import json
import pickle

import numpy as np
import pytest
import reference
from conftest import assert_same_bits, images

import pybn
from pybn import population


class Network:
    """Two linear layers, each with a batch norm, in float64."""

    def __init__(self, rng):
        self.weights = rng.standard_normal((6, 5)), rng.standard_normal((5, 4))
        self.first = pybn.BatchNorm1d(5, activation="relu", dtype=np.float64)
        self.second = pybn.GhostBatchNorm(4, 3, dtype=np.float64)
        self.layers = {"first": self.first, "second": self.second}

    def __call__(self, x):
        return self.second(self.first(x @ self.weights[0]) @ self.weights[1])


def batches_of(rng, sizes=(7, 4, 9, 3, 16), features=6):
    return [rng.standard_normal((n, features)) * (i + 1) + 100 * i for i, n in enumerate(sizes)]


def state_of(network):
    return {name: layer.state_dict() for name, layer in network.layers.items()}


def assert_same_state(network, before):
    for name, layer in network.layers.items():
        for key, value in layer.state_dict().items():
            assert_same_bits(value, before[name][key], f"{name}.{key}")


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_statistics_are_those_of_the_concatenated_data(rng, channel_axis):
    layer = pybn.BatchNorm2d(3, dtype=np.float64, channel_axis=channel_axis)
    data = [
        images(rng, (n, 3, 4, 5), np.float64, channel_axis) * scale + 1e4 for n, scale in ((9, 1), (2, 50), (31, 3))
    ]
    layer(data[0])  # what it knew before plays no part
    found = pybn.reestimate(layer, data)
    mean, var = reference.stats(np.concatenate(data), channel_axis)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-12)
    assert found.model is layer
    assert found.batches == 3
    assert found.statistics["BatchNorm2d"].count == 42 * 20


def test_the_average_of_batch_variances_would_be_another(rng):
    """Batches that differ in mean: what a moving average forgets."""
    layer = pybn.BatchNorm1d(6, dtype=np.float64)
    data = batches_of(rng)
    pybn.reestimate(layer, data)
    assert np.all(layer.running_var > 100 * np.mean([batch.var(0) for batch in data], axis=0))


def test_a_later_batch_norm_sees_what_batch_statistics_make_of_the_earlier_one(rng):
    network, data = Network(rng), batches_of(rng)
    pybn.reestimate(network.layers, data, forward=network)
    arrived = []
    for batch in data:
        z = batch @ network.weights[0]
        arrived.append(reference.normalize(z, *reference.stats(z), activation="relu") @ network.weights[1])
    mean, var = reference.stats(np.concatenate(arrived))
    np.testing.assert_allclose(network.second.running_mean, mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(network.second.running_var, var, rtol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pybn.GhostBatchNorm(4, 3, dtype=np.float64),
        lambda: pybn.BatchRenorm(4, rmax=3, dmax=5, dtype=np.float64),
    ],
    ids=["ghost", "renorm"],
)
def test_a_member_s_stale_statistics_play_no_part_in_what_arrives_after_it(rng, make, tmp_path):
    """Batch renorm corrects by running statistics in training, but not while those are replaced."""
    data = batches_of(rng, features=4)
    found = []
    for stale in (False, True):
        first, second = make(), pybn.BatchNorm1d(4, dtype=np.float64)
        if stale:
            first.running_mean[...], first.running_var[...], first.num_batches_tracked[...] = 77, 0.1, 10_000
        layers = {"first": first, "second": second}
        pybn.reestimate(layers, data, forward=lambda x, first=first, second=second: second(np.abs(first(x))))
        mean, var = reference.stats(np.concatenate(data))
        np.testing.assert_allclose(first.running_mean, mean, rtol=1e-12)
        np.testing.assert_allclose(first.running_var, var, rtol=1e-12)
        assert first.num_batches_tracked == 10_000 * stale
        found.append(second.state_dict())
    for key, value in found[0].items():
        assert_same_bits(value, found[1][key], key)
    if make().__class__ is pybn.BatchRenorm:  # it normalizes as batch norm does
        arrived = np.concatenate([np.abs(reference.normalize(x, *reference.stats(x))) for x in data])
        np.testing.assert_allclose(found[0]["running_mean"], arrived.mean(0), rtol=1e-12)


def test_an_iterable_whose_length_is_not_known_has_no_total(rng):
    class Stream:
        def __iter__(self):
            return iter(batches_of(rng))

        def __len__(self):
            raise TypeError("as a DataLoader of an IterableDataset does")

    totals = set()
    pybn.reestimate(pybn.BatchNorm1d(6), Stream(), progress=lambda done, total: totals.add(total))
    pybn.reestimate(pybn.BatchNorm1d(6), batches_of(rng), progress=lambda done, total: totals.add(total))
    assert totals == {None, 5}


def test_statistics_that_overflow_change_no_layer(rng):
    first, second = pybn.BatchNorm1d(6), pybn.BatchNorm1d(6)
    batch = rng.standard_normal((5, 6), dtype=np.float32)
    with pytest.raises(ValueError, match="running_var has values that overflow float32"):
        pybn.reestimate([first, second], [batch], forward=lambda x: (first(x), second(x * np.float32(1e30))))
    assert not first.running_mean.any()


def test_nothing_but_the_running_statistics_changes(rng):
    network, data = Network(rng), batches_of(rng)
    network.first.eval()
    network.second.freeze()
    network(data[0])
    network.second.backward(np.ones((7, 4)))
    before = {name: dict(vars(layer)) for name, layer in network.layers.items()}
    pybn.reestimate(list(network.layers.values()), data, forward=network)
    for name, layer in network.layers.items():
        for key, value in vars(layer).items():
            if key not in ("running_mean", "running_var", "_saved"):
                assert value is before[name][key] or value == before[name][key], key
        assert layer.num_batches_tracked == 0


def test_a_generator_is_drawn_batch_by_batch(rng):
    drawn, seen = [], []

    def batches():
        for number, batch in enumerate(batches_of(rng)):
            drawn.append(number)
            yield batch

    layer = pybn.BatchNorm1d(6)
    pybn.reestimate(layer, batches(), progress=lambda done, total: seen.append((done, len(drawn), total)))
    assert seen == [(n, n, None) for n in range(1, 6)]


def test_an_error_while_batches_run_changes_nothing(rng):
    network, data = Network(rng), batches_of(rng)
    network(data[0])
    before = state_of(network)
    with pytest.raises(ValueError, match="one value per channel"):
        pybn.reestimate(network.layers, [*data, data[0][:1]], forward=network)
    assert_same_state(network, before)
    assert network.first.training
    assert network.first._observer is None


@pytest.mark.parametrize("as_partitions", [False, True])
@pytest.mark.parametrize("fails_after", [1, 2, 3, 4])
def test_work_goes_on_where_it_ended_with_the_same_bits(rng, tmp_path, fails_after, as_partitions):
    data = batches_of(rng)
    network, twin = Network(np.random.default_rng(1)), Network(np.random.default_rng(1))
    state = tmp_path / "state.npz"
    ran = []

    def given(fails):
        def batch(number):
            if fails and number == fails_after:
                raise InterruptedError("the power went off")
            ran.append(number)
            return data[number]

        if as_partitions:
            return {"partitions": [lambda n=n: iter([batch(n)]) for n in range(5)]}
        return {"data": (batch(n) for n in range(5))}

    options = {"state": state, "save_every": 2}
    with pytest.raises(InterruptedError):
        pybn.reestimate(network.layers, **given(True), forward=network, **options)
    assert state.exists() == (fails_after >= 2)
    ran.clear()
    pybn.reestimate(network.layers, **given(False), forward=network, **options)
    saved = fails_after // 2 * 2
    assert ran == list(range(saved if as_partitions else 0, 5)), "partitions that are done are not opened again"
    assert not state.exists()
    pybn.reestimate(twin.layers, **given(False), forward=twin)
    assert_same_state(network, state_of(twin))


def test_a_state_of_other_work_is_refused(rng, tmp_path):
    data, state = batches_of(rng), tmp_path / "state.npz"
    network = Network(rng)
    before = state_of(network)

    def failing():
        yield from data[:2]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pybn.reestimate(network.layers, failing(), forward=network, state=state, save_every=1)
    with pytest.raises(ValueError, match="is of another names"):
        pybn.reestimate(network.first, data, forward=network, state=state)
    with pytest.raises(ValueError, match="is of another kind"):
        pybn.reestimate(network.layers, partitions=[lambda: data], forward=network, state=state)
    network.first.weight += 1
    with pytest.raises(ValueError, match="is of another model"):
        pybn.reestimate(network.layers, data, forward=network, state=state)
    network.first.weight -= 1
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not one that reestimate wrote"):
        pybn.reestimate(network.layers, data, forward=network, state=state)
    assert_same_state(network, before)


def test_partitions_give_what_the_data_in_one_piece_give(rng):
    data = batches_of(rng)
    network, twin = Network(np.random.default_rng(1)), Network(np.random.default_rng(1))
    whole = pybn.reestimate(network.layers, data, forward=network)
    parted = pybn.reestimate(twin.layers, partitions=[lambda: data[:2], list, lambda: data[2:]], forward=twin)
    for name in network.layers:
        np.testing.assert_allclose(parted.statistics[name].mean, whole.statistics[name].mean, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(parted.statistics[name].var, whole.statistics[name].var, rtol=1e-12)
        assert parted.statistics[name].count == whole.statistics[name].count == 39


def test_a_subject_can_be_sent_to_another_process(rng):
    network, data = Network(rng), batches_of(rng)
    subject = pickle.loads(pickle.dumps(population.Layers(network.layers, network)))
    there = population.of_partition(subject, lambda: data)
    here = population.of_partition(population.Layers(network.layers, network), lambda: data)
    for name in network.layers:
        assert_same_bits(there[name].mean, here[name].mean)
        assert_same_bits(there[name].m2, here[name].m2)


def test_what_is_wrong_is_said(rng):
    network, layer = Network(rng), pybn.BatchNorm1d(6)
    data = batches_of(rng)
    without = pybn.BatchNorm1d(6, track_running_stats=False)
    for call, error, message in [
        (lambda: pybn.reestimate(layer), TypeError, "expected either data or partitions"),
        (lambda: pybn.reestimate(layer, data, partitions=[]), TypeError, "expected either data or partitions"),
        (lambda: pybn.reestimate(layer, data, client=object()), TypeError, "client is given without partitions"),
        (lambda: pybn.reestimate(layer, data, save_every=0), ValueError, "save_every is 0"),
        (lambda: pybn.reestimate(network.layers, data), TypeError, "forward is None"),
        (lambda: pybn.reestimate([network], data), TypeError, "layer '0' is a Network, expected a batch norm"),
        (lambda: pybn.reestimate(3, data), TypeError, "model is a int, expected layers"),
        (lambda: pybn.reestimate([], data, forward=network), ValueError, "no batch norm"),
        (lambda: pybn.reestimate(without, data), ValueError, "without running statistics"),
        (lambda: pybn.reestimate(pybn.VirtualBatchNorm(6), data), ValueError, "without running statistics"),
        (lambda: pybn.reestimate(layer, []), ValueError, "no values arrived at BatchNorm1d"),
        (lambda: pybn.reestimate(layer, partitions=[]), ValueError, "no values arrived at BatchNorm1d"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert layer.num_batches_tracked == 0


def test_the_state_file_says_what_it_is(rng, tmp_path):
    def failing():
        yield rng.standard_normal((5, 6))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pybn.reestimate(pybn.BatchNorm1d(6), failing(), state=tmp_path / "s.npz", save_every=1)
    with np.load(tmp_path / "s.npz") as arrays:
        assert json.loads(str(arrays["head"]))["done"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
