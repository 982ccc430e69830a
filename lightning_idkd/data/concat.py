"""Several sets as one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_idkd.data.images import Images
from lightning_idkd.data.source import Source
from lightning_idkd.errors import UserError, require


@dataclass
class Concat(Source):
    """Several sets as one, such as a public set of which a part resembles the private data.

    Classes of one name are one class; an image without a label keeps having none.

    Args:
        parts: the sets, whose images follow in this order; each may have a limit and classes of its own.
    """

    parts: list[Source]

    def check(self, key: str) -> None:
        require(len(self.parts) > 0, f"{key}.parts", self.parts, "one set or more")
        for i, part in enumerate(self.parts):
            part.check(f"{key}.parts[{i}]")

    def load(self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private") -> Images:
        """As :meth:`Source.load`, by the parts' own caches; in colour where one part is."""
        import torch

        self.check(key)
        parts = [part.load(split, size, channels, key=f"{key}.parts[{i}]") for i, part in enumerate(self.parts)]
        if len({part.size for part in parts}) > 1:
            sizes = ", ".join(f"{part.size}x{part.size}" for part in parts)
            raise UserError(f"{key}.parts: images differ in size ({sizes}); set data.image_size")
        names = tuple(dict.fromkeys(name for part in parts for name in part.classes))
        pixels, labels, colours = [], [], max(part.channels for part in parts)
        for part in parts:
            pixels.append(part.pixels.expand(-1, colours, -1, -1))
            labels.append(part.named(names).labels)
        stored = ", ".join(dict.fromkeys(part.stored for part in parts))
        notes = tuple(f".parts[{i}]{note}" for i, part in enumerate(parts) for note in part.notes)
        lacking = next((f".parts[{i}]{part.unlabelled}" for i, part in enumerate(parts) if part.unlabelled), "")
        return Images(torch.cat(pixels), torch.cat(labels), names, stored, notes, lacking)

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        advice = (part.labelled_splits(split, size, f"{key}.parts[{i}]") for i, part in enumerate(self.parts))
        return "; ".join(filter(None, advice))

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        raise NotImplementedError("each part reads its own files")
