"""A source that joins several sets into one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.samples import Samples
from lightning_idkd.data.source import Source
from lightning_idkd.errors import UserError, require


@dataclass
class Concat(Source):
    """Several sets as one, such as a public set of which a part resembles the private data.

    Classes with the same name are one class; samples without a label stay without one.

    Args:
        parts: the sets, whose samples follow each other in this order; each may have its own limit and classes.
    """

    parts: list[Source]

    def check(self, key: str) -> None:
        require(len(self.parts) > 0, f"{key}.parts", self.parts, "one set or more")
        for where, part in self._parts_with_keys(key):
            part.check(where)

    def expect(self, size: int | None, channels: int | None) -> Inputs:
        return self.parts[0].expect(size, channels)

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Samples:
        """As :meth:`Source.load`; every part has its own cache, and all are in colour where one part is."""
        self.check(key)
        sets = [part.load(split, size, channels, key=where) for where, part in self._parts_with_keys(key)]
        return self._join(sets, key)

    def load_like(self, split: str, inputs: Inputs, *, key: str = "data.private") -> Samples:
        self.check(key)
        sets = [part.load_like(split, inputs, key=where) for where, part in self._parts_with_keys(key)]
        return self._join(sets, key)

    def _parts_with_keys(self, key: str) -> list[tuple[str, Source]]:
        return [(f"{key}.parts[{i}]", part) for i, part in enumerate(self.parts)]

    @staticmethod
    def _join(parts: list[Samples], key: str) -> Samples:
        import torch

        kinds = {part.inputs.plural: type(part.inputs) for part in parts}
        if len(kinds) > 1:
            raise UserError(f"{key}.parts: {' and '.join(kinds)} given; allowed: sets of one kind")
        try:
            [(inputs, values)] = [kind.join([(part.inputs, part.values) for part in parts]) for kind in kinds.values()]
        except ValueError as error:
            raise UserError(f"{key}.parts: {error}") from error
        names = tuple(dict.fromkeys(chain.from_iterable(part.classes for part in parts)))
        labels = torch.cat([part.renumber(names).labels for part in parts])
        notes, unlabelled = [], []
        for i, part in enumerate(parts):
            notes += [f".parts[{i}]{note}" for note in part.notes]
            unlabelled += [f".parts[{i}]{part.unlabelled}"] if part.unlabelled else []
        stored = ", ".join(dict.fromkeys(part.stored for part in parts))
        why = unlabelled[0] if unlabelled else ""
        return type(parts[0])(values, labels, names, stored, tuple(notes), why, inputs)

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        advice = (part.labelled_splits(split, size, f"{key}.parts[{i}]") for i, part in enumerate(self.parts))
        return "; ".join(filter(None, advice))

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        raise NotImplementedError("each part reads its own files")
