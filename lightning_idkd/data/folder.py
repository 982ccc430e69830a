"""Image files in folders, one a class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError

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
        files = [f for folder in self._classes(split, key)[1] for f in self._images(folder, deep=True)]
        return ("folder", [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        names, folders = self._classes(split, key)
        labels = range(len(folders)) if names else [-1]
        return names, [(f, label) for label, folder in zip(labels, folders, strict=True) for f in self._images(folder, True)]

    def _classes(self, split: str, key: str) -> tuple[tuple[str, ...], list[Path]]:
        """Names and folders of the classes; no names and one folder where images lie in it directly."""
        root = Path(self.path).expanduser()
        if not self.path or not root.is_dir():
            raise UserError(f"{key}.path: '{self.path}' is no folder; allowed: one with train/CLASS/ and test/CLASS/ images")
        there = next((root / name for name in STORED_AS[split] if (root / name).is_dir()), None)
        if there is None:
            if split == "test":
                raise UserError(f"{key}.path: '{self.path}' has no {' or '.join(STORED_AS['test'][:2])} folder with test images")
            there = root
        folders = sorted(f for f in there.iterdir() if f.is_dir() and not f.name.startswith("."))
        if any(True for _ in self._images(there, deep=False)) or not folders:
            if not any(True for _ in self._images(there, deep=True)):
                raise UserError(f"{key}.path: no images below '{there}'; allowed endings: {' '.join(ENDINGS)}")
            return (), [there]
        for folder in folders:
            if not any(True for _ in self._images(folder, deep=True)):
                raise UserError(f"{key}.path: the class folder '{folder}' holds no images")
        return tuple(f.name for f in folders), folders

    def _images(self, folder: Path, deep: bool) -> list[Path]:
        found = folder.rglob("*") if deep else folder.iterdir()
        return sorted(f for f in found if f.suffix.lower() in ENDINGS and f.is_file())
