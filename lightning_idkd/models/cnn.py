"""A small convolutional network for images as small as 8x8."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_idkd.models.convolution import convolution
from lightning_idkd.models.norms import norm_activation
from lightning_idkd.models.vmap_layers import MaxPool2d


class CNNModule(nn.Module):
    """Maps images ``[B, channels, H, W]`` to logits ``[B, classes]`` by ``features`` ``[B, 2 width]`` and ``head``."""

    def __init__(self, width: int, dropout: float, norm: str, channels: int, classes: int) -> None:
        super().__init__()
        bias = norm == "none"  # a norm has its own bias

        def layer(inputs: int, outputs: int) -> list[nn.Module]:
            return [convolution(inputs, outputs, 3, bias=bias), norm_activation(norm, outputs)]

        self.layers = nn.Sequential(
            *layer(channels, width), *layer(width, 2 * width), MaxPool2d(2), *layer(2 * width, 2 * width)
        )
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.head = nn.Linear(2 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(self.layers(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
