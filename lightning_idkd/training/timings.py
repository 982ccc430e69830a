"""What was timed before on this machine, so that the next run of the same shape need not."""

from __future__ import annotations

import contextlib
import hashlib
import json

from lightning_idkd.errors import UserError
from lightning_idkd.files import write
from lightning_idkd.machine import cache_folder, describe_machine

FILE = "engines.json"
EDITION = 2  # of the engines: timings of others say nothing


def known() -> dict[str, list]:
    """Engine and threads by the digest of what they were timed for."""
    try:
        return json.loads((cache_folder() / FILE).read_text())
    except (OSError, ValueError):
        return {}


def digest(*shape: object) -> str:
    """Of an experiment's shape on this machine."""
    return hashlib.sha256(json.dumps([describe_machine(), EDITION, *shape]).encode()).hexdigest()[:20]


def remember(key: str, found: tuple[str, int]) -> None:
    """Keep what was found; a cache that cannot be written is timed again."""
    with contextlib.suppress(OSError, UserError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        timings = known() | {key: list(found)}
        write(cache_folder() / FILE, lambda part: part.write_text(json.dumps(timings, indent=1) + "\n"))
