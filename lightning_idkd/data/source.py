"""Where images come from: the base of all sources, what they deliver, and the cache of decoded sets."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import unicodedata
import uuid
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lightning_idkd.errors import UserError, did_you_mean, reason, require
from lightning_idkd.machine import cache_folder

Tensor = Picture = Any  # torch's and Pillow's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds
FORMAT = 3  # raise it when decoding changes: older cache files are then no longer found
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
    notes: tuple[str, ...] = ()
    """Oddities of the set to print once; each continues the config key that named the source."""
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
        """The same images with their labels numbered by ``classes``; an image whose class is not among them gets label -1."""
        import torch

        if tuple(classes) == self.classes:
            return self
        numbers = {name: number for number, name in enumerate(classes)}
        new = torch.tensor([*(numbers.get(name, -1) for name in self.classes), -1])  # label -1 finds the last
        return replace(self, labels=new[self.labels], classes=tuple(classes))

    def occurring(self) -> list[str]:
        """Names of the classes that at least one image has, in order."""
        return [self.classes[number] for number in self.labels.unique().tolist() if number >= 0]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Number, shape and stored form of the images, and the SHA-256 of their pixels and of their labels with class names."""
        pixels, labels = hashlib.sha256(), hashlib.sha256("\0".join(self.classes).encode(errors="surrogatepass"))
        pixels.update(self.pixels.contiguous().numpy())
        labels.update(self.labels.contiguous().numpy().astype("<i8"))
        shape = {"images": len(self), "channels": self.channels, "size": self.size, "stored": self.stored}
        return shape | {"pixels": pixels.hexdigest(), "labels": labels.hexdigest()}


@dataclass
class Remarks:
    """What a source has to say about a set beside its images; it may grow while samples are read."""

    notes: list[str] = field(default_factory=list)
    """See :attr:`Images.notes`."""
    unlabelled: str = ""
    """See :attr:`Images.unlabelled`."""
    cacheable: bool = True
    """Whether `Source.identity` covers all that was read."""

    def lacking(self, why: str) -> None:
        """Keep the first reason why images have no label."""
        self.unlabelled = self.unlabelled or why


class Source(ABC):
    """Base of the image sources; one of your own needs `read` alone, and `identity` to be cached."""

    @abstractmethod
    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...] | None, Iterable[tuple]]:
        """Class names (None: the numbers or texts that occur) and an iterable of (image, label); optionally `Remarks`.

        An image is a file's path or bytes, or a uint8 array [H, W] or [H, W, 3]; a label is a number of the class names, -1
        where there is none; without class names it may be any number from 0 on, or a text.
        ``split`` is train or test, ``size`` what was asked for, ``key`` the config key that named this source.
        """

    def check(self, key: str) -> None:  # noqa: B027 (most have nothing to check)
        """Raise a UserError where an argument is out of its range; asked before any data are read, with the config key."""

    def identity(self, split: str, size: int | None, key: str) -> object | None:
        """Whatever determines the images of ``split``, as something with a stable repr; None: do not cache."""
        return None

    def labelled_splits(self, split: str, size: int | None, key: str) -> str:
        """What to set where the stored images of ``split`` have no labels, as a sentence; empty where there is no choice."""
        return ""

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
        try:
            identity = self.identity(split, size, key)
            return cached(
                None if identity is None else f"{type(self).__name__}-{split}",
                (identity, size, channels),
                lambda: self._decoded(split, size, channels, key),
            )
        except OSError as error:  # a folder that may not be read, a file that vanished
            what = error.filename or type(self).__name__
            raise UserError(f"{key}: '{what}' cannot be read ({error.strerror or error})") from error

    def _decoded(self, split: str, size: int | None, channels: int | None, key: str) -> tuple[Images, bool]:
        """The images, and whether the cache may keep them."""
        found = self.read(split, size, key)
        if not isinstance(found, tuple) or len(found) not in (2, 3):
            said = f"{type(self).__name__}.read returns {type(found).__name__}"
            raise UserError(f"{key}: {said}; allowed: class names or None, and (image, label) pairs")
        classes, samples, remarks = found if len(found) == 3 else (*found, Remarks())
        return decode(classes, samples, split, size, channels, key, remarks), remarks.cacheable


