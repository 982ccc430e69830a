"""Image files in folders, one a class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lightning_idkd.data.images import Remarks, class_name
from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError, did_you_mean

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
OTHERS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".svg", ".psd", ".dng", ".npy")  # images too, but not read
STORED_AS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}  # the first there is


@dataclass
class ImageFolder(Subset):
    """Image files below ``path``: train/CLASS/*.png and test/CLASS/*.png (or val/), class names in sorted order.

    A public set needs no test part, no train/ level and no classes: all images below ``path`` will do.

    Args:
        path: the folder.
        train_split: folder below ``path`` to train on, or of a public set; null for train, else ``path`` itself.
        test_split: folder below ``path`` to test on; null for test, else val, validation or valid.
    """

    path: str = ""
    train_split: str | None = None
    test_split: str | None = None

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        names, folders = self._classes(split, key)
        files = [f for folder in folders.values() for f in self._images(folder)]
        return ("folder", names, list(folders), [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple], Remarks]:
        names, folders = self._classes(split, key)
        remarks = Remarks()
        if not names:
            root = Path(self.path).expanduser()
            lacks = "has no train folder, and its images" if folders[-1] == root else "holds images that"
            remarks.lacking(f".path: '{folders[-1]}' {lacks} have no class folders")
        if others := [f for folder in folders.values() for f in folder.rglob("*") if f.suffix.lower() in OTHERS]:
            some = f"{len(others):,} {split} files are left out, such as '{others[0].name}'"
            remarks.notes.append(f": {some}; allowed endings: {' '.join(ENDINGS)}")
        return names, [(f, label) for label, folder in folders.items() for f in self._images(folder)], remarks

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        root = Path(self.path).expanduser()
        used = [self._stored(root, part) for part in STORED_AS]
        found = [f.name for f in self._folders(root) if f not in used and self._labelled(f)]
        return f"set {key}.{split}_split to a folder with class folders: {', '.join(found)}" if found else ""

    def _labelled(self, folder: Path) -> bool:
        return bool(folders := self._folders(folder)) and not self._images(folder, "*") and all(map(self._images, folders))

    def _names(self, split: str) -> tuple[str, ...]:
        """Names of the folder; the first there is counts."""
        given = self.train_split if split == "train" else self.test_split
        return (given,) if given else STORED_AS[split]

    def _classes(self, split: str, key: str) -> tuple[tuple[str, ...], dict[int, Path]]:
        """Class names and the folder of every label; no names, and -1, where images lie in the folder directly."""
        root = Path(self.path).expanduser()
        if not self.path or not root.is_dir():
            raise UserError(f"{key}.path: '{self.path}' is no folder; allowed: one with train/CLASS/ and test/CLASS/ images")
        there = self._stored(root, split)
        if there is None and (split == "test" or self.train_split):
            wanted = " or ".join(self._names(split)[:2])
            has = ", ".join(f.name for f in self._folders(root)[:10]) or "no folders"
            raise UserError(
                f"{key}.path: '{self.path}' has no {wanted} folder with {split} images; it has {has} ({key}.{split}_split "
                "chooses one)"
            )
        there = there or root
        folders = self._folders(there)
        if there == root:
            folders = [f for f in folders if f.name.lower() not in (*STORED_AS["test"], self.test_split)]
        if not folders or self._images(there, "*"):
            if not self._images(there):
                allowed = f"{' '.join(ENDINGS)}{_tables(there, key)}"
                raise UserError(f"{key}.path: no images below '{there}'; allowed endings: {allowed}")
            if split == "test":
                said = f"{key}.path: the test images in '{there}' have no class folders"
                raise UserError("; ".join(filter(None, [said, self.labelled_splits(split, None, key)])))
            return (), {-1: there}
        for folder in folders:
            if not self._images(folder):
                raise UserError(f"{key}.path: the class folder '{folder}' holds no images{_tables(folder, key)}")
        names = tuple(class_name(f.name) for f in folders)
        if split == "train":
            return names, dict(enumerate(folders))
        known = self._classes("train", key)[0]  # a class without test images keeps its label
        for name, folder in zip(names, folders, strict=True):
            if name not in known:
                raise UserError(f"{key}.path: '{folder}' is no class of the training part.{did_you_mean(name, known)}")
        return known, {known.index(name): folder for name, folder in zip(names, folders, strict=True)}

    def _folders(self, folder: Path) -> list[Path]:
        """Folders in a folder, sorted, hidden ones and what macOS adds to archives apart."""
        return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__MACOSX")))

    def _stored(self, root: Path, split: str) -> Path | None:
        """The folder of a split, upper case or not."""
        folders = {f.name: f for f in self._folders(root)}
        folders = {name.lower(): f for name, f in folders.items()} | folders
        return next((folders[name] for name in self._names(split) if name in folders), None)

    def _images(self, folder: Path, pattern: str = "**/*") -> list[Path]:
        """Image files, hidden ones apart; the pattern says how deep.

        Raises:
            FileNotFoundError: a link to nothing, which would be an image less than the folder lists.
        """
        found = (f for f in folder.glob(pattern) if f.suffix.lower() in ENDINGS and (f.is_file() or f.is_symlink()))
        found = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))
        for file in found:
            if file.is_symlink():
                file.stat()
        return found


def _tables(folder: Path, key: str) -> str:
    """What to say of a folder without images where it holds tables."""
    tables = any(f.suffix.lower() == ".parquet" for f in islice(folder.rglob("*"), 1000))
    return f"; it holds parquet files, which {key}: HuggingFace reads" * tables
