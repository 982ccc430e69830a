"""What a run continues: the newest unfinished run of its name, a named one, or a checkpoint of another run (a fork)."""

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


class Before(NamedTuple):
    """The data of the run that is continued."""

    run: str
    """Its folder."""
    data: dict | None
    """See :func:`lightning_idkd.data.identity.record`; None for a run that is older than this."""
    sets: tuple[str, ...]
    """Which of train, test and public must not have changed."""


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
        """What the checkpoint holds."""
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
    def before(self) -> Before | None:
        """The data that must not have changed."""
        if not self.checkpoint:
            return None
        sets = ("train", "test", "public") if self.keeps_labels else ("train", "test")
        return Before(str(self.source.path), self.state["images"].get("data"), sets)

    def check_epoch(self) -> None:
        """Refuse a fork that begins after what it is to do, unless it continues the distillation that was under way."""
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

    def check_split(self, split_hash: str) -> None:
        """Refuse samples of the nodes that are not those of the checkpoint's run."""
        if self.source and (there := self.source.partition_hash()) != split_hash:
            raise UserError(
                f"data.partition: the nodes' samples are others than in '{self.source.path}' "
                f"(hash {split_hash}, not {there}): a file has changed"
            )


def find_start(config: Config) -> Start:
    """Where the run starts, as ``run.resume`` and ``run.from`` ask for it.

    Raises:
        UserError: what they name is not a run, or has another config.
    """
    start = _find(config)
    start.check_epoch()
    return start


def _find(config: Config) -> Start:
    run = config.run
    wandb_id = loggers.read_wandb_id(config)  # W&B's agent gives it, and gives it again with a cell that was stopped
    if run.resume == "auto" or (wandb_id and run.resume is None):
        folder = RunFolder.find_unfinished(config.folder(), config.resolved, wandb_id)
        if folder:
            return Start(config, folder, folder.last)
    if run.from_:
        folder, checkpoint = RunFolder.find_checkpoint(run.from_, "run.from")
        if differs := difference(config.resolved, folder.config(), SAME):
            key, here, there = differs
            raise UserError(
                f"run.from: {key} is {here} here but {there} in '{run.from_}'; a fork shares {', '.join(SAME)}"
            )
        return Start(config, None, checkpoint)
    if run.resume and run.resume != "auto":
        folder, checkpoint = RunFolder.find_checkpoint(run.resume, "run.resume")
        if differs := difference(config.resolved, folder.config()):
            key, here, there = differs
            raise UserError(
                f"run.resume: {key} is {here} here but {there} in '{run.resume}'; a run continues with its own config"
            )
        if folder.file("summary.json").exists():
            raise UserError(f"run.resume: '{run.resume}' is finished; use run.from to start from its checkpoints")
        return Start(config, folder, checkpoint)
    return Start(config)
