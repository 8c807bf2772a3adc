"""What stands where a batch norm stood, if an Identity would not do."""

from __future__ import annotations

import torch
from torch import nn


class FoldedBatchNorm(nn.Module):
    """A batch norm that a layer before or after it has absorbed, for data of one rank.

    `torch.nn.BatchNorm1d` takes ``(N, C)`` and ``(N, C, L)``, and what a layer may absorb of it is not the same: the
    last axis of a Linear is that of the channels only in the first. Where the network does not tell which comes, this
    stands for the norm: an identity that refuses the other.

    Parameters
    ----------
    rank : int
        How many axes the data has.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `input`.

        Raises
        ------
        ValueError
            If it has another rank.
        """
        if input.dim() != self.rank:
            raise ValueError(
                f"input has {input.dim()} axes, expected {self.rank}: this batch norm was folded for such data; "
                f"pybn.torch.unfold restores it"
            )
        return input

    def extra_repr(self) -> str:
        """Return what the printed module shows."""
        return f"rank={self.rank}"


class FoldedEpilogue(nn.Module):
    """The activation and the residual of a fused batch norm that a layer before it has absorbed.

    Parameters
    ----------
    activation : torch.nn.Module
        What is applied to ``input + residual``.
    before : torch.nn.Module
        What stands for the norm itself.
    """

    def __init__(self, activation: nn.Module, before: nn.Module) -> None:
        super().__init__()
        self.before = before
        self.activation = activation

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``activation(input + residual)``."""
        input = self.before(input)
        if residual is not None:
            input = input + residual
        output: torch.Tensor = self.activation(input)
        return output


def activation_module(name: str | None, negative_slope: float) -> nn.Module:
    """Return the module of torch for an activation of `pybn.torch`'s layers."""
    if name is None:
        return nn.Identity()
    if name == "leaky_relu":
        return nn.LeakyReLU(negative_slope)
    return {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish}[name]()
