"""Reads from its files how a run is doing, without writing anything, while other processes may write them.

Of files that grow, only the ends are read, so that a reader may look at hundreds of runs every second.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lightning_idkd.files import is_locked
from lightning_idkd.records.run_folder import parse_line

T = TypeVar("T")
STATES = ("running", "failed", "damaged", "stopped", "pruned", "waiting", "finished")
"""The states of a run, in the order in which they need attention."""
TAIL = 2**17
"""Bytes from the end of ``metrics.jsonl`` that are read; doubled until they hold a whole line."""
LOG_TAIL = 2**13
"""Bytes from the end of a log that are read."""
PACES = 5
"""Number of evaluations over which the pace is averaged."""
WARNING = re.compile(r"(?i:warning|error|failed)\b|.*\b\w*Warning: |(\w+\.)*\w*(Error|Exception)\b")
"""How the lines of a log begin that a person should see."""
FAILURE = re.compile(r"error: |(\w+\.)*\w*(Error|Exception)(:|$)")
"""How the last line of a log begins after a failure."""


@dataclass
class Status:
    """How a run is doing."""

    state: str = "waiting"
    """One of :data:`STATES`."""
    epochs: int | None = None
    """The epoch at which the run ends; None if its config does not say."""
    line: dict = field(default_factory=dict)
    """The last whole line of ``metrics.jsonl``; empty before the first evaluation."""
    seconds_left: float = math.nan
    """Expected seconds to the end of training; nan if it is unknown, or the run does not run."""
    note: str = ""
    """The last line of the log that reports a warning or a failure."""

    @property
    def progress(self) -> str:
        """The finished epochs of all, such as ``12/60``."""
        epoch = self.line.get("epoch", 0)
        return str(epoch) if self.epochs is None else f"{epoch}/{self.epochs}"


def read_status(folder: Path, log: Path | None = None, epochs: int | None = None) -> Status:
    """Read how the run in ``folder`` is doing; the folder need not exist yet.

    Args:
        log: a file with the output of the run.
        epochs: the epoch at which the run ends; None: the one in its config.
    """
    last, note = ("", "") if log is None else read_changed(scan_log, log) or ("", "")
    status = Status(note=note)
    status.epochs = read_changed(scan_epochs, folder / "config.yaml") if epochs is None else epochs
    lines, written = read_changed(scan_metrics, folder / "metrics.jsonl") or ([], math.nan)
    status.line = lines[-1] if lines else {}
    whole = read_changed(scan_summary, folder / "summary.json")
    if whole:
        status.state, status.note = "finished", ""
    elif whole is not None:
        status.state, status.note = "damaged", "summary.json is not the summary of a run"
    elif is_locked(folder) or (log is not None and is_locked(log.parent)):  # the latter while the process starts
        status.state = "running"
        status.seconds_left = predict_seconds_left(lines, status.epochs, time.time() - written)
    elif status.epochs is not None and (folder / f"checkpoints/epoch_{status.epochs}.ckpt").exists():
        status.state, status.note = "finished", ""  # a run that ends before its last epoch has no summary
    elif FAILURE.match(last):
        status.state = "failed"
    elif last.startswith("pruned"):
        status.state, status.note = "pruned", last
    elif folder.exists() or last:
        status.state = "stopped"
    return status


def predict_seconds_left(lines: list[dict], epochs: int | None, since: float) -> float:
    """Seconds to the last epoch, at the pace of the last evaluations; nan if it is unknown.

    Args:
        lines: the last lines of metrics; if there are few, the first of them begins the run.
        since: seconds since the last of them.
    """
    seconds = spent = 0.0
    begin = [] if lines and len(lines) > PACES else [{"epoch": 0, "throughput/seconds": 0.0}]
    for before, after in itertools.pairwise([*begin, *lines][-PACES - 1 :]):
        with suppress(KeyError, TypeError):
            # the clock of a fork begins anew
            first = before["throughput/seconds"] if before["throughput/seconds"] < after["throughput/seconds"] else 0.0
            spent, seconds = spent + after["epoch"] - before["epoch"], seconds + after["throughput/seconds"] - first
    if epochs is None or spent <= 0:
        return math.nan
    return max(0.0, (epochs - lines[-1]["epoch"]) * seconds / spent - since)


# ------------------------------------------------------------------ files


def read_changed(scan: Callable[[Path, int, int], T], path: Path) -> T | None:
    """What ``scan`` reads from a file, which it remembers until the file changes; None if the file is missing or cannot
    be read."""
    try:
        path = path.resolve()
        stat = path.stat()
        return scan(path, stat.st_mtime_ns, stat.st_size)
    except OSError:
        return None


def read_end(path: Path, end: int, size: int) -> list[bytes]:
    """The lines in the last ``size`` of ``end`` bytes of a file, without a first one that is cut."""
    with open(path, "rb") as file:
        file.seek(max(0, end - size))
        lines = file.read().split(b"\n")
    return lines if end <= size else lines[1:]


@functools.lru_cache(4096)
def scan_log(path: Path, _written: int, end: int) -> tuple[str, str]:
    """The last line of a log, and the last that reports a warning or a failure. Lines of SLURM's programs do not count:
    they only say that the process has ended."""
    texts = [text.decode(errors="replace").strip() for text in read_end(path, end, LOG_TAIL)]
    texts = [text for text in texts if text and not text.startswith(("srun: ", "slurmstepd"))]
    note = next((text for text in reversed(texts) if WARNING.match(text)), "")
    return texts[-1] if texts else "", note.removeprefix("error: ")


@functools.lru_cache(4096)
def scan_metrics(path: Path, written: int, end: int) -> tuple[list[dict], float]:
    """The last lines of metrics that are whole, at least one if there is one, and when the file was last written."""
    lines: list[dict] = []
    size = TAIL
    while not lines:
        for text in reversed(read_end(path, end, size)):
            line = parse_line(text)
            if line is not None and "epoch" in line:
                lines.insert(0, line)
            if len(lines) > PACES:
                break
        if size >= end:
            break
        size *= 2
    return lines, written / 1e9


@functools.lru_cache(4096)
def scan_summary(path: Path, _written: int, _end: int) -> bool:
    """Whether a summary can be read and has a result."""
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


@functools.lru_cache(4096)
def scan_epochs(path: Path, _written: int, _end: int) -> int | None:
    """The epoch at which a run ends, from its config: ``run.until`` or ``train.epochs``.

    The text is searched, since to parse the YAML of hundreds of runs takes seconds.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    for group, key in (("run", "until"), ("train", "epochs")):
        match = re.search(rf"^{group}:\n(?:[ -].*\n)*?  {key}: (\d+)$", text, re.MULTILINE)
        if match:
            return int(match[1])
    return None


def find_runs(root: Path) -> Iterator[tuple[Path, Path | None]]:
    """Every run or sweep cell at or below ``root``: the folder that has its name, and the run's own folder.

    Of several runs of one name, these are the newest and any other that runs. The run's folder is None for a cell that
    has not begun.
    """
    if (root / "config.yaml").exists():
        yield root.parent, root
        return
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    folders = [root / name for name in names if not name.startswith(".")]
    runs = [folder for folder in folders if (folder / "config.yaml").exists()]
    for run in runs:
        if run == runs[-1] or (not (run / "summary.json").exists() and is_locked(run)):
            yield root, run
    if not runs and ((root / "cell.json").exists() or (root / "log.txt").exists()):
        yield root, None
    for folder in folders:
        if folder not in runs:
            yield from find_runs(folder)
