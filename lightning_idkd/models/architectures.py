"""Architectures as light config objects: importable without torch, ``build`` makes the module."""

# No ``from __future__ import annotations`` here: to read postponed annotations jsonargparse executes the TYPE_CHECKING
# block, and importing torch would cost ``--help`` seconds.

import fnmatch
import inspect
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, get_args

from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lightning_idkd.models.split import Split

ResNetNorm = Literal["evonorm", "evonorm_batch", "evonorm_qgm", "group", "batch", "batch_statistics"]
Norm = Literal["none", "group", "batch", "batch_statistics"]
SomeNorm = Literal["group", "batch", "batch_statistics"]


class Architecture(ABC):
    """What a node trains: a network for the images and classes of the data."""

    @abstractmethod
    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        """A network for images ``[B, channels, size, size]``, initialised from torch's global generator.

        It has ``features(x) -> [B, F]`` (pooled, before the classifier), ``head`` (``nn.Linear``, F to classes) and
        ``forward(x) = head(features(x))``, the logits ``[B, classes]``.
        """


@dataclass
class ResNet(Architecture):
    """CIFAR ResNet of 6n+2 layers in three stages (He et al., CVPR 2016, section 4.2), for images of 8x8 and more.

    Shortcuts that change the shape are a 1x1 convolution of stride 2 and a norm. With "evonorm", EvoNorm-S0 (Liu et
    al. 2020) normalises and activates where the network of the QG-DSGDm paper has it: the stem and each block's first
    convolution. After the second convolution and in the shortcut that network has BatchNorm with the statistics of the
    batch at hand, in evaluation too ("evonorm_batch"); "evonorm" has GroupNorm there, so that no output depends on the other
    samples of the batch. All groups: 8, or as many of 4, 2, 1 as divide. "evonorm_qgm" is the ResNet-20-EvoNorm of QG-DSGDm's
    and IDKD's code, of 272,474 parameters for CIFAR-10: that BatchNorm, and an EvoNorm with up to 32 groups, the unbiased
    variance, no trained v (272,826 with it) and a ReLU behind.
    """

    depth: int = 20
    """Layers with weights, 6n+2: 8, 14, 20, 26, 32, 44, 56, 110, ..."""

    width: int = 16
    """Channels of the first stage; the next have two and four times as many."""

    norm: ResNetNorm = "evonorm"
    """EvoNorm-S0 (replaces norm and ReLU) with GroupNorm or batch statistics, or as in QG-DSGDm's code; GroupNorm, BatchNorm with
    running statistics, or BatchNorm with those of the batch at hand, in evaluation too."""

    stem_stride: int = 1
    """2 halves larger images at once, such as Imagenette at 64x64."""

    pool: int | None = None
    """Side of the windows of the last images that are averaged, each to features of its own, such as 8 in IDKD's code: 4 windows
    for 64x64. null: the whole image."""

    def __post_init__(self) -> None:
        if self.depth < 8 or self.depth % 6 != 2:
            below = max(8, self.depth - (self.depth - 2) % 6)
            raise UserError(
                f"node.network.depth is {self.depth}; a CIFAR ResNet has 6n+2 layers, the nearest depths are {below}"
                f" and {below + 6}."
            )
        _check_at_least_one("width", self.width)
        _check_at_least_one("stem_stride", self.stem_stride)
        if self.pool is not None:
            _check_at_least_one("pool", self.pool)
        _check_choice("norm", self.norm, get_args(ResNetNorm))

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.resnet import ResNetModule, last_side

        if self.pool is not None and self.pool > (side := last_side(size, self.stem_stride)):
            raise UserError(f"node.network.pool is {self.pool}; images of {size}x{size} end as {side}x{side}, at most that.")
        return ResNetModule(self.depth, self.width, self.norm, self.stem_stride, self.pool, channels, size, classes)


