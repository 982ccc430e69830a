"""A source that joins several sets into one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from lightning_idkd.data.images import Images
from lightning_idkd.data.source import Source
from lightning_idkd.errors import UserError, require


@dataclass
class Concat(Source):
    """Several sets as one, such as a public set of which a part resembles the private data.

    Classes with the same name are one class; images without a label stay without one.

    Args:
        parts: the sets, whose images follow each other in this order; each may have its own limit and classes.
    """

    parts: list[Source]

    def check(self, key: str) -> None:
        require(len(self.parts) > 0, f"{key}.parts", self.parts, "one set or more")
        for i, part in enumerate(self.parts):
            part.check(f"{key}.parts[{i}]")

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Images:
        """As :meth:`Source.load`; every part has its own cache, and all are in colour where one part is."""
        import torch

        self.check(key)
        parts = [part.load(split, size, channels, key=f"{key}.parts[{i}]") for i, part in enumerate(self.parts)]
        if len({part.size for part in parts}) > 1:
            sizes = ", ".join(f"{part.size}x{part.size}" for part in parts)
            raise UserError(f"{key}.parts: images differ in size ({sizes}); set data.image_size")
        names = tuple(dict.fromkeys(chain.from_iterable(part.classes for part in parts)))
        pixels, labels, notes, unlabelled = [], [], [], []
        most = max(part.channels for part in parts)
        for i, part in enumerate(parts):
            pixels.append(part.pixels.expand(-1, most, -1, -1))
            labels.append(part.named(names).labels)
            notes += [f".parts[{i}]{note}" for note in part.notes]
            unlabelled += [f".parts[{i}]{part.unlabelled}"] if part.unlabelled else []
        stored = ", ".join(dict.fromkeys(part.stored for part in parts))
        why = unlabelled[0] if unlabelled else ""
        return Images(torch.cat(pixels), torch.cat(labels), names, stored, tuple(notes), why)

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        advice = (part.labelled_splits(split, size, f"{key}.parts[{i}]") for i, part in enumerate(self.parts))
        return "; ".join(filter(None, advice))

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        raise NotImplementedError("each part reads its own files")
