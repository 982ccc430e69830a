"""The residual network for small images (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_idkd.models.convolution import convolution
from lightning_idkd.models.norms import norm_activation, norm_layer, norm_shortcut


def last_side(size: int, stem_stride: int) -> int:
    """Side in pixels of the feature maps after the stem and the two stages that halve them."""
    return math.ceil(math.ceil(math.ceil(size / stem_stride) / 2) / 2)


class ResidualBlock(nn.Module):
    """``relu(norm(conv(act(conv(x)))) + shortcut(x))`` with 3x3 kernels.

    The shortcut is the identity, or a 1x1 convolution and a norm if the shape changes.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.act1 = norm_activation(norm, outputs)
        self.conv2 = convolution(outputs, outputs, 3)
        self.norm2 = norm_shortcut(norm, outputs)
        self.shortcut = (
            nn.Identity()
            if inputs == outputs and stride == 1
            else nn.Sequential(convolution(inputs, outputs, 1, stride), norm_layer(norm, outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act1(self.conv1(x))), self.shortcut(x))


class ResNetModule(nn.Module):
    """Maps images ``[B, channels, S, S]`` to logits ``[B, classes]`` through ``features`` ``[B, F]`` and ``head``.

    F is 4 ``width`` times the number of windows of ``pool`` x ``pool`` pixels in the last feature maps, one if ``pool``
    is None.
    """

    def __init__(self, depth: int, width: int, norm: str, stem_stride: int, pool: int | None, channels: int, size: int,
                 classes: int) -> None:  # fmt: skip
        super().__init__()
        blocks, inputs = [], width
        for outputs in (width, 2 * width, 4 * width):
            for i in range((depth - 2) // 6):
                stride = 2 if i == 0 and outputs != width else 1
                blocks.append(ResidualBlock(inputs, outputs, stride, norm))
                inputs = outputs
        self.stem = nn.Sequential(convolution(channels, width, 3, stem_stride), norm_activation(norm, width))
        self.blocks = nn.Sequential(*blocks)
        self.pool = pool
        self.head = nn.Linear(4 * width * (1 if pool is None else (last_side(size, stem_stride) // pool) ** 2), classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return x.mean((2, 3)) if self.pool is None else F.avg_pool2d(x, self.pool).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
