"""Networks of the decentralised-learning literature besides residual ones."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from lightning_idkd.models.norms import norm_activation, norm_layer
from lightning_idkd.models.resnet import convolution


class LeNetModule(nn.Module):
    """Images ``[B, channels, S, S]`` to logits ``[B, classes]`` through ``features`` ``[B, 84]`` and ``head``."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * side**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(84, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class VGGModule(nn.Module):
    """Images ``[B, channels, S, S]`` to logits ``[B, classes]`` through ``features`` ``[B, 512]`` and ``head``."""

    def __init__(self, norm: str, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, depth in ((64, 1), (128, 1), (256, 2), (512, 2), (512, 2)):
            for _ in range(depth):
                layers += [convolution(channels, width, 3, bias=True), norm_activation(norm, width)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(512, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def mobilenet_v2(norm: str, channels: int, classes: int) -> nn.Module:
    """torchvision's, with stride 1 in the stem and the second stage, so that 32x32 images end as 4x4."""
    from torchvision.models import MobileNetV2

    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    made = MobileNetV2(classes, inverted_residual_setting=stages, norm_layer=functools.partial(norm_layer, norm), dropout=0.0)
    made.features[0][0] = convolution(channels, 32, 3)
    return made


def vision_transformer(patch: int, depth: int, width: int, heads: int, channels: int, size: int, classes: int) -> nn.Module:
    """torchvision's, without dropout."""
    from torchvision.models import VisionTransformer

    made = VisionTransformer(size, patch, depth, heads, width, 2 * width, num_classes=classes)
    made.conv_proj = nn.Conv2d(channels, width, patch, patch)
    nn.init.trunc_normal_(made.conv_proj.weight, std=(channels * patch**2) ** -0.5)
    nn.init.zeros_(made.conv_proj.bias)
    return made
