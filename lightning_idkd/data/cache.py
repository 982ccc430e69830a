"""Keeps decoded sets in files, so that the next run need not decode them."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from lightning_idkd.checksum import is_sealed, seal
from lightning_idkd.data.images import ImageInputs, Images
from lightning_idkd.data.inputs import restore
from lightning_idkd.data.samples import Samples
from lightning_idkd.errors import explain_write_error
from lightning_idkd.files import remove_parts, replace
from lightning_idkd.machine import cache_folder

logger = logging.getLogger(__name__)

FORMAT = 4  # raise it when decoding changes: files of another format are not used


def load_or_make(name: str, identity: object, make: Callable[[], tuple[Samples, bool]]) -> Samples:
    """The set from its cache file where that is whole, else as ``make`` returns it, and kept for the next time.

    A warning names a file that is damaged.

    Args:
        name: how the file's name begins.
        identity: what determines the samples, as something with a stable repr.
        make: returns the samples and whether they may be kept.
    """
    digest = hashlib.sha256(repr((FORMAT, identity)).encode()).hexdigest()[:20]
    file = cache_folder() / f"{name}-{digest}.pt"
    remove_parts(file.parent)
    try:
        sealed = is_sealed(file)  # the pages it reads are those that `_load` maps
        if sealed:
            return _load(file)
        if sealed is False:
            logger.warning("the decoded samples in '%s' are damaged; decoding them again", file)
    except Exception:  # torch raises many kinds for a file of another kind, and the file may be missing
        pass
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

    content = {field.name: getattr(samples, field.name) for field in fields(samples)}
    content |= {"inputs": samples.inputs.facts()} | {k: list(content[k]) for k in ("classes", "notes")}

    def save(part: Path) -> None:
        torch.save(content, part)
        seal(part)

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, save)
    except (OSError, RuntimeError) as error:
        _warn_unwritable(file.parent, explain_write_error(error, file.parent))


@functools.cache  # a process says it once, not for every set
def _warn_unwritable(folder: Path, cause: str) -> None:
    kept = "decoded samples are not kept for the next run"
    logger.warning("%s: cannot write to %s (%s); set IDKD_CACHE to another folder", kept, folder, cause)
