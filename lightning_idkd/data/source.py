"""Where images come from: the base of all sources, what they deliver, and the cache of decoded sets."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lightning_idkd.errors import UserError, did_you_mean, reason, require

Tensor = Picture = Any  # torch's and Pillow's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds
FORMAT = 2  # raise it when decoding changes: older cache files are then no longer found
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip these to 255


@dataclass
class Images:
    """A set of square images of one size, on the CPU; indexing gives a subset.

    Treat the tensors as read-only: they may be mapped from the cache file.
    """

    pixels: Tensor
    """uint8 [N, C, S, S]."""
    labels: Tensor
    """int64 [N]; all -1 where the set has no labels."""
    classes: tuple[str, ...]
    """Class names, k of them; empty where the set has no labels."""
    stored: str = ""
    """Size and mode of the first image before it was converted, such as 64x64 RGB."""

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def size(self) -> int:
        return self.pixels.shape[2]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | np.ndarray) -> Images:
        return Images(self.pixels[index], self.labels[index], self.classes, self.stored)


class Source(ABC):
    """Base of the image sources; one of your own needs `read` alone, and `identity` to be cached."""

    @abstractmethod
    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        """Class names (None: the numbers that occur) and an iterable of (image, label).

        An image is a file's path or bytes, or a uint8 array [H, W] or [H, W, 3]; a label is an integer, -1 where there is none.
        ``split`` is train or test, ``size`` what was asked for, ``key`` the config key that named this source.
        """

    def check(self, key: str) -> None:  # noqa: B027 (most have nothing to check)
        """Raise a UserError where an argument is out of its range; asked before any data are read, with the config key."""

    def identity(self, split: str, size: int | None, key: str) -> object | None:
        """Whatever determines the images of ``split``, as something with a stable repr; None: do not cache."""
        return None

    def load(self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private") -> Images:
        """The images of ``split`` (train or test).

        Args:
            split: train or test.
            size: width and height in pixels; the middle square is resized. None: as stored.
            channels: 1 or 3. None: 1 where all images are grey, else 3.
            key: config key that named this source, for messages.

        Raises:
            UserError: where the data are missing, cannot be read, or differ in size and ``size`` is None.
        """
        if size is not None and size < 1:
            raise UserError(f"data.image_size: {size} given; allowed: 1 or more, or null for the stored size")
        self.check(key)
        identity = self.identity(split, size, key)
        return cached(
            None if identity is None else f"{type(self).__name__}-{split}",
            (identity, size, channels),
            lambda: self._decoded(split, size, channels, key),
        )

    def _decoded(self, split: str, size: int | None, channels: int | None, key: str) -> Images:
        found = self.read(split, size, key)
        if not isinstance(found, tuple) or len(found) != 2:
            said = f"{type(self).__name__}.read returns {type(found).__name__}"
            raise UserError(f"{key}: {said}; allowed: class names or None, and (image, label) pairs")
        return decode(*found, split, size, channels, key)


@dataclass
class Subset(Source):
    """Base of the sources here: any of them can be cut down to some classes and to a number of images.

    Args:
        limit: use so many training images, a fixed random choice (many sets are stored sorted by class); null for all.
        classes: use these classes only, by name, renumbered in this order; null for all.
    """

    limit: int | None = field(default=None, kw_only=True)
    classes: list[str] | None = field(default=None, kw_only=True)

    def check(self, key: str) -> None:
        if self.classes is not None:
            require(len(self.classes) > 0, f"{key}.classes", self.classes, "one class or more, or null for all")
            if len(set(self.classes)) < len(self.classes):
                raise UserError(f"{key}.classes: {', '.join(self.classes)}: a class is named twice")
        if self.limit is not None:
            require(self.limit >= 1, f"{key}.limit", self.limit, "1 or more, or null for all images")

    def load(self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private") -> Images:
        """As :meth:`Source.load`; a limit's images are in the set's order, and part of a larger limit's."""
        images = super().load(split, size, channels, key=key)
        if self.classes is not None:
            images = self._only(images, split, key)
        if split == "test" or self.limit is None or self.limit >= len(images):
            return images
        return images[np.sort(np.random.default_rng(0).permutation(len(images))[: self.limit])]

    def _only(self, images: Images, split: str, key: str) -> Images:
        import torch

        for name in self.classes:
            if name not in images.classes:
                some = ", ".join(images.classes[:20]) + ", ..." * (len(images.classes) > 20)
                hint = did_you_mean(name, images.classes)
                raise UserError(f"{key}.classes: this set has no class '{name}'.{hint} It has: {some or 'no labels'}")
        new = torch.full((len(images.classes),), -1)
        new[[images.classes.index(name) for name in self.classes]] = torch.arange(len(self.classes))
        labels = new[images.labels]
        kept = (labels >= 0).nonzero()[:, 0].numpy()
        if not len(kept):
            raise UserError(f"{key}.classes: split '{split}' has no images of {', '.join(self.classes)}")
        return Images(images.pixels[kept], labels[kept], tuple(self.classes), images.stored)


