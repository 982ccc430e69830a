"""Where images come from: the base of all sources, and of those that can be cut down to a subset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lightning_idkd.data.cache import load_or_make
from lightning_idkd.data.decode import decode
from lightning_idkd.data.images import Images, Remarks
from lightning_idkd.errors import UserError, did_you_mean, require


class Source(ABC):
    """Base of the image sources. A source of your own needs `read` only, and `identity` if it is to be cached."""

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
        """Everything that determines the images of ``split``, as something with a stable repr; None: do not cache."""
        return None

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        """What to set if the stored images of ``split`` have no labels, as a sentence; empty if there is no choice."""
        return ""

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Images:
        """The images of ``split``.

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
                return self._decode(split, size, channels, key)[0]
            name = f"{type(self).__name__}-{split}"
            return load_or_make(name, (identity, size, channels), lambda: self._decode(split, size, channels, key))
        except OSError as error:  # a folder that may not be read, a file that vanished
            what = error.filename or type(self).__name__
            raise UserError(f"{key}: '{what}' cannot be read ({error.strerror or error})") from error

    def _decode(self, split: str, size: int | None, channels: int | None, key: str) -> tuple[Images, bool]:
        """The images, and whether the cache may keep them."""
        content = self.read(split, size, key)
        if not isinstance(content, tuple) or len(content) not in (2, 3):
            given = f"{type(self).__name__}.read returns {type(content).__name__}"
            raise UserError(f"{key}: {given}; allowed: class names or None, and (image, label) pairs")
        classes, samples, remarks = content if len(content) == 3 else (*content, Remarks())
        return decode(classes, samples, split, size, channels, key, remarks), remarks.cacheable


@dataclass
class Subset(Source):
    """Base of the sources that can be cut down to some classes and to a number of images.

    Args:
        limit: number of training images to use, a fixed random choice (many sets are stored sorted by class); null for
            all.
        skip: leave out the training images that another source uses with this ``limit``, so that the two share none;
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
            require(self.limit >= 1, f"{key}.limit", self.limit, "1 or more, or null for all images")
        if self.skip is not None:
            require(self.skip >= 1, f"{key}.skip", self.skip, "1 or more, or null for none")

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Images:
        """As :meth:`Source.load`; the images of a limit keep the set's order, and belong to every larger limit too."""
        images = super().load(split, size, channels, key=key)
        if self.classes is not None:
            images = self._select_classes(images, self.classes, split, key)
        first, last = self.skip or 0, len(images) if self.limit is None else (self.skip or 0) + self.limit
        if split == "test" or (first == 0 and last >= len(images)):
            return images
        require(first < len(images), f"{key}.skip", first, f"below {len(images)}, the number of images")
        return images[np.sort(np.random.default_rng(0).permutation(len(images))[first:last])]

    @staticmethod
    def _select_classes(images: Images, classes: list[str], split: str, key: str) -> Images:
        if not images.classes and images.unlabelled:
            raise UserError(f"{key}{images.unlabelled}")
        for name in classes:
            if name not in images.classes:
                some = ", ".join(images.classes[:20]) + (", ..." if len(images.classes) > 20 else "")
                hint = did_you_mean(name, images.classes)
                raise UserError(f"{key}.classes: this set has no class '{name}'.{hint} It has: {some or 'no labels'}")
        images = images.named(classes)
        kept = (images.labels >= 0).nonzero()[:, 0].numpy()
        if not len(kept):
            raise UserError(f"{key}.classes: split '{split}' has no images of {', '.join(classes)}")
        return images[kept]
