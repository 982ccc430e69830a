"""``runs/<name>/<id>/``: config, metrics, summary, partition, checkpoints. Every file is written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_idkd import config_file
from lightning_idkd.errors import UserError, reason

RESULT = ("seed", "graph", "data", "node", "train", "gossip", "calibration", "distillation", "callbacks", "run.precision",
          "run.autocast")  # fmt: skip
"""The config keys that enter a run's result: all but how and where it runs."""
SAME = ("seed", "graph", "node", "gossip", "run.precision", "run.autocast", "data.private", "data.partition", "data.validation",
        "data.image_size", "data.channels", "data.augment")  # fmt: skip
"""What a fork shares with the run it starts from. The initial training does not see the public set."""
ONGOING = ("calibration", "distillation", "data.public", "data.augment_public")
"""What a fork must share besides, to go on with the distilled labels that it finds."""


@contextlib.contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Keep other processes away from ``folder``; a UserError that says ``taken`` where one is at work. The lock ends with the
    process at the latest."""
    with open(folder / ".lock", "a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(taken) from e
        yield


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Let ``save`` write beside ``path``, then put the finished file in its place."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as e:
        raise UserError(f"run.dir: cannot write '{path}' ({reason(e, path.parent)}); what was there before is intact") from e
    finally:
        part.unlink(missing_ok=True)


def plain(value: Any, what: str) -> Any:
    """``value`` as JSON has it: a number of torch or numpy becomes Python's, nan and inf become null.

    Raises:
        UserError: it holds something else; ``what`` says which value it is, in words.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, int)):
                raise UserError(f"{what} has the key {key!r}, of type {type(key).__name__}; allowed: text")
        return {key: plain(v, f"{what}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{what}[{i}]") for i, v in enumerate(value)]
    if is_number(value):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise UserError(f"{what} is {kind_of(value)}; allowed: a number, text, true, false, null, or lists and dicts of these")


def is_number(value: Any) -> bool:
    """Whether it is a single number of torch or numpy."""
    return getattr(value, "shape", None) == () and hasattr(value, "item")


def kind_of(value: Any) -> str:
    """What ``value`` is, in words."""
    shape = getattr(value, "shape", None)
    name = type(value).__name__
    return f"a{'n' * (name[0] in 'aeiouAEIO')} {name}" + ("" if shape is None else f" of shape {list(shape)}")


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
        folder.point()
        return folder

    def point(self) -> None:
        """Let ``latest`` point here."""
        write(self.path.parent / "latest", lambda part: part.symlink_to(self.path.name))

    # ------------------------------------------------------------------ finding

    @classmethod
    def unfinished(cls, parent: Path, config: dict, id: str | None = None) -> RunFolder | None:
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
                if difference(config, other) is None and config["run"]["from"] == other["run"]["from"] and folder.free():
                    return folder
        return None

    @classmethod
    def named(cls, text: str, key: str) -> tuple[RunFolder, Path]:
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
    def locked(self) -> Iterator[None]:
        """Keep other processes away; a UserError where one is at work."""
        with locked(self.path, f"run.resume: another process works on '{self.path}'; wait for it, or stop it"):
            yield

    def free(self) -> bool:
        """Whether nobody works on it."""
        try:
            with self.locked():
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
            found = config_file.read(path.read_text(encoding="utf-8"))
            found["run"].setdefault("autocast", False)  # runs are older than these keys
            found["data"].setdefault("channels", None)
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as e:
            raise UserError(f"'{path}' is damaged, or of no run") from e
        return found

    def text(self, name: str, text: str) -> None:
        write(self.file(name), lambda part: part.write_text(text, encoding="utf-8"))

    def json(self, name: str, content: Any) -> None:
        self.text(name, json.dumps(plain(content, name), indent=1) + "\n")

    def yaml(self, name: str, content: dict) -> None:
        self.text(name, config_file.write(content))

    def metrics(self) -> list[dict]:
        """All lines of ``metrics.jsonl``."""
        path = self.file("metrics.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, lines: list[dict]) -> None:
        """Rewrite ``metrics.jsonl``: a few hundred lines at most, so that a kill never leaves half of one."""
        self.text("metrics.jsonl", "".join(json.dumps(plain(line, "metrics")) + "\n" for line in lines))

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


def difference(a: dict, b: dict, keys: tuple[str, ...] = RESULT) -> tuple[str, Any, Any] | None:
    """The first dotted key, ``keys`` or below, in which two resolved configs differ, with both values."""
    for key in keys:
        if found := _difference(at(a, key), at(b, key), key):
            return found
    return None


def at(config: dict, key: str) -> Any:
    """What a resolved config has at a dotted key."""
    return functools.reduce(lambda c, k: c.get(k), key.split("."), config)


def _difference(a: Any, b: Any, key: str) -> tuple[str, Any, Any] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for k in {**a, **b}:
            if found := _difference(a.get(k), b.get(k), f"{key}.{k}"):
                return found
        return None
    return None if a == b else (key, a, b)
