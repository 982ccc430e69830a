"""The plain values of a run's checkpoint: how far the run is, and what it has counted and measured so far."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lightning_idkd.labels import MEASURES

LABEL_FIELDS = ("phase", "steps", "exchange_bytes", "exchanges", "ood", "per_node")
"""Fields that a fork without the distilled labels resets."""
RUN_FIELDS = ("best", "seconds", "due", "lost", "turns", "absent")
"""Fields that every fork resets."""


@dataclass
class Progress:
    """Every field is a key of the checkpoint."""

    steps: int
    """Steps in an epoch."""
    last_lr: float
    """Learning rate of the last step."""
    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished steps, over all epochs."""
    epoch_step: int = 0
    """Finished steps of this epoch."""
    began: float | None = None
    """Finished epochs, with their fraction, at the beginning of the last step; None before the first."""
    phase: str = "train"
    """``train``, ``distil`` after the first exchange, or ``final`` after the last step."""
    best: float = -1.0
    """Validation accuracy of the best consensus model so far."""
    samples: int = 0
    """Training samples that the nodes have consumed."""
    seconds: float = 0.0
    """Duration of the earlier sessions of this run."""
    train_seconds: float = 0.0
    """Duration of its training steps."""
    loss_steps: int = 0
    """Steps since the last evaluation."""
    loss_missed: int = 0
    """Batches since the last evaluation that absent honest nodes did not take."""
    due: int = 0
    """Messages of training steps of this run that faults might lose: edges, over all steps."""
    lost: int = 0
    """Those of them that did not arrive."""
    turns: int = 0
    """Steps of this run in which nodes might be absent, over all nodes."""
    absent: int = 0
    """Those of them that nodes missed."""
    exchange_bytes: int = 0
    """Bytes that exchanges of labels have sent."""
    exchanges: list[dict] = field(default_factory=list)
    """Every exchange: epoch, sizes of the distilled sets, heterogeneity before and after, measures of every node."""
    ood: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys((*MEASURES, "threshold_probability")))
    """The last calibration's measures, averaged over nodes."""
    per_node: dict[str, list] = field(default_factory=dict)
    """The last measured accuracy, threshold and other measures of every node."""

    def improves(self, line: dict) -> bool:
        """Whether an evaluation has the best consensus model so far, on validation samples; remembers its accuracy."""
        accuracy = line.get("validation/consensus", -1.0)
        better = accuracy > self.best
        self.best = max(self.best, accuracy)
        return better

    def state(self) -> dict[str, Any]:
        """All fields, for a checkpoint."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # not asdict, which would copy every list of nodes

    def restore(self, state: dict[str, Any], labels: bool = True, fork: bool = False) -> None:
        """Continue from a checkpoint.

        Args:
            labels: whether training goes on with the distilled labels of the checkpoint.
            fork: whether this is another run than the one that wrote it.
        """
        reset_fields = (() if labels else LABEL_FIELDS) + (RUN_FIELDS if fork else ())
        for key in (f.name for f in fields(self) if f.name not in reset_fields):
            if key in state:  # a checkpoint may be older than a field
                setattr(self, key, state[key])
