"""Fully connected layers."""

from __future__ import annotations

from torch import Tensor, nn


class MLPModule(nn.Module):
    """Maps vectors ``[B, features]``, or images with so many pixels, to logits ``[B, classes]`` by ``features``
    ``[B, width]`` and ``head``."""

    def __init__(self, features: int, width: int, depth: int, dropout: float, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in [features] + [width] * (depth - 1):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(self.layers(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
