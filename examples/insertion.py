"""Claim: batch norms can be put into a trained network without changing what it computes.

Two convolutions and a linear layer are trained on 4000 MNIST images without batch norm; `pybn.insert` puts a batch norm
behind each, with the statistics of the training images and the weight and bias that make it the identity; then
`pybn.torch.fold` takes them out again. The same is done to the ONNX model of examples/mnist_cnn.onnx, whose own batch
norms are folded first. Reported: largest changes of the logits of 1000 held-out images and of parameters, each as a
share of the largest value, and how many predictions change. Ioffe and Szegedy (2015, section 3) note that batch norm
can be the identity.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pybn
from examples.data import mnist
from examples.experiment import Result, main, sweep
from examples.figures import GREY, THIRD, WITH, new_figure, write
from examples.networks import cnn, seeded
from examples.training import train
from pybn.torch import fold

HERE = Path(__file__).parent
LIMIT = 1e-5  # of the change of outputs


def difference(before: np.ndarray, after: np.ndarray) -> float:
    """Largest change, as a share of the largest value."""
    return float(np.abs(after - before).max() / np.abs(before).max())


def compared(before: np.ndarray, after: np.ndarray) -> Result:
    """What became of logits."""
    changed = int((before.argmax(1) != after.argmax(1)).sum())
    return {"change": difference(before, after), "predictions changed": changed, "predictions": len(before)}


@torch.inference_mode()
def logits_of(model: torch.nn.Module, images: Tensor) -> np.ndarray:
    """In evaluation."""
    return model.eval()(images).numpy()


def job(seed: int, steps: int) -> Result:
    """Insert into a network of torch modules, and fold."""
    data = mnist(seed)
    model = seeded(seed, lambda: cnn(None, size=28)).train()
    for _ in train(model, data.train_images, data.train_labels, rate=0.3, steps=steps, seed=seed):
        pass
    before = logits_of(model, data.test_images)
    inserted = copy.deepcopy(model)
    added = pybn.insert(inserted, data.train_images.split(250)).statistics
    after = logits_of(inserted, data.test_images)
    folded, report = fold(inserted, data.test_images[:1])
    parameters = zip(model.parameters(), folded.parameters(), strict=True)
    return {
        "accuracy": float((before.argmax(1) == data.test_labels.numpy()).mean()),
        "batch norms": len(added),
        "folded": len(report.folds),
        "parameters": max(difference(old.detach().numpy(), new.detach().numpy()) for old, new in parameters),
        **compared(before, after),
    }


def onnx_job() -> Result:
    """The same for the ONNX model."""
    with np.load(HERE / "mnist_test.npz") as arrays:
        images, labels = arrays["image"], arrays["labels"]
    model = pybn.fold_onnx(HERE / "mnist_cnn.onnx").model
    result = pybn.insert(model, [{"image": part} for part in np.array_split(images, 4)])
    folded = pybn.fold_onnx(result.model).model
    before, after = run_onnx(model, images), run_onnx(result.model, images)
    old, new = parameters_of(model), parameters_of(folded)
    return {
        "accuracy": float((before.argmax(1) == labels).mean()),
        "batch norms": len(result.statistics),
        "folded": sum(node.op_type == "BatchNormalization" for node in result.model.graph.node)
        - sum(node.op_type == "BatchNormalization" for node in folded.graph.node),
        "parameters": max(difference(value, new[name]) for name, value in old.items()),
        **compared(before, after),
    }


def run_onnx(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Logits by onnxruntime, which is to fuse nothing on its own."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    return logits


def parameters_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Weights and biases of linear operators, by operator and position."""
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {
        f"{number}.{position}": values[name]
        for number, node in enumerate(
            node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm")
        )
        for position, name in enumerate(node.input)
        if name in values
    }


def run(quick: bool, seeds: int) -> Result:
    """Changes by seed in torch, and in ONNX."""
    found = sweep(job, [(seed,) for seed in range(seeds)], quick=quick, steps=10 if quick else 300)
    return {"torch": list(found.values()), "onnx": [onnx_job()]}


def plot(result: Result) -> Figure:
    """Changes on a logarithmic axis."""
    everything = [*result["torch"], *result["onnx"]]
    worst = max(entry["change"] for entry in everything)
    flipped, of = (sum(entry[what] for entry in everything) for what in ("predictions changed", "predictions"))
    figure, (axes,) = new_figure(
        f"Inserted batch norms change logits by {worst:.0e} of the largest,\nand {flipped} of {of} predictions"
    )
    rows = {
        "logits after insert, torch": ("torch", "change", WITH),
        "logits after insert, ONNX": ("onnx", "change", WITH),
        "parameters after insert\nand fold, torch": ("torch", "parameters", THIRD),
        "parameters after insert\nand fold, ONNX": ("onnx", "parameters", THIRD),
    }
    for row, (kind, what, colour) in enumerate(rows.values()):
        values = [max(entry[what], 1e-9) for entry in result[kind]]
        axes.plot(values, [row] * len(values), "o", color=colour, alpha=0.6)
    axes.axvline(LIMIT, color=GREY, linestyle=":")
    write(axes, LIMIT, -0.8, f"target, {LIMIT:.0e}", GREY)
    axes.axvline(2**-24, color=GREY, linestyle=":")
    write(axes, 2**-24, -0.8, "one rounding of float32", GREY)
    axes.set(xscale="log", xlim=(1e-8, 1e-4), ylim=(len(rows) - 0.5, -1.1), xlabel="largest change / largest value")
    axes.set_yticks(range(len(rows)), list(rows))
    return figure


if __name__ == "__main__":
    main("insertion", __doc__, run, plot)
