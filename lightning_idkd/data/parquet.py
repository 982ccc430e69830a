"""Parquet files as the Hugging Face hub lays them out: which of them form a split, and the rows that they hold."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_idkd.data.images import Remarks, class_name
from lightning_idkd.errors import UserError, did_you_mean

Schema = Any  # pyarrow's; jsonargparse would run an import under TYPE_CHECKING
SPLITS = ("train", "test", "validation", "valid", "val")
DEPTH = 4  # folders between the given one and a file: configuration, data, split
SHARD = re.compile(r"(?P<before>.*?)[-._ ]?(?P<index>\d+)-of-(?P<total>\d+)(?P<after>[-.]\w+)?")
PREFERRED = ("label", "fine_label", "labels", "fine_labels")
ALSO = ("target", "targets", "class", "classes", "class_id", "class_label", "category", "categories", "digit", "y")
ROWS = 256  # read at once


# ------------------------------------------------------------------ files


def layout(root: Path, asked: Iterable[str | None] = ()) -> dict[str, dict[str, list[Path]]]:
    """All parquet files below ``root``, by configuration ("" where there is none) and by split.

    A file belongs to the split that begins its name, else to that of its folder: ``train-*.parquet``, ``data/train-*.parquet``,
    ``CONFIGURATION/train-*.parquet``, ``train/0000.parquet``, ``CONFIGURATION/train/0000.parquet``. ``asked`` are further names
    of splits.
    """
    known = sorted({*SPLITS, *filter(None, asked)}, key=len, reverse=True)
    found: dict[str, dict[str, list[Path]]] = {}
    for file in files(root):
        parts = (part.removesuffix(".parquet") for part in file.relative_to(root).parts[:-1])  # which Spark makes a folder
        folders = [part for part in parts if part != "data"]
        stem = file.name[: -len(".parquet")]
        split = next((name for name in known if re.match(rf"{re.escape(name)}([-.]|$)", stem)), None)
        if split is None and not (folders and folders[-1] in known):
            shard = SHARD.fullmatch(stem) or re.fullmatch(r"(?P<before>(?:.*(?=[-._ ]))?)[-._ ]?(?P<index>\d*)", stem)
            split = re.split(r"[-.]", shard["before"] if shard else stem)[0]
        if folders and (split in (None, "", folders[-1])):
            split = folders.pop()
        found.setdefault("/".join(folders), {}).setdefault(split or "train", []).append(file)
    return found


def files(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Parquet files in a folder and those below it, sorted, hidden ones apart."""
    below = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.name.lower().endswith(".parquet") and not entry.is_dir():
            yield folder / entry.name
        elif depth and entry.is_dir():
            below.append(folder / entry.name)
    for other in below:
        yield from files(other, depth - 1)


def whole(found: list[Path], root: Path, key: str) -> list[Path]:
    """The files of a split, refused where they are not one complete upload.

    Raises:
        UserError: shards of several uploads, or a shard that is missing.
    """
    uploads: dict[tuple, dict[int | str, Path]] = {}
    for file in found:
        shard = SHARD.fullmatch(file.name[: -len(".parquet")])
        index = int(shard["index"]) if shard else file.name
        upload = (file.parent, shard and int(shard["total"]), shard and shard["before"])
        if index in uploads.setdefault(upload, {}):  # old names end with a hash, which differs between two uploads
            upload = (*upload, shard["after"])
        uploads.setdefault(upload, {})[index] = file
    if len(uploads) > 1:
        said = " and ".join(_listed([*upload.values()], root) for upload in uploads.values())
        raise UserError(f"{key}.path: '{root}' holds the same split more than once: {said}; keep the files of one upload")
    (((_, total, *_), shards),) = uploads.items()
    if total is not None and set(shards) not in (set(range(total)), set(range(1, total + 1))):
        lacking = ", ".join(map(str, sorted(set(range(total)) - set(shards))[:5]))
        has = f"{len(shards)} of {total} shards ({_listed([*shards.values()], root)})"
        raise UserError(f"{key}.path: '{root}' holds {has}; number {lacking} is missing, so the download is not complete")
    if all(re.fullmatch(r"\d{4}\.parquet", file.name.lower()) for file in found):  # the hub's own conversions
        numbers = {int(file.name[:4]) for file in found}
        if lacking := sorted(set(range(max(numbers))) - numbers):
            name = found[0].with_name(f"{lacking[0]:04d}.parquet").relative_to(root)
            raise UserError(f"{key}.path: '{root}' lacks '{name}', so the download is not complete")
    for file in found:
        if not file.is_file():
            raise UserError(f"{key}.path: '{file}' is a link to nothing")
    return [shards[index] for index in sorted(shards)]


def _listed(found: list[Path], root: Path) -> str:
    first = str(found[0].relative_to(root))
    return first if len(found) == 1 else f"{first} to {found[-1].name} ({len(found)} files)"


