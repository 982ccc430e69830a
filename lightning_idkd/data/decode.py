"""Decodes image files, bytes and arrays into the tensors of a set."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lightning_idkd.data.images import Images
from lightning_idkd.data.samples import Remarks, class_name, number_classes
from lightning_idkd.errors import UserError

Tensor = Any
Picture = Any  # Pillow's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes of more than 8 bits, which Pillow would clip to 255
BLOCK, PIECE = 1024, 256  # images that are read, and that a thread decodes, at once


def decode(
    classes: tuple[str, ...] | None,
    samples: Iterable[tuple],
    split: str,
    size: int | None,
    channels: int | None,
    key: str,
    remarks: Remarks,
) -> Images:
    """Decode the ``samples`` of `Source.read` into one set.

    Args:
        classes: class names; None makes classes of the labels that occur.
        samples: pairs of an image and a label.
        split: train or test, for messages.
        size: width and height in pixels; None: as stored.
        channels: 1 or 3; None: 1 where all images are grey, else 3.
        key: config key of the source, for messages.
        remarks: the source's own, complete once the samples are read.

    Raises:
        UserError: a sample that is not an image and a label, an image that cannot be decoded, images that are not
            square or differ in size, or no images.
    """
    import torch

    def convert_piece(first: int, images: list) -> list[tuple[np.ndarray, bool]]:
        return [_convert_or_refuse(image, i, size, channels, split, key) for i, image in enumerate(images, first)]

    decoded: list[np.ndarray] = []
    labels: list[int | str] = []
    stored, damaged, warned = "", 0, []
    pending = check_samples(samples, classes, split, key)
    # Decoding a small image hardly releases the interpreter: two threads on two cores are slower than one.
    with ThreadPoolExecutor(min(4, max(1, (os.cpu_count() or 1) // 2))) as pool:
        while block := list(islice(pending, BLOCK)):
            images = [image for image, _ in block]
            labels += [label for _, label in block]
            starts = range(0, len(images), PIECE)
            firsts, pieces = [len(decoded) + i for i in starts], [images[i : i + PIECE] for i in starts]
            with warnings.catch_warnings(record=True) as caught:  # Pillow warns of each odd file; they are counted
                warnings.simplefilter("always")
                converted = list(chain(*pool.map(convert_piece, firsts, pieces)))
                warned += [str(warning.message) for warning in caught]
                stored = stored if decoded else describe_form(images[0])
            damaged += sum(not sound for _, sound in converted)
            arrays = [array for array, _ in converted]
            for array in arrays:
                height, width = array.shape[:2]
                if height != width or array.shape[:2] != (decoded or arrays)[0].shape[:2]:
                    wrong = f"images are not square or differ in size ({width}x{height})"
                    raise UserError(f"{key}: {wrong}; set data.image_size")
            decoded += arrays
    if not decoded:
        raise UserError(f"{key}: split '{split}' holds no images")
    notes = list(remarks.notes)
    if damaged:
        of = f"of {len(decoded):,} {split} images"
        notes.append(f": damaged metadata, such as EXIF, is ignored in {damaged:,} {of}")
    if warned:
        notes.append(f": {len(warned):,} warnings while decoding, the first: {' '.join(warned[0].split())[:150]}")
    if any(array.ndim == 3 for array in decoded):  # a coloured set may have grey images
        decoded = [array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2) for array in decoded]
    pixels = torch.from_numpy(np.stack(decoded))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    names, numbers, more = number_labels(classes, labels)
    unlabelled = remarks.unlabelled if -1 in numbers else ""
    return Images(pixels, numbers, names, stored, (*notes, *more), unlabelled)


def number_labels(
    classes: tuple[str, ...] | None, labels: list[int | str]
) -> tuple[tuple[str, ...], Tensor, list[str]]:
    """Class names, labels int64 [N] as their numbers, and notes; without ``classes`` they are the values that occur."""
    import torch

    if classes is not None:
        return tuple(map(class_name, classes)), torch.tensor(labels, dtype=torch.int64), []
    names, numbers, note = number_classes(labels)
    return names, torch.tensor(numbers, dtype=torch.int64), [note] if note else []


def check_samples(
    samples: Iterable[tuple], classes: tuple[str, ...] | None, split: str, key: str
) -> Iterator[tuple[Path | bytes | np.ndarray, int | str]]:
    """The samples one by one, refused where one is not an image and a label that the ``classes`` allow."""
    most = np.inf if classes is None else len(classes)
    for number, sample in enumerate(samples):
        pair = isinstance(sample, tuple) and len(sample) == 2
        text = pair and classes is None and isinstance(sample[1], str)
        if not text and not (pair and isinstance(sample[1], (int, np.integer)) and -1 <= sample[1] < most):
            given = f"one with label {sample[1]!r}" if pair else type(sample).__name__
            allowed = "a label from 0 on, or -1" if classes is None else f"a label from 0 to {most - 1}, or -1"
            allowed = "label -1" if classes == () else f"{allowed} for none"
            where = f"sample {number} of split '{split}'"
            raise UserError(f"{key}: {where} is {given}; allowed: (sample, label) with {allowed}")
        yield sample[0], sample[1] if text else int(sample[1])


def _convert_or_refuse(
    image: Path | bytes | np.ndarray, number: int, size: int | None, channels: int | None, split: str, key: str
) -> tuple[np.ndarray, bool]:
    """Image ``number`` of the split as `convert` returns it, or a UserError that names it."""
    try:
        return convert(image, size, channels)
    except Exception as error:  # Pillow raises many kinds for broken files: OSError, SyntaxError, its own
        which = f"'{image}'" if isinstance(image, Path) else f"image {number} of split '{split}'"
        why = "not an image that Pillow knows" if "identify image" in str(error) else error
        raise UserError(f"{key}: {which} cannot be decoded: {why}") from error


def convert(image: Path | bytes | np.ndarray, size: int | None, channels: int | None) -> tuple[np.ndarray, bool]:
    """Convert one image to uint8 [H, W] (grey) or [H, W, 3].

    The result is in colour where ``channels`` is 3, or None and the image has colour. The second value says whether the
    metadata are sound; damaged metadata are ignored.

    Raises:
        ValueError: an array of another type, or an image of more than 8 bits per channel. Pillow raises others.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            hint = " (a VectorSource reads vectors)" if image.ndim == 1 else ""
            raise ValueError(f"an array of {image.dtype}; allowed: uint8, 0 to 255{hint}")
        with open_image(image) as picture:
            return crop_and_resize(picture, size, channels), True
    try:
        with open_image(image) as picture:
            picture.load()
            if picture.mode in DEEP:
                raise ValueError(f"images of mode {picture.mode} have more than 8 bits a channel; store them with 8")
            picture, sound = turn_upright(picture)
            return crop_and_resize(picture, size, channels), sound
    except Exception:
        with contextlib.suppress(Exception), open_image(strip_metadata(image)) as picture:
            if picture.mode not in DEEP:
                return crop_and_resize(picture, size, channels), False
        raise


