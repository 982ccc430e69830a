"""The run folder ``runs/<name>/<id>/`` with config, metrics, summary, partition and checkpoints.

Every file is written whole or not at all, but for ``metrics.jsonl``, to which lines are appended. Checkpoints carry a
checksum. The one before the last is kept as ``previous.ckpt``.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd.checksum import is_sealed, seal
from lightning_idkd.config import class_paths, yaml_file
from lightning_idkd.config.resolved import add_newer_keys, difference
from lightning_idkd.errors import UserError, explain_write_error
from lightning_idkd.files import Locked, append, link, lock_folder, remove_parts, to_json, write


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
        ``run.from``. With ``id``, it also has that W&B id. A sentence names a run that is left out because its config
        is damaged or its folder cannot be written.
        """
        for path in sorted(parent.glob("*/config.yaml"), reverse=True):
            folder = cls(path.parent)
            if path.parent.name == "latest" or folder.file("summary.json").exists() or not folder.has_checkpoint():
                continue
            if id is not None and folder.wandb_id() != id:
                continue
            try:
                other = folder.config()
                same = difference(config, other) is None and config["run"]["from"] == other["run"]["from"]
                if same and folder.is_free():
                    return folder
            except UserError as e:
                print(f"run.resume: not continued: {e}", file=sys.stderr)
        return None

    @classmethod
    def find_checkpoint(cls, text: str, key: str) -> tuple[RunFolder, Path]:
        """The run folder and the checkpoint that ``text`` names.

        Args:
            text: a run folder, which stands for its newest whole checkpoint, or a file in its ``checkpoints/``.
            key: the config key that has this value, for messages.

        Raises:
            UserError: ``text`` is neither, or the run has no whole checkpoint.
        """
        path = Path(text).resolve()
        is_checkpoint = path.is_file() and path.parent.name == "checkpoints"
        folder = cls(path.parent.parent if is_checkpoint else path)
        if not folder.file("config.yaml").exists():
            allowed = "auto, null, a run folder" if key == "run.resume" else "null, a run folder"
            allowed += " such as runs/NAME/latest, or a file in its checkpoints/"
            raise UserError(f"{key}: '{text}' is not a run folder; allowed: {allowed}")
        if not folder.has_checkpoint():
            raise UserError(f"{key}: '{text}' has no checkpoint yet")
        # to continue from last.ckpt means to continue; a fork from it is another experiment than one from previous.ckpt
        given = is_checkpoint and not (key == "run.resume" and path == folder.last)
        return folder, path if given else folder.newest()

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
        """Whether no other process works on this run.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            with lock_folder(self.path, "", warn=False):
                return True
        except Locked:
            return False

    def clean(self) -> None:
        """Remove the temporary files that killed processes have left; the caller has the lock of this folder."""
        for folder in (self.path, *(path for path in self.path.iterdir() if path.is_dir())):
            remove_parts(folder, locked=True)
        remove_parts(self.path.parent)

    # ------------------------------------------------------------------ files

    def file(self, name: str) -> Path:
        """The path of a file in this folder; it need not exist."""
        return self.path / name

    def make_folder(self, name: str) -> Path:
        """Make a folder in this folder unless it exists; returns its path.

        Raises:
            UserError: this folder cannot be written.
        """
        path = self.file(name)
        try:
            path.mkdir(exist_ok=True)
        except OSError as e:
            raise UserError(f"run.dir: cannot make '{path}' ({explain_write_error(e, self.path)})") from e
        return path

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

    # ------------------------------------------------------------------ metrics

    def metrics(self) -> list[dict]:
        """Read all lines of ``metrics.jsonl``. A last line that is cut is left out: a process is writing it, or was
        killed.

        Raises:
            UserError: the file cannot be read, or another line is damaged.
        """
        path = self.file("metrics.jsonl")
        try:
            texts = path.read_bytes().splitlines() if path.exists() else []
        except OSError as e:
            raise UserError(f"'{path}' cannot be read ({e.strerror})") from e
        lines = [parse_line(text) for text in texts]
        if None in lines[:-1]:
            number = lines.index(None) + 1
            raise UserError(f"'{path}' is damaged in line {number} of {len(texts)}; delete that line, or restore it")
        return [line for line in lines if line is not None]

    def log(self, line: dict) -> None:
        """Append a line to ``metrics.jsonl``."""
        append(self.file("metrics.jsonl"), format_line(line))

    def start_log(self, lines: list[dict]) -> None:
        """Let ``metrics.jsonl`` hold these lines, which belong to the checkpoint that the run starts from, and print
        if it loses a cut line."""
        path, text = self.file("metrics.jsonl"), "".join(map(format_line, lines))
        before = path.read_bytes() if path.exists() else b""
        if before and parse_line(before.splitlines()[-1]) is None:
            print(f"'{path}': the last line is cut, and dropped", flush=True)
        if before != text.encode():
            self.text(path.name, text)

    # ------------------------------------------------------------------ checkpoints

    @property
    def last(self) -> Path:
        """The path of the last checkpoint; it need not exist."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The path of the checkpoint before the last; it need not exist."""
        return self.last.with_name("previous.ckpt")

    def has_checkpoint(self) -> bool:
        """Whether there is something to continue from, be it damaged."""
        return self.last.exists() or self.previous.exists()

    def newest(self) -> Path:
        """The last checkpoint, or the one before if the last is damaged.

        Raises:
            UserError: neither is whole.
        """
        for path in (self.last, self.previous):
            if is_whole(path):
                return path
        raise UserError(describe_damage(self.last))

    def describe_fallback(self, checkpoint: Path, epoch: int) -> str:
        """Why the run continues from ``checkpoint``, at ``epoch``, if that is previous.ckpt instead of a damaged
        last.ckpt; else empty."""
        if checkpoint != self.previous or is_whole(self.last):
            return ""
        state = "damaged" if self.last.exists() else "missing"
        return f"checkpoint '{self.last}' is {state}; continuing from {checkpoint.name}, epoch {epoch}"

    def continue_from(self, checkpoint: Path) -> None:
        """Make ``checkpoint`` the last one.

        So a damaged last.ckpt does not become previous.ckpt, and later checkpoints, which a run that goes back leaves
        behind, are not continued.
        """
        if checkpoint == self.last:
            return
        if checkpoint != self.previous:
            self.previous.unlink(missing_ok=True)
        write(self.last, lambda part: link(checkpoint, part))

    def save(self, state: dict, name: str, keep: list[str]) -> None:
        """Write a checkpoint called ``name``, and keep it under the names in ``keep`` too. The last.ckpt before it
        stays as previous.ckpt."""
        import torch

        path = self.last.with_name(name)

        def save(part: Path) -> None:
            torch.save(state, part)
            seal(part)
            if path == self.last and path.exists():
                write(self.previous, lambda other: link(path, other))

        write(path, save)
        for other in keep:  # a link keeps this checkpoint, because files are replaced, never written over
            write(path.with_name(other), lambda part: link(path, part))

    def wandb_id(self) -> str | None:
        """Read the id of the run in W&B; None if it has none yet."""
        path = self.file("wandb/run_id.txt")
        return path.read_text() if path.exists() else None

    def summary(self) -> dict | None:
        """Read ``summary.json``; None if the run has not finished.

        Raises:
            UserError: the file is damaged.
        """
        path = self.file("summary.json")
        try:
            return dict(json.loads(path.read_text())) if path.exists() else None
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"'{path}' is damaged, or not the summary of a run") from e

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
            UserError: the file cannot be read, or its checksum shows that it is damaged.
        """
        import torch

        try:
            if is_sealed(path) is not False:
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # torch raises many kinds, for a file from before checksums or of another program
            cause = e.strerror if isinstance(e, OSError) and e.strerror else "torch does not understand it"
            raise UserError(describe_damage(path, f"unreadable: {cause}")) from e
        raise UserError(describe_damage(path))


def format_line(line: dict) -> str:
    """A line of ``metrics.jsonl``."""
    return json.dumps(to_json(line, "metrics")) + "\n"


def parse_line(text: bytes) -> dict | None:
    """The content of a line of ``metrics.jsonl``; None if it is damaged."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("epoch", 0), (int, float)) else None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint exists and is not damaged, as far as its checksum shows."""
    try:
        return is_sealed(path) is not False
    except OSError:
        return False


def describe_damage(path: Path, state: str = "damaged") -> str:
    """The sentence that a checkpoint is damaged, or missing, and which whole ones lie beside it."""
    others = [other.name for other in sorted(path.parent.glob("*.ckpt")) if other != path and is_whole(other)]
    state = f"{state} ({path.stat().st_size} bytes)" if path.exists() else "missing"
    instead = f"whole ones beside it: {', '.join(others)}" if others else "there is no whole one beside it"
    return f"checkpoint '{path}' is {state}; {instead}"
