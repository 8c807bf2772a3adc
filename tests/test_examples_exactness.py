"""What the experiments rest on and must hold exactly, or but for rounding: each on a small case."""

import copy

import numpy as np
import pytest
import torch

from examples import (
    batch_mates,
    conv_bias,
    inference_statistics,
    inference_time,
    insertion,
    per_channel,
    raw_inputs,
    recurrent,
)
from examples.data import mnist
from examples.networks import cnn, seeded
from pybn.torch import BatchNorm2d


@pytest.fixture(scope="module")
def images():
    return mnist(0).test_images[:40]


def test_a_bias_before_batch_norm_has_a_gradient_of_rounding_only_and_changes_no_loss():
    ratios = {arm: max(conv_bias.gradients(arm, seed=0, steps=3)) for arm in conv_bias.ARMS}
    assert ratios["before batch norm, float64"] < 1e-13
    assert ratios["before batch norm, float32"] < 1e-4
    assert ratios["without batch norm"] > 0.1
    biased, unbiased = (conv_bias.losses(biased, seed=0, steps=3) for biased in (True, False))
    np.testing.assert_allclose(biased, unbiased, rtol=1e-12)


def test_reestimated_statistics_are_those_of_all_that_arrived():
    assert inference_statistics.pooling_error(seed=0, steps=2, count=700) < 1e-12


def test_statistics_of_the_batch_leave_the_moving_averages_alone_and_are_those_of_training(images):
    model = seeded(0, lambda: cnn(BatchNorm2d, size=28))
    before = copy.deepcopy(model.state_dict())
    labels = model.train()(images).argmax(1)  # of one batch of 40
    model.load_state_dict(before)
    assert inference_statistics.by_batch(model, images, labels) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.track_running_stats for module in model.modules() if isinstance(module, BatchNorm2d))


def test_insertion_changes_rounding_only_and_folding_takes_it_back():
    for found, batch_norms in ((insertion.job(seed=0, steps=2), 3), (insertion.onnx_job(), 8)):
        assert found["batch norms"] == found["folded"] == batch_norms
        assert found["change"] < insertion.LIMIT
        assert found["predictions changed"] == 0
        assert found["predictions"] == 1000
        assert found["parameters"] < 1e-6


def test_batch_mates_change_no_bit_of_virtual_batch_norm_and_most_of_batch_norm(images):
    order = torch.arange(len(images)).flip(0)
    differ = {}
    for arm in batch_mates.ARMS:
        model = batch_mates.trained(arm, seed=0, steps=1)
        with torch.no_grad():
            arriving = model[0](images)
            first, second = (batch_mates.in_batches(model[1], arriving, 7, o) for o in (order.sort()[0], order))
        differ[arm] = (first.view(torch.int32) != second.view(torch.int32)).double().mean()
    assert differ["virtual batch norm"] == 0
    assert differ["batch norm"] > 0.5


def test_batches_in_any_order_come_back_in_that_of_the_images(images):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert torch.equal(batch_mates.in_batches(lambda x: x, images, 7, order), images)


def test_the_numpy_network_has_the_gradients_of_its_loss(rng):
    x, labels = rng.uniform(0, 255, (6, 1, raw_inputs.PIXELS)).astype(np.float32), np.arange(6)
    network = raw_inputs.Network("channel", rng)
    for layer in (network.hidden, network.head):
        layer.weight, layer.bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
    x = x.astype(np.float64)

    def loss():
        logits = network(x)
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(6), labels])

    network.backward(raw_inputs.cross_entropy_gradient(network(x), labels))
    for layer, name, index in (
        (network.hidden, "weight", (3, 400)),
        (network.head, "bias", (4,)),
        (network.norm, "weight", (0,)),
        (network.norm, "bias", (0,)),
    ):
        values, gradient = getattr(layer, name), getattr(layer, f"{name}_grad")[index]
        around = []
        for step in (2**-14, -(2**-14)):  # exact in float32, and too short to pass a kink
            values[index] += step
            around.append(loss())
            values[index] -= step
        assert (around[0] - around[1]) * 2**13 == pytest.approx(gradient, rel=1e-5)


def test_the_first_batch_norm_folds_into_the_first_dense_layer():
    found = raw_inputs.fold(0.1, seed=0, steps=2)
    assert found["operators"] == ["Flatten", "Gemm", "Relu", "Gemm"]
    assert found["change"] < 1e-5
    assert found["predictions changed"] == 0


def test_utterances_are_whole_and_of_unequal_lengths():
    data = recurrent.vowels()
    there = ~data.train_images.isnan()
    lengths = there[:, :, 0].sum(1)
    assert (len(data.train_labels), len(data.test_labels)) == (270, 370)
    assert (int(lengths.min()), int(lengths.max())) == (7, 26)
    assert int((~data.test_images[:, :, 0].isnan()).sum(1).max()) == recurrent.STEPS
    assert torch.equal(there, (torch.arange(recurrent.STEPS) < lengths[:, None])[:, :, None].expand_as(there))
    assert data.train_labels.unique().tolist() == list(range(9))


@pytest.mark.parametrize("arm", recurrent.ARMS)
def test_an_utterance_in_evaluation_does_not_depend_on_longer_ones_beside_it(arm):
    x = recurrent.vowels().test_images[:12]
    model = seeded(0, lambda: recurrent.Recurrent(arm))
    with torch.no_grad():
        model.train()(x)
        together = model.eval()(x)
        alone = torch.cat([model(utterance[None]) for utterance in x])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_a_step_that_one_utterance_reaches_is_legal_in_training():
    x = recurrent.vowels().train_images[:3].clone()
    x[1:, 20:] = torch.nan
    x[0] = 1.0
    for arm in recurrent.ARMS:
        assert seeded(0, lambda arm=arm: recurrent.Recurrent(arm)).train()(x).isfinite().all()


def test_images_move_to_the_right(images):
    moved = per_channel.moved(images, 3)
    assert torch.equal(moved[..., 3:], images[..., :-3])
    assert not moved[..., :3].any()


def test_every_pixel_has_statistics_of_its_own_or_shares_those_of_its_channel(images):
    for arm, shapes in (("channel", [8, 16]), ("pixel", [8 * 14 * 14, 16 * 7 * 7]), ("without", [])):
        model = per_channel.network(arm)
        assert [len(b) for name, b in model.named_buffers() if name.endswith("running_mean")] == shapes
        assert model(images).shape == (40, 10)


def test_the_variants_whose_times_are_compared_compute_the_same(images):
    with np.load(insertion.HERE / "mnist_test.npz") as arrays:
        pixels = arrays["image"][:8]
    for library, predicts in (
        ("torch", inference_time.in_torch(pixels, pixels)),
        ("onnxruntime", inference_time.in_onnxruntime(pixels)),
    ):
        logits = {name: predict() for name, predict in predicts.items()}
        for pair, names in inference_time.PAIRS.items():
            if pair.startswith(library):
                before, after = (logits[name] for name in names)
                np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max(), rtol=0)
