"""Claim: a batch norm as the first layer learns the scale of raw inputs.

A dense layer of 128 ReLUs and one of 10 are trained on 4000 MNIST images in batches of 64, in NumPy: on pixels of 0 to
255 as they are, on pixels divided by 255, and on pixels as they are with a `pybn.BatchNorm1d` as first layer, which
takes the image as one channel or every pixel as a feature. All choose from the same learning rates. Reported: accuracy
on 1000 held-out images. Of the statistics of every pixel, the moving average and those of `pybn.reestimate` are
compared. Last, `pybn.fold_onnx` takes the first batch norm into the first dense layer. There is no figure in the paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from statistics import median

import numpy as np
import onnx
import onnxruntime as ort
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

import pybn
from examples.data import mnist_pixels
from examples.experiment import Result, main, sweep
from examples.figures import GREY, THIRD, WITH, WITHOUT, band, new_figure
from examples.training import batches

PIXELS, HIDDEN, CLASSES = 28 * 28, 128, 10
ARMS = ("divided", "raw", "channel", "pixel")
RATES = [1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0]


class Linear:
    """``x @ weight.T + bias``, with He's initial weights."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator) -> None:
        self.weight = (rng.standard_normal((outputs, inputs)) * np.sqrt(2 / inputs)).astype(np.float32)
        self.bias = np.zeros(outputs, np.float32)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, inputs) to (N, outputs)."""
        self._x = x
        return x @ self.weight.T + self.bias

    def backward(self, dy: np.ndarray) -> np.ndarray:
        """Gradient of the last input; keeps those of the parameters."""
        self.weight_grad, self.bias_grad = dy.T @ self._x, dy.sum(axis=0)
        return dy @ self.weight


class Network:
    """Maybe a batch norm, a hidden layer of ReLUs, the logits. Images have shape (N, 1, 784)."""

    def __init__(self, arm: str, rng: np.random.Generator) -> None:
        self.norm = {"channel": pybn.BatchNorm1d(1), "pixel": pybn.BatchNorm1d(PIXELS)}.get(arm)
        self.hidden, self.head = Linear(PIXELS, HIDDEN, rng), Linear(HIDDEN, CLASSES, rng)

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """(N, 1, 784) to (N, 784), by the first layer if there is one."""
        if self.norm is None:
            return images[:, 0]
        return self.norm(images)[:, 0] if self.norm.num_features == 1 else self.norm(images[:, 0])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The logits."""
        self._active = np.maximum(self.hidden(self.normalize(images)), 0)
        return self.head(self._active)

    def backward(self, dlogits: np.ndarray) -> None:
        """Gradients of all parameters, for the last images."""
        dx = self.hidden.backward(self.head.backward(dlogits) * (self._active > 0))
        if self.norm is not None:
            self.norm.zero_grad()
            self.norm.backward(dx[:, None] if self.norm.num_features == 1 else dx)

    def descend(self, rate: float) -> None:
        """One step along the last gradients."""
        for layer in (self.norm, self.hidden, self.head):
            if layer is not None:
                layer.weight -= rate * layer.weight_grad
                layer.bias -= rate * layer.bias_grad


