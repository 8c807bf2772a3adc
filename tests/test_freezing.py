"""Frozen layers: evaluation statistics while the rest trains."""

import pickle

import numpy as np
import pytest
from conftest import assert_same_bits, images, parameters

import pybn

LAYERS = {
    "plain": lambda **options: pybn.BatchNorm1d(4, **options),
    "ghost": lambda **options: pybn.GhostBatchNorm(4, 2, **options),
    "renorm": lambda **options: pybn.BatchRenorm(4, **options),
    "sequence": lambda **options: pybn.SequenceBatchNorm(4, 6, **options),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_frozen_layer_uses_evaluation_statistics_and_keeps_them(rng, make):
    layer = make(activation="silu")
    layer(images(rng, (8, 4, 6)))
    layer.weight[...], layer.bias[...], *_ = parameters(rng, 4)
    x, dy = (images(rng, (5, 4, 6)) for _ in range(2))
    before = layer.state_dict()
    expected = layer.eval()(x)
    gradient = layer.backward(dy)
    weight_grad = layer.weight_grad
    layer.zero_grad()
    assert layer.train().freeze() is layer
    assert layer.training
    assert layer.frozen
    assert_same_bits(layer(x), expected)
    assert_same_bits(layer.backward(dy), gradient)
    assert_same_bits(layer.weight_grad, weight_grad)
    assert pickle.loads(pickle.dumps(layer)).frozen
    for name, value in layer.state_dict().items():
        assert_same_bits(value, before[name], name)
    layer.eval().train()
    assert layer.frozen, "train and eval do not change it"
    layer.unfreeze()
    assert np.any(layer(x) != expected)
    assert np.any(layer.running_mean != before["running_mean"])


def test_without_running_statistics_nothing_can_freeze():
    layer = pybn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="track_running_stats is False, expected True"):
        layer.freeze()
    assert not layer.frozen
    layer.freeze(False)