# ------------------------------------------------------------------ columns


@dataclass
class Column:
    """What a column holds."""

    kind: str
    """image, class (numbers with names), number, text, or other."""
    type: str
    """As the file calls it, for messages."""
    names: tuple[str, ...] | None = None
    """Class names."""


def columns(schema: Schema) -> dict[str, Column]:
    """The columns of a parquet file, by its schema and what `datasets` notes in it."""
    import pyarrow.types as kinds

    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        features = features if isinstance(features, dict) else {}
    except (TypeError, KeyError, ValueError):
        features = {}
    found = {}
    for name, type in zip(schema.names, schema.types, strict=True):
        feature = features.get(name) if isinstance(features.get(name), dict) else {}
        if kinds.is_dictionary(type):
            type = type.value_type
        plain = kinds.is_integer(type) or kinds.is_floating(type) or kinds.is_boolean(type) or kinds.is_null(type)
        names = class_names(feature) if feature.get("_type") == "ClassLabel" and plain else ()
        if names:
            found[name] = Column("class", str(type), names)
        elif feature.get("_type") == "Image" or (kinds.is_struct(type) and type.get_field_index("bytes") >= 0):
            found[name] = Column("image", str(type))
        elif kinds.is_binary(type) or kinds.is_large_binary(type):
            found[name] = Column("bytes", str(type))
        elif plain:
            found[name] = Column("number", str(type))
        elif kinds.is_string(type) or kinds.is_large_string(type):
            found[name] = Column("text", str(type))
        else:
            found[name] = Column("other", str(type))
    return found


