"""The networks of the examples. What normalizes is an argument: a function from a number of channels to a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]


def mlp(
    norm: Norm | None,
    activation: Callable[[], nn.Module] = nn.ReLU,
    inputs: int = 28 * 28,
    hidden: tuple[int, ...] = (100, 100, 100),
) -> nn.Sequential:
    """Linear, norm, activation for every hidden layer; with sigmoids, Ioffe and Szegedy's (2015, section 4.1)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for outputs in hidden:
        layers += [nn.Linear(inputs, outputs), *([norm(outputs)] if norm else []), activation()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def cnn(
    norm: Norm | None, activation: Callable[[], nn.Module] = nn.ReLU, size: int = 8, channels: tuple[int, ...] = (8, 16)
) -> nn.Sequential:
    """Convolution, norm, activation, each halving images of size x size, and one linear layer."""
    layers: list[nn.Module] = []
    inputs = 1
    for outputs in channels:
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), *([norm(outputs)] if norm else []), activation()]
        inputs, size = outputs, (size + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * size**2, 10))


class Residual(nn.Module):
    """conv-bn-relu-conv-bn, plus the input, then relu."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Input and output have shape (N, channels, H, W)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network whose parameters the seed decides; batch norm draws none, so arms with and without it start alike."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
