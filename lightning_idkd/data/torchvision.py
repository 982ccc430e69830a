"""Image sets that torchvision downloads and checks, by one name each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError, did_you_mean

# class in torchvision.datasets, its arguments for the training and for the test part (None: has none)
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
IMAGENETTE = {"train": 9469, "test": 3925}  # torchvision takes whatever an interrupted unpacking has left


@dataclass
class Torchvision(Subset):
    """A set that torchvision downloads.

    cifar10, cifar100 (the fine classes), mnist, fashion_mnist, svhn, imagenette (10 ImageNet classes, 160 pixels; its
    validation part tests), textures (DTD; its training and validation parts train), places365 (the 36,500 validation
    scenes, a public set). Sets of larger images need data.image_size.

    Args:
        name: which one.
        path: folder for torchvision's files.
        download: fetch them where they are missing.
    """

    name: str = "cifar10"
    path: str = "~/.cache/torchvision"
    download: bool = True

    def __post_init__(self):
        if self.name not in SETS:
            raise UserError(
                f"data.private.name: there is no set '{self.name}'.{did_you_mean(self.name, SETS)} Allowed: {', '.join(SETS)}"
            )

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        return ("torchvision", self.name, split)  # complete sets have one content only, wherever that lies

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        import torchvision.datasets

        name, *by_split = SETS[self.name]
        parts = by_split[split == "test"]
        if parts is None:
            raise UserError(f"{key}.name: {self.name} has no test part, so it can be a public set only")
        make, folder = getattr(torchvision.datasets, name), Path(self.path).expanduser()
        paths = {"loader": Path} if name in ("Imagenette", "DTD", "Places365") else {}  # files, to be decoded with all others
        try:
            found = [make(folder, **part, **paths, download=self.download) for part in parts]
        except (OSError, RuntimeError) as error:  # no network; torchvision's "not found or corrupted"
            why = " ".join(str(error).split())[:200]
            raise UserError(
                f"{key}.path: '{self.path}' does not hold the complete {self.name} files of torchvision"
                + (f", and they cannot be downloaded ({why})." if self.download else f"; set {key}.download to true.")
            ) from error
        if self.name == "imagenette" and (count := sum(map(len, found))) != IMAGENETTE[split]:
            raise UserError(
                f"{key}.path: '{folder / 'imagenette2-160'}' holds {count} of {IMAGENETTE[split]} {split} images; delete it, "
                f"and set {key}.download to true"
            )
        classes = getattr(found[0], "classes", range(10))  # SVHN's are digits
        return tuple(c[0] if isinstance(c, tuple) else str(c) for c in classes), chain.from_iterable(map(samples, found))


def samples(dataset) -> Iterable[tuple]:
    """(image, label) pairs of a torchvision dataset: from its arrays where it has them."""
    import numpy as np

    if not hasattr(dataset, "data"):
        return (dataset[i] for i in range(len(dataset)))
    pixels = np.asarray(dataset.data)
    if pixels.ndim == 4 and pixels.shape[1] == 3:  # SVHN's are channels-first
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return zip(pixels, np.asarray(labels).tolist(), strict=True)
