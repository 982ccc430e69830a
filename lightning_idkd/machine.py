"""This computer: its processor, its cores and its cache folder."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def count_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """The folder for cached files: ``$IDKD_CACHE``, else ``lightning_idkd`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if folder := os.environ.get("IDKD_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_idkd"


def describe_processor(*names: str) -> str:
    """What the system says of the processor in fields of these names, such as ``model name``."""
    with contextlib.suppress(OSError):
        fields = {}
        for line in Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
        return " ".join(fields[name] for name in names if name in fields) or platform.processor()
    return platform.processor()


def describe_machine() -> list:
    """List everything outside the experiment that a timing depends on."""
    processor = describe_processor("model name", "cpu family", "model", "stepping")
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return [processor, os.cpu_count(), torch.backends.cpu.get_cpu_capability(), torch.__version__, device]