def cross_entropy_gradient(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gradient of the mean cross entropy by the logits."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    gradient = powers / powers.sum(axis=1, keepdims=True)
    gradient[np.arange(len(labels)), labels] -= 1
    return gradient / len(labels)


def load(arm: str, seed: int) -> tuple[np.ndarray, ...]:
    """Training images and labels, held-out images and labels; images (N, 1, 784) float32."""
    train_x, train_y, test_x, test_y = (part.numpy() for part in mnist_pixels(seed))
    scale = 255 if arm == "divided" else 1
    train_x, test_x = ((x.reshape(-1, 1, PIXELS) / scale).astype(np.float32) for x in (train_x, test_x))
    return train_x, train_y, test_x, test_y


def trained(arm: str, rate: float, seed: int, steps: int) -> Network:
    """A network after its training, in evaluation."""
    images, labels, _, _ = load(arm, seed)
    network = Network(arm, np.random.default_rng(seed))
    # One thread, as the other process has the other core; and too high a rate ends in NaN.
    with threadpool_limits(1), np.errstate(all="ignore"):
        for batch in batches(len(images), 64, steps, seed):
            chosen = batch.numpy()
            network.backward(cross_entropy_gradient(network(images[chosen]), labels[chosen]))
            network.descend(rate)
    if network.norm is not None:
        network.norm.eval()
    return network


def accuracy(network: Network, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers."""
    with np.errstate(all="ignore"):
        return float((network(images).argmax(axis=1) == labels).mean())


def job(arm: str, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Accuracies with moving averages, and with statistics of all training images, if they are finite."""
    images, _, test_images, test_labels = load(arm, seed)
    network = trained(arm, rate, seed, steps)
    moving = accuracy(network, test_images, test_labels)
    if network.norm is None or not np.isfinite(network.head.weight).all():
        return moving, moving
    pybn.reestimate(network.norm, parts(images if arm == "channel" else images[:, 0]))
    return moving, accuracy(network, test_images, test_labels)


def parts(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images in batches of 500."""
    yield from np.array_split(images, max(1, len(images) // 500))


def as_onnx(network: Network) -> onnx.ModelProto:
    """The network whose first layer is a batch norm of one channel, for inputs (N, 1, 784)."""
    norm, make = network.norm, onnx.helper.make_node
    assert norm is not None
    arrays = {"scale": norm.weight, "shift": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
    arrays |= {"w1": network.hidden.weight, "b1": network.hidden.bias, "w2": network.head.weight}
    arrays["b2"] = network.head.bias
    nodes = [
        make("BatchNormalization", ["image", "scale", "shift", "mean", "var"], ["normalized"], epsilon=norm.eps),
        make("Flatten", ["normalized"], ["flat"]),
        make("Gemm", ["flat", "w1", "b1"], ["hidden"], transB=1),
        make("Relu", ["hidden"], ["active"]),
        make("Gemm", ["active", "w2", "b2"], ["logits"], transB=1),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "mlp",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 1, PIXELS])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", CLASSES])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def fold(rate: float, seed: int, steps: int) -> Result:
    """What folding the first batch norm changes."""
    network = trained("channel", rate, seed, steps)
    _, _, images, _ = load("channel", seed)
    folded = pybn.fold_onnx(as_onnx(network)).model
    session = ort.InferenceSession(folded.SerializeToString(), providers=["CPUExecutionProvider"])
    (after,), before = session.run(None, {"image": images}), network(images)
    return {
        "operators": [node.op_type for node in folded.graph.node],
        "change": float(np.abs(after - before).max() / np.abs(before).max()),
        "predictions changed": int((after.argmax(axis=1) != before.argmax(axis=1)).sum()),
        "predictions": len(images),
    }


def run(quick: bool, seeds: int) -> Result:
    """By arm: accuracies by rate and seed, the best rate; what folding changed."""
    rates, steps = ([0.1], 10) if quick else (RATES, 300)
    found = sweep(job, itertools.product(ARMS, rates, range(seeds)), quick=quick, steps=steps)
    result: Result = {"steps": steps, "rates": rates}
    for arm, kind in itertools.product(ARMS, (0, 1)):
        by_rate = {rate: [found[arm, rate, seed][kind] for seed in range(seeds)] for rate in rates}
        best = max(rates, key=lambda rate: median(by_rate[rate]))
        entry = {"rate": best, "accuracies": by_rate[best], "median": median(by_rate[best]), "all": [*by_rate.values()]}
        result[f"{arm}, re-estimated" if kind else arm] = entry
    folds = sweep(fold, [(result["channel"]["rate"], seed) for seed in range(seeds)], quick=quick, steps=steps)
    return {**result, "folded": list(folds.values())}


def plot(result: Result) -> Figure:
    """Accuracy over learning rates."""
    lines = {
        "raw": ("0 to 255", GREY),
        "divided": ("divided by 255", WITHOUT),
        "channel": ("0 to 255,\nbatch norm first", WITH),
        "pixel": ("0 to 255, batch norm\nfirst, of every pixel", THIRD),
    }
    best = {arm: result[arm]["median"] for arm in lines}
    figure, (axes,) = new_figure(
        f"A batch norm as first layer learns the scale: {best['channel']:.1%},\n"
        f"with pixels divided by 255 {best['divided']:.1%}, with neither {best['raw']:.1%}"
    )
    for arm, (label, colour) in lines.items():
        band(axes, result["rates"], list(zip(*result[arm]["all"], strict=True)), colour)
        axes.plot(result[arm]["rate"], best[arm], "o", color=colour, label=label)
    axes.set(xscale="log", ylim=(0, 1), xlabel="learning rate", ylabel="accuracy on held-out images")
    axes.set_title(f"after {result['steps']} steps; median and range of seeds; best rate marked", loc="left")
    axes.legend(frameon=False, labelcolor="linecolor", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    main("raw_inputs", __doc__, run, plot)
