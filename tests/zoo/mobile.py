"""Small classifiers: depthwise convolutions, squeeze and excitation, channel shuffles."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from zoo.net import Net, Value, scaled

Activation = Callable[[Value], Value]


def mobilenet_v2(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381): ReLU6, and none after the projection."""
    net = Net("mobilenet_v2", (3, size, size), seed=7)
    x = net.clip(net.bn(net.conv(net.input, scaled(32, width), 3, 2)))
    for expansion, channels, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            expanded = expansion * x.channels
            x = _inverted_residual(net, x, expanded, scaled(channels, width), 3, 1 if repeat else stride, net.clip)
    x = net.clip(net.bn(net.conv(x, scaled(1280, width), 1)))
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 1000))


def mobilenet_v3(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """MobileNetV3-Large (Howard et al. 2019, arXiv:1905.02244): HardSwish, squeeze and excitation by HardSigmoid."""
    net = Net("mobilenet_v3", (3, size, size), seed=8, epsilon=1e-3)
    x = net.hardswish(net.bn(net.conv(net.input, scaled(16, width), 3, 2)))
    for kernel, expanded, channels, excited, activation, stride in (
        (3, 16, 16, False, net.relu, 1),
        (3, 64, 24, False, net.relu, 2),
        (3, 72, 24, False, net.relu, 1),
        (5, 72, 40, True, net.relu, 2),
        (5, 120, 40, True, net.relu, 1),
        (5, 120, 40, True, net.relu, 1),
        (3, 240, 80, False, net.hardswish, 2),
        (3, 200, 80, False, net.hardswish, 1),
        (3, 184, 80, False, net.hardswish, 1),
        (3, 184, 80, False, net.hardswish, 1),
        (3, 480, 112, True, net.hardswish, 1),
        (3, 672, 112, True, net.hardswish, 1),
        (5, 672, 160, True, net.hardswish, 2),
        (5, 960, 160, True, net.hardswish, 1),
        (5, 960, 160, True, net.hardswish, 1),
    ):
        inner = scaled(expanded, width)
        x = _inverted_residual(
            net, x, inner, scaled(channels, width), kernel, stride, activation,
            squeezed=-(-inner // 32) * 8 if excited else None, gate=net.hard_sigmoid, squeeze=net.relu,
        )  # fmt: skip
    x = net.hardswish(net.bn(net.conv(x, scaled(960, width), 1)))
    x = net.hardswish(net.gemm(net.flatten(net.global_pool(x)), scaled(1280, width)))
    return net.model(net.gemm(x, 1000))


def efficientnet_b0(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """EfficientNet-B0 (Tan and Le 2019, arXiv:1905.11946): SiLU, squeeze and excitation everywhere."""
    net = Net("efficientnet_b0", (3, size, size), seed=9, epsilon=1e-3)
    x = net.silu(net.bn(net.conv(net.input, scaled(32, width), 3, 2)))
    for expansion, channels, repeats, stride, kernel in (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    ):  # fmt: skip
        for repeat in range(repeats):
            x = _inverted_residual(
                net, x, expansion * x.channels, scaled(channels, width), kernel, 1 if repeat else stride, net.silu,
                squeezed=x.channels // 4, gate=net.sigmoid, squeeze=net.silu,
            )  # fmt: skip
    x = net.silu(net.bn(net.conv(x, scaled(1280, width), 1)))
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 1000))


def _inverted_residual(
    net: Net, x: Value, expanded: int, channels: int, kernel: int, stride: int, activation: Activation, *,
    squeezed: int | None = None, gate: Activation | None = None, squeeze: Activation | None = None,
) -> Value:  # fmt: skip
    """Expand, filter each channel, excite (if `squeezed` channels are given), project, add."""
    y = x if expanded == x.channels else activation(net.bn(net.conv(x, expanded, 1)))
    y = activation(net.bn(net.conv(y, expanded, kernel, stride, groups=expanded)))
    if squeezed and gate and squeeze:
        z = squeeze(net.conv(net.global_pool(y), squeezed, 1, bias=True))
        y = net.mul(y, gate(net.conv(z, expanded, 1, bias=True)))
    y = net.bn(net.conv(y, channels, 1))
    return net.add(y, x) if y.shape == x.shape else y


def shufflenet(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """ShuffleNet with 3 groups (Zhang et al. 2018, arXiv:1707.01083): the depthwise batch norm has no activation."""
    net = Net("shufflenet", (3, size, size), seed=10)
    x = net.relu(net.bn(net.conv(net.input, scaled(24, width, 12), 3, 2)))
    x = net.max_pool(x, 3, 2, 1)
    for stage, repeats in enumerate((4, 8, 4)):
        channels = scaled(240 << stage, width, 12)
        for repeat in range(repeats):
            x = _shuffle_unit(net, x, channels, first=stage == repeat == 0, halve=not repeat)
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 1000))


def _shuffle_unit(net: Net, x: Value, channels: int, *, first: bool, halve: bool, groups: int = 3) -> Value:
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; added to the input, or concatenated where it shrinks."""
    inner = channels // 4
    y = net.relu(net.bn(net.conv(x, inner, 1, groups=1 if first else groups)))
    y = _shuffle(net, y, groups)
    y = net.bn(net.conv(y, inner, 3, 2 if halve else 1, groups=inner))
    if not halve:
        return net.relu(net.add(net.bn(net.conv(y, channels, 1, groups=groups)), x))
    y = net.bn(net.conv(y, channels - x.channels, 1, groups=groups))
    return net.relu(net.concat(net.average_pool(x, 3, 2, 1), y))


def _shuffle(net: Net, x: Value, groups: int) -> Value:
    channels, height, width = x.shape
    x = net.reshape(x, (groups, channels // groups, height, width))
    return net.reshape(net.transpose(x, (0, 2, 1, 3, 4)), (channels, height, width))
