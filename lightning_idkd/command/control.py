"""The control of a run: the same run without distillation from the first exchange on, and both beside each other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_idkd.config.resolved import RESULT, difference
from lightning_idkd.errors import UserError
from lightning_idkd.records.report import format_bytes
from lightning_idkd.records.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning_idkd.config import Config


def finished(config: Config) -> RunFolder | None:
    """The newest run of this name and config, where it has come to its end and its control has not."""
    folder = RunFolder(config.folder() / "latest")
    if folder.summary() is None or difference(config.resolved, folder.config()) is not None:
        return None
    folder = RunFolder(folder.path.resolve())
    return folder if control_of(folder, config) is None else None


def control_of(folder: RunFolder, config: Config) -> dict | None:
    """The summary of the control that was made for the run in ``folder``; None where there is none yet."""
    name = f"{config.run.name}_control"
    for file in sorted((Path(config.run.dir) / name).glob("*/summary.json"), reverse=True):
        found = RunFolder(file.parent).config()
        alike = difference(found, config.resolved, [key for key in RESULT if key != "distillation"]) is None
        if alike and found["run"]["from"] == start(folder, config):
            return json.loads(file.read_text())
    return None


def start(folder: RunFolder, config: Config) -> str | None:
    """The checkpoint that the control starts from: that of the first exchange; None where this comes before the first epoch."""
    epoch = config.first_exchange()
    file = folder.file(f"checkpoints/epoch_{epoch}.ckpt")
    if epoch and not file.exists() and (summary := folder.summary()):  # a fork may begin with the exchange
        return summary["from"]
    return str(file) if epoch else None


def train_control(folder: RunFolder, config: Config) -> int:
    """Train the control of the finished run in ``folder`` in a process of its own, and print both; returns the exit status."""
    name, checkpoint = f"{config.run.name}_control", start(folder, config)
    changes = {"distillation": "null", "run.control": "false", "run.name": name, "run.resume": "auto"}
    changes |= {"run.from": checkpoint or "null"}
    command = [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(folder.file("config.yaml"))]
    command += [word for key, value in changes.items() for word in (f"--{key}", value)]
    print(f"\ncontrol: the same from epoch {config.first_exchange()} on without distillation", flush=True)
    process = subprocess.Popen(command)
    # Ctrl-C reaches the control by itself; after either it leaves a checkpoint
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        return status
    summary, control = folder.summary(), control_of(folder, config)
    if control is None:
        raise UserError(f"run.control: the control in '{Path(config.run.dir) / name}' has no summary.json")
    print(table(type(config.distillation).__name__, summary, control), end="")
    return 0


def table(method: str, summary: dict, control: dict) -> str:
    """Both runs and their difference, in percent."""
    keys = {"node mean": "node_mean", "worst": "node_min", "consensus": "consensus"}
    rows = [("", *keys, "sent")]
    for name, found in ((method, summary), ("no distillation", control)):
        sent = sum(v for k, v in found["communication"].items() if k.endswith("_bytes"))
        rows.append((name, *(f"{100 * found['accuracy'][k]:.1f}" for k in keys.values()), format_bytes(sent)))
    gains = [100 * (summary["accuracy"][k] - control["accuracy"][k]) for k in keys.values()]
    rows.append(("difference", *(f"{gain:+.1f}" for gain in gains), ""))
    lines = "".join(f"{name:<16} {a:>10} {b:>8} {c:>10} {d:>10}".rstrip() + "\n" for name, a, b, c, d in rows)
    return f"\n{lines}accuracy in %, one seed; seeds differ by more than methods do, so repeat it with --seed 1, 2, ...\n"