def opened(image: Path | bytes | np.ndarray) -> Picture:
    """The image as Pillow has it."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return Image.open(image if isinstance(image, Path) else io.BytesIO(image))


def convert(image: Path | bytes | np.ndarray, size: int | None, channels: int | None) -> np.ndarray:
    """One image as uint8 [H, W] (grey) or [H, W, 3]; colour only where ``channels`` is 3 or the image has some."""
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray) and image.dtype != np.uint8:
        raise ValueError(f"an array of {image.dtype}; allowed: uint8, 0 to 255")
    with opened(image) as picture:
        if not isinstance(image, np.ndarray):
            if picture.mode in DEEP:
                raise ValueError(f"images of mode {picture.mode} have more than 8 bits a channel; store them with 8")
            picture = ImageOps.exif_transpose(picture)
        if picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")  # Pillow warns about the direct way
        mode = "L" if channels == 1 or (channels is None and picture.mode in ("1", "L")) else "RGB"
        picture = picture.convert(mode) if picture.mode != mode else picture
        if size is not None and picture.size != (size, size):
            (width, height), side = picture.size, min(picture.size)
            left, top = (width - side) // 2, (height - side) // 2
            method = Image.Resampling.BOX if side % size == 0 else Image.Resampling.BICUBIC
            picture = picture.resize((size, size), method, box=(left, top, left + side, top + side))
        return np.asarray(picture)


def decode(
    classes: tuple[str, ...] | None,
    samples: Iterable[tuple],
    split: str,
    size: int | None,
    channels: int | None,
    key: str,
) -> Images:
    """The ``samples`` of `Source.read` as tensors."""
    import torch

    labels: list[int] = []
    most = len(classes) if classes else np.inf

    def bare() -> Iterator[Path | bytes | np.ndarray]:
        for sample in samples:
            pair = isinstance(sample, tuple) and len(sample) == 2
            if not pair or not isinstance(sample[1], (int, np.integer)) or not -1 <= sample[1] < most:
                given = f"one with label {sample[1]!r}" if pair else type(sample).__name__
                numbers = f"0 to {most - 1}" if classes else "0 on"
                said = f"sample {len(labels)} of split '{split}' is {given}; allowed: (image, label)"
                raise UserError(f"{key}: {said} with a label from {numbers}, or -1 for none")
            labels.append(int(sample[1]))
            yield sample[0]

    def piece(first: int, images: list) -> list[np.ndarray]:
        arrays = []
        for i, image in enumerate(images, first):
            try:
                arrays.append(convert(image, size, channels))
            except Exception as error:  # Pillow raises many kinds for broken files: OSError, SyntaxError, its own
                which = f"'{image}'" if isinstance(image, Path) else f"image {i} of split '{split}'"
                raise UserError(f"{key}: {which} cannot be decoded: {error}") from error
        return arrays

    decoded: list[np.ndarray] = []
    pending = bare()
    # Decoding a small image hardly releases the interpreter: two threads on two cores are slower than one.
    with ThreadPoolExecutor(min(4, max(1, (os.cpu_count() or 1) // 2))) as pool:
        while block := list(islice(pending, 1024)):
            starts = range(0, len(block), 256)
            firsts = [len(decoded) + i for i in starts]
            arrays = list(chain(*pool.map(piece, firsts, [block[i : i + 256] for i in starts])))
            if not decoded:
                with opened(block[0]) as first:
                    stored = f"{first.width}x{first.height} {'grey' if first.mode in ('1', 'L') else first.mode}"
            for array in arrays:
                height, width = array.shape[:2]
                if height != width or array.shape[:2] != (decoded or arrays)[0].shape[:2]:
                    raise UserError(f"{key}: images are not square or differ in size ({width}x{height}); set data.image_size")
            decoded += arrays
    if not decoded:
        raise UserError(f"{key}: split '{split}' holds no images")
    if any(array.ndim == 3 for array in decoded):  # grey ones in a coloured set
        decoded = [array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2) for array in decoded]
    pixels = torch.from_numpy(np.stack(decoded))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    names = tuple(map(str, range(max(labels) + 1))) if classes is None else tuple(classes)
    return Images(pixels, torch.tensor(labels, dtype=torch.int64), names, stored)


def cache_folder() -> Path:
    """``$IDKD_CACHE``, else ``lightning_idkd`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("IDKD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_idkd"


def cached(name: str | None, identity: object, make: Callable[[], Images]) -> Images:
    """What ``make`` returns, from its cache file where that is sound; ``name`` None: without a cache."""
    if name is None:
        return make()
    import torch

    digest = hashlib.sha256(repr((FORMAT, identity)).encode()).hexdigest()[:20]
    file = cache_folder() / f"{name}-{digest}.pt"
    try:
        stored = torch.load(file, mmap=True, weights_only=True)
        return Images(stored["pixels"], stored["labels"], tuple(stored["classes"]), stored["stored"])
    except Exception:  # absent, torn or of another kind: whatever torch makes of such a file, it is built anew
        images = make()
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            torch.save(vars(images) | {"classes": list(images.classes)}, stream)
            stream.flush()
            os.fsync(stream.fileno())  # or a power cut could leave the final name on missing contents
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        logging.getLogger(__name__).warning(
            "decoded images are not kept for the next run: cannot write to %s (%s); set IDKD_CACHE to another folder",
            file.parent,
            reason(error, file.parent),
        )
    return images
