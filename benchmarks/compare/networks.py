"""The four families of networks of the papers, at sizes that two cores can train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

__all__ = ["NETWORKS", "build"]


def _conv_bn(n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(n_out)]


def vgg(widths: Sequence[int], n_classes: int, in_channels: int) -> nn.Module:
    """Convolutions with BatchNorm and ReLU, pooling after every second one; one linear layer."""
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        layers += [*_conv_bn(in_channels, width), nn.ReLU()]
        if i % 2 and i < len(widths) - 1:
            layers.append(nn.MaxPool2d(2))
        in_channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes))


class _Basic(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(n_in, n_out, stride=stride)
        self.conv2, self.bn2 = _conv_bn(n_out, n_out)
        # A 1 × 1 convolution where shapes change (option B of He et al.).
        self.shortcut = nn.Sequential(*_conv_bn(n_in, n_out, 1, stride)) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(depth: int, n_classes: int, in_channels: int) -> nn.Module:
    """ResNet of He et al. for small images: 6 n + 2 layers, 16, 32 and 64 channels."""
    n = (depth - 2) // 6
    blocks, width = list[nn.Module](), 16
    for i, n_out in enumerate((16, 32, 64)):
        for j in range(n):
            blocks.append(_Basic(width, n_out, 2 if i and not j else 1))
            width = n_out
    stem = [*_conv_bn(in_channels, 16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes))


class _Inverted(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = n_in * expansion
        self.has_shortcut = n_in == n_out and stride == 1
        self.body = nn.Sequential(
            *([*_conv_bn(n_in, hidden, 1), nn.ReLU6()] if expansion > 1 else []),
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU6(),
            *_conv_bn(hidden, n_out, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.has_shortcut else y


def mobilenet_v2(n_classes: int, in_channels: int) -> nn.Module:
    """MobileNetV2 (Sandler et al.) with fewer blocks and channels, for small images."""
    layers, width = [*_conv_bn(in_channels, 16), nn.ReLU6()], 16
    for expansion, n_out, n, stride in ((1, 16, 1, 1), (6, 24, 2, 2), (6, 40, 3, 2), (6, 64, 2, 1)):
        for j in range(n):
            layers.append(_Inverted(width, n_out, stride if not j else 1, expansion))
            width = n_out
    layers += [*_conv_bn(width, 256, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, n_classes))


class _Dense(nn.Module):
    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(n_in)
        self.conv = nn.Conv2d(n_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(relu(self.bn(x)))], 1)


def densenet(depth: int, n_classes: int, in_channels: int, growth: int = 12) -> nn.Module:
    """DenseNet of Huang et al. without bottlenecks: three blocks, 3 n + 4 layers, growth 12."""
    n = (depth - 4) // 3
    layers, width = list[nn.Module]([nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)]), 16
    for i in range(3):
        for _ in range(n):
            layers.append(_Dense(width, growth))
            width += growth
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if i < 2:
            layers += [nn.Conv2d(width, width, 1, bias=False), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, n_classes))


#: The networks by name: ``f(n_classes, in_channels)``.
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "vgg": lambda c, i: vgg((32, 32, 64, 64, 128, 128), c, i),
    "vgg16": lambda c, i: vgg16(c, i),
    "resnet20": lambda c, i: resnet(20, c, i),
    "resnet56": lambda c, i: resnet(56, c, i),
    # The same networks, fully trained.
    "resnet20_full": lambda c, i: resnet(20, c, i),
    "resnet56_full": lambda c, i: resnet(56, c, i),
    "mobilenetv2": mobilenet_v2,
    "densenet16": lambda c, i: densenet(16, c, i),
    "densenet40": lambda c, i: densenet(40, c, i),
}


def vgg16(n_classes: int, in_channels: int) -> nn.Module:
    """VGG-16 with BatchNorm and a single linear layer, as the papers prune it."""
    layers: list[nn.Module] = []
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if not width:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [*_conv_bn(in_channels, width), nn.ReLU()]
        in_channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, n_classes))


def build(name: str, n_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A network with random weights, channels last in memory."""
    return NETWORKS[name](n_classes, in_channels).to(memory_format=torch.channels_last)
