"""Claim: batch norm allows higher learning rates.

A network of three hidden layers of 100 ReLUs, on 4000 MNIST images for 400 steps of 64, at learning rates from 0.01 to
20, with and without batch norm before every ReLU. Reported: accuracy on 1000 held-out images.

Ioffe and Szegedy (2015, section 4.2.1) train Inception at 5 and at 30 times the learning rate it has without batch
norm; without it, 5 times that rate already sent the parameters to machine infinity.
"""

from __future__ import annotations

import itertools
from statistics import median

from matplotlib.figure import Figure

from examples.data import mnist
from examples.experiment import Result, main, sweep
from examples.figures import WITH, WITHOUT, band, entitle, new_figure, write
from examples.networks import mlp, seeded
from examples.training import accuracy, train
from pybn.torch import BatchNorm1d

ARMS = {"without": None, "with": BatchNorm1d}
RATES = [0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 5.0, 20.0]


def job(arm: str, rate: float, seed: int, steps: int) -> float:
    """Accuracy at the end."""
    data = mnist(seed)
    model = seeded(seed, lambda: mlp(ARMS[arm]))
    for _ in train(model, data.train_images, data.train_labels, rate=rate, steps=steps, seed=seed):
        pass
    return accuracy(model, data.test_images, data.test_labels)


def run(quick: bool, seeds: int) -> Result:
    """Accuracies by arm, learning rate and seed."""
    rates = [0.1, 2.0] if quick else RATES
    found = sweep(job, itertools.product(ARMS, rates, range(seeds)), quick=quick, steps=20 if quick else 400)
    return {
        "rates": rates,
        **{arm: [[found[arm, rate, seed] for seed in range(seeds)] for rate in rates] for arm in ARMS},
    }


def plot(result: Result) -> Figure:
    """Accuracy over the learning rate."""
    rates = result["rates"]
    figure, (axes,) = new_figure()
    highest = {}
    for arm, colour in (("with", WITH), ("without", WITHOUT)):
        band(axes, rates, list(zip(*result[arm], strict=True)), colour)
        write(
            axes,
            rates[1],
            median(result[arm][1]),
            f"{arm} batch norm",
            colour,
            right=10,
            up=10 if arm == "with" else -14,
        )
        learned = [rate for rate, accuracies in zip(rates, result[arm], strict=True) if median(accuracies) > 0.9]
        highest[arm] = max(learned, default=0)
    entitle(figure, f"It learns at rates up to {highest['with']:g} with batch norm, {highest['without']:g} without")
    axes.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="accuracy on held-out images",
        ylim=(0, 1.06),
        title="line: median, band: all seeds",
    )
    return figure


if __name__ == "__main__":
    main("learning_rates", __doc__, run, plot)