@dataclass
class CNN(Architecture):
    """Three 3x3 convolutions, one 2x2 max pooling and a global average: 14,458 parameters for 8x8 digits."""

    width: int = 16
    """Channels of the first convolution; the other two have twice as many."""

    dropout: float = 0.0
    """Probability of zeroing a feature before the classifier, in [0, 1)."""

    norm: Norm = "group"
    """No norm, GroupNorm (8 groups, or as many of 4, 2, 1 as divide), BatchNorm with running statistics, or with those of the
    batch at hand."""

    def __post_init__(self) -> None:
        _check_at_least_one("width", self.width)
        if not 0 <= self.dropout < 1:
            raise UserError(f"node.network.dropout is {self.dropout}; it is a probability, at least 0 and below 1.")
        _check_choice("norm", self.norm, get_args(Norm))

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.cnn import CNNModule

        if size < 2:
            raise UserError(f"data.image_size: {size} given; CNN pools 2x2 pixels and needs 2 or more")
        return CNNModule(self.width, self.dropout, self.norm, channels, classes)


@dataclass
class LeNet(Architecture):
    """LeNet-5 with ReLU and max pooling (LeCun et al., 1998), for images of 16x16 and more: 62,006 parameters for CIFAR-10."""

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.plain import LeNetModule

        if size < 16:
            raise UserError(f"data.image_size: {size} given; LeNet needs 16 or more")
        return LeNetModule(channels, size, classes)


@dataclass
class VGG(Architecture):
    """VGG-11 for CIFAR (Simonyan and Zisserman, 2015), for images of 32x32 and more: 9,225,610 parameters without norm.

    Eight 3x3 convolutions, five 2x2 poolings, one linear layer.
    """

    norm: Norm = "none"
    """No norm (as in the RelaySGD paper), GroupNorm, BatchNorm with running statistics, or with those of the batch at hand."""

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, get_args(Norm))

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.plain import VGGModule

        if size < 32:
            raise UserError(f"data.image_size: {size} given; VGG pools five times and needs 32 or more")
        return VGGModule(self.norm, channels, classes)


@dataclass
class MobileNetV2(Architecture):
    """torchvision's MobileNetV2 (Sandler et al., CVPR 2018) with strides for small images: 2,236,682 parameters for CIFAR-10."""

    norm: SomeNorm = "group"
    """GroupNorm, BatchNorm with running statistics, or with those of the batch at hand; without one the signal dies out."""

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, get_args(SomeNorm))

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.plain import mobilenet_v2

        return _split_at_last_linear(mobilenet_v2(self.norm, channels, classes), classes)


@dataclass
class ViT(Architecture):
    """A small vision transformer (Dosovitskiy et al., ICLR 2021), torchvision's, for small images."""

    patch: int = 4
    """Side of a patch in pixels; divides the image size."""

    depth: int = 6
    """Transformer blocks."""

    width: int = 128
    """Size of a token; a multiple of heads."""

    heads: int = 4
    """Attention heads."""

    def __post_init__(self) -> None:
        for key in ("patch", "depth", "width", "heads"):
            _check_at_least_one(key, getattr(self, key))
        if self.width % self.heads:
            raise UserError(f"node.network.width is {self.width}; it is a multiple of node.network.heads, {self.heads}.")

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.plain import vision_transformer

        if size % self.patch:
            raise UserError(f"node.network.patch is {self.patch}; it divides the image size, {size}.")
        made = vision_transformer(self.patch, self.depth, self.width, self.heads, channels, size, classes)
        return _split_at_last_linear(made, classes)


