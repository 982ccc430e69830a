"""Trains the control of a run and prints both: it is the same run without distillation from the first exchange on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_idkd.config.resolved import RESULT, difference
from lightning_idkd.errors import UserError
from lightning_idkd.records.report import format_bytes, sum_bytes
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.launchers import without_ranks

if TYPE_CHECKING:
    from lightning_idkd.config import Config


def find_finished(config: Config) -> RunFolder | None:
    """The newest run of this name and config if it is finished and its control is not, else None."""
    folder = RunFolder(config.folder() / "latest")
    if folder.summary() is None or difference(config.resolved, folder.config()) is not None:
        return None
    folder = RunFolder(folder.path.resolve())
    return folder if find_control(folder, config) is None else None


def find_control(folder: RunFolder, config: Config) -> dict | None:
    """The summary of the finished control of the run in ``folder``; None if there is none yet."""
    name = f"{config.run.name}_control"
    for file in sorted((Path(config.run.dir) / name).glob("*/summary.json"), reverse=True):
        run = RunFolder(file.parent)
        control = run.config()
        alike = difference(control, config.resolved, [key for key in RESULT if key != "distillation"]) is None
        if alike and control["run"]["from"] == find_start(folder, config):
            return run.summary()
    return None


def find_start(folder: RunFolder, config: Config) -> str | None:
    """The checkpoint that the control starts from.

    It is that of the first exchange; None if the first exchange comes before the first epoch.
    """
    epoch = config.first_exchange()
    file = folder.file(f"checkpoints/epoch_{epoch}.ckpt")
    if epoch and not file.exists() and (summary := folder.summary()):  # the run is a fork that begins with the exchange
        return summary["from"]
    return str(file) if epoch else None


def train_control(folder: RunFolder, config: Config) -> int:
    """Train the control of the finished run in ``folder`` in a new process and print both; returns the exit status."""
    name, checkpoint = f"{config.run.name}_control", find_start(folder, config)
    changes = {"distillation": "null", "run.control": "false", "run.name": name, "run.resume": "auto"}
    changes |= {"run.from": checkpoint or "null"}
    command = [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(folder.file("config.yaml"))]
    for key, value in changes.items():
        command += [f"--{key}", value]
    print(f"\ncontrol: the same run without distillation from epoch {config.first_exchange()} on", flush=True)
    process = subprocess.Popen(command, env=without_ranks())
    # Ctrl-C reaches the control without help; the control saves a checkpoint after either signal
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        return process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        return status
    summary, control = folder.summary(), find_control(folder, config)
    if control is None:
        raise UserError(f"run.control: the control in '{Path(config.run.dir) / name}' has no summary.json")
    print(format_table(type(config.distillation).__name__, summary, control), end="")
    return 0


def format_table(method: str, summary: dict, control: dict) -> str:
    """A table of the accuracies of a run and its control and of their difference, in percent, and of the bytes sent."""
    keys = {"node mean": "node_mean", "worst": "node_min", "consensus": "consensus"}
    rows = [("", *keys, "sent")]
    for name, result in ((method, summary), ("no distillation", control)):
        sent = sum_bytes(result["communication"])
        rows.append((name, *(f"{100 * result['accuracy'][key]:.1f}" for key in keys.values()), format_bytes(sent)))
    gains = [100 * (summary["accuracy"][key] - control["accuracy"][key]) for key in keys.values()]
    rows.append(("difference", *(f"{gain:+.1f}" for gain in gains), ""))
    text = "\n"
    for name, mean, worst, consensus, sent in rows:
        text += f"{name:<16} {mean:>10} {worst:>8} {consensus:>10} {sent:>10}".rstrip() + "\n"
    note = "seeds differ by more than methods do, so repeat it with --seed 1, 2, ..."
    return f"{text}accuracy in %, one seed; {note}\n"
