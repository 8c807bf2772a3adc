"""Claim: batch norm regularizes, and can replace dropout.

Batch norm and dropout (of one half) after every hidden layer, each with and without the other, in a network of two
hidden layers of 200 ReLUs on 500 MNIST images, which it can learn by heart: 600 steps of 32, 40 epochs. All four choose
from the same learning rates, by median accuracy on 1000 other images. Reported: accuracy on the 500, and on 1000 images
that neither training nor choice has seen.

Ioffe and Szegedy (2015): batch norm acts "as a regularizer, in some cases eliminating the need for Dropout". Li et al.
(2019) explain why both together can be worse than either: dropout shifts the variance that batch norm expects in
evaluation.
"""

from __future__ import annotations

import itertools
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import nn

from examples.data import mnist
from examples.experiment import Result, main, sweep
from examples.figures import GREY, WITH, WITHOUT, new_figure, write
from examples.networks import mlp, seeded
from examples.training import evaluate, train
from pybn.torch import BatchNorm1d

ARMS = {
    "neither": (None, 0.0),
    "dropout": (None, 0.5),
    "batch norm": (BatchNorm1d, 0.0),
    "both": (BatchNorm1d, 0.5),
}
RATES = [0.1, 0.3, 1.0]
TRAINED_ON, CHOSEN_ON = slice(0, 500), slice(500, 1500)


def job(arm: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """Accuracies and losses on the images of training, choice and test."""
    data = mnist(seed)
    images, labels = data.train_images[TRAINED_ON], data.train_labels[TRAINED_ON]
    norm, probability = ARMS[arm]

    def activation() -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Dropout(probability))

    model = seeded(seed, lambda: mlp(norm, activation, hidden=(200, 200)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        for _ in train(model, images, labels, rate=rate, steps=steps, seed=seed, batch_size=32):
            pass
    measured = {}
    for what, some in (
        ("train", (images, labels)),
        ("choice", (data.train_images[CHOSEN_ON], data.train_labels[CHOSEN_ON])),
        ("test", (data.test_images, data.test_labels)),
    ):
        measured[what], measured[f"{what} loss"] = evaluate(model, *some)
    return measured


def run(quick: bool, seeds: int) -> Result:
    """What every seed measured, by arm, at the arm's best rate."""
    rates, steps = ([0.1], 10) if quick else (RATES, 600)
    found = sweep(job, itertools.product(ARMS, rates, range(seeds)), quick=quick, steps=steps)
    result: Result = {"steps": steps, "rates": rates, "arms": {}}
    for arm in ARMS:
        runs = {rate: [found[arm, rate, seed] for seed in range(seeds)] for rate in rates}
        best = max(rates, key=lambda rate: median(run["choice"] for run in runs[rate]))
        measured = {what: [run[what] for run in runs[best]] for what in runs[best][0]}
        result["arms"][arm] = {"rate": best, **measured}
    return result


def plot(result: Result) -> Figure:
    """Every seed's accuracy on images it was trained on and on others, one row an arm."""
    test = {arm: median(entry["test"]) for arm, entry in result["arms"].items()}
    gain = {arm: 100 * (test[arm] - test["neither"]) for arm in ("batch norm", "dropout", "both")}
    title = "Points gained: " + ", ".join(f"{arm} {points:+.1f}" for arm, points in gain.items())
    figure, (axes,) = new_figure(title, height=3)
    rows = list(reversed(result["arms"]))
    for row, arm in enumerate(rows):
        entry = result["arms"][arm]
        colour = WITH if ARMS[arm][0] else WITHOUT
        axes.plot([test[arm], median(entry["train"])], [row, row], color=colour, linewidth=2, alpha=0.4)
        axes.plot(entry["test"], [row] * len(entry["test"]), "o", color=colour)
        axes.plot(entry["train"], [row] * len(entry["train"]), "|", color=GREY, markersize=12)
        write(axes, test[arm], row, f"{test[arm]:.1%}", colour, right=0, up=11, align="center")
    write(axes, test["neither"], len(rows) - 1, "held-out images", WITHOUT, right=0, up=26, align="center")
    write(
        axes,
        median(result["arms"]["neither"]["train"]),
        len(rows) - 1,
        "the 500 trained on",
        GREY,
        right=6,
        up=26,
        align="right",
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="accuracy; a point is a seed, the number the median", ylim=(-0.5, len(rows) - 0.2))
    return figure


if __name__ == "__main__":
    main("regularization", __doc__, run, plot)
