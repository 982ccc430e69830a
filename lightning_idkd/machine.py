"""This computer: its processor, its cores, and where caches lie on it."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """``$IDKD_CACHE``, else ``lightning_idkd`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("IDKD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_idkd"


def describe_machine() -> list:
    """What a timing depends on besides the experiment."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
        about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
        processor = " ".join(about[key] for key in ("model name", "cpu family", "model", "stepping") if key in about) or processor
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return [processor, os.cpu_count(), torch.backends.cpu.get_cpu_capability(), torch.__version__, device]
