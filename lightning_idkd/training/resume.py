"""Finds what a run continues: the newest unfinished run of its name, a given run, or a checkpoint (a fork)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lightning_idkd.config import Config
from lightning_idkd.config.resolved import ONGOING, SAME, difference
from lightning_idkd.errors import UserError
from lightning_idkd.records import loggers
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.schedule import epoch_of

ROWS = ("X", "buffers", "rule", "rule_edges", "distilled", "answers", "missed", "loss")
"""The parts of a checkpoint with a row for each node or edge, of which a process needs its own."""


class EarlierRun(NamedTuple):
    """A run whose data are read again, and must not have changed."""

    folder: str
    """Path of its folder, for messages."""
    data: dict | None
    """Identity of its data, from :func:`lightning_idkd.data.identity.record`; None if the run did not record it yet."""
    sets: tuple[str, ...]
    """The sets to compare, some of train, test and public."""


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Args:
        folder: the folder of the run to continue; None for a new run.
        checkpoint: the checkpoint to load; None to start from scratch. With a new folder, the run is a fork.
    """

    config: Config
    folder: RunFolder | None = None
    checkpoint: Path | None = None

    @property
    def fork(self) -> bool:
        """Whether this is another run than the one that wrote the checkpoint."""
        return self.checkpoint is not None and self.folder is None

    @cached_property
    def state(self) -> dict | None:
        """The content of the checkpoint."""
        return RunFolder.load(self.checkpoint) if self.checkpoint else None

    @property
    def source(self) -> RunFolder | None:
        """The run that wrote the checkpoint."""
        return RunFolder(self.checkpoint.parent.parent) if self.checkpoint else None

    @cached_property
    def keeps_labels(self) -> bool:
        """Whether training goes on with the distilled labels of the checkpoint."""
        return not self.fork or difference(self.config.resolved, self.source.config(), ONGOING) is None

    @property
    def earlier_run(self) -> EarlierRun | None:
        """The run that wrote the checkpoint, with the sets that must not have changed."""
        if not self.checkpoint:
            return None
        sets = ("train", "test", "public") if self.keeps_labels else ("train", "test")
        return EarlierRun(str(self.source.path), self.state["images"].get("data"), sets)

    def check_epoch(self) -> None:
        """Refuse a fork whose checkpoint is past its last epoch, or past its first exchange if it does not keep the
        distilled labels."""
        if not self.fork:
            return
        config, state = self.config, self.state
        source, epochs, epoch = config.run.from_, config.train.epochs, state["epoch"]
        if epoch >= epochs:
            raise UserError(f"train.epochs: {epochs}, but '{source}' has trained {epoch} epochs already; give more")
        if config.distillation is not None and not self.keeps_labels:
            start = epoch_of(config.distillation.start, epochs, "distillation.start")
            if start < epoch or (start == epoch and state["epoch_step"]):
                raise UserError(
                    f"distillation.start: epoch {start} is over in '{source}', which is at epoch {epoch}, step "
                    f"{state['epoch_step']} of it"
                )

    @cached_property
    def lines(self) -> list[dict]:
        """The metrics of the run that wrote the checkpoint."""
        return self.source.metrics() if self.checkpoint else []

    def share(self) -> dict:
        """What other processes, which may not see the files, know of this start; rows apart (see :meth:`receive`)."""
        state = self.state and {k: v for k, v in self.state.items() if k not in ROWS}
        known = {"state": state, "keeps_labels": self.keeps_labels, "lines": self.lines}
        return {"folder": self.folder, "checkpoint": self.checkpoint, "known": known}

    @classmethod
    def receive(cls, config: Config, shared: dict) -> Start:
        """The start of which the first process has told by :meth:`share`."""
        start = cls(config, shared["folder"], shared["checkpoint"])
        vars(start).update(shared["known"])  # the values of properties, which are thus never read from files
        return start

    def check_split(self, split_hash: str) -> None:
        """Refuse a partition that differs from that of the checkpoint's run."""
        if self.source and (source_hash := self.source.partition_hash()) != split_hash:
            raise UserError(
                f"data.partition: the nodes' samples are others than in '{self.source.path}' "
                f"(hash {split_hash}, not {source_hash}): a file has changed"
            )


def find_start(config: Config) -> Start:
    """Find where the run starts, according to ``run.resume`` and ``run.from``.

    Raises:
        UserError: what they name is not a run, or has another config.
    """
    start = _find(config)
    start.check_epoch()
    return start


def _find(config: Config) -> Start:
    run = config.run
    wandb_id = loggers.read_wandb_id(config)  # W&B's agent passes the same id again when it restarts a stopped cell
    if run.resume == "auto" or (wandb_id and run.resume is None):
        folder = RunFolder.find_unfinished(config.folder(), config.resolved, wandb_id)
        if folder:
            return Start(config, folder, folder.newest())
    if run.from_:
        folder, checkpoint = RunFolder.find_checkpoint(run.from_, "run.from")
        if differs := difference(config.resolved, folder.config(), SAME):
            key, value, stored = differs
            raise UserError(
                f"run.from: {key} is {value} here but {stored} in '{run.from_}'; a fork shares {', '.join(SAME)}"
            )
        return Start(config, None, checkpoint)
    if run.resume and run.resume != "auto":
        folder, checkpoint = RunFolder.find_checkpoint(run.resume, "run.resume")
        if differs := difference(config.resolved, folder.config()):
            key, value, stored = differs
            raise UserError(
                f"run.resume: {key} is {value} here but {stored} in '{run.resume}'; a run continues with its own config"
            )
        if folder.file("summary.json").exists():
            raise UserError(f"run.resume: '{run.resume}' is finished; use run.from to start from its checkpoints")
        return Start(config, folder, checkpoint)
    return Start(config)
