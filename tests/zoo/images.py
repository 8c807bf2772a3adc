"""Networks whose output is an image or what is found in one: U-Net, the generator of DCGAN, a detector."""

from __future__ import annotations

import onnx

from zoo.net import Net, Value, scaled


def unet(width: float = 1.0, size: int = 256) -> onnx.ModelProto:
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597) with batch norms, also after the transposed convolutions."""
    net = Net("unet", (1, size, size), seed=11)
    depths = [scaled(64 << depth, width) for depth in range(5)]
    x, skips = net.input, []
    for channels in depths[:-1]:
        x = _double_conv(net, x, channels)
        skips.append(x)
        x = net.max_pool(x)
    x = _double_conv(net, x, depths[-1])
    for skip in reversed(skips):
        up = net.relu(net.bn(net.conv_transpose(x, skip.channels, 2, 2)))
        x = _double_conv(net, net.concat(skip, up), skip.channels)
    return net.model(net.sigmoid(net.conv(x, 2, 1, bias=True)))


def _double_conv(net: Net, x: Value, channels: int) -> Value:
    for _ in range(2):
        x = net.relu(net.bn(net.conv(x, channels)))
    return x


def dcgan(width: float = 1.0, size: int = 64) -> onnx.ModelProto:
    """The generator of DCGAN (Radford et al. 2016, arXiv:1511.06434), figure 1: 100 numbers become an image."""
    net = Net("dcgan", (100, 1, 1), seed=12)
    x = net.relu(net.bn(net.conv_transpose(net.input, scaled(1024, width), 4, 1)))
    while x.shape[-1] < size // 2:
        x = net.relu(net.bn(net.conv_transpose(x, x.channels // 2, 4, 2, 1)))
    return net.model(net.tanh(net.conv_transpose(x, 3, 4, 2, 1)))


def yolo(width: float = 1.0, size: int = 320) -> onnx.ModelProto:
    """A detector in the manner of YOLOv8n: cross-stage blocks, SiLU, a neck up and down again, three heads.

    The preprocessing, by the mean and deviation of ImageNet's colours, is a part of the network.
    """
    net = Net("yolo", (3, size, size), seed=13, epsilon=1e-3)
    x = net.standardise(net.input, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = _conv_silu(net, x, scaled(16, width), 3, 2)
    levels = []
    for channels, depth in ((32, 1), (64, 2), (128, 2), (256, 1)):
        x = _conv_silu(net, x, scaled(channels, width), 3, 2)
        x = _cross_stage(net, x, x.channels, depth, shortcut=True)
        levels.append(x)
    _, large, medium, small = levels
    small = _pyramid_pool(net, small)

    medium_up = _cross_stage(net, net.concat(net.upsample(small), medium), medium.channels, 1)
    large = _cross_stage(net, net.concat(net.upsample(medium_up), large), large.channels, 1)
    medium = net.concat(_conv_silu(net, large, large.channels, 3, 2), medium_up)
    medium = _cross_stage(net, medium, medium_up.channels, 1)
    small_down = net.concat(_conv_silu(net, medium, medium.channels, 3, 2), small)
    small = _cross_stage(net, small_down, small.channels, 1)
    return net.model(*(_head(net, level) for level in (large, medium, small)))


def _conv_silu(net: Net, x: Value, channels: int, kernel: int = 1, stride: int = 1) -> Value:
    return net.silu(net.bn(net.conv(x, channels, kernel, stride)))


def _cross_stage(net: Net, x: Value, channels: int, depth: int, *, shortcut: bool = False) -> Value:
    """Split in two, pass one half through bottlenecks, and concatenate all that came on the way."""
    parts = list(net.halves(_conv_silu(net, x, channels)))
    for _ in range(depth):
        y = _conv_silu(net, _conv_silu(net, parts[-1], channels // 2, 3), channels // 2, 3)
        parts.append(net.add(y, parts[-1]) if shortcut else y)
    return _conv_silu(net, net.concat(*parts), channels)


def _pyramid_pool(net: Net, x: Value) -> Value:
    pooled = [_conv_silu(net, x, x.channels // 2)]
    for _ in range(3):
        pooled.append(net.max_pool(pooled[-1], 5, 1, 2))
    return _conv_silu(net, net.concat(*pooled), x.channels)


def _head(net: Net, x: Value) -> Value:
    """Boxes (4 numbers of 16 bins each) and 80 classes, one column for each place."""
    boxes = _conv_silu(net, _conv_silu(net, x, x.channels, 3), x.channels, 3)
    classes = _conv_silu(net, _conv_silu(net, x, x.channels, 3), x.channels, 3)
    y = net.concat(net.conv(boxes, 64, 1, bias=True), net.sigmoid(net.conv(classes, 80, 1, bias=True)))
    return net.reshape(y, (y.channels, y.shape[1] * y.shape[2]))
