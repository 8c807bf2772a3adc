"""A zoo of networks for the folder, built by script: the structures of the papers, random parameters, no downloads.

- ``net``        the builder: one method an operator
- ``residual``, ``plain``, ``mobile``, ``images``, ``text``   one function a network
- ``packaged``   models that come with installed packages
- ``running``    what to feed a model, and how to run it
- ``leftovers``  what a folder has left in it
- ``test_*``     what must hold for each

`FULL` builds a network as published, `SMALL` the same one with few channels on small inputs,
`packaged.packaged` reads what others have made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx

from zoo import images, mobile, plain, residual, text

Builder = Callable[[], onnx.ModelProto]

# Name of the network: its function, and the width and size that make it small, with every layer there.
_NETWORKS: dict[str, tuple[Callable[..., onnx.ModelProto], float, int]] = {
    "ResNet-50": (residual.resnet50, 1 / 16, 48),
    "pre-activation ResNet-50": (residual.preact_resnet50, 1 / 16, 48),
    "DenseNet-121": (residual.densenet121, 1 / 8, 48),
    "3-D ResNet-18": (residual.resnet3d18, 1 / 16, 24),
    "VGG16-BN": (plain.vgg16_bn, 1 / 16, 32),
    "Inception v3": (plain.inception_v3, 1 / 16, 91),
    "MobileNetV2": (mobile.mobilenet_v2, 1 / 8, 48),
    "MobileNetV3": (mobile.mobilenet_v3, 1 / 8, 48),
    "EfficientNet-B0": (mobile.efficientnet_b0, 1 / 8, 48),
    "ShuffleNet": (mobile.shufflenet, 1 / 10, 48),
    "U-Net": (images.unet, 1 / 16, 32),
    "DCGAN generator": (images.dcgan, 1 / 32, 64),
    "YOLO": (images.yolo, 1 / 4, 64),
    "CRNN": (text.crnn, 1 / 16, 48),
    "OCR": (text.ocr, 1 / 8, 40),
}

FULL: dict[str, Builder] = {name: build for name, (build, _, _) in _NETWORKS.items()}
SMALL: dict[str, Builder] = {name: partial(build, width, size) for name, (build, width, size) in _NETWORKS.items()}
