"""Folding a dictionary of arrays, compared with PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pybn
from pybn.folding import Reason


@pytest.fixture
def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 4, 3, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ConvTranspose2d(4, 6, 2, groups=2),
        torch.nn.BatchNorm2d(6, affine=False),
        torch.nn.Flatten(),
        torch.nn.Linear(150, 5),
        torch.nn.BatchNorm1d(5),
    ]
    result = torch.nn.Sequential(*layers).double().eval()
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        if hasattr(layer, "running_mean"):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.1, 2.0)
    return result


def state_of(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


PAIRS = [("0", "1"), ("2", "3"), ("5", "6")]


def test_folded_layers_compute_what_layers_and_batch_norms_did(network):
    state = state_of(network)
    before = {name: array.copy() for name, array in state.items()}
    folded = pybn.fold_state_dict(state, PAIRS, transposed=["2"])
    assert set(folded) == {f"{layer}.{kind}" for layer, _ in PAIRS for kind in ("weight", "bias")}
    assert all(np.array_equal(state[name], array) for name, array in before.items())
    tensors = {name: torch.from_numpy(array) for name, array in folded.items()}
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    hidden = torch.nn.functional.conv2d(x, tensors["0.weight"], tensors["0.bias"])
    hidden = torch.nn.functional.conv_transpose2d(hidden, tensors["2.weight"], tensors["2.bias"], groups=2)
    actual = torch.nn.functional.linear(hidden.flatten(1), tensors["5.weight"], tensors["5.bias"])
    torch.testing.assert_close(actual, network(x), rtol=1e-11, atol=1e-11)


def test_other_arrays_are_kept_and_so_are_batch_norms_in_no_pair(network):
    state = {**state_of(network), "head.weight": np.ones(3)}
    folded = pybn.fold_state_dict(state, PAIRS[:1])
    assert folded["head.weight"] is state["head.weight"]
    assert "3.running_mean" in folded
    assert "1.running_mean" not in folded
    assert "1.num_batches_tracked" not in folded


def test_epsilon_is_read(network):
    network[1].eps = 0.5
    state = state_of(network)
    folded = pybn.fold_state_dict(state, PAIRS[:1], eps=0.5)
    expected = state["1.weight"] / np.sqrt(state["1.running_var"] + 0.5)
    np.testing.assert_allclose(folded["0.weight"], state["0.weight"] * expected[:, None, None, None], rtol=1e-13)


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([("7", "1")], {}, KeyError, "7.weight"),
        ([("0", "4")], {}, KeyError, "4.running_mean"),
        ([("0", "1"), ("0", "3")], {}, ValueError, "'0' twice"),
        ([("0", "3")], {}, ValueError, "0 and 3: .*shape"),
        ([("0", "1")], {"transposed": ["2"]}, ValueError, "'2'.*no pair"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(network, pairs, options, error, message):
    with pytest.raises(error, match=message):
        pybn.fold_state_dict(state_of(network), pairs, **options)


def test_what_cannot_be_represented_is_an_error_with_a_reason(network):
    state = state_of(network)
    state["1.running_var"][2] = -1.0
    with pytest.raises(pybn.FoldError, match=r"0 and 1: .*channel 2") as caught:
        pybn.fold_state_dict(state, PAIRS[:1])
    assert caught.value.reason is Reason.INVALID_VARIANCE