@dataclass
class TorchModule(Architecture):
    """Any ``nn.Module`` class, or function that returns one, by import path; it maps images to logits.

    A module whose ``head`` is an ``nn.Linear`` applied to its ``features(x)`` is used as it is. Any other is split at
    its last ``nn.Linear`` with as many outputs as there are classes; nothing, such as a log-softmax, may follow that
    layer. Both are checked once, on two random images.
    """

    path: str
    """Import path, e.g. ``torchvision.models.resnet18`` or ``my_package.MyNet``."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call. ``channels``, ``size`` and ``classes`` are added where the signature names them;
    ``torchvision.models`` get ``num_classes`` instead."""

    frozen: list[str] | None = None
    """Patterns of parameter names that are not trained, such as ``[conv1.*, bn1.*, layer*]`` for all but the classifier of
    ``resnet18``; null: none. Their norms and dropout work as in training."""

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        import torch
        from torch import nn

        make = _imported(self.path)
        sizes = {"channels": channels, "size": size, "classes": classes}
        try:
            if self.path.startswith("torchvision.models."):
                accepted = {"num_classes": classes}
                if self.path.endswith((".googlenet", ".inception_v3")):
                    accepted |= {"aux_logits": False, "init_weights": True}  # in training they return several outputs
            else:
                accepted = {key: sizes[key] for key in inspect.signature(make).parameters if key in sizes}
            module = make(**(accepted | self.arguments))
        except Exception as error:
            raise UserError(
                f"node.network.path: {self.path} cannot be called with {self.arguments}: {_summary(error)}."
            ) from error
        if not isinstance(module, nn.Module):
            raise UserError(f"node.network.path: {self.path} makes a {type(module).__name__}, not a torch.nn.Module.")
        self._freeze(module)

        modes = {part: part.training for part in module.modules()}
        module.eval()
        images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            try:
                logits = module(images)
            except Exception as error:
                raise UserError(
                    f"node.network.path: {self.path} fails on images {list(images.shape)}: {_summary(error)}."
                    + " These are grey; where it takes three channels, set data.channels to 3." * (channels == 1)
                ) from error
            if not isinstance(logits, torch.Tensor) or logits.shape != (2, classes):
                given = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
                raise UserError(f"node.network.path: {self.path} returns {given} for 2 images, not logits [2, {classes}].")
            if not _is_head_of_features(module, images, logits):
                module = _split_at_last_linear(module, classes)
                if module is None or not _is_head_of_features(module, images, logits):
                    raise UserError(
                        f"node.network.path: {self.path} does not end in an nn.Linear with {classes} outputs; give it a"
                        " features(x) -> [B, F] and a head = nn.Linear with forward(x) = head(features(x))."
                    )
        for part, training in modes.items():
            part.training = training
        return module

    def _freeze(self, module: "nn.Module") -> None:
        """Leave the parameters that ``frozen`` names as they are."""
        named = dict(module.named_parameters())
        for pattern in self.frozen or []:
            found = fnmatch.filter(named, pattern)
            if not found:
                parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in named))
                raise UserError(f"node.network.frozen: no parameter of {self.path} is named '{pattern}'; its parts are {parts}.")
            for name in found:
                named[name].requires_grad_(False)


def _is_head_of_features(module: "nn.Module", images: "Tensor", logits: "Tensor") -> bool:
    """Whether ``head(features(x))`` is what the module itself returned."""
    import torch
    from torch import nn

    head, features = getattr(module, "head", None), getattr(module, "features", None)
    if not isinstance(head, nn.Linear) or not callable(features):
        return False
    pooled = features(images)
    if not isinstance(pooled, torch.Tensor) or pooled.shape != (len(images), head.in_features):
        return False
    return torch.allclose(head(pooled), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


def _split_at_last_linear(module: "nn.Module", classes: int) -> "Split | None":
    from torch import nn

    from lightning_idkd.models.split import Split

    linear = [name for name, m in module.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not linear or linear[-1] == "":
        return None
    return Split(module, linear[-1])


def _imported(path: str) -> "Callable":
    parent, _, name = path.rpartition(".")
    if not parent:
        raise UserError(f"node.network.path is '{path}'; it is an import path such as torchvision.models.resnet18.")
    try:
        module = import_module(parent)
    except ModuleNotFoundError as error:
        package, _, missing = (error.name or "").rpartition(".")
        found = pkgutil.iter_modules(getattr(import_module(package), "__path__", []) if package else None)
        hint = did_you_mean(missing, [m.name for m in found])
        raise UserError(f"node.network.path is '{path}': no module named '{error.name}'.{hint}") from error
    except Exception as error:
        raise UserError(f"node.network.path is '{path}': {parent} does not import: {_summary(error)}.") from error
    if not hasattr(module, name):
        raise UserError(f"node.network.path is '{path}': {parent} has no '{name}'.{did_you_mean(name, dir(module))}")
    return getattr(module, name)


def _summary(error: Exception) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}".rstrip(".: ")


def _check_at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"node.network.{key} is {value}; it is at least 1.")


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise UserError(f"node.network.{key} is '{value}'; allowed are {', '.join(allowed)}.{hint}")
