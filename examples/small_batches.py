"""Claim: small batches hurt batch norm, and its relatives that do not live on the batch alone hurt less.

A network of two convolutions (8 and 16 channels, each halving the image) on scikit-learn's digits, 150 steps of 1, 2, 4
and 32 images, with nothing after the convolutions, batch norm, ghost batch norm (parts of at least 4 images), batch
renormalization (rmax to 3 and dmax to 5 within 100 steps) and virtual batch norm (a reference batch of 32). At each
batch size each chooses from the same learning rates, by median accuracy over seeds. Reported: accuracy on 500 held-out
images. A smaller batch sees fewer images in 150 steps, so compare what is above one another, not side by side.

A batch of 1 is no error here, as a channel has 16 or 4 values in one image; after a linear layer it would be.

Ioffe (2017): with the statistics of 4 images Inception reaches 0.742 on ImageNet with batch norm, and 0.765 with batch
renormalization; with those of 32, 0.783 and 0.785.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import median

from matplotlib.figure import Figure
from torch import Tensor, nn

import pybn
from examples.data import Split, digits
from examples.experiment import Result, main, sweep
from examples.figures import FIFTH, FOURTH, THIRD, WITH, WITHOUT, new_figure, write
from examples.networks import cnn, seeded
from examples.training import accuracy, train
from pybn.torch import BatchNorm2d, BatchRenorm, GhostBatchNorm, VirtualBatchNorm

BATCH_SIZES = [1, 2, 4, 32]
RATES = [0.01, 0.05, 0.25, 1.25]


def renorm(channels: int) -> nn.Module:
    """Batch norm at first, then more and more corrected, as in the paper's section 4.2 on a shorter schedule."""
    return BatchRenorm(channels, momentum=0.1, rmax=pybn.Ramp(1, 3, 25, 100), dmax=pybn.Ramp(0, 5, 25, 100))


class WithReference(nn.Module):
    """A network with virtual batch norms: the reference batch goes first, through the weights as they are now."""

    def __init__(self, network: nn.Sequential, reference: Tensor) -> None:
        super().__init__()
        self.network, self.reference = network, reference

    def forward(self, x: Tensor) -> Tensor:
        """Logits, of which none depends on the other images in x."""
        reference = self.reference
        for layer in self.network[:-2]:
            normalizes = isinstance(layer, VirtualBatchNorm)
            reference = layer.reference_forward(reference) if normalizes else layer(reference)
        return self.network(x)


ARMS: dict[str, Callable[[Split], nn.Module]] = {
    "none": lambda _: cnn(None),
    "batch norm": lambda _: cnn(BatchNorm2d),
    "ghost": lambda _: cnn(lambda channels: GhostBatchNorm(channels, 4)),
    "renorm": lambda _: cnn(renorm),
    "virtual": lambda data: WithReference(cnn(VirtualBatchNorm), data.train_images[:32]),
}
COLOURS = dict(zip(ARMS, (WITHOUT, WITH, FIFTH, FOURTH, THIRD), strict=True))


def job(arm: str, batch_size: int, rate: float, seed: int, steps: int) -> float:
    """Accuracy at the end."""
    data = digits(seed)
    model = seeded(seed, lambda: ARMS[arm](data))
    losses = train(
        model, data.train_images, data.train_labels, rate=rate, steps=steps, seed=seed, batch_size=batch_size
    )
    for _ in losses:
        pass
    return accuracy(model, data.test_images, data.test_labels)


def run(quick: bool, seeds: int) -> Result:
    """Accuracies by arm, batch size and seed, at the best rate of that arm and batch size."""
    rates, steps = ([0.05], 3) if quick else (RATES, 150)
    found = sweep(job, itertools.product(ARMS, BATCH_SIZES, rates, range(seeds)), quick=quick, steps=steps)
    result: Result = {"steps": steps, "rates": rates, "batch_sizes": BATCH_SIZES, "arms": {}}
    for arm, batch_size in itertools.product(ARMS, BATCH_SIZES):
        runs = {rate: [found[arm, batch_size, rate, seed] for seed in range(seeds)] for rate in rates}
        best = max(rates, key=lambda rate: median(runs[rate]))
        result["arms"].setdefault(arm, []).append({"rate": best, "accuracies": runs[best]})
    return result


def plot(result: Result) -> Figure:
    """Accuracy over the batch size."""
    sizes = result["batch_sizes"]
    arms = result["arms"]
    single = {arm: median(arms[arm][sizes.index(1)]["accuracies"]) for arm in arms if arm != "ghost"}  # batch norm's
    outcomes = [f"{arm} {reached:.0%}" for arm, reached in single.items()]
    title = f"Single images: {', '.join(outcomes[:2])},\n{', '.join(outcomes[2:])}"
    figure, (axes,) = new_figure(title)
    for number, (arm, entries) in enumerate(arms.items()):
        places = [place + 0.12 * (number - 2) for place in range(len(sizes))]
        middles = [median(entry["accuracies"]) for entry in entries]
        for place, middle, entry in zip(places, middles, entries, strict=True):
            reached = entry["accuracies"]
            axes.plot([place, place], [min(reached), max(reached)], color=COLOURS[arm], alpha=0.4)
            axes.plot(place, middle, "o", color=COLOURS[arm])
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set(xlabel=f"images in a batch, {result['steps']} steps", ylabel="accuracy on held-out images")
    lowest = axes.get_ylim()[0]
    for number, arm in enumerate(arms):  # where nothing is: larger batches reach more
        write(axes, 2.6, lowest, arm, COLOURS[arm], up=12 + 14 * (len(arms) - number))
    return figure


if __name__ == "__main__":
    main("small_batches", __doc__, run, plot)
