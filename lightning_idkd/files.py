"""Files that are written completely or not at all, locks on folders, and conversion of values to JSON."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_idkd.errors import UserError, explain_write_error


@contextlib.contextmanager
def lock_folder(folder: Path, message: str) -> Iterator[None]:
    """Keep other processes out of ``folder``; the lock ends with the process at the latest.

    Raises:
        UserError: another process holds the lock; ``message`` is its text.
    """
    with open(folder / ".lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(message) from e
        yield


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write a temporary file, then move it to ``path``; so ``path`` never holds half a file.

    Raises:
        UserError: the file cannot be written; an earlier file at ``path`` stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        cause = explain_write_error(e, path.parent)
        raise UserError(f"run.dir: cannot write '{path}' ({cause}); what was there before is intact") from e
    finally:
        part.unlink(missing_ok=True)


def to_json(value: Any, what: str) -> Any:
    """Convert ``value`` to JSON: numbers of torch or numpy become Python numbers, nan and inf become null.

    Raises:
        UserError: ``value`` holds something that JSON does not have; ``what`` names it in the message.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise UserError(f"{what} has the key {key!r}, of type {type(key).__name__}; allowed: text")
        return {key: to_json(v, f"{what}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v, f"{what}[{i}]") for i, v in enumerate(value)]
    if is_number(value):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise UserError(
        f"{what} is {describe_type(value)}; allowed: a number, text, true, false, null, or lists and dicts of these"
    )


def is_number(value: Any) -> bool:
    """Whether ``value`` is a single number of torch or numpy."""
    return getattr(value, "shape", None) == () and hasattr(value, "item")


def describe_type(value: Any) -> str:
    """Name the type of ``value``, with an article and its shape if it has one: ``an ndarray of shape [3]``."""
    name = type(value).__name__
    article = "an" if name[0] in "aeiouAEIO" else "a"
    shape = getattr(value, "shape", None)
    return f"{article} {name}" if shape is None else f"{article} {name} of shape {list(shape)}"
