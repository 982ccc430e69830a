"""A set of images with labels and class names, and the remarks of a source about it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np

Tensor = Any  # torch's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds


@dataclass
class Images:
    """A set of square images of one size, on the CPU; indexing gives a subset.

    The tensors are read-only: they may be mapped from the cache file.
    """

    pixels: Tensor
    """uint8 [N, C, S, S]."""
    labels: Tensor
    """int64 [N]; all -1 where the set has no labels."""
    classes: tuple[str, ...]
    """Class names, k of them; empty where the set has no labels."""
    stored: str = ""
    """Size and mode of the first image before it was converted, such as 64x64 RGB."""
    notes: tuple[str, ...] = ()
    """Oddities of the set, each printed once; each continues the config key that named the source."""
    unlabelled: str = ""
    """Why images have no label, as such a continuation; empty where all have one, or no reason is known."""

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def size(self) -> int:
        return self.pixels.shape[2]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | np.ndarray) -> Images:
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def named(self, classes: Sequence[str]) -> Images:
        """The same images with their labels numbered by ``classes``; an image of any other class gets label -1."""
        import torch

        if tuple(classes) == self.classes:
            return self
        number = {name: c for c, name in enumerate(classes)}
        new = torch.tensor([*(number.get(name, -1) for name in self.classes), -1])  # label -1 takes the last entry
        return replace(self, labels=new[self.labels], classes=tuple(classes))

    def occurring(self) -> list[str]:
        """Names of the classes that at least one image has, in order."""
        return [self.classes[number] for number in self.labels.unique().tolist() if number >= 0]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the set: number, shape and stored form of the images, and the SHA-256 of their pixels and of
        their labels with the class names."""
        pixels, labels = hashlib.sha256(), hashlib.sha256("\0".join(self.classes).encode(errors="surrogatepass"))
        pixels.update(self.pixels.contiguous().numpy())
        labels.update(self.labels.contiguous().numpy().astype("<i8"))
        shape = {"images": len(self), "channels": self.channels, "size": self.size, "stored": self.stored}
        return shape | {"pixels": pixels.hexdigest(), "labels": labels.hexdigest()}


@dataclass
class Remarks:
    """What a source reports about a set beside its images; it may grow while samples are read."""

    notes: list[str] = field(default_factory=list)
    """See :attr:`Images.notes`."""
    unlabelled: str = ""
    """See :attr:`Images.unlabelled`."""
    cacheable: bool = True
    """Whether `Source.identity` covers everything that was read."""

    def lacking(self, why: str) -> None:
        """Note why images have no label; only the first reason is kept."""
        self.unlabelled = self.unlabelled or why


def class_name(name: str) -> str:
    """A class name in composed Unicode, so that the same name is equal on every file system.

    Bytes that are not UTF-8 become readable text.
    """
    readable = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return unicodedata.normalize("NFC", readable)


def number_classes(labels: list[int | str]) -> tuple[tuple[str, ...], list[int], str]:
    """Make classes of labels that come without class names: every value that occurs, except -1, is a class.

    Returns:
        The names of the classes, numbers before texts and both ascending; the labels as numbers of these classes; and a
        note, empty where the labels are 0, 1, 2, ... already.
    """

    def place(value: int | str) -> tuple:
        number = not isinstance(value, str) or value.isdecimal()
        return (0, int(value), str(value)) if number else (1, value)

    values = sorted(set(labels) - {-1}, key=place)
    names = tuple(dict.fromkeys(class_name(str(value)) for value in values))
    if values == list(range(len(values))):
        return names, cast("list[int]", list(labels)), ""
    number_of_name = {name: number for number, name in enumerate(names)}
    number = {value: number_of_name[class_name(str(value))] for value in values} | {-1: -1}
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    note = f": labels have no class names; the {len(names):,} values that occur ({some}) are the classes"
    return names, [number[label] for label in labels], note
