"""A source of image data sets in the Hugging Face parquet layout, from a folder or the hub."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lightning_idkd.data import parquet
from lightning_idkd.data.folder import ENDINGS
from lightning_idkd.data.parquet import Column
from lightning_idkd.data.samples import Remarks
from lightning_idkd.data.source import Subset, expand
from lightning_idkd.errors import UserError, did_you_mean

IterableDataset = Any  # a class of `datasets`; jsonargparse would run an import under TYPE_CHECKING, taking seconds
STORED_AS = {"train": ("train",), "test": ("test", "validation", "valid", "val")}  # the first that exists is used


@dataclass
class HuggingFace(Subset):
    """An image data set of the Hugging Face hub, or a folder with its parquet files.

    The folder has ``train-*.parquet`` and ``test-*.parquet`` (or ``validation-*``) directly, in ``data/`` or in the
    folder of a configuration, or it has ``train/*.parquet`` and so on. The set is looked for in this order: ``path``
    itself, ``$IDKD_DATA/<last part of path>``, the same with ``-<S>`` for the smallest stored size S that is not below
    ``data.image_size`` (else the largest), the hub. A set of the hub is downloaded once and then read from the cache;
    delete the cache folder to download it again. Class names come from the files; where these have no class names, the
    numbers or texts that occur are the classes.

    Args:
        path: a folder, or a name on the hub such as uoft-cs/cifar100.
        image: column of the images; null for the only column with images.
        label: column of the labels; null for the first of label, fine_label, labels and fine_labels that exists, else
            the only column of class labels, else the only column with another usual name, such as target. A public set
            needs no labels.
        config_name: configuration of the set, a folder below ``path``; null for the only one.
        train_split: stored split with the training images, or with those of a public set; null for train.
        test_split: stored split with the test images; null for test, or the first of validation, valid and val.
    """

    path: str
    image: str | None = None
    label: str | None = None
    config_name: str | None = None
    train_split: str | None = None
    test_split: str | None = None

    def identity(self, split: str, size: int | None, key: str) -> tuple:
        folder = self._folder(size, key)
        if folder is None:
            return ("hub", self.path, self.image, self.label, self.config_name, self._names(split))
        files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in self._files(folder, split, key)]
        return ("parquet", files, self.image, self.label)

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple], Remarks]:
        if folder := self._folder(size, key):
            table = self._table(folder, self._files(folder, split, key), key)
            return table.names, table.rows(), table.remarks
        dataset, remarks = self._open(split, key), Remarks()
        columns = {name: describe_column(feature) for name, feature in (dataset.features or {}).items()}
        image = parquet.image_column(self.image, columns, self.path, key)
        label = parquet.label_column(self.label, columns, self.path, key, remarks)
        names = columns[label].names if label else ()
        return names, self._rows(dataset, image, label, names, key, remarks), remarks

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        folder = self._folder(size, key)
        if folder is None:
            return f"{key}.{split}_split chooses another split"
        splits = self._splits(folder, key)
        used = {next((name for name in self._names(part) if name in splits), None) for part in STORED_AS}
        labelled = []
        for name in sorted({*splits} - used):
            with contextlib.suppress(UserError):
                if self._table(folder, parquet.check_upload(splits[name], folder, key), key).labelled():
                    labelled.append(name)
        if not labelled:
            return "no other split has labels"
        return f"set {key}.{split}_split to a labelled split: {', '.join(labelled)}"

    def _table(self, folder: Path, files: list[Path], key: str) -> parquet.Table:
        return parquet.Table(files, folder, self.image, self.label, self.path, key)

    def _rows(self, dataset: IterableDataset, image: str, label: str | None, names: tuple[str, ...] | None, key: str,
              remarks: Remarks) -> Iterator[tuple]:  # fmt: skip
        import datasets

        try:
            rows = dataset.select_columns([image, label] if label else [image])
            for block in rows.cast_column(image, datasets.Image(decode=False)).iter(batch_size=parquet.ROWS):
                labels = [-1] * len(block[image])
                if label:
                    labels = parquet.number_labels(block[label], names, names, f"'{self.path}'", remarks)
                for picture, number in zip(block[image], labels, strict=True):
                    if picture is None:
                        raise UserError(f"{key}.path: '{self.path}': a row has no image")
                    yield _read_content(picture, self.path, key), number
        except UserError:
            raise
        except Exception as error:  # from the network, datasets or pyarrow
            raise UserError(parquet.explain_unreadable(key, self.path, error)) from error

    def _names(self, split: str) -> tuple[str, ...]:
        """Possible names of a stored split; the first that exists is used."""
        given = self.train_split if split == "train" else self.test_split
        return (given,) if given else STORED_AS[split]

    def _folder(self, size: int | None, key: str = "data.private") -> Path | None:
        """The folder with the data; None where only the hub can have them."""
        given = expand(self.path, f"{key}.path")
        if given.is_dir():
            return given
        if given.is_file():
            raise UserError(f"{key}.path: '{self.path}' is a file; set it to its folder, '{given.parent}'")
        if not (root := os.environ.get("IDKD_DATA")):
            return None
        if not Path(root).is_dir():
            raise UserError(
                f"IDKD_DATA: '{root}' is not a folder, so it cannot hold '{self.path}'; set it to a folder, or unset it"
            )
        if (Path(root) / given.name).is_dir():
            return Path(root) / given.name
        named = re.compile(rf"{re.escape(given.name)}-(\d+)")
        sizes = {int(m[1]): f for f in Path(root).iterdir() if (m := named.fullmatch(f.name)) and f.is_dir()}
        enough = [s for s in sizes if size is not None and s >= size]
        return sizes[min(enough) if enough else max(sizes)] if sizes else None

    def _splits(self, folder: Path, key: str) -> dict[str, list[Path]]:
        """The files of every split of the configuration."""
        asked = (self.train_split, self.test_split)
        configurations = parquet.find_files(folder, asked)
        known = {*parquet.SPLITS, *asked}
        names = {name for name, splits in configurations.items() if known & {*splits}} or {*configurations}
        if self.config_name is not None:
            if self.config_name not in configurations:
                allowed = ", ".join(sorted(filter(None, names))) or "null, since there are none"
                hint = did_you_mean(self.config_name, names)
                lacks = f"'{folder}' has no folder '{self.config_name}'"
                raise UserError(f"{key}.config_name: {lacks}.{hint} Allowed: {allowed}")
            return configurations[self.config_name]
        if len(names) > 1 and "" not in names:
            several = ", ".join(sorted(names))
            raise UserError(f"{key}.config_name: '{folder}' holds several configurations; set it to one of {several}")
        return configurations["" if "" in names else min(names)] if names else {}

    def _files(self, folder: Path, split: str, key: str) -> list[Path]:
        splits = self._splits(folder, key)
        for name in self._names(split):
            if name in splits:
                return parquet.check_upload(splits[name], folder, key)
        wanted = " or ".join(f"{name}-*.parquet" for name in self._names(split)[:2])
        place = f"'{self.path}'" if str(folder) == self.path else f"'{self.path}' ({folder})"
        lacks = f"{key}.path: no {split} images in {place}, which holds no {wanted}"
        if splits:
            raise UserError(f"{lacks}; its splits: {', '.join(sorted(splits))} ({key}.{split}_split chooses one)")
        others = {path.suffix.lower() for depth in ("*", "*/*", "*/*/*") for path in islice(folder.glob(depth), 100)}
        advice = f"set {key}.path to a folder that does"
        if others & {*ENDINGS}:
            advice = f"it holds image files, which {key}: ImageFolder reads"
        elif ".arrow" in others:
            advice = "it holds arrow files; store the set by to_parquet of datasets"
        raise UserError(f"{lacks}; {advice}")

    def _open(self, split: str, key: str) -> IterableDataset:
        import datasets

        try:
            self._reach_hub(key)
            name = () if self.config_name is None else (self.config_name,)
            splits = datasets.load_dataset(self.path, *name, streaming=True)
        except UserError:
            raise
        except Exception as error:  # datasets and pyarrow raise many kinds for what they cannot read
            if several := re.search(r"available configs: \[(.*?)\]", str(error)):
                where = f"{key}.config_name: '{self.path}' holds several configurations"
                raise UserError(f"{where}; set it to one of {several[1].replace(chr(39), '')}") from error
            raise UserError(parquet.explain_unreadable(key, self.path, error)) from error
        for name in self._names(split):
            if name in splits:
                return splits[name]
        chooses = f"({key}.{split}_split chooses one)"
        raise UserError(f"{key}.path: '{self.path}' has no {split} images; its splits: {', '.join(splits)} {chooses}")

    def _reach_hub(self, key: str) -> None:
        """Fail at once where the hub does not answer; `datasets` would try again for 20 s."""
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
        except Exception as error:  # no network, a proxy's answer, offline mode, or a name that the hub does not allow
            where = "is neither a folder nor reachable on the Hugging Face hub (offline?)"
            raise UserError(f"{key}.path: '{self.path}' {where}.\n{advice}") from error


def describe_column(feature: Any) -> Column:
    """What a column of `datasets` holds."""
    import datasets

    if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
        return Column("image", "image")
    if isinstance(feature, datasets.ClassLabel):
        return Column("class", "class label", parquet.class_names({"names": feature.names}))
    type = feature.dtype if isinstance(feature, datasets.Value) else feature.__class__.__name__
    kind = "text" if "string" in type else "number" if re.match(r"u?int|float|bool|null", type) else "other"
    return Column("bytes" if type in ("binary", "large_binary") else kind, type)


def _read_content(picture: dict | bytes, path: str, key: str) -> bytes:
    """The bytes of an image, which the table holds or names by an address on the hub."""
    content = picture["bytes"] if isinstance(picture, dict) else picture
    if content is not None:
        return content
    where = str(picture["path"])
    if "hf://" not in where and not where.startswith("https://huggingface.co/"):  # never read local files
        raise UserError(f"{key}.path: '{path}' names the image '{where}', which is not on the hub")
    import fsspec

    with fsspec.open(where, "rb") as file:
        return file.read()
