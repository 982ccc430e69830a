"""Architectures as config objects, importable without torch; ``build`` makes the network."""

# No ``from __future__ import annotations`` here: to read postponed annotations, jsonargparse executes the TYPE_CHECKING
# block, and importing torch would make ``--help`` slower by seconds.

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

    from lightning_idkd.data.inputs import Inputs

ResNetNorm = Literal["evonorm", "evonorm_batch", "evonorm_qgm", "group", "batch", "batch_statistics"]
Norm = Literal["none", "group", "batch", "batch_statistics"]
SomeNorm = Literal["group", "batch", "batch_statistics"]
FeatureNorm = Literal["layer", "sphere"]


@dataclass
class Architecture(ABC):
    """The network that a node trains, for the samples and classes of the data."""

    feature_norm: FeatureNorm | None = field(default=None, kw_only=True)
    """Norm of the features before the classifier, which keeps nodes that lack classes from drifting apart (Zhang et
    al., arXiv 2308.09565). layer: mean 0 and variance 1 over the features of a sample. sphere: length sqrt(F) for F
    features. null: no norm."""

    @abstractmethod
    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        """Build a network for images ``[B, channels, size, size]``, initialised from torch's global generator.

        A subclass whose arguments are named ``features`` and ``classes`` is a network of vectors ``[B, features]``.
        Images have ``channels * size**2`` features, so such a network works for both.

        The network has ``features(x) -> [B, F]`` (pooled, before the classifier), ``head`` (``nn.Linear``, F to
        classes) and ``forward(x) = head(features(x))``, the logits ``[B, classes]``.
        """

    def build_for(self, inputs: "Inputs", classes: int) -> "nn.Module":
        """Build the network for samples of a form, with its ``feature_norm``.

        Raises:
            UserError: these samples have not the sizes that the network needs, or it has no features to normalise.
        """
        from lightning_idkd.models.feature_norm import NormalisedFeatures

        network = self.build_plain(inputs, classes)
        if self.feature_norm is None:
            return network
        _check_choice("feature_norm", self.feature_norm, get_args(FeatureNorm))
        if not (hasattr(network, "features") and hasattr(network, "head")):
            name = type(self).__name__
            raise UserError(
                f"node.network.feature_norm: {name} builds a network without features(x) and head; allowed: null"
            )
        return NormalisedFeatures(network, self.feature_norm)

    def build_plain(self, inputs: "Inputs", classes: int) -> "nn.Module":
        """Build the network for samples of a form: call :meth:`build` with the sizes of images, or with those that it
        names.

        Raises:
            UserError: it names a size that these samples do not have.
        """
        offered, parameters = inputs.sizes | {"classes": classes}, inspect.signature(self.build).parameters
        needed = [
            name
            for name, p in parameters.items()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if "channels" in offered and "features" not in needed:
            return self.build(inputs.sizes["channels"], inputs.sizes["size"], classes)
        lacking = [name for name in needed if name not in offered]
        if lacking or "features" not in needed:
            needs, has = " and ".join(lacking) or "sizes of images", " and ".join(inputs.sizes)
            allowed = "MLP, TorchModule, or a class of yours whose build takes features and classes"
            raise UserError(
                f"node.network: {type(self).__name__} needs {needs}, but {inputs.plural} have {has}; allowed: {allowed}"
            )
        chosen = dict.fromkeys([*needed, *(["classes"] if "classes" in parameters else [])])
        return self.build(**{name: offered[name] for name in chosen})


@dataclass
class ResNet(Architecture):
    """CIFAR ResNet of 6n+2 layers in three stages (He et al., CVPR 2016, section 4.2), for images of 8x8 and more.

    A shortcut that changes the shape is a 1x1 convolution of stride 2 with a norm. The three kinds of EvoNorm-S0 (Liu
    et al., NeurIPS 2020), which normalises and activates, are placed as in the network of the QG-DSGDm paper: in the
    stem and after each block's first convolution. They differ in the norm after the second convolution and in the
    shortcut. "evonorm_batch" has BatchNorm there, with the statistics of the current batch, in evaluation too, as in
    the QG-DSGDm paper. "evonorm" has GroupNorm there, so that no output depends on the other samples of the batch. Both
    have 8 groups, or the largest of 4, 2, 1 that divides the channels. "evonorm_qgm" is the ResNet-20-EvoNorm of the
    code of QG-DSGDm and IDKD, with 272,474 parameters for CIFAR-10. It has the BatchNorm of "evonorm_batch", and an
    EvoNorm with up to 32 groups, the unbiased variance, an untrained v (272,826 parameters if trained), and a ReLU
    after it.
    """

    depth: int = 20
    """Number of layers with weights, 6n+2: 8, 14, 20, 26, 32, 44, 56, 110, ..."""

    width: int = 16
    """Channels of the first stage; the next two stages have two and four times as many."""

    norm: ResNetNorm = "evonorm"
    """evonorm, evonorm_batch, evonorm_qgm: EvoNorm-S0 with GroupNorm, with batch statistics, or as in QG-DSGDm's code,
    see above. group: GroupNorm. batch: BatchNorm with running statistics. batch_statistics: BatchNorm with the
    statistics of the current batch, in evaluation too."""

    stem_stride: int = 1
    """Stride of the first convolution; 2 halves the side of larger images at once, such as Imagenette at 64x64."""

    pool: int | None = None
    """Side of the windows of the last feature maps that average pooling reduces to one value per channel, such as 8 in
    IDKD's code, which gives 4 windows for images of 64x64. null: one window, the whole feature map."""

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
            raise UserError(
                f"node.network.pool is {self.pool}; the last feature maps of {size}x{size} images are {side}x{side},"
                f" so it must be at most {side}."
            )
        return ResNetModule(self.depth, self.width, self.norm, self.stem_stride, self.pool, channels, size, classes)


@dataclass
class CNN(Architecture):
    """Three 3x3 convolutions, one 2x2 max pooling and a global average: 14,458 parameters for 8x8 digits."""

    width: int = 16
    """Channels of the first convolution; the other two convolutions have twice as many."""

    dropout: float = 0.0
    """Probability of zeroing a feature before the classifier, in [0, 1)."""

    norm: Norm = "group"
    """none: no norm. group: GroupNorm with 8 groups, or the largest of 4, 2, 1 that divides the channels. batch:
    BatchNorm with running statistics. batch_statistics: BatchNorm with the statistics of the current batch, in
    evaluation too."""

    def __post_init__(self) -> None:
        _check_at_least_one("width", self.width)
        _check_dropout(self.dropout)
        _check_choice("norm", self.norm, get_args(Norm))

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.cnn import CNNModule

        if size < 2:
            raise UserError(f"data.image_size: {size} given; CNN pools 2x2 pixels and needs 2 or more")
        return CNNModule(self.width, self.dropout, self.norm, channels, classes)


@dataclass
class MLP(Architecture):
    """Fully connected layers with ReLU, for vectors, and for images as vectors of their pixels.

    With the width 200 and images of 28x28 it is the 2NN of FedAvg (McMahan et al., AISTATS 2017), with 199,210
    parameters for 10 classes.
    """

    width: int = 64
    """Outputs of every hidden layer."""

    depth: int = 2
    """Number of hidden layers."""

    dropout: float = 0.0
    """Probability of zeroing a feature before the classifier, in [0, 1)."""

    def __post_init__(self) -> None:
        _check_at_least_one("width", self.width)
        _check_at_least_one("depth", self.depth)
        _check_dropout(self.dropout)

    def build(self, features: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.mlp import MLPModule

        return MLPModule(features, self.width, self.depth, self.dropout, classes)


@dataclass
class LeNet(Architecture):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling, for images of 16x16 and more.

    It has 62,006 parameters for CIFAR-10.
    """

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.lenet import LeNetModule

        if size < 16:
            raise UserError(f"data.image_size: {size} given; LeNet needs 16 or more")
        return LeNetModule(channels, size, classes)


@dataclass
class VGG(Architecture):
    """VGG-11 for CIFAR (Simonyan and Zisserman, 2015), for images of 32x32 and more: 9,225,610 parameters without norm.

    Eight 3x3 convolutions, five 2x2 poolings, one linear layer.
    """

    norm: Norm = "none"
    """none: no norm, as in the RelaySGD paper. group: GroupNorm. batch: BatchNorm with running statistics.
    batch_statistics: BatchNorm with the statistics of the current batch, in evaluation too."""

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, get_args(Norm))

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.vgg import VGGModule

        if size < 32:
            raise UserError(f"data.image_size: {size} given; VGG pools five times and needs 32 or more")
        return VGGModule(self.norm, channels, classes)


@dataclass
class MobileNetV2(Architecture):
    """MobileNetV2 of torchvision (Sandler et al., CVPR 2018) with strides for small images.

    It has 2,236,682 parameters for CIFAR-10.
    """

    norm: SomeNorm = "group"
    """group: GroupNorm. batch: BatchNorm with running statistics. batch_statistics: BatchNorm with the statistics of
    the current batch, in evaluation too. Without a norm the activations would vanish."""

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, get_args(SomeNorm))

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.split import split_at_last_linear
        from lightning_idkd.models.torchvision import mobilenet_v2

        return split_at_last_linear(mobilenet_v2(self.norm, channels, classes), classes)


@dataclass
class ViT(Architecture):
    """A small vision transformer of torchvision (Dosovitskiy et al., ICLR 2021) for small images."""

    patch: int = 4
    """Side of a patch in pixels; it must divide the image size."""

    depth: int = 6
    """Number of transformer blocks."""

    width: int = 128
    """Size of a token, a multiple of ``heads``."""

    heads: int = 4
    """Number of attention heads."""

    def __post_init__(self) -> None:
        for key in ("patch", "depth", "width", "heads"):
            _check_at_least_one(key, getattr(self, key))
        if self.width % self.heads:
            raise UserError(
                f"node.network.width is {self.width}; it must be a multiple of node.network.heads, {self.heads}."
            )

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.models.split import split_at_last_linear
        from lightning_idkd.models.torchvision import vision_transformer

        if size % self.patch:
            raise UserError(f"node.network.patch is {self.patch}; it must divide the image size, {size}.")
        network = vision_transformer(self.patch, self.depth, self.width, self.heads, channels, size, classes)
        return split_at_last_linear(network, classes)


@dataclass
class TorchModule(Architecture):
    """Any ``nn.Module`` class, or function that returns a module, by its import path; it maps samples to logits.

    A module whose ``head`` is an ``nn.Linear`` applied to its ``features(x)`` is used as it is. Any other module is
    split at its last ``nn.Linear`` with as many outputs as there are classes; no further operation, such as a
    log-softmax, may follow that layer. Both conditions are checked once, on two random samples.
    """

    path: str
    """Import path, such as ``torchvision.models.resnet18`` or ``my_package.MyNet``."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the call. ``channels``, ``size``, ``features`` and ``classes`` are added if the signature
    names them; ``torchvision.models`` get ``num_classes`` instead."""

    frozen: list[str] | None = None
    """Name patterns of the parameters that are not trained, such as ``[conv1.*, bn1.*, layer*]`` for all but the
    classifier of ``resnet18``; null: all are trained. Norms and dropout of frozen parts work as in training."""

    def build(self, channels: int, size: int, classes: int) -> "nn.Module":
        from lightning_idkd.data.images import ImageInputs

        return self.build_plain(ImageInputs(channels, size), classes)

    def build_plain(self, inputs: "Inputs", classes: int) -> "nn.Module":
        import torch

        from lightning_idkd.models.split import is_split, split_at_last_linear

        module = self._make(inputs, classes)
        self._freeze(module)
        modes = {part: part.training for part in module.modules()}
        module.eval()
        samples = torch.randn(2, *inputs.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = self._check_logits(module, inputs, samples, classes)
            if not is_split(module, samples, logits):
                module = split_at_last_linear(module, classes)
                if module is None or not is_split(module, samples, logits):
                    raise UserError(
                        f"node.network.path: {self.path} does not end in an nn.Linear with {classes} outputs; give it a"
                        " features(x) -> [B, F] and a head = nn.Linear with forward(x) = head(features(x))."
                    )
        for part, training in modes.items():
            part.training = training
        return module

    def _make(self, inputs: "Inputs", classes: int) -> "nn.Module":
        """Call the class or function at ``path``."""
        from torch import nn

        make = _import_path(self.path)
        sizes = inputs.sizes | {"classes": classes}
        try:
            if self.path.startswith("torchvision.models."):
                accepted = {"num_classes": classes}
                if self.path.endswith((".googlenet", ".inception_v3")):
                    accepted |= {"aux_logits": False, "init_weights": True}  # no auxiliary outputs in training
            else:
                accepted = {key: sizes[key] for key in inspect.signature(make).parameters if key in sizes}
            module = make(**(accepted | self.arguments))
        except Exception as error:
            raise UserError(
                f"node.network.path: {self.path} cannot be called with {self.arguments}: {_summarise(error)}."
            ) from error
        if not isinstance(module, nn.Module):
            raise UserError(f"node.network.path: {self.path} makes a {type(module).__name__}, not a torch.nn.Module.")
        return module

    def _freeze(self, module: "nn.Module") -> None:
        """Set ``requires_grad = False`` for the parameters that ``frozen`` names."""
        parameters = dict(module.named_parameters())
        for pattern in self.frozen or []:
            names = fnmatch.filter(parameters, pattern)
            if not names:
                parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
                raise UserError(
                    f"node.network.frozen: no parameter of {self.path} is named '{pattern}'; its parts are {parts}."
                )
            for name in names:
                parameters[name].requires_grad_(False)

    def _check_logits(self, module: "nn.Module", inputs: "Inputs", samples: "Tensor", classes: int) -> "Tensor":
        """Run ``module`` on ``samples`` and return its logits, refusing any other kind of output."""
        from torch import Tensor

        try:
            logits = module(samples)
        except Exception as error:
            message = (
                f"node.network.path: {self.path} fails on {inputs.plural} {list(samples.shape)}: {_summarise(error)}."
            )
            if inputs.sizes.get("channels") == 1:
                message += " These images are grey; if the network takes three channels, set data.channels to 3."
            raise UserError(message) from error
        if not isinstance(logits, Tensor) or logits.shape != (len(samples), classes):
            given = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(
                f"node.network.path: {self.path} returns {given} for 2 {inputs.plural}, not logits [2, {classes}]."
            )
        return logits


def _import_path(path: str) -> "Callable":
    """Import what ``path`` names, or raise a UserError that says which part of it is wrong."""
    parent, _, name = path.rpartition(".")
    if not parent:
        raise UserError(
            f"node.network.path is '{path}'; it must be an import path such as torchvision.models.resnet18."
        )
    try:
        module = import_module(parent)
    except ModuleNotFoundError as error:
        package, _, missing = (error.name or "").rpartition(".")
        modules = pkgutil.iter_modules(getattr(import_module(package), "__path__", []) if package else None)
        hint = did_you_mean(missing, [m.name for m in modules])
        raise UserError(f"node.network.path is '{path}': no module named '{error.name}'.{hint}") from error
    except Exception as error:
        raise UserError(f"node.network.path is '{path}': {parent} does not import: {_summarise(error)}.") from error
    if not hasattr(module, name):
        raise UserError(f"node.network.path is '{path}': {parent} has no '{name}'.{did_you_mean(name, dir(module))}")
    return getattr(module, name)


def _summarise(error: Exception) -> str:
    """The type of ``error`` and the first line of its message."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}".rstrip(".: ")


def _check_at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise UserError(f"node.network.{key} is {value}; it must be at least 1.")


def _check_dropout(value: float) -> None:
    if not 0 <= value < 1:
        raise UserError(f"node.network.dropout is {value}; it must be a probability, at least 0 and below 1.")


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        hint = did_you_mean(str(value), allowed)
        raise UserError(f"node.network.{key} is '{value}'; allowed are {', '.join(allowed)}.{hint}")
