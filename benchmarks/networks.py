"""Whole networks in PyTorch, stock and with pybn: training steps, inference, memory.

    pip install -e ".[torch,bench]"
    python benchmarks/networks.py                    # all of it: about an hour on two cores
    python benchmarks/networks.py --quick            # few rounds, float32 alone
    python benchmarks/networks.py --help             # what else there is

Every variant of a network runs in a process of its own, because what one has freed would be there for the next. They
take turns, step by step, and a figure is the median of the rounds' ratios, so that what a busy machine does to one it
does to the other. After a third of the rounds new processes begin: whether a process finds the memory again that it has
freed, or gets fresh pages in every step, is decided early in its life, and not the same way in the next.

A training step is forward, cross entropy and backward, with random images, labels and initial parameters; `--sgd` adds
the optimiser's step, which pybn has no part in. The tables are in Markdown.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
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
from pybn.torch import accelerate, fold, reuse_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "torch"))

import torch_zoo


@dataclass(frozen=True)
class Network:
    """A network, and the images it is measured with."""

    title: str
    build: Callable[..., nn.Module]
    shape: tuple[int, int, int, int]

    @property
    def label(self) -> str:
        return f"{self.title}, {'x'.join(map(str, self.shape))}"


NETWORKS = {
    "resnet50": Network("ResNet-50", torch_zoo.resnet50, (16, 3, 224, 224)),
    "mobilenetv2": Network("MobileNetV2", torch_zoo.mobilenet_v2, (16, 3, 224, 224)),
    "densenet121": Network("DenseNet-121", torch_zoo.densenet121, (8, 3, 160, 160)),
    "resnet18": Network("ResNet-18", torch_zoo.resnet18, (32, 3, 128, 128)),
}
SETTINGS = ("float32", "channels_last", "bfloat16")

# The paper of in-place norms replaces ReLU, which has no inverse, by a leaky one; so does the stock network here.
LEAKY = partial(nn.LeakyReLU, 0.01)
IN_MEMORY = {
    "densenet121": "DenseNet-121, leaky ReLU",
    "mobilenetv2": "MobileNetV2, leaky ReLU",
}

# Every second name of a pair is the first with the memory of the process reused. What is accelerated is so with
# concatenations=True, which concerns DenseNet-121 alone.
REUSED = ", reuse_memory"
VARIANTS = {
    "training": ("stock", "stock" + REUSED, "accelerated", "accelerated" + REUSED),
    "inference": ("stock", "torch.fx fuse", "accelerated", "fold", "fold" + REUSED),
    "memory": ("stock", "accelerated", "accelerated" + REUSED, "in place"),
}
# Of a variant, one after the other, among which the rounds are divided.
PROCESSES = 3
# Steps of which the largest memory is measured: freed memory is in pieces after the first. In which pieces differs from
# one process to the next, so a figure is the median of some.
MEMORY_STEPS = 3
MEMORY_PROCESSES = 5


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


def variant_of(model: nn.Module, variant: str) -> nn.Module:
    """The model as a variant runs it."""
    name = variant.removesuffix(REUSED)
    if name == "torch.fx fuse":
        from torch.fx.experimental.optimization import fuse

        fused: nn.Module = fuse(model)
        return fused
    if name == "fold":
        return fold(model).model
    if name == "stock":
        return model
    return accelerate(model, inplace=True, inplace_activations=name == "in place", concatenations=True).model


def prepared(what: str, network: Network, setting: str, variant: str, *, sgd: bool) -> Callable[[], None]:
    """What is timed."""
    if variant.endswith(REUSED):
        reuse_memory()
    x, model = images(network, setting), built(network, setting)
    if what == "training":
        return training_step(variant_of(model, variant), x, setting, sgd=sgd)
    return inference(variant_of(with_statistics(model).eval(), variant), x, setting)


# ---- how it is timed


@dataclass(frozen=True)
class Row:
    """Seconds of every variant of one network in one setting, and pages it got from the system, round by round."""

    network: str
    setting: str
    what: str
    seconds: dict[str, list[float]]
    pages: dict[str, list[int]]

    def ratio(self, variant: str, to: str = "stock") -> float:
        """How many times faster than another a variant is: the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self.seconds[to], self.seconds[variant], strict=True))


