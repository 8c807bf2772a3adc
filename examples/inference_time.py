"""Claim: batch norm makes predictions slower, and folding repairs that.

The network of examples/train_mnist_cnn.py classifies held-out images one by one and in batches of 64, on one thread: in
torch without batch norms, with torch's, and after `pybn.torch.fold`; in onnxruntime as examples/mnist_cnn.onnx is and
after `pybn.fold_onnx`, both with onnxruntime's own fusions, which fold some batch norms when the model is loaded, and
without. The variants take turns; a round is that until each has had 0.4 seconds, and there are as many as seeds.
Reported: the fastest call of each round, the median of the rounds' ratios to the folded network, and how much folding
changes the logits. The paper (Ioffe and Szegedy 2015, section 3.1) notes that in inference batch norm can be composed
with the layer before, and gives no times.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
import torch
from matplotlib.figure import Figure
from torch import nn

import pybn
from examples.experiment import Result, main, sweep
from examples.figures import GREY, WITH, WITHOUT, new_figure, write
from examples.networks import seeded
from examples.train_mnist_cnn import DigitNet
from pybn.torch import fold

HERE = Path(__file__).parent
BATCH_SIZES = (1, 64)
PAIRS = {  # with batch norm, and what it is compared with
    "torch": ("with", "folded"),
    "onnxruntime": ("as it is", "folded"),
    "onnxruntime, no fusions": ("as it is, no fusions", "folded, no fusions"),
}

Predict = Callable[[], np.ndarray]


def without_batch_norm(model: nn.Module) -> nn.Module:
    """A copy in which every batch norm does nothing."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            model.set_submodule(name, nn.Identity())
    return model


def in_torch(images: np.ndarray, population: np.ndarray) -> dict[str, Predict]:
    """What classifies images, by variant."""
    model = seeded(0, DigitNet).eval()
    pybn.reestimate(model, torch.from_numpy(population[:250]).split(250))
    x = torch.from_numpy(images)
    folded, report = fold(model, x)
    assert not report.left
    models = {"without": without_batch_norm(model), "with": model, "folded": folded}
    return {name: lambda model=model: model(x).detach().numpy() for name, model in models.items()}


def in_onnxruntime(images: np.ndarray) -> dict[str, Predict]:
    """What classifies images, by variant."""
    original = onnx.load(HERE / "mnist_cnn.onnx")
    models = {"as it is": original, "folded": pybn.fold_onnx(original).model}
    predicts: dict[str, Predict] = {}
    for suffix, level in (
        ("", ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
        (", no fusions", ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
    ):
        for name, model in models.items():
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            options.graph_optimization_level = level
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            predicts[name + suffix] = lambda session=session: session.run(None, {"image": images})[0]
    return predicts


def fastest(predicts: dict[str, Predict], least: float) -> dict[str, float]:
    """Milliseconds of the fastest call of each; they take turns call by call, until each has had `least` seconds.

    A machine that slows down for a while then does so for all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in predicts}
    while any(sum(of_one) < least or not of_one for of_one in times.values()):
        for name, predict in predicts.items():
            start = time.perf_counter()
            predict()
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * min(of_one) for name, of_one in times.items()}


@torch.inference_mode()
def job(rounds: int, least: float) -> Result:
    """By library and batch size: milliseconds of every round by variant, and the change of the logits."""
    with np.load(HERE / "mnist_test.npz") as arrays:
        population = arrays["image"]
    result: Result = {"torch": {}, "onnxruntime": {}}
    for size in BATCH_SIZES:
        images = population[:size]
        for library, predicts in (
            ("torch", in_torch(images, population)),
            ("onnxruntime", in_onnxruntime(images)),
        ):
            found = [fastest(predicts, least) for _ in range(rounds)]
            before, after = (predicts[name]() for name in PAIRS[library])
            change = float(np.abs(after - before).max() / np.abs(before).max())
            result[library][str(size)] = {
                "milliseconds": {name: [of_round[name] for of_round in found] for name in predicts},
                "change": change,
            }
    return result


def run(quick: bool, seeds: int) -> Result:
    """What `job` measures, in one process while no other works, and ratios to the folded network."""
    result = sweep(job, [(seeds,)], quick=quick, least=0.0 if quick else 0.4)[(seeds,)]
    result["ratios"] = {
        pair: {
            str(size): [
                slow / fast
                for slow, fast in zip(*(times(result, pair, size)[name] for name in PAIRS[pair]), strict=True)
            ]
            for size in BATCH_SIZES
        }
        for pair in PAIRS
    }
    return result


def times(result: Result, pair: str, size: int) -> dict[str, list[float]]:
    """Milliseconds of every round by variant."""
    return result[pair.split(",")[0]][str(size)]["milliseconds"]


def plot(result: Result) -> Figure:
    """Bars of time per image, with batch norm and folded."""
    ratios = result["ratios"]["torch"]
    figure, panels = new_figure(
        f"Folding makes predictions {median(ratios['1']):.2f} times as fast one by one in torch,\n"
        f"and {median(ratios['64']):.2f} times in batches of 64",
        2,
        width=8,
    )
    for axes, size in zip(panels, BATCH_SIZES, strict=True):
        ticks = []
        for row, pair in enumerate(PAIRS):
            milliseconds = times(result, pair, size)
            for shift, name, colour in zip((-0.2, 0.2), PAIRS[pair], (WITH, WITHOUT), strict=True):
                per_image = [value / size for value in milliseconds[name]]
                axes.barh(row + shift, median(per_image), 0.36, color=colour)
                text = "with batch norm" if colour == WITH else "folded"
                label = f"{median(per_image):.3g}" + (f" ms {text}" if row == 0 else "")
                write(axes, median(per_image), row + shift, label, colour)
            ticks.append(pair.replace(", ", ",\n"))
        none = median(times(result, "torch", size)["without"]) / size
        axes.plot([none, none], [-0.4, 0.55], color=GREY, linestyle=":")
        write(axes, none, 0.5, f"{none:.3g} if it never had any", GREY)
        axes.set_yticks(range(len(ticks)), ticks if size == BATCH_SIZES[0] else [""] * len(ticks))
        axes.set(xlabel="ms per image, one thread", title=f"{size} image{'s' * (size > 1)} at a time")
        axes.set(ylim=(len(ticks) - 0.5, -0.5), xlim=(0, 1.75 * axes.get_xlim()[1]))
    return figure


if __name__ == "__main__":
    main("inference_time", __doc__, run, plot)
