"""Whole networks in PyTorch, stock and with pybn: training steps, inference, memory.

    pip install -e ".[torch,bench]"
    python benchmarks/networks.py                    # all of it: about ten minutes on two cores
    python benchmarks/networks.py --quick            # few rounds
    python benchmarks/networks.py --help             # what else there is

What is compared runs in turns in one process, and a figure is the median of the rounds' ratios, so that what a busy
machine does to one it does to the other. A training step is forward, cross entropy and backward, with random
images, labels and initial parameters; `--sgd` adds the optimiser's step, which pybn has no part in. Memory is measured
in a fresh process for each model.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import memory
from torch import Tensor, nn
from torch.nn import functional as F

import pybn
from pybn.torch import accelerate, fold

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "torch"))

import torch_zoo


@dataclass(frozen=True)
class Network:
    """A network, the images it is measured with, and the ratio that pybn promises for a training step."""

    title: str
    build: Callable[..., nn.Module]
    shape: tuple[int, int, int, int]
    target: float

    @property
    def label(self) -> str:
        return f"{self.title}, {'x'.join(map(str, self.shape))}"


NETWORKS = {
    "resnet50": Network("ResNet-50", torch_zoo.resnet50, (16, 3, 224, 224), 1.20),
    "mobilenetv2": Network("MobileNetV2", torch_zoo.mobilenet_v2, (16, 3, 224, 224), 1.45),
    "densenet121": Network("DenseNet-121", torch_zoo.densenet121, (8, 3, 160, 160), 1.20),
    "resnet18": Network("ResNet-18", torch_zoo.resnet18, (32, 3, 128, 128), 1.08),
}
SETTINGS = ("float32", "channels_last", "bfloat16")

# The paper of in-place norms replaces ReLU, which has no inverse, by a leaky one; so does the stock network here.
LEAKY = partial(nn.LeakyReLU, 0.01)
IN_MEMORY = {
    "densenet121": "DenseNet-121, leaky ReLU",
    "mobilenetv2": "MobileNetV2, leaky ReLU",
}
MEMORY_VARIANTS = ("stock", "accelerated", "in place")


# ---- what is timed


@contextmanager
def ordinary(setting: str) -> Iterator[None]:
    """The context that a setting runs in: autocast for bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bfloat16"):
        yield


def images(network: Network, setting: str) -> Tensor:
    """Random images in the setting's memory format."""
    layout = torch.channels_last if setting == "channels_last" else torch.contiguous_format
    return torch.randn(network.shape).contiguous(memory_format=layout)


def built(network: Network, setting: str, **kwargs: Any) -> nn.Module:
    """The network with parameters that are the same every time."""
    torch.manual_seed(0)
    layout = torch.channels_last if setting == "channels_last" else torch.contiguous_format
    model: nn.Module = network.build(**kwargs).to(memory_format=layout)
    return model


def training_step(model: nn.Module, x: Tensor, setting: str, *, sgd: bool = False) -> Callable[[], None]:
    """Forward, loss, backward."""
    labels = torch.randint(1000, (len(x),), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        with ordinary(setting):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        if sgd:
            optimizer.step()

    return step


def inference(model: nn.Module, x: Tensor, setting: str) -> Callable[[], None]:
    """A pass without gradients."""
    model.eval()

    def run() -> None:
        with torch.inference_mode(), ordinary(setting):
            model(x)

    return run


def training_variants(network: Network, setting: str, *, sgd: bool = False) -> dict[str, Callable[[], None]]:
    """Training steps of the same network, stock first."""
    x, model = images(network, setting), built(network, setting)
    fused = accelerate(copy.deepcopy(model), inplace=True).model
    return {
        name: training_step(variant, x, setting, sgd=sgd)
        for name, variant in (("stock", model), ("accelerated", fused))
    }


def with_statistics(model: nn.Module) -> nn.Module:
    """The network with norms as training leaves them: one that shifts nothing would fold where others do not."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                nn.init.uniform_(tensor, -0.5, 0.5, generator)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5, generator)
    return model


def inference_variants(network: Network, setting: str) -> dict[str, Callable[[], None]]:
    """Inference of the same network, stock first."""
    from torch.fx.experimental.optimization import fuse

    x, model = images(network, setting), with_statistics(built(network, setting)).eval()
    variants = {
        "stock": model, "torch.fx fuse": fuse(model), "accelerated": accelerate(model).model, "fold": fold(model).model
    }  # fmt: skip
    return {name: inference(variant, x, setting) for name, variant in variants.items()}


# ---- how it is timed


@dataclass(frozen=True)
class Row:
    """Seconds of every variant of one network in one setting, round by round."""

    network: str
    setting: str
    what: str
    seconds: dict[str, list[float]]
    target: float

    def ratio(self, variant: str, to: str = "stock") -> float:
        """How many times faster than another a variant is: the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.seconds[to], self.seconds[variant], strict=True))


