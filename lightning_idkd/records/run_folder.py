"""The run folder ``runs/<name>/<id>/`` with config, metrics, summary, partition and checkpoints.

Every file is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd.config import class_paths, yaml_file
from lightning_idkd.config.resolved import add_newer_keys, difference
from lightning_idkd.errors import UserError
from lightning_idkd.files import lock_folder, to_json, write


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, parent: Path, seed: int) -> RunFolder:
        """Make a new run folder below ``parent``, named by the time and the seed, and let ``latest`` point to it.

        Raises:
            UserError: ``parent`` cannot be written.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S") + f"-s{seed}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
                path = parent / (stamp + suffix)
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
            for name in ("checkpoints", "plots"):
                (path / name).mkdir()
        except OSError as e:
            raise UserError(
                f"run.dir: cannot write below '{parent}' ({e.strerror}); set run.dir to a folder you can write to"
            ) from e
        folder = cls(path)
        folder.point_latest()
        return folder

    def point_latest(self) -> None:
        """Let ``runs/<name>/latest`` point to this folder."""
        write(self.path.parent / "latest", lambda part: part.symlink_to(self.path.name))

    # ------------------------------------------------------------------ finding a run

    @classmethod
    def find_unfinished(cls, parent: Path, config: dict, id: str | None = None) -> RunFolder | None:
        """The newest run below ``parent`` that can be continued; None if there is none.

        Such a run has a checkpoint and no summary, no process works on it, and it has the same ``config`` and
        ``run.from``. With ``id``, it also has that W&B id.
        """
        for path in sorted(parent.glob("*/config.yaml"), reverse=True):
            folder = cls(path.parent)
            if path.parent.name == "latest" or folder.file("summary.json").exists() or not folder.last.exists():
                continue
            if id is not None and folder.wandb_id() != id:
                continue
            with contextlib.suppress(UserError):  # raised for a damaged config
                other = folder.config()
                same = difference(config, other) is None and config["run"]["from"] == other["run"]["from"]
                if same and folder.is_free():
                    return folder
        return None

    @classmethod
    def find_checkpoint(cls, text: str, key: str) -> tuple[RunFolder, Path]:
        """The run folder and the checkpoint that ``text`` names.

        Args:
            text: a run folder, which stands for its last checkpoint, or a file in its ``checkpoints/``.
            key: the config key that has this value, for messages.

        Raises:
            UserError: ``text`` is neither, or the run has no checkpoint yet.
        """
        path = Path(text).resolve()
        is_checkpoint = path.is_file() and path.parent.name == "checkpoints"
        folder = cls(path.parent.parent if is_checkpoint else path)
        if not folder.file("config.yaml").exists():
            allowed = "auto, null, a run folder" if key == "run.resume" else "null, a run folder"
            allowed += " such as runs/NAME/latest, or a file in its checkpoints/"
            raise UserError(f"{key}: '{text}' is not a run folder; allowed: {allowed}")
        if not folder.last.exists():
            raise UserError(f"{key}: '{text}' has no checkpoint yet")
        return folder, path if is_checkpoint else folder.last

    # ------------------------------------------------------------------ one process at a time

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from working on this run meanwhile.

        Raises:
            UserError: another process works on it.
        """
        with lock_folder(self.path, f"run.resume: another process works on '{self.path}'; wait for it, or stop it"):
            yield

    def is_free(self) -> bool:
        """Whether no other process works on this run."""
        try:
            with self.lock():
                return True
        except UserError:
            return False

    # ------------------------------------------------------------------ files

    def file(self, name: str) -> Path:
        """The path of a file in this folder; it need not exist."""
        return self.path / name

    @property
    def last(self) -> Path:
        """The path of the newest checkpoint; it need not exist."""
        return self.path / "checkpoints" / "last.ckpt"

    def config(self) -> dict:
        """Read the resolved config, with the values that newer keys had in effect.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self.file("config.yaml")
        try:
            config = class_paths.drop_removed(yaml_file.read(class_paths.of_run(path.read_text(encoding="utf-8"))))
            add_newer_keys(config)
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
            raise UserError(f"'{path}' is damaged, or not the config of a run") from e
        return config

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        write(self.file(name), lambda part: part.write_text(text, encoding="utf-8"))

    def json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.text(name, json.dumps(to_json(content, name), indent=1) + "\n")

    def yaml(self, name: str, content: dict) -> None:
        """Write a YAML file."""
        self.text(name, yaml_file.write(content))

    def metrics(self) -> list[dict]:
        """Read all lines of ``metrics.jsonl``."""
        path = self.file("metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, lines: list[dict]) -> None:
        """Write all lines of ``metrics.jsonl`` anew, so that a kill never leaves half a line; there are a few hundred
        at most."""
        self.text("metrics.jsonl", "".join(json.dumps(to_json(line, "metrics")) + "\n" for line in lines))

    def save(self, state: dict, name: str, keep: list[str]) -> None:
        """Write a checkpoint called ``name``, and keep it under the names in ``keep`` too."""
        import torch

        path = self.last.with_name(name)
        write(path, lambda part: torch.save(state, part))
        for other in keep:  # a link keeps this checkpoint, because files are replaced, never written over
            write(path.with_name(other), lambda part: os.link(path, part))

    def wandb_id(self) -> str | None:
        """Read the id of the run in W&B; None if it has none yet."""
        path = self.file("wandb/run_id.txt")
        return path.read_text() if path.exists() else None

    def summary(self) -> dict | None:
        """Read ``summary.json``; None if the run has not finished."""
        path = self.file("summary.json")
        return json.loads(path.read_text()) if path.exists() else None

    def partition_hash(self) -> str:
        """Read the hash of the partition, which says which samples each node holds.

        Raises:
            UserError: ``partition.json`` is missing or damaged.
        """
        path = self.file("partition.json")
        try:
            return json.loads(path.read_text())["hash"]
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"'{path}' is missing or damaged, so the samples of the run's nodes are unknown") from e

    @staticmethod
    def load(path: Path) -> dict:
        """Read a checkpoint, without running code from it.

        Raises:
            UserError: the file cannot be read.
        """
        import torch

        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            size = path.stat().st_size if path.exists() else 0
            raise UserError(
                f"checkpoint '{path}' cannot be read ({size} bytes); it is incomplete or damaged: delete it, or name "
                "another file in checkpoints/"
            ) from e
