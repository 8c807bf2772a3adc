"""Networks that read text: a CRNN whose sequence model is linear layers, and one of learnable affine blocks."""

from __future__ import annotations

from dataclasses import replace

import onnx

from zoo.net import Net, Value, scaled


def crnn(width: float = 1.0, size: int = 128) -> onnx.ModelProto:
    """The convolutions of CRNN (Shi et al. 2015, arXiv:1507.05717) on lines of 32 rows, `size` columns.

    In place of the recurrent layers there are linear ones with batch norms, once on sequences
    (MatMul, with the features moved to axis 1 and back) and once on single steps (Gemm).
    """
    net = Net("crnn", (1, 32, size), seed=14)
    x = net.max_pool(net.relu(net.conv(net.input, scaled(64, width), bias=True)))
    x = net.max_pool(net.relu(net.conv(x, scaled(128, width), bias=True)))
    x = net.relu(net.bn(net.conv(x, scaled(256, width))))
    x = net.max_pool(net.relu(net.conv(x, scaled(256, width), bias=True)), (2, 1), (2, 1))
    x = net.relu(net.bn(net.conv(x, scaled(512, width))))
    x = net.max_pool(net.relu(net.bn(net.conv(x, scaled(512, width)))), (2, 1), (2, 1))
    x = net.relu(net.bn(net.conv(x, scaled(512, width), 2, pad=0)))

    x = net.transpose(net.squeeze(x, 2), (0, 2, 1))  # (N, T, features)
    for _ in range(2):
        x = net.transpose(net.matmul(x, scaled(256, width)), (0, 2, 1))
        x = net.transpose(net.relu(net.bn(x)), (0, 2, 1))
    steps, features = x.shape
    x = net.reshape(x, (steps * features,))
    x = net.relu(net.bn(net.gemm(x, scaled(256, width))))
    x = net.gemm(x, steps * 37)
    return net.model(net.reshape(x, (steps, 37)))


def ocr(width: float = 1.0, size: int = 160) -> onnx.ModelProto:
    """A text recogniser on PP-LCNetV3 (Cui et al. 2021, arXiv:2109.15099; PaddleOCR): learnable affine blocks.

    After every batch norm and after every activation come a Mul and an Add of one number each, and
    HardSwish is spelled out, as its exporter does.
    """
    net = Net("ocr", (3, 48, size), seed=15)
    x = net.bn(net.conv(net.input, scaled(16, width), 3, 2))
    for kernel, channels, stride, excited in (
        (3, 32, (1, 1), False),
        (3, 64, (2, 1), False),
        (3, 64, (1, 1), False),
        (3, 128, (1, 2), False),
        (3, 128, (1, 1), False),
        (3, 256, (2, 1), False),
        *[(5, 256, (1, 1), False)] * 4,
        (5, 512, (2, 1), True),
        *[(5, 512, (1, 1), True)] * 3,
    ):
        x = _learnable(net, net.conv(x, x.channels, kernel, stride, groups=x.channels))
        if excited:
            z = net.relu(net.conv(net.global_pool(x), max(1, x.channels // 4), 1, bias=True))
            x = net.mul(x, net.hard_sigmoid(net.conv(z, x.channels, 1, bias=True)))
        x = _learnable(net, net.conv(x, scaled(channels, width), 1))
    x = net.average_pool(x, (x.shape[1], 2), (x.shape[1], 2))
    x = net.transpose(net.squeeze(x, 2), (0, 2, 1))
    x = net.matmul(x, 97)
    return net.model(x)


def _learnable(net: Net, x: Value) -> Value:
    """Batch norm, affine, HardSwish, affine."""
    return _affine(net, _spelled_hardswish(net, _affine(net, net.bn(x))))


def _affine(net: Net, x: Value) -> Value:
    scale, shift = net.rng.uniform(0.6, 1.4), 0.2 * net.rng.standard_normal()
    return net.scalar("Add", net.scalar("Mul", x, scale), shift)


def _spelled_hardswish(net: Net, x: Value) -> Value:
    gate = net.clip(net.scalar("Add", x, 3.0), 0.0, 6.0)
    return replace(net.scalar("Div", net.mul(x, gate), 6.0), rms=0.7 * x.rms)
