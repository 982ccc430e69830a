"""The networks ResNet, CNN, MLP, LeNet and VGG of lightning-idkd in plain torch, to load an exported model.

Every exported folder has a copy of this file, ``network.py``, which needs only torch and safetensors::

    import network

    model = network.load(".")
    logits = model(samples)  # images: pixels uint8 [N, C, S, S]; vectors: features [N, F], not scaled
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Scales samples by ``mean`` and ``std``, one number a channel or feature, and maps them to logits [N, classes]."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))

    def forward(self, samples: Tensor) -> Tensor:
        shape = -1, *[1] * (samples.dim() - 2)
        scaled = (samples - self.mean.view(shape)) / self.std.view(shape)
        return self.network(scaled.to(next(self.network.parameters()).dtype))


def load(folder: str | Path) -> Classifier:
    """Load the model of an exported folder, in evaluation mode."""
    from safetensors.torch import load_file

    about = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    network = build(about)
    network.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return Classifier(network, about["mean"], about["std"]).eval()


def build(about: dict) -> nn.Module:
    """Build the network that a ``config.json`` describes, with random parameters."""
    chosen = about["config"]["node"]["network"]
    arguments = dict(chosen["init_args"])
    kind = arguments.pop("feature_norm", None)
    vector = (len(about["mean"]),)
    shape = (about["channels"], about["size"], about["size"]) if "channels" in about else vector
    network = NETWORKS[chosen["class_path"].rpartition(".")[2]](shape, len(about["classes"]), **arguments)
    return network if kind is None else NormalisedFeatures(network, kind)


class Headed(nn.Module):
    """A network whose logits are ``head(features(x))``."""

    head: nn.Module

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class MLP(Headed):
    """Fully connected layers with ReLU."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, dropout: float):
        super().__init__()
        sizes = [math.prod(shape), *[width] * depth]
        layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        self.layers, self.dropout = nn.Sequential(*layers), nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(self.layers(x.flatten(1)))


class CNN(Headed):
    """Three 3x3 convolutions, one max pooling and a global average."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, dropout: float, norm: str):
        super().__init__()
        bias = norm == "none"
        self.layers = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1, bias=bias), activation(norm, width),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=bias), activation(norm, 2 * width), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=bias), activation(norm, 2 * width),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(self.layers(x).mean((2, 3)))


class LeNet(Headed):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling."""

    def __init__(self, shape: tuple[int, ...], classes: int):
        super().__init__()
        channels, size, _ = shape
        side = ((size - 4) // 2 - 4) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * side**2, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(84, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x)


class VGG(Headed):
    """VGG-11 for small images (Simonyan and Zisserman, ICLR 2015)."""

    def __init__(self, shape: tuple[int, ...], classes: int, norm: str):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = shape[0]
        for step in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
            if step == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(inputs, step, 3, padding=1), activation(norm, step)]
                inputs = step
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(512, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class ResNet(Headed):
    """CIFAR ResNet of 6n+2 layers (He et al., CVPR 2016, section 4.2)."""

    def __init__(self, shape: tuple[int, ...], classes: int, depth: int, width: int, norm: str, stem_stride: int,
                 pool: int | None):  # fmt: skip
        super().__init__()
        channels, size, _ = shape
        stem = nn.Conv2d(channels, width, 3, stem_stride, padding=1, bias=False)
        self.stem = nn.Sequential(stem, activation(norm, width))
        blocks, inputs = [], width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                blocks.append(Block(inputs, width * 2**stage, 2 if stage and not i else 1, norm))
                inputs = width * 2**stage
        self.blocks, self.pool = nn.Sequential(*blocks), pool
        side = math.ceil(math.ceil(math.ceil(size / stem_stride) / 2) / 2)
        self.head = nn.Linear(4 * width * (1 if pool is None else (side // pool) ** 2), classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return x.mean((2, 3)) if self.pool is None else F.avg_pool2d(x, self.pool).flatten(1)


class Block(nn.Module):
    """``relu(norm(conv(act(conv(x)))) + shortcut(x))``."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.act1 = activation(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        last = normalisation(norm, outputs)
        self.norm2 = last if isinstance(last, nn.GroupNorm) else nn.Sequential(last)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, normalisation(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(self.act1(self.conv1(x)))) + self.shortcut(x))


def normalisation(norm: str, channels: int) -> nn.Module:
    """A norm without activation. The EvoNorms have GroupNorm or BatchNorm at these places."""
    if norm == "none":
        return nn.Identity()
    if norm in ("group", "evonorm"):
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.BatchNorm2d(channels, track_running_stats=norm == "batch")


def activation(norm: str, channels: int) -> nn.Module:
    """A norm and its activation."""
    if norm in ("evonorm", "evonorm_batch"):
        return EvoNorm(channels, math.gcd(8, channels))
    if norm == "evonorm_qgm":
        groups = max(g for g in range(1, 33) if channels % g == 0)
        return EvoNorm(channels, groups, qgm=True)
    if norm == "group":
        return GroupNormReLU(math.gcd(8, channels), channels)
    return nn.Sequential(normalisation(norm, channels), nn.ReLU())


class GroupNormReLU(nn.GroupNorm):
    """GroupNorm, then ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class EvoNorm(nn.Module):
    """EvoNorm-S0 (Liu et al., NeurIPS 2020): ``x sigmoid(v x) / sqrt(var_group(x) + eps) * weight + bias``.

    That of the code of QG-DSGDm (``qgm``) has v = 1, a variance of N values divided by N - 1, and a ReLU after it.
    """

    def __init__(self, channels: int, groups: int, qgm: bool = False, eps: float = 1e-5):
        super().__init__()
        self.groups, self.qgm, self.eps = groups, qgm, eps
        self.v = None if qgm else nn.Parameter(torch.ones(channels))
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        gated = x * torch.sigmoid(x if self.v is None else x * self.v[:, None, None])
        in_groups = x.unflatten(1, (self.groups, -1))
        variance = in_groups.var((2, 3, 4), correction=1 if self.qgm else 0, keepdim=True)
        y = (gated.unflatten(1, (self.groups, -1)) / torch.sqrt(variance + self.eps)).flatten(1, 2)
        y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return F.relu(y) if self.qgm else y


class NormalisedFeatures(nn.Module):
    """A network whose features have mean 0 and variance 1 (``layer``) or the length sqrt(F) (``sphere``)."""

    def __init__(self, network: Headed, kind: str):
        super().__init__()
        self.network, self.kind = network, kind

    def forward(self, x: Tensor) -> Tensor:
        features = self.network.features(x)
        if self.kind == "layer":
            features = F.layer_norm(features, features.shape[1:])
        else:
            features = F.normalize(features, dim=1) * features.shape[1] ** 0.5
        return self.network.head(features)


NETWORKS = {"CNN": CNN, "LeNet": LeNet, "MLP": MLP, "ResNet": ResNet, "VGG": VGG}
"""The classes by their names in ``config.json``."""
