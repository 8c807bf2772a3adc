"""Networks that add or concatenate what came before: ResNet, before and after activation, in 3-D, and DenseNet."""

from __future__ import annotations

import onnx

from zoo.net import Net, Value, scaled


def resnet50(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """ResNet-50 (He et al. 2015, arXiv:1512.03385): every batch norm follows a convolution."""
    net = Net("resnet50", (3, size, size), seed=1)
    x = net.relu(net.bn(net.conv(net.input, scaled(64, width), 7, 2)))
    x = net.max_pool(x, 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            x = _bottleneck(net, x, scaled(64 << stage, width), 2 if stage and not block else 1)
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 1000))


def _bottleneck(net: Net, x: Value, channels: int, stride: int) -> Value:
    y = net.relu(net.bn(net.conv(x, channels, 1)))
    # The stride in the 3x3 convolution, where every framework has it by now.
    y = net.relu(net.bn(net.conv(y, channels, 3, stride)))
    y = net.bn(net.conv(y, 4 * channels, 1))
    if x.shape != y.shape:
        x = net.bn(net.conv(x, 4 * channels, 1, stride))
    return net.relu(net.add(y, x))


def preact_resnet50(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """Pre-activation ResNet-50 (He et al. 2016, arXiv:1603.05027): batch norms follow sums, which others use, too."""
    net = Net("preact_resnet50", (3, size, size), seed=2)
    x = net.max_pool(net.conv(net.input, scaled(64, width), 7, 2), 3, 2, 1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            x = _preact_bottleneck(net, x, scaled(64 << stage, width), 2 if stage and not block else 1)
    x = net.relu(net.bn(x))
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 1000))


def _preact_bottleneck(net: Net, x: Value, channels: int, stride: int) -> Value:
    active = net.relu(net.bn(x))
    y = net.relu(net.bn(net.conv(active, channels, 1)))
    y = net.relu(net.bn(net.conv(y, channels, 3, stride)))
    y = net.conv(y, 4 * channels, 1)
    if x.shape != y.shape:
        x = net.conv(active, 4 * channels, 1, stride)
    return net.add(y, x)


def densenet121(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """DenseNet-121 (Huang et al. 2017, arXiv:1608.06993): every layer normalises all that came before once more."""
    net = Net("densenet121", (3, size, size), seed=3)
    growth = scaled(32, width)
    x = net.relu(net.bn(net.conv(net.input, 2 * growth, 7, 2)))
    x = net.max_pool(x, 3, 2, 1)
    for stage, layers in enumerate((6, 12, 24, 16)):
        if stage:
            x = net.conv(net.relu(net.bn(x)), x.channels // 2, 1)
            x = net.average_pool(x)
        for _ in range(layers):
            y = net.conv(net.relu(net.bn(x)), 4 * growth, 1)
            y = net.conv(net.relu(net.bn(y)), growth, 3)
            x = net.concat(x, y)
    x = net.relu(net.bn(x))
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 1000))


def resnet3d18(width: float = 1.0, size: int = 112) -> onnx.ModelProto:
    """The 3-D ResNet-18 for video (Tran et al. 2018, arXiv:1711.11248), on 16 frames or fewer."""
    net = Net("resnet3d18", (3, min(16, size // 4), size, size), seed=4)
    x = net.relu(net.bn(net.conv(net.input, scaled(64, width), (3, 7, 7), (1, 2, 2))))
    for stage in range(4):
        for block in range(2):
            x = _basic_block(net, x, scaled(64 << stage, width), 2 if stage and not block else 1)
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 400))


def _basic_block(net: Net, x: Value, channels: int, stride: int) -> Value:
    y = net.relu(net.bn(net.conv(x, channels, 3, stride)))
    y = net.bn(net.conv(y, channels, 3))
    if x.shape != y.shape:
        x = net.bn(net.conv(x, channels, 1, stride))
    return net.relu(net.add(y, x))
