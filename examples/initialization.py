"""Claim: with batch norm, initialization matters less.

Three hidden layers of 100 ReLUs on 4000 MNIST images for 250 steps of 64; every weight drawn with the same standard
deviation, from 0.01 to 1 (He's rule would give 0.05 to the first layer and 0.14 to the others), every bias 0. At each
of them both arms choose from the same learning rates, by median accuracy over seeds. Reported: accuracy on 1000
held-out images.

Ioffe and Szegedy (2015) promise that one may "be less careful about initialization", and give no figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import median

from matplotlib.figure import Figure
from torch import nn

from examples.data import mnist
from examples.experiment import Result, main, sweep
from examples.figures import WITH, WITHOUT, band, entitle, new_figure
from examples.networks import mlp, seeded
from examples.training import accuracy, train
from pybn.torch import BatchNorm1d

ARMS: dict[str, Callable[[int], nn.Module] | None] = {"without": None, "with": BatchNorm1d}
RATES = [0.003, 0.03, 0.3, 2.0]
SCALES = [0.01, 0.03, 0.1, 0.3, 1.0]


def network(arm: str, scale: float) -> nn.Module:
    """All of its linear layers drawn at one scale."""
    model = mlp(ARMS[arm])
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=scale)
            nn.init.zeros_(layer.bias)
    return model


def job(arm: str, scale: float, rate: float, seed: int, steps: int) -> float:
    """Accuracy at the end."""
    data = mnist(seed)
    model = seeded(seed, lambda: network(arm, scale))
    for _ in train(model, data.train_images, data.train_labels, rate=rate, steps=steps, seed=seed):
        pass
    return accuracy(model, data.test_images, data.test_labels)


def run(quick: bool, seeds: int) -> Result:
    """Accuracies by arm, scale and seed, at the best rate of that arm and scale."""
    scales, rates, steps = ([0.01, 0.1], [0.1], 10) if quick else (SCALES, RATES, 250)
    found = sweep(job, itertools.product(ARMS, scales, rates, range(seeds)), quick=quick, steps=steps)
    result: Result = {"steps": steps, "scales": scales, "rates": rates}
    for arm in ARMS:
        result[arm] = []
        for scale in scales:
            runs = {rate: [found[arm, scale, rate, seed] for seed in range(seeds)] for rate in rates}
            best = max(rates, key=lambda rate: median(runs[rate]))
            result[arm].append({"rate": best, "accuracies": runs[best]})
    return result


def plot(result: Result) -> Figure:
    """Accuracy over the scale."""
    figure, (axes,) = new_figure()
    scales = result["scales"]
    worst = {}
    for arm, colour in (("with", WITH), ("without", WITHOUT)):
        runs = [entry["accuracies"] for entry in result[arm]]
        band(axes, scales, list(zip(*runs, strict=True)), colour, f"{arm}\nbatch norm")
        worst[arm] = min(median(run) for run in runs)
    axes.set(
        xscale="log", ylim=(0, 1), xlabel="standard deviation of the initial weights",
        ylabel="accuracy on held-out images", title="the best learning rate at each; line: median, band: all seeds",
    )  # fmt: skip
    entitle(figure, f"From the worst scale: {worst['with']:.0%} with batch norm, {worst['without']:.0%} without")
    return figure


if __name__ == "__main__":
    main("initialization", __doc__, run, plot)
