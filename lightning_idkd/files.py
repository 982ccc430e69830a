"""Files that are written whole or not at all, locks on folders, and values as JSON has them."""

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
def lock_folder(folder: Path, taken: str) -> Iterator[None]:
    """Keep other processes away from ``folder``; a UserError that says ``taken`` where one is at work. The lock ends with the
    process at the latest."""
    with open(folder / ".lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(taken) from e
        yield


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write beside ``path``, then put the finished file in its place."""
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
    """``value`` as JSON has it: a number of torch or numpy becomes Python's, nan and inf become null.

    Raises:
        UserError: it holds something else; ``what`` says which value it is, in words.
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
    raise UserError(f"{what} is {describe_type(value)}; allowed: a number, text, true, false, null, or lists and dicts of these")


def is_number(value: Any) -> bool:
    """Whether it is a single number of torch or numpy."""
    return getattr(value, "shape", None) == () and hasattr(value, "item")


def describe_type(value: Any) -> str:
    """What ``value`` is, in words."""
    shape = getattr(value, "shape", None)
    name = type(value).__name__
    return f"a{'n' * (name[0] in 'aeiouAEIO')} {name}" + ("" if shape is None else f" of shape {list(shape)}")