def timed(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant, which run in turns, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(
    what: str,
    names: Sequence[str],
    settings: Sequence[str],
    rounds: int,
    *,
    sgd: bool = False,
    batch: int | None = None,
) -> list[Row]:
    """Rows of training or inference, printed as they come."""
    make = {"training": partial(training_variants, sgd=sgd), "inference": inference_variants}[what]
    rows = []
    for setting in settings:
        for name in names:
            network = NETWORKS[name]
            if batch is not None:
                network = replace(network, shape=(batch, *network.shape[1:]))
            target = network.target if what == "training" and setting == "float32" else 1.0
            row = Row(network.label, setting, what, timed(make(network, setting), rounds), target)
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the table."""
    stock = statistics.median(row.seconds["stock"])
    ratios = [f"{variant} {row.ratio(variant):.2f}x" for variant in row.seconds if variant != "stock"]
    if "fold" in row.seconds:
        ratios.append(f"fold to torch.fx fuse {row.ratio('fold', 'torch.fx fuse'):.2f}x")
    wanted = f" (at least {row.target:.2f}x)" if row.what == "training" else ""
    return f"{row.what:9}  {row.network:28}  {row.setting:13}  stock {stock:6.3f} s  {', '.join(ratios)}{wanted}"


# ---- memory


@dataclass(frozen=True)
class Peak:
    """Megabytes that a training step adds to a process at its peak, by variant."""

    network: str
    megabytes: dict[str, float]


def peak_of_one_step(name: str, variant: str) -> float:
    """For a fresh process: MB that a training step adds to what is there before it."""
    network = NETWORKS[name]
    model = built(network, "float32", activation=LEAKY)
    if variant != "stock":
        accelerate(model, inplace=True, inplace_activations=variant == "in place")
    step = training_step(model, images(network, "float32"), "float32")
    before = memory("VmRSS")
    step()
    return (memory("VmHWM") - before) / 2**20


def measure_memory(names: Sequence[str]) -> list[Peak]:
    """Peaks of the networks that have something to save, printed as they come."""
    peaks = []
    for name in names:
        if name not in IN_MEMORY:
            continue
        megabytes = {}
        for variant in MEMORY_VARIANTS:
            command = [sys.executable, __file__, "--peak", name, variant]
            megabytes[variant] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        peak = Peak(f"{IN_MEMORY[name]}, {'x'.join(map(str, NETWORKS[name].shape))}", megabytes)
        peaks.append(peak)
        stock = megabytes["stock"]
        parts = [f"{variant} {value:.0f} MB ({value / stock:.2f})" for variant, value in megabytes.items()]
        print(f"memory     {peak.network}  {', '.join(parts)}", flush=True)
    return peaks


# ---- the picture


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of the ratios, a group for each network and setting; stock torch is the line at 1."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kinds = [what for what in ("training", "inference") if any(row.what == what for row in rows)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(7 * len(kinds), 5), squeeze=False, layout="constrained")
    for axis, what in zip(axes[0], kinds, strict=True):
        chosen = [row for row in rows if row.what == what]
        variants = [name for name in chosen[0].seconds if name != "stock"]
        height = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            ratios = [row.ratio(variant) for row in chosen]
            positions = [y + (i - (len(variants) - 1) / 2) * height for y in range(len(chosen))]
            bars = axis.barh(positions, ratios, height, label=variant)
            axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_yticks(range(len(chosen)), [f"{row.network}\n{row.setting}" for row in chosen], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlabel("times as fast as stock torch")
        axis.set_title("Training step" if what == "training" else "Inference")
        if len(variants) > 1:
            axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description="Time and memory of whole networks in PyTorch, stock and with pybn.torch.",
        epilog="examples:\n"
        "  python benchmarks/networks.py --json networks.json --plot networks.png\n"
        "  python benchmarks/networks.py --networks mobilenetv2 --settings float32 --rounds 9\n"
        "  python benchmarks/networks.py --only memory\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME",
                        help=f"some of {', '.join(NETWORKS)} (default: all)")  # fmt: skip
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME",
                        help=f"some of {', '.join(SETTINGS)} (default: all)")  # fmt: skip
    parser.add_argument("--only", choices=("training", "inference", "memory"), help="one part (default: all three)")
    parser.add_argument("--batch", type=int, help="images of a batch (default: as the table says)")
    parser.add_argument("--rounds", type=int, default=7, help="of each row (default: 7)")
    parser.add_argument("--sgd", action="store_true", help="training steps with the optimiser's")
    parser.add_argument("--threads", type=int, default=2, help="of torch and pybn (default: 2)")
    parser.add_argument("--quick", action="store_true", help="two rounds, float32 alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all seconds and megabytes there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios there")
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_of_one_step(*arguments.peak))
        return
    rounds = 2 if arguments.quick else arguments.rounds
    settings = ["float32"] if arguments.quick else arguments.settings
    about = {
        "torch": torch.__version__, "pybn": pybn.__version__, "python": platform.python_version(),
        "threads": arguments.threads, "instruction set": pybn._core.instruction_set(), "rounds": rounds,
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    parts = [arguments.only] if arguments.only else ["training", "inference", "memory"]
    rows = [row for what in ("training", "inference") if what in parts
            for row in measure(what, arguments.networks, settings, rounds, sgd=arguments.sgd,
                               batch=arguments.batch)]  # fmt: skip
    peaks = measure_memory(arguments.networks) if "memory" in parts else []
    if arguments.json:
        everything = {"about": about, "rows": [asdict(row) for row in rows], "peaks": [asdict(peak) for peak in peaks]}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    if arguments.plot and rows:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
