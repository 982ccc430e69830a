"""Image data sets in the Hugging Face parquet layout, from a folder or the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError, did_you_mean

IterableDataset = Any  # that of `datasets`; jsonargparse would run an import under TYPE_CHECKING, which takes seconds
STORED_AS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # the first there is


@dataclass
class HuggingFace(Subset):
    """An image data set of the Hugging Face hub, or a folder with its parquet files.

    A folder holds ``train-*.parquet`` and ``test-*.parquet`` (or ``validation-*``), directly or in ``data/``. Sought in
    this order: ``path`` itself, ``$IDKD_DATA/<last part of path>``, the same with ``-<S>`` for the smallest stored
    size S that is not below ``data.image_size`` (else the largest), the hub. A hub set is fetched once and then taken
    from the cache; delete the cache folder to fetch it again.

    Args:
        path: a folder, or a name on the hub such as uoft-cs/cifar100.
        image: column of the images; null for the only one that holds images.
        label: column of the labels; null for label, else fine_label, else the only class label.
    """

    path: str
    image: str | None = None
    label: str | None = None

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        folder = self._folder(size)
        if folder is None:
            return ("hub", self.path, self.image, self.label, split)
        files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self._files(folder, split, key)]
        return ("parquet", files, self.image, self.label)

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        import datasets

        dataset = self._open(split, size, key)
        features = dataset.features or {}
        images = [c for c, f in features.items() if isinstance(f, datasets.Image) or (isinstance(f, dict) and "bytes" in f)]
        labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        image = self._column("image", self.image, features, images, key)
        if image is None:
            raise UserError(f"{key}.path: '{self.path}' holds no images; columns: {', '.join(features) or 'unknown'}")
        preferred = [c for c in ("label", "fine_label") if c in features][:1]
        label = self._column("label", self.label, features, preferred or labels, key)
        names = getattr(features.get(label), "names", None) if label else ()
        if label and names is None and "int" not in getattr(features[label], "dtype", ""):
            raise UserError(f"{key}.label: column '{label}' holds {features[label]}; allowed: integers or class labels")
        columns = [image, label] if label else [image]
        rows = dataset.select_columns(columns).cast_column(image, datasets.Image(decode=False))
        return None if names is None else tuple(names), self._rows(rows, image, label, split, key)

    def _rows(self, rows: IterableDataset, image: str, label: str | None, split: str, key: str) -> Iterator[tuple]:
        for block in rows.iter(batch_size=1000):
            numbers = block[label] if label else [-1] * len(block[image])
            for picture, number in zip(block[image], numbers, strict=True):
                if picture is None or (label and (number is None or number < 0)):
                    raise UserError(f"{key}.path: '{self.path}', split '{split}': some rows lack an image or a label")
                yield _content(picture), number

    def _folder(self, size: int | None) -> Path | None:
        """The folder that holds the data, or None where only the hub may have them."""
        given = Path(self.path).expanduser()
        if given.is_dir():
            return given
        if not (root := os.environ.get("IDKD_DATA")):
            return None
        if not Path(root).is_dir():
            raise UserError(
                f"IDKD_DATA: '{root}' is no folder, and '{self.path}' is sought there; set it to a folder, or unset it"
            )
        if (Path(root) / given.name).is_dir():
            return Path(root) / given.name
        named = re.compile(rf"{re.escape(given.name)}-(\d+)")
        sizes = {int(m[1]): f for f in Path(root).iterdir() if (m := named.fullmatch(f.name)) and f.is_dir()}
        enough = [s for s in sizes if size is not None and s >= size]
        return sizes[min(enough) if enough else max(sizes)] if sizes else None

    def _files(self, folder: Path, split: str, key: str) -> list[Path]:
        for name in STORED_AS[split]:
            for place in (folder, folder / "data"):
                if files := sorted(place.glob(f"{name}[-.]*parquet")):
                    return files
        wanted = " or ".join(f"{name}-*.parquet" for name in STORED_AS[split][:2])
        raise UserError(
            f"{key}.path: no {split} images in '{self.path}': neither {folder} nor its data/ holds {wanted}; "
            f"set {key}.path to a folder that does"
        )

    def _open(self, split: str, size: int | None, key: str) -> IterableDataset:
        import datasets

        try:
            if folder := self._folder(size):
                files = [str(file) for file in self._files(folder, split, key)]
                return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
            self._reach_hub(key)
            splits = datasets.load_dataset(self.path, streaming=True)
        except UserError:
            raise
        except Exception as error:  # datasets and pyarrow raise many kinds for what they cannot read
            raise UserError(f"{key}.path: '{self.path}' cannot be read: {str(error).splitlines()[0]}") from error
        for name in STORED_AS[split]:
            if name in splits:
                return splits[name]
        raise UserError(f"{key}.path: '{self.path}' has no {split} images; its splits: {', '.join(splits)}")

    def _reach_hub(self, key: str) -> None:
        """Fail at once where `datasets` would try again for 20 s."""
        import huggingface_hub

        last = Path(self.path).name
        root = os.environ.get("IDKD_DATA")
        stored = sorted(f.name for f in Path(root).iterdir() if f.is_dir()) if root else []
        advice = (
            f"Download its parquet files into a folder and set {key}.path to it, or set IDKD_DATA to a folder "
            f"that holds '{last}/'.{did_you_mean(last, stored)}"
        )
        try:
            huggingface_hub.HfApi().dataset_info(self.path, timeout=5)
        except huggingface_hub.errors.RepositoryNotFoundError as error:
            where = "is neither a folder nor a data set that the Hugging Face hub shows you (private ones need a login)"
            raise UserError(f"{key}.path: '{self.path}' {where}.\n{advice}") from error
        except Exception as error:  # no network, a proxy's answer, offline mode, not a name the hub allows
            where = "is neither a folder nor reachable on the Hugging Face hub (offline?)"
            raise UserError(f"{key}.path: '{self.path}' {where}.\n{advice}") from error

    def _column(self, what: str, given: str | None, columns: Iterable[str], found: list[str], key: str) -> str | None:
        if given is not None and given not in columns:
            allowed = ", ".join(columns) + "." + did_you_mean(given, columns)
            raise UserError(f"{key}.{what}: '{given}' is no column of '{self.path}'; allowed: {allowed}")
        if given is None and len(found) > 1:
            raise UserError(f"{key}.{what}: '{self.path}' has several such columns; set one of {', '.join(found)}")
        return given or (found[0] if found else None)


def _content(picture: dict) -> bytes:
    if picture["bytes"] is not None:
        return picture["bytes"]
    import fsspec

    with fsspec.open(picture["path"], "rb") as file:  # stored beside the table, here or on the hub
        return file.read()
