"""VGG-11 for small images (Simonyan and Zisserman, ICLR 2015)."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_idkd.models.convolution import convolution
from lightning_idkd.models.norms import norm_activation


class VGGModule(nn.Module):
    """Maps images ``[B, channels, S, S]`` to logits ``[B, classes]`` through ``features`` ``[B, 512]`` and ``head``."""

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
