"""Claim: batch norm belongs before the activation; or after it.

Two networks, with batch norm before and after every activation, with sigmoids and with ReLUs: three linear layers of
100 units on MNIST, and two convolutions of 8 and 16 channels on scikit-learn's digits; 300 steps of 64 images. All
choose from the same learning rates, by median accuracy over seeds. Reported: accuracy on held-out images, 1000 of MNIST
and 500 digits.

Ioffe and Szegedy (2015, section 3.2) put it before, as that sum is "more Gaussian" than what comes out of an
activation; they give no figure for after.
"""

from __future__ import annotations

import itertools
from statistics import median

from matplotlib.figure import Figure
from torch import nn

from examples.data import digits, mnist
from examples.experiment import Result, main, sweep
from examples.figures import FIFTH, WITH, new_figure, write
from examples.networks import cnn, mlp, seeded
from examples.training import accuracy, train
from pybn.torch import BatchNorm1d, BatchNorm2d

NETWORKS = {"linear": (mlp, BatchNorm1d, mnist), "convolutions": (cnn, BatchNorm2d, digits)}
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "ReLU": nn.ReLU}
PLACES = {"before": WITH, "after": FIFTH}
RATES = [0.1, 0.5, 2.0]


def network(kind: str, activation: str, place: str) -> nn.Module:
    """One of the networks."""
    build, norm, _ = NETWORKS[kind]
    act = ACTIVATIONS[activation]
    if place == "before":
        return build(norm, act)
    return build(lambda channels: nn.Sequential(act(), norm(channels)), nn.Identity)


def job(kind: str, activation: str, place: str, rate: float, seed: int, steps: int) -> float:
    """Accuracy at the end."""
    data = NETWORKS[kind][2](seed)
    model = seeded(seed, lambda: network(kind, activation, place))
    for _ in train(model, data.train_images, data.train_labels, rate=rate, steps=steps, seed=seed):
        pass
    return accuracy(model, data.test_images, data.test_labels)


def run(quick: bool, seeds: int) -> Result:
    """Accuracies by network, activation, place and seed, at the best rate of each."""
    rates, steps = ([0.5], 5) if quick else (RATES, 300)
    settings = list(itertools.product(NETWORKS, ACTIVATIONS, PLACES))
    jobs = [(*setting, rate, seed) for setting in settings for rate in rates for seed in range(seeds)]
    found = sweep(job, jobs, quick=quick, steps=steps)
    result: Result = {"steps": steps, "rates": rates, "settings": []}
    for kind, activation, place in settings:
        runs = {rate: [found[kind, activation, place, rate, seed] for seed in range(seeds)] for rate in rates}
        best = max(rates, key=lambda rate: median(runs[rate]))
        names = {"network": kind, "activation": activation, "place": place}
        result["settings"].append({**names, "rate": best, "accuracies": runs[best]})
    return result


def plot(result: Result) -> Figure:
    """Every seed's accuracy, before and after beside each other."""
    found = {(s["network"], s["activation"], s["place"]): s["accuracies"] for s in result["settings"]}
    groups = list(itertools.product(NETWORKS, ACTIVATIONS))
    gains = [100 * (median(found[(*group, "after")]) - median(found[(*group, "before")])) for group in groups]
    title = f"After the activation instead of before: {min(gains):+.1f} to {max(gains):+.1f} points"
    figure, (axes,) = new_figure(title)
    for row, group in enumerate(groups):
        for side, (place, colour) in enumerate(PLACES.items()):
            values = found[(*group, place)]
            where = row + 0.3 * side - 0.15
            axes.plot([where] * len(values), values, "o", color=colour, alpha=0.5)
            axes.plot([where - 0.1, where + 0.1], [median(values)] * 2, color=colour, linewidth=3)
            write(axes, where, max(values), place, colour, right=0, up=11, align="center")
    axes.set_xticks(range(len(groups)), [f"{kind},\n{activation}" for kind, activation in groups])
    axes.set_ylabel("accuracy; points: seeds, bars: medians")
    axes.margins(y=0.15)
    return figure


if __name__ == "__main__":
    main("placement", __doc__, run, plot)