class Runner:
    """A process that runs one variant when it is told to."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, __file__, "--run", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def cost(self) -> tuple[float, int]:
        """Seconds and fresh pages of one more run."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write("\n")
        stdin.flush()
        seconds, pages = stdout.readline().split()
        return float(seconds), int(pages)

    def end(self) -> None:
        """Let the process end."""
        self._process.communicate()


def run_when_told(run: Callable[[], None]) -> None:
    """The other end of a `Runner`."""
    for _ in sys.stdin:
        start, pages = time.perf_counter(), fresh_pages()
        run()
        print(time.perf_counter() - start, fresh_pages() - pages, flush=True)


def fresh_pages() -> int:
    """Of this process so far: page faults that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def add_rounds(row: Row, runners: dict[str, Runner], rounds: int, limit: float) -> None:
    """What the variants cost in turns, after two to warm up, for `limit` seconds, but at least one round."""
    for runner in (*runners.values(), *runners.values()):
        runner.cost()
    start = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - start > limit:
            break
        for name, runner in runners.items():
            seconds, pages = runner.cost()
            row.seconds[name].append(seconds)
            row.pages[name].append(pages)


def measure(what: str, arguments: argparse.Namespace) -> list[Row]:
    """Rows of training or inference, as they are measured."""
    rows = []
    options = [str(arguments.threads), str(arguments.batch or 0), str(int(arguments.sgd))]
    groups = min(PROCESSES, arguments.rounds)
    for name in arguments.networks:
        for setting in arguments.settings:
            names, label = VARIANTS[what], with_batch(name, arguments.batch).label
            row = Row(label, setting, what, {variant: [] for variant in names}, {variant: [] for variant in names})
            for group in range(groups):
                runners = {variant: Runner(what, name, setting, variant, *options) for variant in names}
                rounds = len(range(group, arguments.rounds, groups))
                add_rounds(row, runners, rounds, arguments.seconds / groups)
                for runner in runners.values():
                    runner.end()
            rows.append(row)
            print(cells(row), file=sys.stderr, flush=True)
    return rows


def with_batch(name: str, batch: int | None) -> Network:
    """A network, with another number of images if that is wanted."""
    network = NETWORKS[name]
    return replace(network, shape=(batch, *network.shape[1:])) if batch else network


# ---- tables


def cells(row: Row) -> str:
    """A row of a table."""
    found = [f"{row.ratio(variant):.2f}" for variant in row.seconds if variant != "stock"]
    if "fold" in row.seconds:
        found += [f"{row.ratio('fold', 'torch.fx fuse'):.2f}", f"{row.ratio('fold' + REUSED, 'torch.fx fuse'):.2f}"]
    stock = statistics.median(row.seconds["stock"])
    return table_row([row.network, row.setting, f"{stock:.3f} s", *found])


def page_cells(row: Row) -> str:
    """A row of the table of pages."""
    return table_row([row.network, row.setting, *(f"{statistics.median(n):.0f}" for n in row.pages.values())])


def table_row(texts: Sequence[str]) -> str:
    """Cells as Markdown has them."""
    return f"| {' | '.join(texts)} |"


def tables(rows: Sequence[Row], peaks: Sequence[Peak]) -> str:
    """All that was measured, in Markdown."""
    parts = []
    for what, title in (("training", "training step"), ("inference", "inference")):
        chosen = [row for row in rows if row.what == what]
        if chosen:
            heads = [title, "setting", *VARIANTS[what]]
            heads += ["fold to fuse", f"fold{REUSED} to fuse"] if what == "inference" else []
            parts.append([table_row(heads), "|---" * len(heads) + "|", *map(cells, chosen)])
        if chosen and what == "training":
            heads = ["fresh pages of a step", "setting", *VARIANTS[what]]
            parts.append([table_row(heads), "|---" * len(heads) + "|", *map(page_cells, chosen)])
    if peaks:
        heads = ["peak memory of training steps", *VARIANTS["memory"]]
        parts.append([table_row(heads), "|---" * len(heads) + "|", *map(peak_cells, peaks)])
    return "\n\n".join("\n".join(part) for part in parts)


def peak_cells(peak: Peak) -> str:
    """A row of the table of memory."""
    stock = peak.megabytes["stock"]
    return table_row([peak.network, *(f"{value:.0f} MB, {value / stock:.2f}" for value in peak.megabytes.values())])


# ---- memory


@dataclass(frozen=True)
class Peak:
    """Megabytes that training steps add to a process at its peak, by variant."""

    network: str
    megabytes: dict[str, float]


def peak_of_training(name: str, variant: str) -> float:
    """For a fresh process: MB that training steps add to what is there before them."""
    network = NETWORKS[name]
    if variant.endswith(REUSED):
        reuse_memory()
    model = variant_of(built(network, "float32", activation=LEAKY), variant)
    step = training_step(model, images(network, "float32"), "float32")
    before = memory("VmRSS")
    for _ in range(MEMORY_STEPS):
        step()
    return (memory("VmHWM") - before) / 2**20


def measure_memory(names: Sequence[str]) -> list[Peak]:
    """Peaks of the networks that have something to save, as they are measured."""
    peaks = []
    for name in names:
        if name not in IN_MEMORY:
            continue
        megabytes = {}
        for variant in VARIANTS["memory"]:
            command = [sys.executable, __file__, "--peak", name, variant]
            megabytes[variant] = statistics.median(
                float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(MEMORY_PROCESSES)
            )
        peaks.append(Peak(f"{IN_MEMORY[name]}, {'x'.join(map(str, NETWORKS[name].shape))}", megabytes))
        print(peak_cells(peaks[-1]), file=sys.stderr, flush=True)
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
        "  python benchmarks/networks.py --only memory\n"
        "  python benchmarks/networks.py --tables part1.json part2.json   # what several runs have measured\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME",
                        help=f"some of {', '.join(NETWORKS)} (default: all)")  # fmt: skip
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME",
                        help=f"some of {', '.join(SETTINGS)} (default: all)")  # fmt: skip
    parser.add_argument("--only", choices=VARIANTS, help="one part (default: all three)")
    parser.add_argument("--batch", type=int, help="images of a batch (default: as the table says)")
    parser.add_argument("--rounds", type=int, default=15, help="of each row, at most (default: 15)")
    parser.add_argument("--seconds", type=float, default=60, help="after which a row has rounds enough (default: 60)")
    parser.add_argument("--sgd", action="store_true", help="training steps with the optimiser's")
    parser.add_argument("--threads", type=int, default=2, help="of torch and pybn (default: 2)")
    parser.add_argument("--quick", action="store_true", help="two rounds, float32 alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all seconds and megabytes there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the ratios there")
    parser.add_argument("--tables", type=Path, nargs="+", metavar="FILE", help="measure nothing, print what is there")
    parser.add_argument("--run", nargs=7, help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.run:
        what, name, setting, variant, threads, batch, sgd = arguments.run
        torch.set_num_threads(int(threads))
        run_when_told(prepared(what, with_batch(name, int(batch)), setting, variant, sgd=sgd == "1"))
        return
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_of_training(*arguments.peak))
        return
    if arguments.quick:
        arguments.rounds, arguments.settings = 2, ["float32"]
    about = {
        "torch": torch.__version__, "pybn": pybn.__version__, "python": platform.python_version(),
        "threads": arguments.threads, "instruction set": pybn._core.instruction_set(),
    }  # fmt: skip
    rows: list[Row] = []
    peaks: list[Peak] = []
    if arguments.tables:
        for file in arguments.tables:
            earlier = json.loads(file.read_text())
            about = earlier["about"]
            rows += [Row(**row) for row in earlier["rows"]]
            peaks += [Peak(**peak) for peak in earlier["peaks"]]
    else:
        parts = [arguments.only] if arguments.only else list(VARIANTS)
        rows = [row for what in ("training", "inference") if what in parts for row in measure(what, arguments)]
        peaks = measure_memory(arguments.networks) if "memory" in parts else []
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print(tables(rows, peaks))
    if arguments.json:
        everything = {"about": about, "rows": [asdict(row) for row in rows], "peaks": [asdict(peak) for peak in peaks]}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    if arguments.plot and rows:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
