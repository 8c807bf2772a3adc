"""Models that come with installed packages: structures and trained weights that nobody here has made.

- The *light* models of the onnx package are well-known networks as Caffe2 exported them in 2018. What is
  large in them is made by ConstantOfShape, 0.02 throughout; a few batch norms have their trained
  parameters. They come as they are, and with random weights drawn in place of the constant ones.
- ``examples/mnist_cnn.onnx`` of this repository is small and trained.
- rapidocr-onnxruntime brings the detector, the recogniser and the classifier of PP-OCR, trained, as
  exported from PaddlePaddle; they are left out where it is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from zoo.net import Array
from zoo.running import feeds

LIGHT = {
    "DenseNet-121": "light_densenet121.onnx",
    "Inception v2": "light_inception_v2.onnx",
    "ResNet-50": "light_resnet50.onnx",
    "ShuffleNet": "light_shufflenet.onnx",
}
OCR = {
    "PP-OCRv4 detector": "ch_PP-OCRv4_det_infer.onnx",
    "PP-OCRv4 recogniser": "ch_PP-OCRv4_rec_infer.onnx",
    "PP-OCRv2 classifier": "ch_ppocr_mobile_v2.0_cls_infer.onnx",
}
# Heights and widths of the images they read: their inputs are dynamic.
OCR_IMAGES = {
    "PP-OCRv4 detector": (96, 160),
    "PP-OCRv4 recogniser": (48, 160),
    "PP-OCRv2 classifier": (48, 192),
}
EXAMPLES = Path(__file__).parents[2] / "examples"


def packaged() -> dict[str, Callable[[], onnx.ModelProto]]:
    """Return a function for each model that is there, by name."""
    models: dict[str, Callable[[], onnx.ModelProto]] = {}
    for name, file in LIGHT.items():
        path = Path(onnx.__file__).parent / "backend/test/data/light" / file
        models[f"light {name}"] = partial(onnx.load, path)
        models[f"light {name} (drawn)"] = partial(drawn, path)
    models["MNIST CNN"] = partial(onnx.load, EXAMPLES / "mnist_cnn.onnx")
    rapidocr = find_spec("rapidocr_onnxruntime")
    if rapidocr is not None and rapidocr.origin is not None:
        folder = Path(rapidocr.origin).parent / "models"
        models |= {name: partial(onnx.load, folder / file) for name, file in OCR.items()}
    return models


def inputs(name: str, model: onnx.ModelProto) -> dict[str, Array]:
    """Return what to run a model of the zoo on: random numbers, and for those that read text an image of digits."""
    if name not in OCR_IMAGES:
        return feeds(model, batch=1)
    height, width = OCR_IMAGES[name]
    image = np.ones((1, 3, height, width), np.float32)
    with np.load(EXAMPLES / "mnist_test.npz") as examples:
        digits = np.concatenate(list(examples["image"][: width // 28, 0]), axis=1) / np.float32(255)
    top = (height - digits.shape[0]) // 2
    image[:, :, top : top + digits.shape[0], : digits.shape[1]] -= 2 * digits
    return {model.graph.input[0].name: image}


def drawn(path: Path) -> onnx.ModelProto:
    """Read a model and put a random initializer in the place of every ConstantOfShape."""
    model = onnx.load(path)
    graph = model.graph
    rng = np.random.default_rng(16)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    roles = _roles(graph)
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "ConstantOfShape":
            kept.append(node)
            continue
        name, shape = node.output[0], constants.pop(node.input[0])
        constants[name] = _draw(rng, roles[name], tuple(shape.tolist()))
        # IR version 3: an initializer is listed among the inputs.
        graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, constants[name].shape))
    listed = [info for info in graph.input if info.name in constants or not info.name.endswith("__SHAPE")]
    return helper.make_model(
        helper.make_graph(
            kept, graph.name, listed, graph.output,
            [numpy_helper.from_array(array, name) for name, array in constants.items()],
        ),
        opset_imports=model.opset_import, ir_version=model.ir_version,
    )  # fmt: skip


def _roles(graph: onnx.GraphProto) -> dict[str, tuple[str, int]]:
    """Return for every value by whom, and as which input, it is used first, looking through Unsqueeze."""
    roles: dict[str, tuple[str, int]] = {}
    for node in reversed(graph.node):
        for index, name in enumerate(node.input):
            through = node.op_type == "Unsqueeze" and node.output[0] in roles
            roles[name] = roles[node.output[0]] if through else (node.op_type, index)
    return roles


def _draw(rng: np.random.Generator, role: tuple[str, int], shape: tuple[int, ...]) -> Array:
    """Draw what an input of an operator may be in a trained network whose activations are of order 1."""
    match role:
        case ("Conv" | "Gemm", 1):
            values = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
        case ("BatchNormalization", 1) | ("Mul", _):
            # Small, so that sums of residual branches do not grow.
            values = rng.uniform(0.4, 0.8, shape) * rng.choice([1, 1, 1, 1, 1, 1, -1], shape)
        case ("BatchNormalization", 4):
            values = rng.uniform(0.5, 2.0, shape)
        case _:
            values = 0.2 * rng.standard_normal(shape)
    return values.astype(np.float32)
