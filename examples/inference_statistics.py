"""Claim: what normalizes in evaluation matters; moving averages can be stale, re-estimated statistics are not.

Two convolutions with batch norm are trained on 4000 MNIST images in batches of 64. Every 20 steps the same network
classifies 1000 held-out images by several statistics: moving averages with a momentum of 0.1 (the default in PyTorch)
and of 0.01 (the default in Keras, called 0.99 there), which lags behind a short training; those that `pybn.reestimate`
finds in one pass over the training images; and those of the held-out batch itself, of 50 images in random order or
sorted by class. Every statistic is at its best of the same learning rates.

Also measured, in float64: re-estimated statistics against those of everything that arrived, put together.

Wu and Johnson (2021, section 3) train ResNet-50 on ImageNet in batches of 8192: while the learning rate is high the
validation error by moving averages jumps about, that by re-estimated statistics does not; in the end they are as good.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import pybn
from examples.data import mnist
from examples.experiment import Result, main, sweep
from examples.figures import FIFTH, FOURTH, GREY, THIRD, WITH, band, new_figure
from examples.networks import cnn, seeded
from examples.training import accuracy, train
from pybn.torch import BatchNorm2d

STATISTICS = ("moving average, 0.1", "moving average, 0.01", "re-estimated", "of the batch", "of the batch, sorted")
RATES = [0.1, 0.3, 1.0]
EVERY = 20  # steps between two looks at the accuracy


def network(momentum: float, seed: int) -> nn.Module:
    """Two convolutions with batch norm."""
    return seeded(seed, lambda: cnn(lambda channels: BatchNorm2d(channels, momentum=momentum), size=28))


@torch.inference_mode()
def by_batch(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy if every batch of 50 is normalized with its own statistics."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    for norm in norms:  # as without running statistics, so that none moves
        norm.track_running_stats = False
        norm.train()
    predicted = torch.cat([model(part).argmax(1) for part in images.split(50)])
    for norm in norms:
        norm.track_running_stats = True
    return (predicted == labels).double().mean().item()


def looks(momentum: float, rate: float, seed: int, steps: int) -> Iterator[nn.Module]:
    """The network after every `EVERY` steps. Momentum plays no part in what its weights become."""
    data, model = mnist(seed), network(momentum, seed)
    losses = train(model, data.train_images, data.train_labels, rate=rate, steps=steps, seed=seed)
    for step, _ in enumerate(losses, 1):
        if step % EVERY == 0:
            yield model


def job(rate: float, seed: int, steps: int) -> dict[str, list[float]]:
    """Accuracies by statistic after every `EVERY` steps."""
    train_images, _, images, labels = mnist(seed)
    order = labels.argsort(stable=True)
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for model in looks(0.01, rate, seed, steps):
        found["moving average, 0.01"].append(accuracy(model, images, labels))
    for model in looks(0.1, rate, seed, steps):
        found["moving average, 0.1"].append(accuracy(model, images, labels))
        found["of the batch"].append(by_batch(model, images, labels))
        found["of the batch, sorted"].append(by_batch(model, images[order], labels[order]))
        reestimated = pybn.reestimate(copy.deepcopy(model), train_images.split(250)).model
        found["re-estimated"].append(accuracy(reestimated, images, labels))
    return found


@torch.no_grad()
def pooling_error(seed: int, steps: int, count: int) -> float:
    """Re-estimated statistics against those of the concatenated data, in deviations; largest difference, float64."""
    data = mnist(seed)
    model = network(0.1, seed).double()
    images = data.train_images[:count].double()
    with torch.enable_grad():
        for _ in train(model, images, data.train_labels[:count], rate=0.3, steps=steps, seed=seed):
            pass
    batches = images.split(300)  # the last has 100
    arrived = arrivals(model, batches)
    found = pybn.reestimate(model, batches).statistics
    differences = []
    for name, x in arrived.items():
        mean, deviation = x.mean(axis=(0, 2, 3)), x.std(axis=(0, 2, 3))
        differences.append(np.abs((found[name].mean - mean) / deviation).max())
        differences.append(np.abs(found[name].var / deviation**2 - 1).max())
    return float(max(differences))


def arrivals(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """All that arrives at each batch norm while every batch is normalized with its own statistics."""
    arrived: dict[str, list[np.ndarray]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: arrived.setdefault(name, []).append(inputs[0].numpy())
        )
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm2d)
    ]
    model.train()
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(parts) for name, parts in arrived.items()}


def run(quick: bool, seeds: int) -> Result:
    """By statistic: accuracies by seed and look at the best rate; the largest error of pooling."""
    rates, steps = ([0.3], EVERY) if quick else (RATES, 10 * EVERY)
    found = sweep(job, itertools.product(rates, range(seeds)), quick=quick, steps=steps)
    of_pooling = {"steps": 2, "count": 400} if quick else {"steps": EVERY, "count": 4000}
    errors = sweep(pooling_error, [(seed,) for seed in range(seeds)], quick=quick, **of_pooling)
    result: Result = {"steps": steps, "every": EVERY, "rates": rates, "pooling error": max(errors.values())}
    for name in STATISTICS:
        runs = {rate: [found[rate, seed][name] for seed in range(seeds)] for rate in rates}
        best = max(rates, key=lambda rate: median(run[-1] for run in runs[rate]))
        result[name] = {"rate": best, "accuracies": runs[best], "median": median(run[-1] for run in runs[best])}
    return result


def plot(result: Result) -> Figure:
    """Accuracy over steps, by statistic."""
    stale, fresh = (
        [median(at) for at in zip(*result[name]["accuracies"], strict=True)]
        for name in ("moving average, 0.01", "re-estimated")
    )
    figure, (axes,) = new_figure(
        f"A slow moving average is stale: {stale[0]:.1%} after {result['every']} steps,\n"
        f"{fresh[0]:.1%} with re-estimated statistics; after {result['steps']} {stale[-1]:.1%} and {fresh[-1]:.1%}",
        width=7.2,
    )
    colours = dict(zip(STATISTICS, (FIFTH, GREY, WITH, THIRD, FOURTH), strict=True))
    for name, colour in colours.items():
        runs = result[name]["accuracies"]
        steps = [result["every"] * (number + 1) for number in range(len(runs[0]))]
        band(axes, steps, runs, colour)
        axes.plot(steps[-1], result[name]["median"], "o", color=colour, label=f"{name}: {result[name]['median']:.1%}")
    axes.set(xlabel="step", ylabel="accuracy on held-out images")
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    main("inference_statistics", __doc__, run, plot)
