"""CIFAR-10 and CIFAR-100 as torchvision downloads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_idkd.data.source import Source
from lightning_idkd.errors import UserError, did_you_mean


@dataclass
class TorchvisionCIFAR(Source):
    """The original, lossless CIFAR files, 32x32 in colour, 50,000 for training and 10,000 for testing.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.

    Args:
        name: cifar10 or cifar100 (the 100 fine classes).
        path: folder for torchvision's files.
        download: fetch them (170 MB) where they are missing.
        limit: use so many training images, a fixed random choice; null for all.
    """

    name: Literal["cifar10", "cifar100"] = "cifar10"
    path: str = "~/.cache/torchvision"
    download: bool = True
    limit: int | None = None

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        return ("torchvision", self.name, split)  # its checksums allow one content only, wherever that lies

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        sets = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
        if self.name not in sets:
            hint = did_you_mean(self.name, sets)
            raise UserError(f"{key}.name: '{self.name}' given; allowed: {', '.join(sets)}.{hint}")
        import torchvision.datasets

        folder = Path(self.path).expanduser()
        try:
            dataset = getattr(torchvision.datasets, sets[self.name])(folder, split == "train", download=self.download)
        except (OSError, RuntimeError) as error:  # no network; torchvision's "not found or corrupted"
            raise UserError(
                f"{key}.path: '{self.path}' does not hold the complete {self.name} files of torchvision"
                + (f", and they cannot be downloaded ({error})." if self.download else f"; set {key}.download to true.")
            ) from error
        return tuple(dataset.classes), zip(dataset.data, dataset.targets, strict=True)