@dataclass
class Subset(Source):
    """Base of the sources here: any of them can be cut down to some classes and to a number of images.

    Args:
        limit: use so many training images, a fixed random choice (many sets are stored sorted by class); null for all.
        skip: leave out the training images that another source has with this ``limit``, so that they share none; null for none.
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

    def load(self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private") -> Images:
        """As :meth:`Source.load`; a limit's images are in the set's order, and part of a larger limit's."""
        images = super().load(split, size, channels, key=key)
        if self.classes is not None:
            images = self._only(images, split, key)
        first, last = self.skip or 0, len(images) if self.limit is None else (self.skip or 0) + self.limit
        if split == "test" or (first == 0 and last >= len(images)):
            return images
        require(first < len(images), f"{key}.skip", first, f"below {len(images)}, the number of images")
        return images[np.sort(np.random.default_rng(0).permutation(len(images))[first:last])]

    def _only(self, images: Images, split: str, key: str) -> Images:
        if not images.classes and images.unlabelled:
            raise UserError(f"{key}{images.unlabelled}")
        for name in self.classes:
            if name not in images.classes:
                some = ", ".join(images.classes[:20]) + ", ..." * (len(images.classes) > 20)
                hint = did_you_mean(name, images.classes)
                raise UserError(f"{key}.classes: this set has no class '{name}'.{hint} It has: {some or 'no labels'}")
        images = images.named(self.classes)
        kept = (images.labels >= 0).nonzero()[:, 0].numpy()
        if not len(kept):
            raise UserError(f"{key}.classes: split '{split}' has no images of {', '.join(self.classes)}")
        return images[kept]


def class_name(name: str) -> str:
    """A class name in composed Unicode, so that the same name from two file systems is equal; bytes that are not UTF-8 become
    readable text."""
    readable = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return unicodedata.normalize("NFC", readable)


def opened(image: Path | bytes | np.ndarray) -> Picture:
    """The image as Pillow has it."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return Image.open(image if isinstance(image, Path) else io.BytesIO(image))


def turned(picture: Picture) -> tuple[Picture, bool]:
    """The picture as its camera was held, and whether its EXIF fields are sound; damaged ones are ignored."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(picture), True
    except Exception:  # Pillow writes all fields anew, and raises many kinds for those that it cannot
        turn = Image.Transpose
        turns = (None, None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_270,
                 turn.TRANSVERSE, turn.ROTATE_90)  # fmt: skip
        try:
            method = turns[picture.getexif().get(0x0112, 0)]
        except Exception:
            method = None
    return picture if method is None else picture.transpose(method), False


def bare(image: Path | bytes) -> bytes:
    """A PNG or JPEG file without its metadata, which need not be sound for its pixels to be.

    Raises:
        ValueError: it is another file.
    """
    image = image.read_bytes() if isinstance(image, Path) else image
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        at, kept = 8, [image[:8]]
        while at + 12 <= len(image):
            end = at + 12 + int.from_bytes(image[at : at + 4], "big")
            if image[at + 4 : at + 5].isupper():  # chunks that the pixels need; transparency is dropped in any case
                kept.append(image[at:end])
            at = end
        return b"".join(kept)
    if image.startswith(b"\xff\xd8"):
        at, kept = 2, [image[:2]]
        while at + 4 <= len(image) and image[at] == 0xFF and image[at + 1] != 0xDA:  # up to the scan
            marker, end = image[at + 1], at + 2 + int.from_bytes(image[at + 2 : at + 4], "big")
            colours = marker == 0xEE and end - at >= 16  # Adobe's marker says how colours are stored
            if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
                kept.append(image[at:end])
            at = end
        return b"".join([*kept, image[at:]])
    raise ValueError("neither PNG nor JPEG")


