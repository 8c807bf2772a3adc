"""What a call costs besides the kernel: pybn.torch.BatchNorm2d and torch's own layer on a tensor of 1x32x8x8.

    python benchmarks/torch_overhead.py

Both take turns, 100 calls at a time; the figures are medians, so that what else the machine does hits both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import pybn.torch

SHAPE = (1, 32, 8, 8)
CALLS = 100


def contenders(make: Callable[[int], torch.nn.Module]) -> dict[str, Callable[[], object]]:
    """What to time with a layer of a kind."""
    x = torch.randn(SHAPE)
    wants_gradient = torch.randn(SHAPE, requires_grad=True)
    dy = torch.randn(SHAPE)
    training, evaluation = make(SHAPE[1]), make(SHAPE[1]).eval()
    inputs = [wants_gradient, *training.parameters()]

    def inference() -> object:
        with torch.no_grad():
            return evaluation(x)

    return {
        "training, forward": lambda: training(wants_gradient),
        "training, forward and backward": lambda: torch.autograd.grad(training(wants_gradient), inputs, dy),
        "evaluation, no_grad": inference,
    }


def microseconds(call: Callable[[], object]) -> float:
    """A call's mean time over CALLS of them."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    rounds: int = parser.parse_args().rounds
    ours, theirs = contenders(pybn.torch.BatchNorm2d), contenders(torch.nn.BatchNorm2d)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ours}
    for _ in range(rounds):
        for name, (own, peer) in times.items():
            own.append(microseconds(ours[name]))
            peer.append(microseconds(theirs[name]))
    print("| us per call | pybn | torch | ratio |\n|---|---|---|---|")
    for name, (own, peer) in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, peer, strict=True))
        print(f"| {name} | {statistics.median(own):.1f} | {statistics.median(peer):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