def open_image(image: Path | bytes | np.ndarray) -> Picture:
    """Open an image with Pillow."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return Image.open(image if isinstance(image, Path) else io.BytesIO(image))


def turn_upright(picture: Picture) -> tuple[Picture, bool]:
    """Turn a picture as its EXIF orientation says; the second value says whether the EXIF fields are sound."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(picture), True
    except Exception:  # Pillow writes all fields anew, and raises many kinds for those that it cannot write
        turn = Image.Transpose
        by_orientation = (None, None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE,
                          turn.ROTATE_270, turn.TRANSVERSE, turn.ROTATE_90)  # fmt: skip
        try:
            method = by_orientation[picture.getexif().get(0x0112, 0)]
        except Exception:
            method = None
    return picture if method is None else picture.transpose(method), False


def strip_metadata(image: Path | bytes) -> bytes:
    """A PNG or JPEG file without its metadata, whose pixels can be read even where the metadata are damaged.

    Raises:
        ValueError: a file of another kind.
    """
    image = image.read_bytes() if isinstance(image, Path) else image
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        start, kept = 8, [image[:8]]
        while start + 12 <= len(image):
            end = start + 12 + int.from_bytes(image[start : start + 4], "big")
            if image[start + 4 : start + 5].isupper():  # a chunk that the pixels need; transparency is dropped anyway
                kept.append(image[start:end])
            start = end
        return b"".join(kept)
    if image.startswith(b"\xff\xd8"):
        start, kept = 2, [image[:2]]
        while start + 4 <= len(image) and image[start] == 0xFF and image[start + 1] != 0xDA:  # up to the scan
            marker, end = image[start + 1], start + 2 + int.from_bytes(image[start + 2 : start + 4], "big")
            colours = marker == 0xEE and end - start >= 16  # Adobe's marker says how colours are stored
            if colours or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
                kept.append(image[start:end])
            start = end
        return b"".join([*kept, image[start:]])
    raise ValueError("neither PNG nor JPEG")


def describe_form(image: Path | bytes | np.ndarray) -> str:
    """Size and mode of an image that can be decoded, such as 64x64 RGB."""
    try:
        picture = open_image(image)
    except Exception:
        picture = open_image(strip_metadata(image))
    with picture:
        return f"{picture.width}x{picture.height} {'grey' if picture.mode in ('1', 'L') else picture.mode}"


def crop_and_resize(picture: Picture, size: int | None, channels: int | None) -> np.ndarray:
    """The middle square of a picture at ``size`` (None: all of it, as stored), with ``channels`` as for `convert`."""
    from PIL import Image

    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns where such a palette becomes RGB directly
    mode = "L" if channels == 1 or (channels is None and picture.mode in ("1", "L")) else "RGB"
    picture = picture.convert(mode) if picture.mode != mode else picture
    if size is not None and picture.size != (size, size):
        (width, height), side = picture.size, min(picture.size)
        left, top = (width - side) // 2, (height - side) // 2
        method = Image.Resampling.BOX if side % size == 0 else Image.Resampling.BICUBIC
        picture = picture.resize((size, size), method, box=(left, top, left + side, top + side))
    return np.asarray(picture)
