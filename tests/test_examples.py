"""The experiments on what batch norm does: every one runs, and what must hold exactly does."""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import experiment, training
from examples.all import CLAIMS
from examples.convergence import steps_to
from examples.data import digits, mnist, mnist_pixels
from examples.networks import cnn, mlp, seeded
from examples.placement import network
from pybn.torch import BatchNorm1d, BatchNorm2d

CLONE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_run_and_leave_a_figure_and_numbers(name, tmp_path):
    claim = importlib.import_module(f"examples.{name}")
    threads = torch.get_num_threads()
    results = tmp_path / "results.json"
    results.write_text('{"another": 1}')
    experiment.perform(name, claim.run, claim.plot, quick=True, seeds=1, folder=tmp_path)
    found = json.loads(results.read_text(), parse_constant=pytest.fail)
    assert found["another"] == 1
    assert found[name]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("name", CLAIMS)
def test_the_page_shows_every_claim_from_the_full_run(name):
    assert f"](figures/{name}.png)" in (CLONE / "docs" / "what-batch-norm-does.md").read_text()
    figure = CLONE / "docs" / "figures" / f"{name}.png"
    assert 5_000 < figure.stat().st_size < 60_000
    assert name in json.loads((CLONE / "docs" / "figures" / "results.json").read_text())


def test_splits_are_balanced_and_disjoint():
    for split, held_out in ((mnist_pixels(0), 1000), (digits(0), 500)):
        train = {image.tobytes() for image in split.train_images.numpy()}
        assert len(split.test_labels) == held_out
        assert not any(image.tobytes() in train for image in split.test_images.numpy())
        counts = np.bincount(split.test_labels)
        assert len(counts) == 10
        assert counts.max() - counts.min() <= held_out // 50
    assert torch.equal(mnist(0).test_images * 255, mnist_pixels(0).test_images)


def test_batches_of_an_epoch_are_disjoint_and_those_of_a_seed_the_same():
    drawn = [batch.tolist() for batch in training.batches(100, 32, 7, seed=3)]
    assert [len(batch) for batch in drawn] == [32] * 7
    assert len({index for batch in drawn[:3] for index in batch}) == 96
    assert drawn[:3] != drawn[3:6]
    assert drawn == [batch.tolist() for batch in training.batches(100, 32, 7, seed=3)]


def test_arms_with_and_without_batch_norm_begin_alike():
    without, with_norm = (seeded(5, lambda norm=norm: mlp(norm)) for norm in (None, BatchNorm1d))
    linear = [[m.weight for m in model if isinstance(m, torch.nn.Linear)] for model in (without, with_norm)]
    assert len(linear[0]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*linear, strict=True))


def test_training_lowers_the_loss_and_evaluation_leaves_the_mode():
    data = digits(0)
    model = seeded(0, lambda: cnn(BatchNorm2d))
    losses = list(training.train(model, data.train_images, data.train_labels, rate=0.1, steps=60, seed=0))
    assert losses[-1] < losses[0] / 3
    assert training.accuracy(model, data.test_images, data.test_labels) > 0.8
    assert model.training


def test_steps_to_an_accuracy_are_those_of_the_first_look_that_has_it():
    assert steps_to(0.9, [0.5, 0.9, 0.8]) == 40
    assert steps_to(0.95, [0.5, 0.9]) == math.inf


def test_placement_moves_the_batch_norm_and_nothing_else():
    torch.manual_seed(0)
    names = {
        place: [type(m).__name__ for m in network("linear", "ReLU", place).modules() if not list(m.children())]
        for place in ("before", "after")
    }
    assert names["before"][1:4] == ["Linear", "BatchNorm1d", "ReLU"]
    assert names["after"][1:4] == ["Linear", "ReLU", "BatchNorm1d"]


def test_a_batch_of_one_image_is_legal_after_a_convolution_and_an_error_after_a_linear_layer():
    image = digits(0).train_images[:1]
    assert cnn(BatchNorm2d).train()(image).shape == (1, 10)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        mlp(BatchNorm1d, inputs=64).train()(image)


def double(number, by):
    return number * by


def test_a_sweep_in_processes_gives_what_one_in_this_process_does():
    arguments = [(n,) for n in range(5)]
    expected = {(n,): 2 * n for n in range(5)}
    assert experiment.sweep(double, arguments, quick=True, by=2) == expected
    assert experiment.sweep(double, arguments, quick=False, by=2) == expected


def test_bad_arguments_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--seeds", "0"])
    with pytest.raises(SystemExit):
        experiment.parse_arguments("x", None)
    assert "--seeds must be at least 1" in capsys.readouterr().err
