"""Networks of torchvision, adapted to small images and to any number of channels."""

from __future__ import annotations

import functools
import inspect

from torch import nn

from lightning_idkd.models.convolution import convolution
from lightning_idkd.models.norms import norm_layer


def mobilenet_v2(norm: str, channels: int, classes: int) -> nn.Module:
    """MobileNetV2 with stride 1 in the stem and the second stage: 32x32 images have last feature maps of 4x4."""
    from torchvision.models import MobileNetV2

    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    network = MobileNetV2(
        classes, inverted_residual_setting=stages, norm_layer=functools.partial(norm_layer, norm), dropout=0.0
    )
    network.features[0][0] = convolution(channels, 32, 3)
    return network


def vision_transformer(
    patch: int, depth: int, width: int, heads: int, channels: int, size: int, classes: int
) -> nn.Module:
    """A vision transformer without dropout, whose patches may be of images with any number of channels."""
    from torchvision.models import VisionTransformer

    network = VisionTransformer(size, patch, depth, heads, width, 2 * width, num_classes=classes)
    network.conv_proj = nn.Conv2d(channels, width, patch, patch)
    nn.init.trunc_normal_(network.conv_proj.weight, std=(channels * patch**2) ** -0.5)
    nn.init.zeros_(network.conv_proj.bias)
    return network


def is_model_builder(made: object) -> bool:
    """Whether an object is a network class of ``torchvision.models``, or one of the functions that it lists as builders
    of a network."""
    from torchvision import models

    if inspect.isclass(made):
        return issubclass(made, nn.Module) and made.__module__.startswith("torchvision.models.")
    return inspect.isfunction(made) and any(made is models.get_model_builder(name) for name in models.list_models())
