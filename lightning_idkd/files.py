"""Files that are written completely or not at all, locks on folders, and conversion of values to JSON."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lightning_idkd.errors import UserError, explain_write_error

PART = re.compile(r"\..+\.(\d+)(-[0-9a-f]+)?\.part", re.DOTALL)
"""Names of temporary files, with the number of the process that writes it."""
HELD = (BlockingIOError, PermissionError)
"""Errors for a file that another process has locked; PermissionError where NFS turns it into a lock of the server."""
LOCK_TRIES = 5
"""Times that a process tries to lock a folder, 20 ms apart, since :func:`is_locked` holds the lock for a moment."""
ABANDONED = 3600
"""Seconds after the last write to a temporary file before it counts as abandoned."""


class Locked(UserError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def lock_folder(folder: Path, message: str, warn: bool = True) -> Iterator[IO]:
    """Keep other processes out of ``folder``; yields the open file that holds the lock.

    The lock ends with the process at the latest, or with the last process that has inherited the file.

    On a file system without locks the caller goes on without one, since refusing would make such a file system useless.

    Args:
        message: the text of the error if another process holds the lock.
        warn: whether to print that the file system has no locks.

    Raises:
        Locked: another process holds the lock.
        UserError: the folder cannot be written.
    """
    try:
        handle = open(folder / ".lock", "a")  # noqa: SIM115 (closed below)
    except OSError as e:
        raise UserError(f"cannot write in '{folder}' ({explain_write_error(e, folder)})") from e
    with handle:
        for attempt in range(LOCK_TRIES):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except HELD as e:
                if attempt == LOCK_TRIES - 1:
                    raise Locked(message) from e
                time.sleep(0.02)
            except OSError as e:
                if warn:
                    reason = f"cannot be locked ({e.strerror}), so nothing stops a second process from working on it"
                    print(f"'{folder}' {reason}; start only one", file=sys.stderr)
                break
        yield handle


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of ``folder``, as far as this process may see; writes nothing."""
    try:
        with open(folder / ".lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except HELD as e:
        return e.filename is None  # else the file itself cannot be opened
    except OSError:
        return False
    return False


def write(path: Path, save: Callable[[Path], Any], key: str = "run.dir") -> None:
    """Let ``save`` write a temporary file, then move it to ``path``; so ``path`` never holds half a file.

    Args:
        key: the config key or option that names the folder, for the message.

    Raises:
        UserError: the file cannot be written; an earlier file at ``path`` stays.
    """
    try:
        replace(path, save)
    except (OSError, RuntimeError) as e:
        cause = explain_write_error(e, path.parent)
        raise UserError(f"{key}: cannot write '{path}' ({cause}); what was there before is intact") from e


def replace(path: Path, save: Callable[[Path], Any]) -> None:
    """Do what :func:`write` does, but raise the error as it comes.

    The file is on the disk before its name is, so a power cut does not leave a name without content either.

    Raises:
        OSError, RuntimeError: the file cannot be written.
    """
    # several containers may share a folder and have processes of the same number
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        save(part)
        if not part.is_symlink():
            sync(part)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # a read-only file system refuses this even where there is no file
            part.unlink(missing_ok=True)
    sync_folder(path.parent)


def append(path: Path, text: str) -> None:
    """Append ``text`` to a file, wholly or not at all unless the machine stops meanwhile.

    Raises:
        UserError: the file cannot be written; what it held before stays.
    """
    try:
        new = not path.exists()
        with open(path, "ab", buffering=0) as file:
            end, content = file.seek(0, os.SEEK_END), memoryview(text.encode())
            try:
                while content:
                    content = content[file.write(content) :]
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as e:
        cause = explain_write_error(e, path.parent)
        raise UserError(f"run.dir: cannot write '{path}' ({cause}); what was there before is intact") from e
    if new:
        sync_folder(path.parent)


def link(file: Path, path: Path) -> None:
    """Give ``file`` the further name ``path``, or copy it where the file system has no hard links.

    Raises:
        OSError: neither is possible.
    """
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)


def sync(path: Path) -> None:
    """Wait until the disk has the content of a file, or the names in a folder.

    Raises:
        OSError: it cannot be written.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in ``folder``, where the file system can say so."""
    with contextlib.suppress(OSError):
        sync(folder)


def remove_parts(folder: Path, locked: bool = False) -> None:
    """Remove the temporary files directly in ``folder`` that killed processes have left.

    Args:
        locked: whether this process holds the lock of the folder, so that nobody else writes there. Otherwise a file
            stays if a process of this machine has its number, or if it is younger than :data:`ABANDONED`, because a
            process of another machine may be writing it.
    """
    for part in folder.glob(".*.part"):
        match = PART.fullmatch(part.name)
        with contextlib.suppress(OSError):  # another process may have removed it
            if match and (locked or (not is_running(int(match[1])) and is_old(part))):
                part.unlink()


def is_running(process: int) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to somebody else
        return True
    return True


def is_old(path: Path) -> bool:
    """Whether nothing was written to a file for :data:`ABANDONED` seconds."""
    return time.time() - path.lstat().st_mtime > ABANDONED


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
