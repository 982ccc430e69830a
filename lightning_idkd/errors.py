"""Mistakes a user can make, said in sentences."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LEAST = 2**20  # bytes of free space below which a disk counts as full


class UserError(ValueError):
    """A mistake in a command, config or data set; the command line prints it in one or two lines and exits with 2."""


def require(right: bool, key: str, value: object, allowed: str) -> None:
    """Refuse ``value`` of ``key`` unless ``right``, naming what is ``allowed``; comparisons with nan are False."""
    if not right:
        raise UserError(f"{key}: {value} given; allowed: {allowed}")


def explain_write_error(error: Exception, folder: Path) -> str:
    """Why a file in ``folder`` could not be written, in words; torch raises a RuntimeError of its own where a disk is full."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RuntimeError):
        return "No space left on device" if shutil.disk_usage(folder).free < LEAST else "writing failed"
    return str(error).splitlines()[0]


def require_shape(found: Any, shape: Iterable[int], whose: str) -> Any:
    """``found``, refused where it is no tensor of this ``shape``; ``whose`` says whose it is, after the config key."""
    given = list(found.shape) if hasattr(found, "shape") else type(found).__name__
    if given != list(shape):
        raise UserError(f"{whose} {given}; allowed: a tensor of shape {list(shape)}")
    return found


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that looks most like ``name``, or None where nothing does.

    Names of up to three letters are alike by chance, such as gpu and cpu: of these one with the same first letter.
    """
    by_lower = {a.lower(): a for a in allowed if len(name) > 3 or a[:1].lower() == name[:1].lower()}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'X'?`` with the nearest allowed name, or an empty string."""
    found = nearest(name, allowed)
    return f" Did you mean '{found}'?" if found else ""
