"""Claim: with virtual batch norm an example's output does not depend on its batch-mates.

Two convolutions are trained on 4000 MNIST images in batches of 64, with batch norm, and with virtual batch norm
(Salimans et al. 2016, section 3.4), whose reference batch is the first 64 training images. Then 1000 held-out images
are cut into batches twice, in two random orders, and normalized as in training: with statistics of their batch, or of
the reference batch and of themselves. Reported by batch size: how many images get another class in the second order.
And of the layers alone, on what arrives at the first of them: how many output values differ in any bit. The paper has
no figure for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data import mnist
from examples.experiment import Result, main, sweep
from examples.figures import THIRD, WITH, band, new_figure
from examples.networks import cnn, seeded
from examples.training import batches
from pybn.torch import BatchNorm2d, VirtualBatchNorm

ARMS = {"batch norm": BatchNorm2d, "virtual batch norm": VirtualBatchNorm}
SIZES = [4, 8, 16, 32, 64]
REFERENCE, RATE = 64, 0.1


def refer(model: nn.Sequential, reference: Tensor) -> None:
    """Let a reference batch pass all layers, as every step of training needs anew."""
    for layer in model:
        reference = layer.reference_forward(reference) if isinstance(layer, VirtualBatchNorm) else layer(reference)


def trained(arm: str, seed: int, steps: int) -> nn.Sequential:
    """A network in training mode, with its last reference batch."""
    data = mnist(seed)
    model = seeded(seed, lambda: cnn(ARMS[arm], size=28)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    reference = data.train_images[:REFERENCE]
    for batch in batches(len(data.train_images), 64, steps, seed):
        if arm == "virtual batch norm":
            refer(model, reference)
        loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        if arm == "virtual batch norm":
            refer(model, reference)
    return model


def in_batches(layer: Callable[[Tensor], Tensor], x: Tensor, size: int, order: Tensor) -> Tensor:
    """What a layer or network makes of batches in that order, in the order of x."""
    y = torch.cat([layer(part) for part in x[order].split(size)])
    return y[order.argsort()]


def orders(count: int, seed: int) -> Iterator[Tensor]:
    """Two random ones."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        yield torch.randperm(count, generator=generator)


def job(arm: str, seed: int, steps: int, sizes: list[int]) -> Result:
    """By batch size: share of images that change class, and of the first layer's values that change a bit."""
    model, images = trained(arm, seed, steps), mnist(seed).test_images
    convolution, norm = model[0], model[1]
    classes, bits = [], []
    with torch.no_grad():
        arriving = convolution(images)
        for size in sizes:
            first, second = (in_batches(model, images, size, order) for order in orders(len(images), seed))
            classes.append((first.argmax(1) != second.argmax(1)).double().mean().item())
            first, second = (in_batches(norm, arriving, size, order) for order in orders(len(images), seed))
            bits.append((first.view(torch.int32) != second.view(torch.int32)).double().mean().item())
    return {"classes": classes, "bits": bits}


def run(quick: bool, seeds: int) -> Result:
    """By arm: what `job` gives, by seed."""
    steps, sizes = (2, [64]) if quick else (100, SIZES)
    found = sweep(job, itertools.product(ARMS, range(seeds)), quick=quick, steps=steps, sizes=sizes)
    result: Result = {"steps": steps, "sizes": sizes}
    for arm in ARMS:
        jobs = [found[arm, seed] for seed in range(seeds)]
        result[arm] = {what: [job[what] for job in jobs] for what in ("classes", "bits")}
    return result


def plot(result: Result) -> Figure:
    """Share of images whose class depends on their batch-mates."""
    at = len(result["sizes"]) // 2
    moved = median(run[at] for run in result["batch norm"]["classes"])
    virtual = max(itertools.chain(*result["virtual batch norm"]["classes"]))
    figure, (axes,) = new_figure(
        f"In batches of {result['sizes'][at]} other batch-mates change {moved:.1%} of classes,\n"
        f"with virtual batch norm {virtual:.1%}"
    )
    percent = {arm: [[100 * share for share in run] for run in result[arm]["classes"]] for arm in ARMS}
    band(axes, result["sizes"], percent["batch norm"], WITH, "batch norm\nas in training", up=8)
    bits = max(itertools.chain(*result["virtual batch norm"]["bits"]))
    label = "virtual batch norm,\nevery bit the same" if bits == 0 else "virtual batch norm"
    band(axes, result["sizes"], percent["virtual batch norm"], THIRD, label)
    axes.set(xscale="log", xlabel="batch size", ylabel="% of images that change class")
    axes.set_xticks(result["sizes"], [str(size) for size in result["sizes"]], minor=False)
    axes.minorticks_off()
    return figure


if __name__ == "__main__":
    main("batch_mates", __doc__, run, plot)
