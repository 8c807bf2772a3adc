"""Claim: batch norm smooths the loss surface, and that is not by making the distributions of activations stable.

As Santurkar et al. (2018): at every tenth step of training, how far does the loss range along the gradient, up to four
learning rates away, and how far does the gradient move there? Three networks of three hidden layers of 100 ReLUs, on
MNIST, 200 steps of 64: without batch norm, with it, and with normal noise added after it, whose mean and deviation are
drawn anew for every unit in every step. All three at each of the same learning rates; the figure shows the rate that is
best for the network *without* batch norm.

Reported of each: the range of the loss, the largest change of the gradient, the same in units of the gradient's length,
how far the mean input of the last activation's units moves in a step (in their standard deviations), and accuracy on
1000 held-out images.

Santurkar et al. show the first two as bands in figures, for VGG on CIFAR-10; the text has no numbers.
"""

from __future__ import annotations

import copy
import itertools
from statistics import median
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data import mnist
from examples.experiment import Result, main, spread, sweep
from examples.figures import THIRD, WITH, WITHOUT, band, new_figure
from examples.networks import mlp, seeded
from examples.training import accuracy, batches, train
from pybn.torch import BatchNorm1d

RATES = [0.1, 0.3, 1.0]
STRIDES = [0.5, 1.0, 2.0, 4.0]  # learning rates along the gradient
EVERY = 10  # steps between two looks
MEASURES = ("loss range", "gradient change", "relative gradient change", "drift")


class NoisyBatchNorm(BatchNorm1d):
    """Batch norm, and in training normal noise of other mean (up to 0.5) and deviation (1 to 1.25) in every call."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Input has shape (N, C)."""
        y = super().forward(input, residual)
        if not self.training:
            return y
        mean = torch.empty(self.num_features).uniform_(-0.5, 0.5)
        deviation = torch.empty(self.num_features).uniform_(1, 1.25)
        return y + mean + deviation * torch.randn_like(y)


ARMS = {"without": None, "with": BatchNorm1d, "noisy": NoisyBatchNorm}
COLOURS = {"without": WITHOUT, "with": WITH, "noisy": THIRD}
LABELS = {"without": "without", "with": "with batch norm", "noisy": "with, and noise"}


class Point(NamedTuple):
    """Loss of a batch, its gradient, and what goes into the last activation."""

    loss: float
    gradient: list[Tensor]
    hidden: Tensor


def look_at(model: nn.Sequential, images: Tensor, labels: Tensor, seed: int) -> Point:
    """The surface at a model's parameters; the seed is of the noise, which is part of the surface."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden = model[:-2](images)
        loss = F.cross_entropy(model[-2:](hidden), labels)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return Point(loss.item(), list(gradient), hidden.detach())


def norm(tensors: list[Tensor]) -> float:
    """Euclidean length of all of them together."""
    return sum(float(t.double().square().sum()) for t in tensors) ** 0.5


def along_the_gradient(
    model: nn.Module, here: Point, images: Tensor, labels: Tensor, rate: float, seed: int
) -> list[float]:
    """The range of the loss and the largest change of the gradient, absolute and relative, up to there."""
    losses, changes = [here.loss], []
    for stride in STRIDES:
        there = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, slope in zip(there.parameters(), here.gradient, strict=True):
                parameter -= stride * rate * slope
        point = look_at(there, images, labels, seed)
        losses.append(point.loss)
        changes.append(norm([a - b for a, b in zip(point.gradient, here.gradient, strict=True)]))
    return [max(losses) - min(losses), max(changes), max(changes) / norm(here.gradient)]


def drift(before: Tensor, after: Tensor) -> float:
    """How far the means of the same batch's units move in a step, in their standard deviations; mean over units."""
    deviation = before.std(0)
    used = deviation > 1e-6  # of units that are not dead
    return float(((after.mean(0) - before.mean(0)).abs() / deviation)[used].mean())


def job(arm: str, rate: float, seed: int, steps: int) -> dict[str, list[float]]:
    """Every measure at every look, and the accuracy at the end."""
    data = mnist(seed)
    model = seeded(seed, lambda: mlp(ARMS[arm]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        training = train(model, data.train_images, data.train_labels, rate=rate, steps=steps, seed=seed)
        looks = []
        for step, batch in enumerate(batches(len(data.train_images), 64, steps, seed)):
            images, labels = data.train_images[batch], data.train_labels[batch]
            if step % EVERY == 0:
                model.train()
                here = look_at(copy.deepcopy(model), images, labels, seed=step)
                found = along_the_gradient(copy.deepcopy(model), here, images, labels, rate, seed=step)
                next(training)
                after = look_at(copy.deepcopy(model), images, labels, seed=step + 1)
                looks.append([*found, drift(here.hidden, after.hidden)])
            else:
                next(training)
    measured = {name: list(values) for name, values in zip(MEASURES, zip(*looks, strict=True), strict=True)}
    return {**measured, "accuracy": [accuracy(model, data.test_images, data.test_labels)]}


def run(quick: bool, seeds: int) -> Result:
    """Medians over looks by rate, arm and seed; the curves at the best rate of the network without batch norm."""
    rates, steps = ([0.3], 2 * EVERY) if quick else (RATES, 200)
    found = sweep(job, itertools.product(ARMS, rates, range(seeds)), quick=quick, steps=steps)
    result: Result = {"steps": steps, "every": EVERY, "rates": rates, "medians": {}, "curves": {}}
    for rate, arm in itertools.product(rates, ARMS):
        runs = [found[arm, rate, seed] for seed in range(seeds)]
        medians = {name: spread([median(run[name]) for run in runs]) for name in runs[0]}
        result["medians"].setdefault(f"{rate:g}", {})[arm] = medians
    best = max(rates, key=lambda rate: result["medians"][f"{rate:g}"]["without"]["accuracy"]["median"])
    result["rate"] = best
    for arm, name in itertools.product(ARMS, MEASURES):
        result["curves"].setdefault(arm, {})[name] = [found[arm, best, seed][name] for seed in range(seeds)]
    return result


def plot(result: Result) -> Figure:
    """The range of the loss and the change of the gradient over training."""
    medians = result["medians"][f"{result['rate']:g}"]
    ratio = medians["without"]["loss range"]["median"] / medians["with"]["loss range"]["median"]
    noisy = medians["without"]["loss range"]["median"] / medians["noisy"]["loss range"]["median"]
    title = f"Along the gradient the loss ranges {ratio:.2g} times less with batch norm, {noisy:.2g} with noise added"
    figure, panels = new_figure(title, 2, width=8.5)
    for axes, name in zip(panels, MEASURES, strict=False):
        for arm, colour in COLOURS.items():
            runs = result["curves"][arm][name]
            looks = [result["every"] * look for look in range(len(runs[0]))]
            band(axes, looks, runs, colour, LABELS[arm])
        axes.set(xlabel=f"step, learning rate {result['rate']:g}", yscale="log")
    panels[0].set_title("range of the loss within 4 steps' length")
    panels[1].set_title("change of the gradient there")
    return figure


if __name__ == "__main__":
    main("smoothness", __doc__, run, plot)
