"""Claim: in a convolution, statistics belong to the channel, not to the pixel.

A convolution computes a channel by the same weights everywhere, so Ioffe and Szegedy (2015, section 3.2) let all pixels
of a channel share mean, variance, weight and bias; in a dense layer every feature has its own. Here two convolutions
are trained on 4000 MNIST images in batches of 64, without batch norm, with statistics of every channel, and with
statistics of every pixel of every channel, each at the best of the same learning rates. Reported: accuracy on 1000
held-out images, also when these are moved to the side, which convolutions should care little about. The paper has no
figure for it.
"""

from __future__ import annotations

import itertools
from statistics import median

from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data import mnist
from examples.experiment import Result, main, sweep
from examples.figures import THIRD, WITH, WITHOUT, band, new_figure
from examples.networks import seeded
from examples.training import accuracy, train
from pybn.torch import BatchNorm1d, BatchNorm2d

ARMS = ("without", "channel", "pixel")
RATES = [0.03, 0.1, 0.3, 1.0]
SHIFTS = [0, 1, 2, 3, 4]  # pixels


def norm(arm: str, channels: int, size: int) -> list[nn.Module]:
    """Layers that normalize (N, channels, size, size)."""
    if arm == "without":
        return []
    if arm == "channel":
        return [BatchNorm2d(channels)]
    features = channels * size**2
    return [nn.Flatten(), BatchNorm1d(features), nn.Unflatten(1, (channels, size, size))]


def network(arm: str) -> nn.Sequential:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), *norm(arm, 8, 14), nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1), *norm(arm, 16, 7), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip


def moved(images: Tensor, pixels: int) -> Tensor:
    """Images moved to the right; what enters is black."""
    return F.pad(images, (pixels, 0))[..., : images.shape[-1]]


def job(arm: str, rate: float, seed: int, steps: int) -> list[float]:
    """Accuracies on held-out images moved by `SHIFTS`."""
    data = mnist(seed)
    model = seeded(seed, lambda: network(arm))
    for _ in train(model, data.train_images, data.train_labels, rate=rate, steps=steps, seed=seed):
        pass
    return [accuracy(model, moved(data.test_images, pixels), data.test_labels) for pixels in SHIFTS]


def run(quick: bool, seeds: int) -> Result:
    """By arm: accuracies by seed and shift, at the best rate for images that are not moved; numbers of statistics."""
    rates, steps = ([0.3], 10) if quick else (RATES, 250)
    found = sweep(job, itertools.product(ARMS, rates, range(seeds)), quick=quick, steps=steps)
    result: Result = {"steps": steps, "rates": rates, "shifts": SHIFTS}
    for arm in ARMS:
        runs = {rate: [found[arm, rate, seed] for seed in range(seeds)] for rate in rates}
        best = max(rates, key=lambda rate: median(run[0] for run in runs[rate]))
        means = sum(len(values) for name, values in network(arm).named_buffers() if name.endswith("running_mean"))
        result[arm] = {"rate": best, "accuracies": runs[best], "means": means}
    return result


def plot(result: Result) -> Figure:
    """Accuracy over shift."""
    channel, pixel = (result[arm]["means"] for arm in ("channel", "pixel"))
    labels = {
        "channel": (f"of a channel: {channel} means", WITH, 4),
        "pixel": (f"of a pixel: {pixel} means", THIRD, 2),
        "without": ("without batch norm", WITHOUT, -8),
    }
    middle = {arm: [median(at) for at in zip(*result[arm]["accuracies"], strict=True)] for arm in labels}
    figure, (axes,) = new_figure(
        f"Statistics of {channel} channels do as well as of {pixel} pixels:\n"
        f"{middle['channel'][0]:.1%} and {middle['pixel'][0]:.1%}; of images moved by {result['shifts'][-1]} pixels "
        f"{middle['channel'][-1]:.0%} and {middle['pixel'][-1]:.0%}",
        width=7.2,
    )
    for arm, (label, colour, up) in labels.items():
        band(axes, result["shifts"], result[arm]["accuracies"], colour, label, up=up)
    axes.set(xlabel="pixels by which held-out images are moved", xticks=result["shifts"], ylim=(0, 1))
    axes.set_ylabel("accuracy, median and range")
    return figure


if __name__ == "__main__":
    main("per_channel", __doc__, run, plot)