def class_names(feature: dict) -> tuple[str, ...]:
    """The names of a class label as files write them: a list, numbered texts, or their count alone."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = [names[number] for number in sorted(names, key=int)]
    return tuple(class_name(str(name)) for name in (range(feature.get("num_classes") or 0) if names is None else names))


def image_column(given: str | None, found: dict[str, Column], path: str, key: str) -> str:
    """The column of the images."""
    _check_given("image", given, found, path, key)
    for kind in ("image", "bytes"):
        images = [name for name, column in found.items() if column.kind == kind]
        if given is None and len(images) > 1:
            raise UserError(f"{key}.image: '{path}' has several columns of images; set it to one of {', '.join(images)}")
        if given or images:
            return given or images[0]
    raise UserError(f"{key}.path: '{path}' holds no images; columns: {', '.join(found) or 'unknown'}")


def label_column(given: str | None, found: dict[str, Column], path: str, key: str, remarks: Remarks) -> str | None:
    """The column of the labels; None, and a remark, where it is not clear which holds them."""
    _check_given("label", given, found, path, key)
    usable = {name: column for name, column in found.items() if column.kind in ("class", "number", "text")}
    if given is None:
        preferred = [name for name in PREFERRED if name in found][:1]
        classes = [name for name, column in usable.items() if column.kind == "class"]
        also = [name for name in usable if name.lower() in (*PREFERRED, *ALSO)]
        candidates = preferred or classes or also
        if len(candidates) > 1:
            several = ", ".join(candidates)
            remarks.lacking(f".label: '{path}' has several columns of labels; set it to one of {several}")
            return None
        if not candidates:
            there = ", ".join(f"{name} ({column.type})" for name, column in usable.items())
            which = f"; set it to the one that holds them: {there}" if there else ""
            remarks.lacking(f".label: no labels found in '{path}' by type or name{which}")
            return None
        given = candidates[0]
    if given not in usable:
        held = f"column '{given}' holds {found[given].type}"
        remarks.lacking(f".label: {held}; allowed: integers, class labels or texts")
        return None
    return given


def _check_given(what: str, given: str | None, found: dict[str, Column], path: str, key: str) -> None:
    if given is not None and given not in found:
        allowed = ", ".join(found) + "." + did_you_mean(given, found)
        raise UserError(f"{key}.{what}: '{given}' is not a column of '{path}'; allowed: {allowed}")


# ------------------------------------------------------------------ rows


def numbers(
    values: Iterable, own: tuple[str, ...] | None, names: tuple[str, ...] | None, where: str, remarks: Remarks
) -> list[int | str]:
    """Labels of a part of a set: numbers of ``names``, the set's classes, or without these integers and texts as they are.

    ``own`` are the class names of the part, whose order may be another. -1, and a remark, where a value is not a label.
    """
    values = list(values)
    if (own is None) != (names is None) or set(own or ()) != set(names or ()):
        has, others = (f"names the classes {_some(n)}" if n is not None else "has no class names" for n in (own, names))
        remarks.lacking(f".path: {where} {has}, but what comes before it {others}")
        return [-1] * len(values)
    to = None if own is None else [names.index(name) for name in own]
    found = [_number(value, to, where, remarks) for value in values]
    if -1 in found:
        remarks.lacking(f".path: {found.count(-1):,} of {len(found):,} images have no label (null, blank or below 0) in {where}")
    return found


def _number(value: Any, to: list[int] | None, where: str, remarks: Remarks) -> int | str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip()):
        return -1
    if isinstance(value, str) and to is None:
        return value
    whole = isinstance(value, (int, float)) and math.isfinite(value) and value == int(value)
    if not whole or (to is not None and value >= len(to)):
        allowed = "integers or texts" if to is None else f"0 to {len(to) - 1}"
        remarks.lacking(f".label: {where} holds {value!r}; allowed: {allowed}")
        return -1
    return -1 if value < 0 else int(value) if to is None else to[int(value)]


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + ", ..." * (len(names) > 10)


class Table:
    """The parquet files of one split as one table of images and labels.

    Args:
        root: the set's folder; images beside the tables must lie in it.
        image, label: columns, where they are given.
        path: the folder as the user wrote it.

    Raises:
        UserError: a file that cannot be read, or has other columns than the first.
    """

    def __init__(self, found: list[Path], root: Path, image: str | None, label: str | None, path: str, key: str):
        self.root, self.key, self.remarks = root, key, Remarks()
        self.shards = [(file, *self._head(file)) for file in found]
        self.shards = [shard for shard in self.shards if shard[2]] or self.shards[:1]  # those with rows
        first, head, _ = self.shards[0]
        self.image = image_column(image, head, path, key)
        self.label = label_column(label, head, path, key, self.remarks)
        self.names = head[self.label].names if self.label else ()
        for file, other, _ in self.shards[1:]:
            for column in filter(None, (self.image, self.label)):
                if column not in other:
                    lacks = f"'{file.name}' has no column '{column}', which '{first.name}' has; its columns: {', '.join(other)}"
                    if column == self.image:
                        raise UserError(f"{key}.path: {lacks}")
                    self.remarks.lacking(f".path: {lacks}")
        odd = [file.name for file, other, _ in self.shards if self._order(other)]
        if odd:
            self.remarks.notes.append(f": '{odd[0]}' lists its classes in another order than '{first.name}'; labels go by name")

    def _order(self, head: dict[str, Column]) -> bool:
        """Whether a shard has the set's classes in another order."""
        names = head[self.label].names if self.label in head else None
        return names is not None and names != self.names and set(names) == set(self.names or ())

    def _head(self, file: Path) -> tuple[dict[str, Column], int]:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                return columns(opened.schema_arrow), opened.metadata.num_rows
        except Exception as error:  # pyarrow raises many kinds for what it cannot read
            raise UserError(unreadable(self.key, file, error)) from error

    def values(self, file: Path, head: dict[str, Column]) -> list[int | str] | None:
        """Labels of a shard; None where it has none."""
        import pyarrow.parquet

        if self.label is None or self.label not in head:
            return None
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                column = opened.read([self.label]).column(self.label).to_pylist()
        except Exception as error:
            raise UserError(unreadable(self.key, file, error)) from error
        return numbers(column, head[self.label].names, self.names, f"'{file.name}'", self.remarks)

    def labelled(self) -> bool:
        """Whether every image has a label."""
        return all((values := self.values(*shard[:2])) is not None and -1 not in values for shard in self.shards)

    def rows(self) -> Iterator[tuple[bytes | Path, int | str]]:
        """Images and labels in the files' order."""
        import pyarrow.parquet

        kinds: dict[str, str] = {}
        for file, head, count in self.shards:
            labels = self.values(file, head) or [-1] * count
            if self.names is None and self.label in head and count:
                kinds.setdefault(head[self.label].kind, file.name)
                if len(kinds) > 1:
                    said = " and ".join(f"{kind}s in '{name}'" for kind, name in kinds.items())
                    self.remarks.lacking(f".path: column '{self.label}' holds {said}")
                    labels = [-1] * count
            at = 0
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    for batch in opened.iter_batches(ROWS, columns=[self.image]):
                        for picture in batch.column(self.image).to_pylist():
                            yield self._content(picture, at, file), labels[at]
                            at += 1
            except UserError:
                raise
            except Exception as error:
                raise UserError(unreadable(self.key, file, error)) from error

    def _content(self, picture: dict | bytes | None, row: int, file: Path) -> bytes | Path:
        """An image's bytes, or where it lies beside the table: below the set's folder, whatever the working folder is."""
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
        self.remarks.cacheable = False  # nothing says when these files change
        return image


def unreadable(key: str, what: Path | str, error: Exception) -> str:
    """The sentence for a file or set that fails while it is read."""
    why = " ".join(str(error).split())[:200] or type(error).__name__
    name = what.name if isinstance(what, Path) else what
    return f"{key}.path: '{name}' cannot be read: {why}"
