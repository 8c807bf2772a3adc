"""Networks as people write them in PyTorch, in few lines each, with random parameters: for tests and benchmarks.

Their structures are those of the papers. Between them they have every style in which a batch norm meets what follows
it: modules in a `Sequential`, one ReLU module called three times, functional and in-place activations, `+` and `+=`,
concatenations, a branch that exists in training alone. `width` scales the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[..., nn.Module]


def scaled(channels: float, width: float) -> int:
    """A number of channels: a multiple of 4, at least 4."""
    return max(4, round(channels * width / 4) * 4)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without a bias, padded so that stride 1 keeps the size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


# ---- residual networks (He et al. 2015)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv(channels, channels, 3, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = conv(channels, 4 * channels, 1), nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(inputs, 4 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """What brings a block's input to the shape of its output; None if it has it."""
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """The ImageNet architecture, with any kind of block."""

    def __init__(
        self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], width: float = 1, classes: int = 1000
    ) -> None:
        super().__init__()
        inputs = scaled(64, width)
        self.conv1, self.bn1 = conv(3, inputs, 7, 2), nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for number, depth in enumerate(depths):
            blocks = []
            channels = scaled(64 * 2**number, width)
            for i in range(depth):
                blocks.append(block(inputs, channels, 2 if number > 0 and i == 0 else 1))
                inputs = channels * block.expansion
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))


# ---- inverted residuals (Sandler et al. 2018, Howard et al. 2019, Tan and Le 2019)


