"""Image files in folders, one a class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError, did_you_mean

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
STORED_AS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}  # the first there is


@dataclass
class ImageFolder(Subset):
    """Image files below ``path``: train/CLASS/*.png and test/CLASS/*.png (or val/), class names in sorted order.

    A public set needs no test part, no train/ level and no classes: all images below ``path`` will do.

    Args:
        path: the folder.
    """

    path: str = ""

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        names, folders = self._classes(split, key)
        files = [f for folder in folders.values() for f in self._images(folder)]
        return ("folder", names, list(folders), [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        names, folders = self._classes(split, key)
        return names, [(f, label) for label, folder in folders.items() for f in self._images(folder)]

    def _classes(self, split: str, key: str) -> tuple[tuple[str, ...], dict[int, Path]]:
        """Class names and the folder of every label; no names, and -1, where images lie in the folder directly."""
        root = Path(self.path).expanduser()
        if not self.path or not root.is_dir():
            raise UserError(f"{key}.path: '{self.path}' is no folder; allowed: one with train/CLASS/ and test/CLASS/ images")
        there = next((root / name for name in STORED_AS[split] if (root / name).is_dir()), None)
        if there is None and split == "test":
            raise UserError(f"{key}.path: '{self.path}' has no {' or '.join(STORED_AS['test'][:2])} folder with test images")
        there = there or root
        folders = sorted(f for f in there.iterdir() if f.is_dir() and not f.name.startswith("."))
        if there == root:
            folders = [f for f in folders if f.name not in STORED_AS["test"]]
        if not folders or self._images(there, "*"):
            if not self._images(there):
                raise UserError(f"{key}.path: no images below '{there}'; allowed endings: {' '.join(ENDINGS)}")
            if split == "test":
                raise UserError(f"{key}.path: the test images in '{there}' have no class folders")
            return (), {-1: there}
        for folder in folders:
            if not self._images(folder):
                raise UserError(f"{key}.path: the class folder '{folder}' holds no images")
        names = tuple(f.name for f in folders)
        if split == "train":
            return names, dict(enumerate(folders))
        known = self._classes("train", key)[0]  # a class without test images keeps its label
        for folder in folders:
            if folder.name not in known:
                raise UserError(f"{key}.path: '{folder}' is no class of the training part.{did_you_mean(folder.name, known)}")
        return known, {known.index(f.name): f for f in folders}

    def _images(self, folder: Path, pattern: str = "**/*") -> list[Path]:
        """Image files, hidden ones apart; the pattern says how deep."""
        found = (f for f in folder.glob(pattern) if f.suffix.lower() in ENDINGS and f.is_file())
        return sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))
