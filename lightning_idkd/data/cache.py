"""Keeps decoded image sets in files, so that the next run need not decode them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from lightning_idkd.data.images import Images
from lightning_idkd.errors import explain_write_error
from lightning_idkd.machine import cache_folder

FORMAT = 3  # raise it when decoding changes: files of another format are not used


def load_or_make(name: str, identity: object, make: Callable[[], tuple[Images, bool]]) -> Images:
    """The set from its cache file where that is sound, else as ``make`` returns it, and kept for the next time.

    Args:
        name: how the file's name begins.
        identity: what determines the images, as something with a stable repr.
        make: returns the images and whether they may be kept.
    """
    digest = hashlib.sha256(repr((FORMAT, identity)).encode()).hexdigest()[:20]
    file = cache_folder() / f"{name}-{digest}.pt"
    try:
        return _load(file)
    except Exception:  # torch raises many kinds for a file that is absent, torn or of another kind
        images, keep = make()
    if keep:
        _save(images, file)
    return images


def _load(file: Path) -> Images:
    import torch

    stored = torch.load(file, mmap=True, weights_only=True)
    names = {k: tuple(stored[k]) for k in ("classes", "notes")}
    return Images(stored["pixels"], stored["labels"], stored=stored["stored"], unlabelled=stored["unlabelled"], **names)


def _save(images: Images, file: Path) -> None:
    """Write the file whole or not at all; a warning says where it cannot be written."""
    import torch

    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            content = {field.name: getattr(images, field.name) for field in fields(images)}
            torch.save(content | {k: list(content[k]) for k in ("classes", "notes")}, stream)
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut could leave the final name on missing contents
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        logging.getLogger(__name__).warning(
            "decoded images are not kept for the next run: cannot write to %s (%s); set IDKD_CACHE to another folder",
            file.parent,
            explain_write_error(error, file.parent),
        )
