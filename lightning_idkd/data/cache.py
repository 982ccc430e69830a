"""Keeps decoded sets in files, so that the next run need not decode them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from lightning_idkd.data.images import ImageInputs, Images
from lightning_idkd.data.inputs import restore
from lightning_idkd.data.samples import Samples
from lightning_idkd.errors import explain_write_error
from lightning_idkd.machine import cache_folder

FORMAT = 4  # raise it when decoding changes: files of another format are not used


def load_or_make(name: str, identity: object, make: Callable[[], tuple[Samples, bool]]) -> Samples:
    """The set from its cache file where that is sound, else as ``make`` returns it, and kept for the next time.

    Args:
        name: how the file's name begins.
        identity: what determines the samples, as something with a stable repr.
        make: returns the samples and whether they may be kept.
    """
    digest = hashlib.sha256(repr((FORMAT, identity)).encode()).hexdigest()[:20]
    file = cache_folder() / f"{name}-{digest}.pt"
    try:
        return _load(file)
    except Exception:  # torch raises many kinds for a file that is absent, torn or of another kind
        samples, keep = make()
    if keep:
        _save(samples, file)
    return samples


def _load(file: Path) -> Samples:
    import torch

    stored = torch.load(file, mmap=True, weights_only=True)
    inputs = restore(stored.pop("inputs"))
    names = {k: tuple(stored.pop(k)) for k in ("classes", "notes")}
    return (Images if isinstance(inputs, ImageInputs) else Samples)(**stored, **names, inputs=inputs)


def _save(samples: Samples, file: Path) -> None:
    """Write the file whole or not at all; a warning says where it cannot be written."""
    import torch

    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            content = {field.name: getattr(samples, field.name) for field in fields(samples)}
            content |= {"inputs": samples.inputs.facts()} | {k: list(content[k]) for k in ("classes", "notes")}
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut could leave the final name on missing contents
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        logging.getLogger(__name__).warning(
            "decoded samples are not kept for the next run: cannot write to %s (%s); set IDKD_CACHE to another folder",
            file.parent,
            explain_write_error(error, file.parent),
        )
