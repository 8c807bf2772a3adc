"""Plain stochastic gradient descent: no momentum, no decay, no schedule, so that one number is there to tune."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices of `steps` batches, epoch after epoch in a new random order; the last, smaller batch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while steps > 0:
        for batch in torch.randperm(count, generator=generator).split(batch_size)[: min(steps, count // batch_size)]:
            steps -= 1
            yield batch


def train(
    model: nn.Module, images: Tensor, labels: Tensor, *, rate: float, steps: int, seed: int, batch_size: int = 64
) -> Iterator[float]:
    """Fit `model` in place, yielding the loss of every step after it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, fused=True)  # a tenth of a step's time
    for batch in batches(len(images), batch_size, steps, seed):
        model.train()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.inference_mode()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross entropy in evaluation mode; the model is left in the mode it was in."""
    training = model.training
    logits = model.eval()(images)
    model.train(training)
    return (logits.argmax(1) == labels).double().mean().item(), F.cross_entropy(logits, labels).item()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in evaluation mode; chance's if the model's outputs are no numbers any more."""
    return evaluate(model, images, labels)[0]
