"""Parquet files as the Hugging Face hub lays them out: the files of a split, their columns and their rows."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_idkd.data.samples import Remarks, class_name
from lightning_idkd.errors import UserError, did_you_mean

Schema = Any  # pyarrow's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds
SPLITS = ("train", "test", "validation", "valid", "val")
DEPTH = 4  # how many levels of folders are searched below the given one
SHARD = re.compile(r"(?P<before>.*?)[-._ ]?(?P<index>\d+)-of-(?P<total>\d+)(?P<after>[-.]\w+)?")
PREFERRED = ("label", "fine_label", "labels", "fine_labels")  # names of the column of labels; the first that exists
ALSO = ("target", "targets", "class", "classes", "class_id", "class_label", "category", "categories", "digit", "y")
ROWS = 256  # rows that are read at once


# ------------------------------------------------------------------ files


def find_files(root: Path, asked: Iterable[str | None] = ()) -> dict[str, dict[str, list[Path]]]:
    """All parquet files below ``root``, by configuration ("" where there is none) and by split.

    A file belongs to the split with which its name begins, else to the split that its folder is named after:
    ``train-*.parquet``, ``data/train-*.parquet``, ``CONFIGURATION/train-*.parquet``, ``train/0000.parquet``,
    ``CONFIGURATION/train/0000.parquet``. ``asked`` are names of splits beside the usual ones.
    """
    known = sorted({*SPLITS, *filter(None, asked)}, key=len, reverse=True)
    by_configuration: dict[str, dict[str, list[Path]]] = {}
    for file in walk_files(root):
        # Spark writes a split as a folder train.parquet/.
        parts = (part.removesuffix(".parquet") for part in file.relative_to(root).parts[:-1])
        folders = [part for part in parts if part != "data"]
        stem = file.name[: -len(".parquet")]
        split = next((name for name in known if re.match(rf"{re.escape(name)}([-.]|$)", stem)), None)
        if split is None and not (folders and folders[-1] in known):
            shard = SHARD.fullmatch(stem) or re.fullmatch(r"(?P<before>(?:.*(?=[-._ ]))?)[-._ ]?(?P<index>\d*)", stem)
            split = re.split(r"[-.]", shard["before"] if shard else stem)[0]
        if folders and (split in (None, "", folders[-1])):
            split = folders.pop()
        by_configuration.setdefault("/".join(folders), {}).setdefault(split or "train", []).append(file)
    return by_configuration


def walk_files(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The parquet files in a folder and in those below it, sorted, without hidden ones."""
    below = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.name.lower().endswith(".parquet") and not entry.is_dir():
            yield folder / entry.name
        elif depth and entry.is_dir():
            below.append(folder / entry.name)
    for other in below:
        yield from walk_files(other, depth - 1)


def check_upload(files: list[Path], root: Path, key: str) -> list[Path]:
    """The files of a split in order, refused where they are not one complete upload.

    Raises:
        UserError: shards of several uploads, a shard that is missing, or a broken link.
    """
    uploads: dict[tuple, dict[int | str, Path]] = {}
    for file in files:
        shard = SHARD.fullmatch(file.name[: -len(".parquet")])
        index = int(shard["index"]) if shard else file.name
        upload = (file.parent, shard and int(shard["total"]), shard and shard["before"])
        if index in uploads.setdefault(upload, {}):  # old names end with a hash, which differs between two uploads
            upload = (*upload, shard["after"])
        uploads.setdefault(upload, {})[index] = file
    if len(uploads) > 1:
        several = " and ".join(_abridge([*upload.values()], root) for upload in uploads.values())
        wrong = f"'{root}' holds the same split more than once: {several}"
        raise UserError(f"{key}.path: {wrong}; keep the files of one upload")
    (((_, total, *_), shards),) = uploads.items()
    if total is not None and set(shards) not in (set(range(total)), set(range(1, total + 1))):
        missing = ", ".join(map(str, sorted(set(range(total)) - set(shards))[:5]))
        has = f"'{root}' holds {len(shards)} of {total} shards ({_abridge([*shards.values()], root)})"
        raise UserError(f"{key}.path: {has}; number {missing} is missing, so the download is not complete")
    if all(re.fullmatch(r"\d{4}\.parquet", file.name.lower()) for file in files):  # the hub's own conversions
        numbers = {int(file.name[:4]) for file in files}
        if missing := sorted(set(range(max(numbers))) - numbers):
            name = files[0].with_name(f"{missing[0]:04d}.parquet").relative_to(root)
            raise UserError(f"{key}.path: '{root}' lacks '{name}', so the download is not complete")
    for file in files:
        if not file.is_file():
            raise UserError(f"{key}.path: '{file}' is a broken link")
    return [shards[index] for index in sorted(shards)]


