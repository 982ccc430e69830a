"""A source of the image sets that torchvision downloads and checks, each by its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_idkd.data.source import Subset, expand
from lightning_idkd.errors import UserError, did_you_mean

Dataset = Any  # torchvision's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds

# class in torchvision.datasets, its arguments for the training part and for the test part (None: it has no test part)
SETS: dict[str, tuple[str, list[dict], list[dict] | None]] = {
    "cifar10": ("CIFAR10", [{"train": True}], [{"train": False}]),
    "cifar100": ("CIFAR100", [{"train": True}], [{"train": False}]),
    "mnist": ("MNIST", [{"train": True}], [{"train": False}]),
    "fashion_mnist": ("FashionMNIST", [{"train": True}], [{"train": False}]),
    "svhn": ("SVHN", [{"split": "train"}], [{"split": "test"}]),
    "imagenette": ("Imagenette", [{"split": "train", "size": "160px"}], [{"split": "val", "size": "160px"}]),
    "textures": ("DTD", [{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "places365": ("Places365", [{"split": "val", "small": True}], None),
}
IMAGENETTE = {"train": 9469, "test": 3925}  # images; torchvision does not notice that unpacking was interrupted


@dataclass
class Torchvision(Subset):
    """A set that torchvision downloads.

    The sets are cifar10, cifar100 (the fine classes), mnist, fashion_mnist, svhn, imagenette (10 ImageNet classes, 160
    pixels; the validation part is the test set), textures (DTD; the training and validation parts are trained on) and
    places365 (the 36,500 validation scenes, a public set). Sets of images of different sizes need data.image_size.

    Args:
        name: name of the set.
        path: folder of torchvision's files.
        download: whether to download files that are missing.
    """

    name: str = "cifar10"
    path: str = "~/.cache/torchvision"
    download: bool = True

    def __post_init__(self):
        if self.name not in SETS:
            hint = did_you_mean(self.name, SETS)
            raise UserError(f"data.private.name: there is no set '{self.name}'.{hint} Allowed: {', '.join(SETS)}")

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        return ("torchvision", self.name, split)  # a complete set has the same content in every folder

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        import torchvision.datasets

        name, *by_split = SETS[self.name]
        parts = by_split[split == "test"]
        if parts is None:
            raise UserError(f"{key}.name: {self.name} has no test part, so it can be a public set only")
        make, folder = getattr(torchvision.datasets, name), expand(self.path, f"{key}.path")
        # These sets are files; a loader that keeps their paths leaves the decoding to this package.
        paths = {"loader": Path} if name in ("Imagenette", "DTD", "Places365") else {}
        try:
            datasets = [make(folder, **part, **paths, download=self.download) for part in parts]
        except (OSError, RuntimeError) as error:  # no network, or torchvision's "not found or corrupted"
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{key}.path: '{self.path}' does not hold the complete {self.name} files of torchvision"
                + (f", and they cannot be downloaded ({why})." if self.download else f"; set {key}.download to true.")
            ) from error
        if self.name == "imagenette" and (count := sum(map(len, datasets))) != IMAGENETTE[split]:
            raise UserError(
                f"{key}.path: '{folder / 'imagenette2-160'}' holds {count} of {IMAGENETTE[split]} {split} images; "
                f"delete it, and set {key}.download to true"
            )
        classes = getattr(datasets[0], "classes", range(10))  # SVHN names no classes, which are digits
        names = tuple(c[0] if isinstance(c, tuple) else str(c) for c in classes)
        return names, chain.from_iterable(map(read_samples, datasets))


def read_samples(dataset: Dataset) -> Iterable[tuple]:
    """The (image, label) pairs of a torchvision dataset, from its arrays where it has them."""
    import numpy as np

    if not hasattr(dataset, "data"):
        return (dataset[i] for i in range(len(dataset)))
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 4 and pixels.shape[1] == 3:  # SVHN's are channels-first
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return zip(pixels, np.asarray(labels).tolist(), strict=True)
