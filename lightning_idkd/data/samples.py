"""A set of samples with labels and class names, and the remarks of a source about it."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

    from lightning_idkd.data.inputs import Inputs

Tensor = Any  # torch's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds


@dataclass
class Samples:
    """A set of samples of one form, on the CPU; indexing gives a subset.

    The tensors are read-only: they may be mapped from the cache file.
    """

    values: Tensor
    """[N, ...]; ``inputs`` describes their layout."""
    labels: Tensor
    """int64 [N]; all -1 where the set has no labels."""
    classes: tuple[str, ...]
    """Class names, k of them; empty where the set has no labels."""
    stored: str = ""
    """Form of the first sample before it was converted, such as 64x64 RGB."""
    notes: tuple[str, ...] = ()
    """Remarks about oddities of the set, each printed once, directly after the config key of the source."""
    unlabelled: str = ""
    """Why samples have no label, printed in the same way; empty if all have one, or if the reason is unknown."""
    inputs: Inputs = None  # ty: ignore[invalid-assignment]
    """Form of the samples, and how a network takes them."""

    def __post_init__(self) -> None:
        if self.inputs is None:
            raise UserError("Samples: no inputs given; allowed: those of a kind of data, such as VectorInputs")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | np.ndarray) -> Self:
        return replace(self, values=self.values[index], labels=self.labels[index])

    def renumber(self, classes: Sequence[str]) -> Self:
        """The same samples with their labels numbered by ``classes``; a sample of any other class gets label -1."""
        import torch

        if tuple(classes) == self.classes:
            return self
        number = {name: c for c, name in enumerate(classes)}
        new = torch.tensor([*(number.get(name, -1) for name in self.classes), -1])  # label -1 takes the last entry
        return replace(self, labels=new[self.labels], classes=tuple(classes))

    def occurring_classes(self) -> list[str]:
        """Names of the classes that at least one sample has, in order."""
        return [self.classes[number] for number in self.labels.unique().tolist() if number >= 0]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies the set: number, form and stored form of the samples, and the SHA-256 of their values and of
        their labels with the class names.

        For every kind of samples, the number is called ``images``, and the digest of the values ``pixels``.
        """
        values, labels = hashlib.sha256(), hashlib.sha256("\0".join(self.classes).encode(errors="surrogatepass"))
        values.update(self.values.contiguous().numpy())
        labels.update(self.labels.contiguous().numpy().astype("<i8"))
        form = {"images": len(self), **self.inputs.facts(), "stored": self.stored}
        return form | {"pixels": values.hexdigest(), "labels": labels.hexdigest()}


@dataclass
class Remarks:
    """What a source reports about a set beside its samples; it may grow while samples are read."""

    notes: list[str] = field(default_factory=list)
    """See :attr:`Samples.notes`."""
    unlabelled: str = ""
    """See :attr:`Samples.unlabelled`."""
    columns: Sequence[str] = ()
    """Names of the features of vectors; empty where they have none."""
    cacheable: bool = True
    """Whether `Source.identity` covers everything that was read."""

    def note_unlabelled(self, why: str) -> None:
        """Note why samples have no label; only the first reason is kept."""
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


def draw_test_part(labels: np.ndarray, share: float) -> np.ndarray:
    """Mask [N] of a test set: a ``share`` of the samples of every class, a fixed random choice."""
    rng, test = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in np.unique(labels[labels >= 0]):
        members = rng.permutation(np.flatnonzero(labels == label))
        test[members[: round(share * len(members))]] = True
    return test