class ConvNorm(nn.Sequential):
    """conv - batch norm - activation, as modules of a Sequential."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1,
        activation: Activation | None = nn.ReLU6,
    ) -> None:  # fmt: skip
        layers = [conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs)]
        super().__init__(*layers, *([activation(inplace=True)] if activation else []))


class SqueezeExcitation(nn.Module):
    """Channels scaled by what the whole image says (Hu et al. 2018)."""

    def __init__(self, channels: int, squeezed: int, activation: Activation, gate: Activation) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class InvertedResidual(nn.Module):
    """Expanded, convolved depthwise, projected without an activation; added to the input where shapes agree."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, expanded: int, activation: Activation,
        excitation: Callable[[int], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.adds = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [] if expanded == inputs else [ConvNorm(inputs, expanded, 1, activation=activation)]
        layers.append(ConvNorm(expanded, expanded, kernel, stride, expanded, activation))
        layers += [excitation(expanded)] if excitation else []
        layers.append(ConvNorm(expanded, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.adds else self.block(x)


class Mobile(nn.Module):
    """Features, the mean over the image, a classifier."""

    def __init__(self, features: list[nn.Module], classifier: nn.Sequential) -> None:
        super().__init__()
        self.features, self.classifier = nn.Sequential(*features), classifier

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1)
        return self.classifier(torch.flatten(x, 1))


def mobilenet_v2(width: float = 1, classes: int = 1000, activation: Activation = nn.ReLU6) -> Mobile:
    """MobileNetV2."""
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    inputs = scaled(32, width)
    features: list[nn.Module] = [ConvNorm(3, inputs, 3, 2, activation=activation)]
    for expansion, channels, repeats, stride in stages:
        for i in range(repeats):
            outputs = scaled(channels, width)
            features.append(
                InvertedResidual(inputs, outputs, 3, stride if i == 0 else 1, inputs * expansion, activation)
            )
            inputs = outputs
    outputs = scaled(1280, width)
    features.append(ConvNorm(inputs, outputs, 1, activation=activation))
    return Mobile(features, nn.Sequential(nn.Dropout(0.2), nn.Linear(outputs, classes)))


def mobilenet_v3(width: float = 1, classes: int = 1000) -> Mobile:
    """MobileNetV3-small."""
    relu, swish = nn.ReLU, nn.Hardswish
    stages = [
        (3, 16, 16, True, relu, 2), (3, 72, 24, False, relu, 2), (3, 88, 24, False, relu, 1),
        (5, 96, 40, True, swish, 2), (5, 240, 40, True, swish, 1), (5, 120, 48, True, swish, 1),
        (5, 288, 96, True, swish, 2), (5, 576, 96, True, swish, 1),
    ]  # fmt: skip
    inputs = scaled(16, width)
    features: list[nn.Module] = [ConvNorm(3, inputs, 3, 2, activation=swish)]
    for kernel, expanded, channels, excites, activation, stride in stages:
        wide, outputs = scaled(expanded, width), scaled(channels, width)
        excitation = partial(excite, scaled(expanded / 4, width), nn.ReLU, nn.Hardsigmoid) if excites else None
        features.append(InvertedResidual(inputs, outputs, kernel, stride, wide, activation, excitation))
        inputs = outputs
    last = scaled(576, width)
    features.append(ConvNorm(inputs, last, 1, activation=swish))
    head = scaled(1024, width)
    return Mobile(
        features,
        nn.Sequential(nn.Linear(last, head), nn.Hardswish(inplace=True), nn.Dropout(0.2), nn.Linear(head, classes)),
    )


def excite(squeezed: int, activation: Activation, gate: Activation, channels: int) -> nn.Module:
    """A SqueezeExcitation, the channels last."""
    return SqueezeExcitation(channels, squeezed, activation, gate)


def efficientnet(width: float = 1, classes: int = 1000) -> Mobile:
    """EfficientNet-B0, without stochastic depth."""
    stages = [
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3),
        (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
    ]  # fmt: skip
    inputs = scaled(32, width)
    features: list[nn.Module] = [ConvNorm(3, inputs, 3, 2, activation=nn.SiLU)]
    for expansion, kernel, stride, channels, repeats in stages:
        for i in range(repeats):
            outputs = scaled(channels, width)
            excitation = partial(excite, scaled(inputs / 4, 1), nn.SiLU, nn.Sigmoid)
            features.append(
                InvertedResidual(
                    inputs, outputs, kernel, stride if i == 0 else 1, inputs * expansion, nn.SiLU, excitation
                )
            )
            inputs = outputs
    outputs = scaled(1280, width)
    features.append(ConvNorm(inputs, outputs, 1, activation=nn.SiLU))
    return Mobile(features, nn.Sequential(nn.Dropout(0.2), nn.Linear(outputs, classes)))


# ---- densely connected (Huang et al. 2017)


class DenseLayer(nn.Module):
    """norm - activation - 1x1 conv - norm - activation - 3x3 conv on all that came before, concatenated."""

    def __init__(self, inputs: int, growth: int, activation: Activation) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), activation(inplace=True)
        self.conv1 = conv(inputs, 4 * growth, 1)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), activation(inplace=True)
        self.conv2 = conv(4 * growth, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    """Layers of which each sees the outputs of all before it."""

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """The ImageNet architecture."""

    def __init__(
        self, depths: tuple[int, ...], width: float = 1, classes: int = 1000, activation: Activation = nn.ReLU
    ) -> None:
        super().__init__()
        growth, channels = scaled(32, width), scaled(64, width)
        layers: list[nn.Module] = [
            conv(3, channels, 7, 2), nn.BatchNorm2d(channels), activation(inplace=True), nn.MaxPool2d(3, 2, 1)
        ]  # fmt: skip
        for number, depth in enumerate(depths):
            layers.append(DenseBlock(DenseLayer(channels + i * growth, growth, activation) for i in range(depth)))
            channels += depth * growth
            layers.append(nn.BatchNorm2d(channels))
            if number + 1 < len(depths):
                layers += [activation(inplace=True), conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
                channels //= 2
        self.features, self.activation = nn.Sequential(*layers), activation(inplace=True)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.activation(self.features(x)), 1)
        return self.classifier(torch.flatten(x, 1))


densenet121 = partial(DenseNet, (6, 12, 24, 16))


# ---- branches that are concatenated (Szegedy et al. 2014, Ronneberger et al. 2015)


class BasicConv(nn.Module):
    """conv - norm - ReLU with a functional ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> None:
        super().__init__()
        self.branch1 = BasicConv(inputs, one)
        self.branch2 = nn.Sequential(BasicConv(inputs, three[0]), BasicConv(three[0], three[1], 3))
        self.branch3 = nn.Sequential(BasicConv(inputs, five[0]), BasicConv(five[0], five[1], 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), BasicConv(inputs, pool))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """A stem, two inception blocks, and a second classifier that exists in training only."""

    def __init__(self, width: float = 1, classes: int = 1000) -> None:
        super().__init__()
        at = partial(scaled, width=width)
        self.conv1, self.conv2, self.conv3 = (
            BasicConv(3, at(64), 7, 2), BasicConv(at(64), at(64)), BasicConv(at(64), at(192), 3)
        )  # fmt: skip
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.inception1 = Inception(at(192), at(64), (at(96), at(128)), (at(16), at(32)), at(32))
        channels = at(64) + at(128) + at(32) + at(32)
        self.aux = nn.Sequential(BasicConv(channels, at(128)), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.aux_fc = nn.Linear(at(128), classes)
        self.inception2 = Inception(channels, at(128), (at(128), at(192)), (at(32), at(96)), at(64))
        self.fc = nn.Linear(at(128) + at(192) + at(96) + at(64), classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.conv3(self.conv2(self.pool(self.conv1(x))))
        x = self.inception1(self.pool(x))
        aux = self.aux_fc(self.aux(x)) if self.training else None
        x = self.inception2(self.pool(x))
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        logits = self.fc(F.dropout(x, 0.2, self.training))
        return logits if aux is None else (logits, aux)


class UNet(nn.Module):
    """Down and up again, each level of the way up with what the way down has seen."""

    def __init__(self, width: float = 1, classes: int = 2, levels: int = 3) -> None:
        super().__init__()
        channels = [scaled(64 * 2**i, width) for i in range(levels)]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([3, *channels], channels, strict=False))
        pairs = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(double_conv(2 * b, b) for _, b in pairs)
        self.head = nn.Conv2d(channels[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for level in self.down:
            x = level(F.max_pool2d(x, 2) if seen else x)
            seen.append(x)
        for up, merge, skip in zip(self.up, self.merge, seen[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.head(x)


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Conv - norm - LeakyReLU, twice."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [conv(channels, outputs), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1, inplace=True)]
    return nn.Sequential(*layers)


# Every network above, narrow, by name; each takes images of 3 channels, 32x32 or larger.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": partial(resnet18, 1 / 8, 10),
    "ResNet-50": partial(resnet50, 1 / 16, 10),
    "MobileNetV2": partial(mobilenet_v2, 1 / 8, 10),
    "MobileNetV3": partial(mobilenet_v3, 1 / 4, 10),
    "EfficientNet": partial(efficientnet, 1 / 8, 10),
    "DenseNet": partial(DenseNet, (2, 2, 2), 1 / 8, 10),
    "GoogLeNet": partial(GoogLeNet, 1 / 8, 10),
    "U-Net": partial(UNet, 1 / 16, 2),
}
