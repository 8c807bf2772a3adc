"""Every network of the zoo: it is what its paper says, it folds as far as is possible, and computes what it did."""

from __future__ import annotations

import functools
import math

import numpy as np
import onnx
import pytest

from pybn.folding import fold_onnx, runtime
from pybn.folding.verify import verify
from zoo import FULL, SMALL
from zoo.leftovers import Leftovers, leftovers
from zoo.packaged import packaged
from zoo.running import feeds, run

# As published, in millions, with 1000 classes. Inception without its auxiliary classifier.
PARAMETERS = {
    "ResNet-50": 25.56,
    "DenseNet-121": 7.98,
    "Inception v3": 23.83,
    "MobileNetV2": 3.50,
    "MobileNetV3": 5.48,
    "EfficientNet-B0": 5.29,
}
# Batch norms that follow a sum or a concatenation others use, too: only --aggressive takes them out. (In the ResNet
# one more follows a MaxPool, and passes it in the small network, where none of its four gammas is negative.)
AFTER_JOINS = {"pre-activation ResNet-50": 16, "DenseNet-121": 62}
PACKAGED = packaged()
# Those that are quickly run, the first also quickly judged; benchmarks/folders.py has all.
QUICK = ("MNIST CNN", "light ShuffleNet (drawn)")

# Each is built and folded once; nothing here changes them.
build = functools.cache(lambda name: (SMALL | PACKAGED)[name]())
fold = functools.cache(lambda name, aggressive: fold_onnx(build(name), aggressive=aggressive))

networks = pytest.mark.parametrize("name", SMALL)
both_ways = pytest.mark.parametrize("aggressive", [False, True], ids=["default", "aggressive"])


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch):
    monkeypatch.setattr(runtime, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(runtime, "TIMING_RUNS", (1, 1))


@networks
def test_is_valid_and_its_activations_are_of_order_one(name):
    model = build(name)
    onnx.checker.check_model(model, full_check=True)
    everything = onnx.ModelProto()
    everything.CopyFrom(model)
    everything.graph.output.extend(
        onnx.ValueInfoProto(name=node.output[0]) for node in model.graph.node if node.op_type == "BatchNormalization"
    )
    for values in run(everything, feeds(model)):
        assert np.isfinite(values).all()
        assert 0.05 < np.sqrt(np.mean(np.square(values, dtype=np.float64))) < 10


@pytest.mark.parametrize("name", PARAMETERS)
def test_has_the_published_number_of_parameters(name):
    statistics = ("mean_", "var_")
    other = ("shape_", "low_", "high_", "scales_", "sizes_", "deviation_")
    parameters = sum(
        math.prod(tensor.dims)
        for tensor in FULL[name]().graph.initializer
        if not tensor.name.startswith(statistics + other)
    )
    assert parameters / 1e6 == pytest.approx(PARAMETERS[name], rel=2e-3)


@networks
def test_statistics_have_negative_and_zero_gammas(name):
    gammas = [onnx.numpy_helper.to_array(t) for t in build(name).graph.initializer if t.name.startswith("gamma_")]
    together = np.concatenate(gammas)
    assert 0.05 < np.mean(together < 0) < 0.25
    assert 0 < np.mean(together == 0) < 0.1


def test_the_same_seed_makes_the_same_model():
    assert SMALL["ResNet-50"]().SerializeToString() == SMALL["ResNet-50"]().SerializeToString()


@networks
@both_ways
def test_nothing_is_left_that_can_be_folded(name, aggressive):
    left = 0 if aggressive else AFTER_JOINS.get(name, 0)
    assert leftovers(fold(name, aggressive).model) == Leftovers(left, 0)


@pytest.mark.parametrize("name", [*SMALL, *QUICK])
@both_ways
def test_computes_what_it_did(name, aggressive):
    model, folded = build(name), fold(name, aggressive).model
    onnx.checker.check_model(folded)
    inputs = feeds(model)
    for actual, expected in zip(run(folded, inputs), run(model, inputs), strict=True):
        assert np.abs(actual - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", [*SMALL, QUICK[0]])
@both_ways
def test_every_fold_is_within_its_bound(name, aggressive):
    result = fold(name, aggressive)
    if aggressive and result.model == fold(name, False).model:
        return  # that has been judged already
    check = verify(build(name), result.model, result.report, [feeds(build(name))])
    assert not [found for found in check.folds if not found.passed]
    assert check.passed


@networks
@both_ways
def test_folding_twice_is_folding_once(name, aggressive):
    once = fold(name, aggressive).model
    assert fold_onnx(once, aggressive=aggressive).model.SerializeToString() == once.SerializeToString()


@pytest.mark.parametrize("name", QUICK)
def test_nothing_is_left_of_packaged_models(name):
    assert leftovers(fold(name, False).model) == Leftovers(0, 0)