def convert(image: Path | bytes | np.ndarray, size: int | None, channels: int | None) -> tuple[np.ndarray, bool]:
    """One image as uint8 [H, W] (grey) or [H, W, 3], and whether its metadata are sound; colour only where ``channels`` is 3 or
    the image has some."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"an array of {image.dtype}; allowed: uint8, 0 to 255")
        with opened(image) as picture:
            return _squared(picture, size, channels), True
    try:
        with opened(image) as picture:
            picture.load()
            if picture.mode in DEEP:
                raise ValueError(f"images of mode {picture.mode} have more than 8 bits a channel; store them with 8")
            picture, sound = turned(picture)
            return _squared(picture, size, channels), sound
    except Exception:
        with contextlib.suppress(Exception), opened(bare(image)) as picture:
            if picture.mode not in DEEP:
                return _squared(picture, size, channels), False
        raise


def form(image: Path | bytes | np.ndarray) -> str:
    """Size and mode of an image that can be decoded."""
    try:
        picture = opened(image)
    except Exception:
        picture = opened(bare(image))
    with picture:
        return f"{picture.width}x{picture.height} {'grey' if picture.mode in ('1', 'L') else picture.mode}"


def _squared(picture: Picture, size: int | None, channels: int | None) -> np.ndarray:
    """The middle square of a picture in the colours and size that are wanted."""
    from PIL import Image

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
    remarks: Remarks,
) -> Images:
    """The ``samples`` of `Source.read` as tensors."""
    import torch

    labels: list[int | str] = []
    most = np.inf if classes is None else len(classes)

    def lone() -> Iterator[Path | bytes | np.ndarray]:
        for sample in samples:
            pair = isinstance(sample, tuple) and len(sample) == 2
            text = pair and classes is None and isinstance(sample[1], str)
            if not text and not (pair and isinstance(sample[1], (int, np.integer)) and -1 <= sample[1] < most):
                given = f"one with label {sample[1]!r}" if pair else type(sample).__name__
                allowed = "a label from 0 on, or -1" if classes is None else f"a label from 0 to {most - 1}, or -1"
                allowed = "label -1" if classes == () else f"{allowed} for none"
                said = f"sample {len(labels)} of split '{split}' is {given}; allowed: (image, label)"
                raise UserError(f"{key}: {said} with {allowed}")
            labels.append(sample[1] if text else int(sample[1]))
            yield sample[0]

    def piece(first: int, images: list) -> list[tuple[np.ndarray, bool]]:
        arrays = []
        for i, image in enumerate(images, first):
            try:
                arrays.append(convert(image, size, channels))
            except Exception as error:  # Pillow raises many kinds for broken files: OSError, SyntaxError, its own
                which = f"'{image}'" if isinstance(image, Path) else f"image {i} of split '{split}'"
                why = "not an image that Pillow knows" if "identify image" in str(error) else error
                raise UserError(f"{key}: {which} cannot be decoded: {why}") from error
        return arrays

    decoded: list[np.ndarray] = []
    pending, stored, damaged, warned = lone(), "", 0, []
    # Decoding a small image hardly releases the interpreter: two threads on two cores are slower than one.
    with ThreadPoolExecutor(min(4, max(1, (os.cpu_count() or 1) // 2))) as pool:
        while block := list(islice(pending, 1024)):
            starts = range(0, len(block), 256)
            firsts = [len(decoded) + i for i in starts]
            with warnings.catch_warnings(record=True) as said:  # Pillow's, of each odd file: they are counted
                warnings.simplefilter("always")
                pieces = list(chain(*pool.map(piece, firsts, [block[i : i + 256] for i in starts])))
                warned += [str(warning.message) for warning in said]
                stored = stored if decoded else form(block[0])
            damaged += sum(not sound for _, sound in pieces)
            arrays = [array for array, _ in pieces]
            for array in arrays:
                height, width = array.shape[:2]
                if height != width or array.shape[:2] != (decoded or arrays)[0].shape[:2]:
                    raise UserError(f"{key}: images are not square or differ in size ({width}x{height}); set data.image_size")
            decoded += arrays
    if not decoded:
        raise UserError(f"{key}: split '{split}' holds no images")
    notes, of = list(remarks.notes), f"of {len(decoded):,} {split} images"
    if damaged:
        notes.append(f": damaged metadata, such as EXIF, is ignored in {damaged:,} {of}")
    if warned:
        notes.append(f": {len(warned):,} warnings while decoding, the first: {' '.join(warned[0].split())[:150]}")
    if any(array.ndim == 3 for array in decoded):  # grey ones in a coloured set
        decoded = [array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2) for array in decoded]
    pixels = torch.from_numpy(np.stack(decoded))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    names, numbers, how = numbered(labels) if classes is None else (tuple(map(class_name, classes)), labels, "")
    unlabelled = remarks.unlabelled if -1 in numbers else ""
    notes += [how] if how else []
    return Images(pixels, torch.tensor(numbers, dtype=torch.int64), names, stored, tuple(notes), unlabelled)


def numbered(labels: list[int | str]) -> tuple[tuple[str, ...], list[int], str]:
    """Classes of labels without names: the values that occur, -1 apart, numbers first. Their names, the labels as numbers of
    these, and a note unless they are 0, 1, 2, ... already."""

    def place(value: int | str) -> tuple:
        number = not isinstance(value, str) or value.isdecimal()
        return (0, int(value), str(value)) if number else (1, value)

    values = sorted(set(labels) - {-1}, key=place)
    names = tuple(dict.fromkeys(class_name(str(value)) for value in values))
    numbers = {name: number for number, name in enumerate(names)}
    number = {value: numbers[class_name(str(value))] for value in values} | {-1: -1}
    if values == list(range(len(values))):
        return names, list(labels), ""
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    how = f": labels have no class names; the {len(names):,} values that occur ({some}) are the classes"
    return names, [number[label] for label in labels], how


def cached(name: str | None, identity: object, make: Callable[[], tuple[Images, bool]]) -> Images:
    """The images that ``make`` returns, from their cache file where that is sound; ``name`` None: without a cache.

    ``make`` also returns whether the images may be kept."""
    if name is None:
        return make()[0]
    import torch

    digest = hashlib.sha256(repr((FORMAT, identity)).encode()).hexdigest()[:20]
    file = cache_folder() / f"{name}-{digest}.pt"
    try:
        stored = torch.load(file, mmap=True, weights_only=True)
        names = {k: tuple(stored[k]) for k in ("classes", "notes")}
        return Images(stored["pixels"], stored["labels"], stored=stored["stored"], unlabelled=stored["unlabelled"], **names)
    except Exception:  # absent, torn or of another kind: whatever torch makes of such a file, it is built anew
        images, keep = make()
    if not keep:
        return images
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            content = {f.name: getattr(images, f.name) for f in fields(images)}
            torch.save(content | {k: list(content[k]) for k in ("classes", "notes")}, stream)
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
