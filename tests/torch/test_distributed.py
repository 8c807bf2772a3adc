"""SyncBatchNorm: what several ranks do (in `distributed_cases.py`), and what one does alone."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pybn.torch import (
    BatchNorm2d,
    GhostBatchNorm,
    InPlaceABN,
    SyncBatchNorm,
    convert_sync_batchnorm,
    revert_sync_batchnorm,
)

CASES = Path(__file__).with_name("distributed_cases.py")
RANKS = 3


def test_three_ranks_give_what_one_process_gives_on_the_union(tmp_path):
    """One launch for all cases, because every rank needs seconds to import torch; rank 2 dies in the last one."""
    finished = [tmp_path / f"rank{rank}" for rank in range(RANKS)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error", CASES, str(rank), str(RANKS), tmp_path / "store", finished[rank]],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n\n".join(outputs)
    assert [path.exists() for path in finished] == [True, True, False], "\n\n".join(outputs)


# ---- one rank alone


def network():
    shared = torch.nn.BatchNorm2d(4)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.Sequential(shared, torch.nn.BatchNorm2d(4, eps=1e-3, momentum=None)),
        BatchNorm2d(4, activation="leaky_relu", negative_slope=0.2),
        shared,
        torch.nn.BatchNorm2d(4, affine=False, track_running_stats=False).eval(),
    )


def test_without_a_process_group_it_is_the_plain_layer():
    torch.manual_seed(0)
    layer, plain = SyncBatchNorm(3, activation="relu"), torch.nn.BatchNorm2d(3)
    for training in (True, False):
        x = torch.randn(4, 3, 5, 5)
        torch.testing.assert_close(layer.train(training)(x), torch.relu(plain.train(training)(x)))
    torch.testing.assert_close(dict(layer.state_dict()), dict(plain.state_dict()))
    with pytest.raises(ValueError, match="expected at least 2 axes and 3 channels"):
        layer(torch.randn(2, 4))


def test_it_is_a_batch_norm_but_not_the_one_that_data_parallel_refuses_on_the_cpu():
    assert issubclass(SyncBatchNorm, torch.nn.modules.batchnorm._BatchNorm)
    assert not issubclass(SyncBatchNorm, torch.nn.SyncBatchNorm)


def test_converting_keeps_parameters_settings_and_hooks():
    model = network()
    before = list(model.named_modules())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    seen = []
    model[1][1].register_forward_hook(lambda *_: seen.append(1))

    converted = convert_sync_batchnorm(model, timeout=5)
    assert converted is model
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before]
    assert {k: id(v) for k, v in model.named_parameters()} == {k: id(v) for k, v in parameters.items()}
    assert {k: id(v) for k, v in model.named_buffers()} == {k: id(v) for k, v in buffers.items()}
    assert model[3] is model[1][0]
    layers = [model[1][0], model[1][1], model[2], model[4]]
    assert all(type(layer) is SyncBatchNorm and layer.timeout == 5 for layer in layers)
    assert (layers[1].eps, layers[1].momentum) == (1e-3, None)
    assert (layers[2].activation, layers[2].negative_slope) == ("leaky_relu", 0.2)
    assert not layers[3].training
    model(torch.randn(2, 3, 6, 6))
    assert seen == [1]
    assert convert_sync_batchnorm(model)[2] is layers[2]


def test_reverting_gives_the_layers_that_there_were():
    model = network()
    twin = revert_sync_batchnorm(convert_sync_batchnorm(copy.deepcopy(model)))
    assert repr(twin) == repr(model)
    assert [type(layer) for layer in twin.modules()] == [type(layer) for layer in model.modules()]
    assert [vars(layer).keys() for layer in twin.modules()] == [vars(layer).keys() for layer in model.modules()]
    assert twin[3] is twin[1][0]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


def test_a_batch_norm_itself_is_converted_to_a_new_layer():
    layer = torch.nn.BatchNorm1d(3)
    converted = convert_sync_batchnorm(layer)
    assert type(converted) is SyncBatchNorm
    assert converted.weight is layer.weight
    assert type(layer) is torch.nn.BatchNorm1d
    assert type(revert_sync_batchnorm(converted)) is torch.nn.BatchNorm1d


def test_layers_made_as_synchronised_stay():
    layer = SyncBatchNorm(3)
    assert revert_sync_batchnorm(layer) is layer


def test_a_lazy_layer_is_refused_before_it_has_seen_data():
    with pytest.raises(ValueError, match="has not seen data"):
        convert_sync_batchnorm(torch.nn.LazyBatchNorm2d())


def test_a_network_with_other_statistics_is_refused_and_unchanged():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), GhostBatchNorm(3, 2))
    with pytest.raises(ValueError, match=r"GhostBatchNorm\(3, .* has statistics of another kind"):
        convert_sync_batchnorm(model)
    assert type(model[0]) is torch.nn.BatchNorm2d


def test_an_in_place_layer_keeps_its_activation():
    torch.manual_seed(0)
    layer = InPlaceABN(3, negative_slope=0.2)
    converted = convert_sync_batchnorm(copy.deepcopy(layer))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(converted(x.clone()), layer(x.clone()))
    assert repr(revert_sync_batchnorm(converted)) == repr(layer)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="timeout is -1"):
        SyncBatchNorm(3, timeout=-1)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        SyncBatchNorm(3, activation="tanh")
