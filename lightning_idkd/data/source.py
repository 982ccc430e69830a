"""Sources of samples: the base class of all sources, and of those that can be cut down to a subset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lightning_idkd.data.cache import load_or_make
from lightning_idkd.data.decode import decode
from lightning_idkd.data.images import ImageInputs
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.samples import Remarks, Samples
from lightning_idkd.errors import UserError, did_you_mean, require


def expand(path: str, key: str) -> Path:
    """A path with its ``~`` expanded; a UserError where no user has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}: '{path}' names the folder of a user who does not exist") from error


class Source(ABC):
    """Base class of the sources. Your own source of images defines `read`, and also `identity` if decoded images shall
    be cached; your own source of vectors is a subclass of `VectorSource`."""

    @abstractmethod
    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        """Class names (None: the numbers or texts that occur are the classes) and an iterable of (image, label) pairs;
        optionally `Remarks` as a third item.

        An image is a file's path or bytes, or a uint8 array [H, W] or [H, W, 3]. A label is the number of a class name,
        or -1 for an image without a label; without class names it may be any number from 0 on, or a text.

        Args:
            split: train or test.
            size: the size that was asked for, in pixels; None: as stored.
            key: config key that named this source, for messages.
        """

    def check(self, key: str) -> None:  # noqa: B027 (most have nothing to check)
        """Raise a UserError that begins with the config ``key`` where an argument is out of its range.

        It is called before any data are read.
        """

    def identity(self, split: str, size: int | None, key: str) -> object | None:
        """Return everything that determines the images of ``split``, with a stable repr; None: do not cache."""
        return None

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        """What to set if the stored images of ``split`` have no labels, as a sentence; empty if there is no choice."""
        return ""

    def expect(self, size: int | None, channels: int | None) -> Inputs:
        """The form that samples probably have; the arguments are those of :meth:`load`.

        A source of images reads nothing for this; a source of vectors reads its table.
        """
        return ImageInputs(channels or 3, size or 32)

    def load_like(self, split: str, inputs: Inputs, *, key: str = "data.private") -> Samples:
        """The samples of ``split`` in the form of another set's.

        Raises:
            UserError: as for :meth:`load`, or these samples cannot have this form.
        """
        if not isinstance(inputs, ImageInputs):
            raise UserError(
                f"{key}: {type(self).__name__} holds images; allowed: {inputs.plural}, as the private samples"
            )
        return self.load(split, inputs.size, inputs.channels, key=key)

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Samples:
        """The samples of ``split``.

        Args:
            split: train or test.
            size: width and height in pixels, to which the middle square is resized. None: as stored.
            channels: 1 or 3. None: 1 where all images are grey, else 3.
            key: config key that named this source, for messages.

        Raises:
            UserError: the data are missing, cannot be read, or differ in size while ``size`` is None.
        """
        if size is not None and size < 1:
            raise UserError(f"data.image_size: {size} given; allowed: 1 or more, or null for the stored size")
        self.check(key)
        try:
            identity = self.identity(split, size, key)
            if identity is None:
                return self._read_all(split, size, channels, key)[0]
            name = f"{type(self).__name__}-{split}"
            return load_or_make(name, (identity, size, channels), lambda: self._read_all(split, size, channels, key))
        except OSError as error:  # a folder that may not be read, a file that vanished
            what = error.filename or type(self).__name__
            raise UserError(f"{key}: '{what}' cannot be read ({error.strerror or error})") from error

    def _read_all(self, split: str, size: int | None, channels: int | None, key: str) -> tuple[Samples, bool]:
        """The samples, and whether the cache may keep them."""
        content = self.read(split, size, key)
        if not isinstance(content, tuple) or len(content) not in (2, 3):
            given = f"{type(self).__name__}.read returns {type(content).__name__}"
            raise UserError(f"{key}: {given}; allowed: class names or None, and (sample, label) pairs")
        classes, samples, remarks = content if len(content) == 3 else (*content, Remarks())
        return self.convert(classes, samples, split, size, channels, key, remarks), remarks.cacheable

    def convert(
        self,
        classes: tuple[str, ...] | None,
        samples: Iterable[tuple],
        split: str,
        size: int | None,
        channels: int | None,
        key: str,
        remarks: Remarks,
    ) -> Samples:
        """Make a set of what `read` returns; the other arguments are those of :meth:`load`."""
        return decode(classes, samples, split, size, channels, key, remarks)


@dataclass
class Subset(Source):
    """Base of the sources that can be cut down to some classes and to a number of samples.

    Args:
        limit: number of training samples to use, a fixed random choice (many sets are stored sorted by class); null for
            all.
        skip: leave out the training samples that another source uses with this ``limit``, so that the two share none;
            null for none.
        classes: use these classes only, by name, renumbered in this order; null for all.
    """

    limit: int | None = field(default=None, kw_only=True)
    skip: int | None = field(default=None, kw_only=True)
    classes: list[str] | None = field(default=None, kw_only=True)

    def check(self, key: str) -> None:
        if self.classes is not None:
            require(len(self.classes) > 0, f"{key}.classes", self.classes, "one class or more, or null for all")
            if len(set(self.classes)) < len(self.classes):
                raise UserError(f"{key}.classes: {', '.join(self.classes)}: a class is named twice")
        if self.limit is not None:
            require(self.limit >= 1, f"{key}.limit", self.limit, "1 or more, or null for all samples")
        if self.skip is not None:
            require(self.skip >= 1, f"{key}.skip", self.skip, "1 or more, or null for none")

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Samples:
        """As :meth:`Source.load`; the samples of a limit keep the set's order, and belong to every larger limit too."""
        return self._cut(super().load(split, size, channels, key=key), split, key)

    def _cut(self, samples: Samples, split: str, key: str) -> Samples:
        """The samples of the classes and of the number that are asked for."""
        if self.classes is not None:
            samples = self._select_classes(samples, self.classes, split, key)
        first, last = self.skip or 0, len(samples) if self.limit is None else (self.skip or 0) + self.limit
        if split == "test" or (first == 0 and last >= len(samples)):
            return samples
        require(
            first < len(samples), f"{key}.skip", first, f"below {len(samples)}, the number of {samples.inputs.plural}"
        )
        return samples[np.sort(np.random.default_rng(0).permutation(len(samples))[first:last])]

    @staticmethod
    def _select_classes(samples: Samples, classes: list[str], split: str, key: str) -> Samples:
        if not samples.classes and samples.unlabelled:
            raise UserError(f"{key}{samples.unlabelled}")
        for name in classes:
            if name not in samples.classes:
                some = ", ".join(samples.classes[:20]) + (", ..." if len(samples.classes) > 20 else "")
                hint = did_you_mean(name, samples.classes)
                raise UserError(f"{key}.classes: this set has no class '{name}'.{hint} It has: {some or 'no labels'}")
        samples = samples.renumber(classes)
        kept = (samples.labels >= 0).nonzero()[:, 0].numpy()
        if not len(kept):
            raise UserError(f"{key}.classes: split '{split}' has no {samples.inputs.plural} of {', '.join(classes)}")
        return samples[kept]
