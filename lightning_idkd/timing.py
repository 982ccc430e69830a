"""What was timed before on this machine, so that the next run of the same shape need not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path

import torch

from lightning_idkd.data.source import cache_folder
from lightning_idkd.errors import UserError
from lightning_idkd.run_folder import write

FILE = "engines.json"
EDITION = 2  # of the engines: timings of others say nothing


def machine() -> list:
    """What a timing depends on besides the experiment."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
        processor = " ".join(about[key] for key in ("model name", "cpu family", "model", "stepping") if key in about) or processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return [processor, os.cpu_count(), torch.backends.cpu.get_cpu_capability(), torch.__version__, device]


def known() -> dict[str, list]:
    """Engine and threads by the digest of what they were timed for."""
    try:
        return json.loads((cache_folder() / FILE).read_text())
    except (OSError, ValueError):
        return {}


def digest(*shape: object) -> str:
    """Of an experiment's shape on this machine."""
    return hashlib.sha256(json.dumps([machine(), EDITION, *shape]).encode()).hexdigest()[:20]


def remember(key: str, found: tuple[str, int]) -> None:
    """Keep what was found; a cache that cannot be written is timed again."""
    with contextlib.suppress(OSError, UserError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        timings = known() | {key: list(found)}
        write(cache_folder() / FILE, lambda part: part.write_text(json.dumps(timings, indent=1) + "\n"))
