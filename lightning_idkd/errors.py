"""Errors that a user can correct, and the sentences that report them."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FULL_DISK = 2**20  # bytes of free space below which a disk counts as full


class UserError(ValueError):
    """A mistake in a command, config or data set; the command line prints it in one or two lines and exits with 2."""


def require(right: bool, key: str, value: object, allowed: str) -> None:
    """Raise a UserError that names ``key``, ``value`` and what is ``allowed``, unless ``right``.

    A comparison with nan is False, so ``require(value > 0, ...)`` also refuses nan.
    """
    if not right:
        raise UserError(f"{key}: {value} given; allowed: {allowed}")


def explain_write_error(error: Exception, folder: Path) -> str:
    """Explain in words why a file in ``folder`` could not be written.

    torch raises a RuntimeError instead of an OSError if the disk is full.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError):
        return "No space left on device" if shutil.disk_usage(folder).free < FULL_DISK else "writing failed"
    return str(error).splitlines()[0]


def require_shape(value: Any, shape: Iterable[int], origin: str) -> Any:
    """Return ``value`` if it is a tensor of this ``shape``, else raise a UserError.

    ``origin`` begins the message: it names the config key and what gave the value, e.g. ``gossip: DSGD.update
    returns``.
    """
    given = list(value.shape) if hasattr(value, "shape") else type(value).__name__
    if given != list(shape):
        raise UserError(f"{origin} {given}; allowed: a tensor of shape {list(shape)}")
    return value


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is most similar to ``name``, or None if none is similar.

    Short names are similar by chance, such as gpu and cpu: a name of up to three letters must have the same first
    letter.
    """
    by_lower = {a.lower(): a for a in allowed if len(name) > 3 or a[:1].lower() == name[:1].lower()}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'X'?`` with the nearest allowed name, or an empty string."""
    suggestion = nearest(name, allowed)
    return f" Did you mean '{suggestion}'?" if suggestion else ""