def _abridge(files: list[Path], root: Path) -> str:
    """The first and the last of several files, and their number, for a message."""
    first = str(files[0].relative_to(root))
    return first if len(files) == 1 else f"{first} to {files[-1].name} ({len(files)} files)"


# ------------------------------------------------------------------ columns


@dataclass
class Column:
    """What a column holds."""

    kind: str
    """image, bytes, class (numbers with names), number, text, or other."""
    type: str
    """Type as the file names it, for messages."""
    names: tuple[str, ...] | None = None
    """Class names; None where the column has none."""


def describe_columns(schema: Schema) -> dict[str, Column]:
    """The columns of a parquet file, from its schema and the features that `datasets` stores in it."""
    import pyarrow.types as kinds

    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        features = features if isinstance(features, dict) else {}
    except (TypeError, KeyError, ValueError):
        features = {}
    columns = {}
    for name, type in zip(schema.names, schema.types, strict=True):
        feature = features.get(name) if isinstance(features.get(name), dict) else {}
        if kinds.is_dictionary(type):
            type = type.value_type
        number = kinds.is_integer(type) or kinds.is_floating(type) or kinds.is_boolean(type) or kinds.is_null(type)
        names = class_names(feature) if feature.get("_type") == "ClassLabel" and number else ()
        if names:
            columns[name] = Column("class", str(type), names)
        elif feature.get("_type") == "Image" or (kinds.is_struct(type) and type.get_field_index("bytes") >= 0):
            columns[name] = Column("image", str(type))
        elif kinds.is_binary(type) or kinds.is_large_binary(type):
            columns[name] = Column("bytes", str(type))
        elif number:
            columns[name] = Column("number", str(type))
        elif kinds.is_string(type) or kinds.is_large_string(type):
            columns[name] = Column("text", str(type))
        else:
            columns[name] = Column("other", str(type))
    return columns


