"""A source that reads image files from folders, one folder for every class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lightning_idkd.data.samples import Remarks, class_name
from lightning_idkd.data.source import Subset, expand
from lightning_idkd.errors import UserError, did_you_mean

ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
OTHERS = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".tga", ".svg", ".psd", ".dng", ".npy")  # images that are not read
STORED_AS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}  # the first that exists is used


@dataclass
class ImageFolder(Subset):
    """Image files below ``path``: train/CLASS/*.png and test/CLASS/*.png (or val/); class names are sorted.

    A public set needs neither a test part, nor a train/ level, nor classes: all images below ``path`` are read.

    Args:
        path: the folder.
        train_split: folder below ``path`` with the training images, or those of a public set; null for train, or
            ``path`` itself where there is none.
        test_split: folder below ``path`` with the test images; null for test, or the first of val, validation and
            valid that exists.
    """

    path: str = ""
    train_split: str | None = None
    test_split: str | None = None

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        names, folders = self._classes(split, key)
        files = []
        for folder in folders.values():
            files += [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self._images(folder)]
        return ("folder", names, list(folders), files)

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple], Remarks]:
        names, folders = self._classes(split, key)
        remarks = Remarks()
        if not names:
            root = expand(self.path, f"{key}.path")
            lacks = "has no train folder, and its images" if folders[-1] == root else "holds images that"
            remarks.note_unlabelled(f".path: '{folders[-1]}' {lacks} have no class folders")
        others, samples = [], []
        for label, folder in folders.items():
            others += [f for f in folder.rglob("*") if f.suffix.lower() in OTHERS]
            samples += [(f, label) for f in self._images(folder)]
        if others:
            some = f"{len(others):,} {split} files are left out, such as '{others[0].name}'"
            remarks.notes.append(f": {some}; allowed endings: {' '.join(ENDINGS)}")
        return names, samples, remarks

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        root = expand(self.path, f"{key}.path")
        used = [self._folder_of(root, part) for part in STORED_AS]
        others = [f.name for f in self._folders(root) if f not in used and self._has_classes(f)]
        return f"set {key}.{split}_split to a folder with class folders: {', '.join(others)}" if others else ""

    def _has_classes(self, folder: Path) -> bool:
        """Whether all images of a folder lie in class folders."""
        folders = self._folders(folder)
        return bool(folders) and not self._images(folder, "*") and all(map(self._images, folders))

    def _names(self, split: str) -> tuple[str, ...]:
        """Possible names of a split's folder; the first that exists is used."""
        given = self.train_split if split == "train" else self.test_split
        return (given,) if given else STORED_AS[split]

    def _classes(self, split: str, key: str) -> tuple[tuple[str, ...], dict[int, Path]]:
        """Class names and the folder of every label.

        Where images lie directly in the split's folder there are no names, and its label is -1.
        """
        root = expand(self.path, f"{key}.path")
        if not self.path or not root.is_dir():
            allowed = "one with train/CLASS/ and test/CLASS/ images"
            raise UserError(f"{key}.path: '{self.path}' is not a folder; allowed: {allowed}")
        part = self._folder_of(root, split)
        if part is None and (split == "test" or self.train_split):
            wanted = " or ".join(self._names(split)[:2])
            has = ", ".join(f.name for f in self._folders(root)[:10]) or "no folders"
            raise UserError(
                f"{key}.path: '{self.path}' has no {wanted} folder with {split} images; it has {has} "
                f"({key}.{split}_split chooses one)"
            )
        part = part or root
        folders = self._folders(part)
        if part == root:
            folders = [f for f in folders if f.name.lower() not in (*STORED_AS["test"], self.test_split)]
        if not folders or self._images(part, "*"):
            if not self._images(part):
                allowed = f"{' '.join(ENDINGS)}{_mention_tables(part, key)}"
                raise UserError(f"{key}.path: no images below '{part}'; allowed endings: {allowed}")
            if split == "test":
                lacks = f"{key}.path: the test images in '{part}' have no class folders"
                raise UserError("; ".join(filter(None, [lacks, self.labelled_splits(split, None, key)])))
            return (), {-1: part}
        for folder in folders:
            if not self._images(folder):
                tables = _mention_tables(folder, key)
                raise UserError(f"{key}.path: the class folder '{folder}' holds no images{tables}")
        names = tuple(class_name(f.name) for f in folders)
        if split == "train":
            return names, dict(enumerate(folders))
        known = self._classes("train", key)[0]  # a class without test images keeps its label
        for name, folder in zip(names, folders, strict=True):
            if name not in known:
                hint = did_you_mean(name, known)
                raise UserError(f"{key}.path: '{folder}' is not a class of the training part.{hint}")
        return known, {known.index(name): folder for name, folder in zip(names, folders, strict=True)}

    def _folders(self, folder: Path) -> list[Path]:
        """The folders in a folder, sorted, without hidden ones and those that macOS adds to archives."""
        return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__MACOSX")))

    def _folder_of(self, root: Path, split: str) -> Path | None:
        """The folder of a split, in upper or lower case; None where there is none."""
        folders = {f.name: f for f in self._folders(root)}
        folders = {name.lower(): f for name, f in folders.items()} | folders
        return next((folders[name] for name in self._names(split) if name in folders), None)

    def _images(self, folder: Path, pattern: str = "**/*") -> list[Path]:
        """The image files in a folder, without hidden ones; the pattern says how deep they may lie.

        Raises:
            FileNotFoundError: a broken link, since its image would be left out silently.
        """
        images = []
        for file in folder.glob(pattern):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.suffix.lower() in ENDINGS and not hidden and (file.is_file() or file.is_symlink()):
                images.append(file)
        images.sort()
        for file in images:
            if file.is_symlink():
                file.stat()
        return images


def _mention_tables(folder: Path, key: str) -> str:
    """The end of a message about a folder without images: which source reads the tables in it, if there are some."""
    tables = any(f.suffix.lower() == ".parquet" for f in islice(folder.rglob("*"), 1000))
    return f"; it holds parquet files, which {key}: HuggingFace reads" if tables else ""
