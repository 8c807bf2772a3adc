"""Classifiers of convolutions one after the other, and side by side: VGG and Inception."""

from __future__ import annotations

import onnx

from zoo.net import Net, Sizes, Value, scaled


def vgg16_bn(width: float = 1.0, size: int = 224) -> onnx.ModelProto:
    """VGG-16 with batch norms (Simonyan and Zisserman 2015, arXiv:1409.1556): convolutions that have biases, too."""
    net = Net("vgg16_bn", (3, size, size), seed=5)
    x = net.input
    for channels, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            x = net.relu(net.bn(net.conv(x, scaled(channels, width), bias=True)))
        x = net.max_pool(x)
    x = net.flatten(x)
    for _ in range(2):
        x = net.relu(net.gemm(x, scaled(4096, width)))
    return net.model(net.gemm(x, 1000))


def inception_v3(width: float = 1.0, size: int = 299) -> onnx.ModelProto:
    """Inception v3 (Szegedy et al. 2016, arXiv:1512.00567): branches of batch-normalised convolutions, concatenated."""
    net = Net("inception_v3", (3, size, size), seed=6, epsilon=1e-3)
    inception = _Inception(net, width)
    x = inception.conv(net.input, 32, 3, 2, pad=0)
    x = inception.conv(x, 32, 3, pad=0)
    x = inception.conv(x, 64, 3)
    x = net.max_pool(x, 3, 2)
    x = inception.conv(x, 80, 1)
    x = inception.conv(x, 192, 3, pad=0)
    x = net.max_pool(x, 3, 2)
    for pooled in (32, 64, 64):
        x = inception.block_35(x, pooled)
    x = inception.reduction_35(x)
    for inner in (128, 160, 160, 192):
        x = inception.block_17(x, inner)
    x = inception.reduction_17(x)
    for _ in range(2):
        x = inception.block_8(x)
    return net.model(net.gemm(net.flatten(net.global_pool(x)), 1000))


class _Inception:
    """The blocks of figures 5 to 7, named by the size of their images, and what lies between them."""

    def __init__(self, net: Net, width: float) -> None:
        self.net = net
        self.width = width

    def conv(self, x: Value, channels: int, kernel: Sizes, stride: int = 1, pad: Sizes | None = None) -> Value:
        return self.net.relu(self.net.bn(self.net.conv(x, scaled(channels, self.width), kernel, stride, pad=pad)))

    def pooled(self, x: Value, channels: int) -> Value:
        return self.conv(self.net.average_pool(x, 3, 1, 1, count_include_pad=1), channels, 1)

    def block_35(self, x: Value, pooled: int) -> Value:
        five = self.conv(self.conv(x, 48, 1), 64, 5)
        three = self.conv(self.conv(self.conv(x, 64, 1), 96, 3), 96, 3)
        return self.net.concat(self.conv(x, 64, 1), five, three, self.pooled(x, pooled))

    def reduction_35(self, x: Value) -> Value:
        once = self.conv(x, 384, 3, 2, pad=0)
        twice = self.conv(self.conv(self.conv(x, 64, 1), 96, 3), 96, 3, 2, pad=0)
        return self.net.concat(once, twice, self.net.max_pool(x, 3, 2))

    def block_17(self, x: Value, inner: int) -> Value:
        once = self.conv(self.conv(self.conv(x, inner, 1), inner, (1, 7)), 192, (7, 1))
        twice = self.conv(x, inner, 1)
        for kernel, channels in (((7, 1), inner), ((1, 7), inner), ((7, 1), inner), ((1, 7), 192)):
            twice = self.conv(twice, channels, kernel)
        return self.net.concat(self.conv(x, 192, 1), once, twice, self.pooled(x, 192))

    def reduction_17(self, x: Value) -> Value:
        three = self.conv(self.conv(x, 192, 1), 320, 3, 2, pad=0)
        seven = self.conv(self.conv(self.conv(x, 192, 1), 192, (1, 7)), 192, (7, 1))
        return self.net.concat(three, self.conv(seven, 192, 3, 2, pad=0), self.net.max_pool(x, 3, 2))

    def block_8(self, x: Value) -> Value:
        once = self.conv(x, 384, 1)
        twice = self.conv(self.conv(x, 448, 1), 384, 3)
        forked = [self.conv(y, 384, kernel) for y in (once, twice) for kernel in ((1, 3), (3, 1))]
        return self.net.concat(self.conv(x, 320, 1), *forked, self.pooled(x, 192))
