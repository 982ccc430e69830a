"""``runs/<name>/<id>/``: config, metrics, summary, partition, checkpoints. Every file is written whole or not at all."""

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
    """One run's files."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, parent: Path, seed: int) -> RunFolder:
        """A new folder below ``parent``, and ``latest`` pointing to it."""
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
        """Let ``latest`` point here."""
        write(self.path.parent / "latest", lambda part: part.symlink_to(self.path.name))

    # ------------------------------------------------------------------ finding

    @classmethod
    def find_unfinished(cls, parent: Path, config: dict, id: str | None = None) -> RunFolder | None:
        """The newest run below ``parent`` that nobody works on, with a checkpoint, no summary, the same config and source, and
        W&B's ``id`` where one is given."""
        for path in sorted(parent.glob("*/config.yaml"), reverse=True):
            folder = cls(path.parent)
            if path.parent.name == "latest" or folder.file("summary.json").exists() or not folder.last.exists():
                continue
            if id is not None and folder.wandb_id() != id:
                continue
            with contextlib.suppress(UserError):  # a damaged one
                other = folder.config()
                if difference(config, other) is None and config["run"]["from"] == other["run"]["from"] and folder.is_free():
                    return folder
        return None

    @classmethod
    def find_checkpoint(cls, text: str, key: str) -> tuple[RunFolder, Path]:
        """The run folder and checkpoint that ``text`` names: a run folder (its last checkpoint), or a checkpoint."""
        path = Path(text).resolve()
        of_a_run = path.is_file() and path.parent.name == "checkpoints"
        folder = cls(path.parent.parent if of_a_run else path)
        if not folder.file("config.yaml").exists():
            auto = "; allowed: auto, null, or a run folder" if key == "run.resume" else "; give one"
            raise UserError(f"{key}: '{text}' is no run folder{auto} such as runs/NAME/latest, or a file in its checkpoints/")
        if not folder.last.exists():
            raise UserError(f"{key}: '{text}' has no checkpoint yet")
        return folder, path if of_a_run else folder.last

    # ------------------------------------------------------------------ one process at a time

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes away; a UserError where one is at work."""
        with lock_folder(self.path, f"run.resume: another process works on '{self.path}'; wait for it, or stop it"):
            yield

    def is_free(self) -> bool:
        """Whether nobody works on it."""
        try:
            with self.lock():
                return True
        except UserError:
            return False

    # ------------------------------------------------------------------ files

    def file(self, name: str) -> Path:
        return self.path / name

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    def config(self) -> dict:
        path = self.file("config.yaml")
        try:
            found = yaml_file.read(class_paths.of_run(path.read_text(encoding="utf-8")))
            add_newer_keys(found)
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
            raise UserError(f"'{path}' is damaged, or of no run") from e
        return found

    def text(self, name: str, text: str) -> None:
        write(self.file(name), lambda part: part.write_text(text, encoding="utf-8"))

    def json(self, name: str, content: Any) -> None:
        self.text(name, json.dumps(to_json(content, name), indent=1) + "\n")

    def yaml(self, name: str, content: dict) -> None:
        self.text(name, yaml_file.write(content))

    def metrics(self) -> list[dict]:
        """All lines of ``metrics.jsonl``."""
        path = self.file("metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, lines: list[dict]) -> None:
        """Rewrite ``metrics.jsonl``: a few hundred lines at most, so that a kill never leaves half of one."""
        self.text("metrics.jsonl", "".join(json.dumps(to_json(line, "metrics")) + "\n" for line in lines))

    def save(self, state: dict, name: str, keep: list[str]) -> None:
        """Write a checkpoint, and keep it under the further names."""
        import torch

        path = self.last.with_name(name)
        write(path, lambda part: torch.save(state, part))
        for other in keep:  # a checkpoint is replaced, never rewritten, so a link keeps this one
            write(path.with_name(other), lambda part: os.link(path, part))

    def wandb_id(self) -> str | None:
        """The id of its W&B run; None before it has one."""
        path = self.file("wandb/run_id.txt")
        return path.read_text() if path.exists() else None

    def summary(self) -> dict | None:
        """``summary.json``; None where the run has not come to its end."""
        path = self.file("summary.json")
        return json.loads(path.read_text()) if path.exists() else None

    def partition_hash(self) -> str:
        """Which samples its nodes hold."""
        path = self.file("partition.json")
        try:
            return json.loads(path.read_text())["hash"]
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"'{path}' is missing or damaged: which samples the run's nodes hold is not known") from e

    @staticmethod
    def load(path: Path) -> dict:
        """Read a checkpoint."""
        import torch

        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            size = path.stat().st_size if path.exists() else 0
            raise UserError(
                f"checkpoint '{path}' cannot be read ({size} bytes; cut short or damaged): delete it, or name another "
                "file in checkpoints/"
            ) from e
