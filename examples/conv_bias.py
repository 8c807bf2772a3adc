"""Claim: the bias of a convolution before a batch norm is redundant.

Batch norm subtracts the mean, and the bias with it; its own bias takes that place (Ioffe and Szegedy 2015, section
3.2). Two convolutions are trained on scikit-learn's digits in batches of 64, without and with batch norm, in float32
and float64. Reported: the largest gradient among a convolution's biases as a share of the largest among its weights, at
every step. Also: the same network with batch norm, but without those biases, trained on the same batches in float64,
and how far its losses are from those with biases.
"""

from __future__ import annotations

import itertools
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import nn

from examples.data import digits
from examples.experiment import Result, main, sweep
from examples.figures import THIRD, WITH, WITHOUT, band, new_figure
from examples.networks import cnn, seeded
from examples.training import train
from pybn.torch import BatchNorm2d

ARMS = {
    "without batch norm": (None, torch.float32),
    "before batch norm, float32": (BatchNorm2d, torch.float32),
    "before batch norm, float64": (BatchNorm2d, torch.float64),
}
RATE = 0.3
BIASED, UNBIASED = True, False


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """All of them."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def gradient_ratio(model: nn.Module) -> float:
    """Of biases to weights: the largest of each convolution, and of all convolutions."""
    return max(float(conv.bias.grad.abs().max() / conv.weight.grad.abs().max()) for conv in convolutions(model))


def gradients(arm: str, seed: int, steps: int) -> list[float]:
    """The ratio at every step."""
    norm, dtype = ARMS[arm]
    data = digits(seed)
    model = seeded(seed, lambda: cnn(norm)).to(dtype)
    losses = train(model, data.train_images.to(dtype), data.train_labels, rate=RATE, steps=steps, seed=seed)
    return [gradient_ratio(model) for _ in losses]


def losses(biased: bool, seed: int, steps: int) -> list[float]:
    """Of a network with batch norm, its convolutions with biases or without."""
    data = digits(seed)
    model = seeded(seed, lambda: cnn(BatchNorm2d)).double()
    if not biased:
        for conv in convolutions(model):
            conv.bias = None
    return list(train(model, data.train_images.double(), data.train_labels, rate=RATE, steps=steps, seed=seed))


def run(quick: bool, seeds: int) -> Result:
    """Ratios by arm, seed and step; the largest difference of losses with and without biases."""
    steps = 5 if quick else 200
    ratios = sweep(gradients, itertools.product(ARMS, range(seeds)), quick=quick, steps=steps)
    curves = sweep(losses, itertools.product((BIASED, UNBIASED), range(seeds)), quick=quick, steps=steps)
    differences = [
        max(abs(a - b) for a, b in zip(curves[BIASED, seed], curves[UNBIASED, seed], strict=True))
        for seed in range(seeds)
    ]
    return {
        "steps": steps,
        "rate": RATE,
        "ratios": {arm: [ratios[arm, seed] for seed in range(seeds)] for arm in ARMS},
        "largest difference of losses": max(differences),
    }


def plot(result: Result) -> Figure:
    """Ratios over steps."""
    typical = {arm: median(itertools.chain(*runs)) for arm, runs in result["ratios"].items()}
    figure, (axes,) = new_figure(
        "Before batch norm a convolution's bias has no gradient:\n"
        f"{typical['before batch norm, float64']:.0e} of the weights' in float64, mere rounding"
    )
    for (arm, runs), colour in zip(result["ratios"].items(), (WITHOUT, WITH, THIRD), strict=True):
        band(axes, range(1, result["steps"] + 1), runs, colour, arm.replace(", ", ",\n"))
    axes.set(yscale="log", xlabel="step", ylabel="largest gradient, bias / weight")
    return figure


if __name__ == "__main__":
    main("conv_bias", __doc__, run, plot)