def class_names(feature: dict) -> tuple[str, ...]:
    """The names of a class label, which files write as a list, as numbered texts, or only as a count."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = [names[number] for number in sorted(names, key=int)]
    if names is None:
        names = range(feature.get("num_classes") or 0)
    return tuple(class_name(str(name)) for name in names)


def image_column(given: str | None, columns: dict[str, Column], path: str, key: str) -> str:
    """The column of the images: the ``given`` one, or the only one with images."""
    _check_given("image", given, columns, path, key)
    for kind in ("image", "bytes"):
        images = [name for name, column in columns.items() if column.kind == kind]
        if given is None and len(images) > 1:
            several = f"'{path}' has several columns of images"
            raise UserError(f"{key}.image: {several}; set it to one of {', '.join(images)}")
        if given or images:
            return given or images[0]
    raise UserError(f"{key}.path: '{path}' holds no images; columns: {', '.join(columns) or 'unknown'}")


def label_column(given: str | None, columns: dict[str, Column], path: str, key: str, remarks: Remarks) -> str | None:
    """The column of the labels; where it is not clear which one it is, None and a remark."""
    _check_given("label", given, columns, path, key)
    usable = {name: column for name, column in columns.items() if column.kind in ("class", "number", "text")}
    if given is None:
        preferred = [name for name in PREFERRED if name in columns][:1]
        classes = [name for name, column in usable.items() if column.kind == "class"]
        also = [name for name in usable if name.lower() in (*PREFERRED, *ALSO)]
        candidates = preferred or classes or also
        if len(candidates) > 1:
            several = ", ".join(candidates)
            remarks.note_unlabelled(f".label: '{path}' has several columns of labels; set it to one of {several}")
            return None
        if not candidates:
            others = ", ".join(f"{name} ({column.type})" for name, column in usable.items())
            advice = f"; set it to the one that holds them: {others}" if others else ""
            remarks.note_unlabelled(f".label: no labels found in '{path}' by type or name{advice}")
            return None
        given = candidates[0]
    if given not in usable:
        holds = f"column '{given}' holds {columns[given].type}"
        remarks.note_unlabelled(f".label: {holds}; allowed: integers, class labels or texts")
        return None
    return given


def _check_given(what: str, given: str | None, columns: dict[str, Column], path: str, key: str) -> None:
    if given is not None and given not in columns:
        allowed = ", ".join(columns) + "." + did_you_mean(given, columns)
        raise UserError(f"{key}.{what}: '{given}' is not a column of '{path}'; allowed: {allowed}")


# ------------------------------------------------------------------ rows


def number_labels(
    values: Iterable, own: tuple[str, ...] | None, names: tuple[str, ...] | None, where: str, remarks: Remarks
) -> list[int | str]:
    """Labels of a part of a set as numbers of the set's class names; without class names, the integers and texts given.

    A value that is not a label becomes -1, with a remark.

    Args:
        values: the stored labels.
        own: class names of the part, perhaps in another order than the set's.
        names: class names of the set.
        where: the part, for messages.
        remarks: the remarks about the set, which grow.
    """
    values = list(values)
    if (own is None) != (names is None) or set(own or ()) != set(names or ()):
        has, before = _describe_classes(own), _describe_classes(names)
        remarks.note_unlabelled(f".path: {where} {has}, but what comes before it {before}")
        return [-1] * len(values)
    to = None if own is None else [names.index(name) for name in own]
    labels = [_number_label(value, to, where, remarks) for value in values]
    if without := labels.count(-1):
        some = f"{without:,} of {len(labels):,} images"
        remarks.note_unlabelled(f".path: {some} have no label (null, blank or below 0) in {where}")
    return labels


def _number_label(value: Any, to: list[int] | None, where: str, remarks: Remarks) -> int | str:
    blank = isinstance(value, str) and not value.strip()
    if value is None or blank or (isinstance(value, float) and math.isnan(value)):
        return -1
    if isinstance(value, str) and to is None:
        return value
    integer = isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)
    if not integer or (to is not None and value >= len(to)):
        allowed = "integers or texts" if to is None else f"0 to {len(to) - 1}"
        remarks.note_unlabelled(f".label: {where} holds {value!r}; allowed: {allowed}")
        return -1
    if value < 0:
        return -1
    return int(value) if to is None else to[int(value)]


def _describe_classes(names: tuple[str, ...] | None) -> str:
    if names is None:
        return "has no class names"
    return f"names the classes {', '.join(names[:10])}" + (", ..." if len(names) > 10 else "")


class Table:
    """The parquet files of one split as one table of images and labels.

    Args:
        files: the files in order.
        root: folder of the set; images beside the tables must be in it.
        image: column of the images; None chooses it.
        label: column of the labels; None chooses it.
        path: the folder as the user wrote it, for messages.
        key: config key of the source, for messages.

    Raises:
        UserError: a file that cannot be read, or that lacks the first file's column of images.
    """

    def __init__(self, files: list[Path], root: Path, image: str | None, label: str | None, path: str, key: str):
        self.root, self.key, self.remarks = root, key, Remarks()
        self.shards = [(file, *self._read_head(file)) for file in files]
        self.shards = [shard for shard in self.shards if shard[2]] or self.shards[:1]  # the files that have rows
        first, head, _ = self.shards[0]
        self.image = image_column(image, head, path, key)
        self.label = label_column(label, head, path, key, self.remarks)
        self.names = head[self.label].names if self.label else ()
        for file, other, _ in self.shards[1:]:
            for column in filter(None, (self.image, self.label)):
                if column not in other:
                    has = f"which '{first.name}' has; its columns: {', '.join(other)}"
                    lacks = f".path: '{file.name}' has no column '{column}', {has}"
                    if column == self.image:
                        raise UserError(key + lacks)
                    self.remarks.note_unlabelled(lacks)
        reordered = [file.name for file, other, _ in self.shards if self._has_other_order(other)]
        if reordered:
            order = f"'{reordered[0]}' lists its classes in another order than '{first.name}'"
            self.remarks.notes.append(f": {order}; labels go by name")

    def _has_other_order(self, head: dict[str, Column]) -> bool:
        """Whether a file has the set's classes in another order."""
        names = head[self.label].names if self.label in head else None
        return names is not None and names != self.names and set(names) == set(self.names or ())

    def _read_head(self, file: Path) -> tuple[dict[str, Column], int]:
        """The columns of a file, and its number of rows."""
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                return describe_columns(opened.schema_arrow), opened.metadata.num_rows
        except Exception as error:  # pyarrow raises many kinds for what it cannot read
            raise UserError(explain_unreadable(self.key, file, error)) from error

    def labels(self, file: Path, head: dict[str, Column]) -> list[int | str] | None:
        """The labels of a file; None where it has none."""
        import pyarrow.parquet

        if self.label is None or self.label not in head:
            return None
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                column = opened.read([self.label]).column(self.label).to_pylist()
        except Exception as error:
            raise UserError(explain_unreadable(self.key, file, error)) from error
        return number_labels(column, head[self.label].names, self.names, f"'{file.name}'", self.remarks)

    def labelled(self) -> bool:
        """Whether every image has a label."""
        for file, head, _ in self.shards:
            labels = self.labels(file, head)
            if labels is None or -1 in labels:
                return False
        return True

    def rows(self) -> Iterator[tuple[bytes | Path, int | str]]:
        """The images and labels in the order of the files."""
        import pyarrow.parquet

        kinds: dict[str, str] = {}
        for file, head, count in self.shards:
            labels = self.labels(file, head) or [-1] * count
            if self.names is None and self.label in head and count:
                kinds.setdefault(head[self.label].kind, file.name)
                if len(kinds) > 1:
                    several = " and ".join(f"{kind}s in '{name}'" for kind, name in kinds.items())
                    self.remarks.note_unlabelled(f".path: column '{self.label}' holds {several}")
                    labels = [-1] * count
            row = 0
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    for batch in opened.iter_batches(ROWS, columns=[self.image]):
                        for picture in batch.column(self.image).to_pylist():
                            yield self._locate(picture, row, file), labels[row]
                            row += 1
            except UserError:
                raise
            except Exception as error:
                raise UserError(explain_unreadable(self.key, file, error)) from error

    def _locate(self, picture: dict | bytes | None, row: int, file: Path) -> bytes | Path:
        """The bytes of an image, or its file, which must be in the set's folder whatever the working folder is."""
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if content is not None:
            return content
        path = picture.get("path") if isinstance(picture, dict) else None
        where = f"row {row} of '{file.name}'"
        if not path:
            raise UserError(f"{self.key}.path: {where} has no image")
        image = Path(os.path.normpath(os.path.join(os.path.abspath(file.parent), path)))
        if not image.is_relative_to(os.path.abspath(self.root)):
            raise UserError(f"{self.key}.path: {where} names the image '{path}', which lies outside '{self.root}'")
        if not image.is_file():
            raise UserError(f"{self.key}.path: {where} names the image '{path}', but there is no '{image}'")
        self.remarks.cacheable = False  # `identity` does not notice when these files change
        return image


def explain_unreadable(key: str, what: Path | str, error: Exception) -> str:
    """The message about a file or set that cannot be read."""
    why = " ".join(str(error).split())[:200] or type(error).__name__
    name = what.name if isinstance(what, Path) else what
    return f"{key}.path: '{name}' cannot be read: {why}"
