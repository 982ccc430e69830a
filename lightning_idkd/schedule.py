"""Learning-rate schedules and starts of phases, in epochs.

No schedule returns 0, since gossip rules divide by the learning rate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lightning_idkd.errors import UserError, require


def epoch_of(start: int | float, epochs: int, key: str) -> int:
    """The epoch in which a phase starts: ``start`` below 1 is a fraction of the epochs, else it is the epoch itself.

    Raises:
        UserError: a start after the last epoch, below 0, or at a part of an epoch; ``key`` is its config key.
    """
    epoch = math.floor(start * epochs + 1e-9) if 0 <= start < 1 else start
    if not 0 <= epoch < epochs or epoch != int(epoch):
        wrong, allowed = f"is not one of {epochs} epochs", f", or an epoch from 1 to {epochs - 1}"
        if epochs == 1:
            wrong, allowed = "is not the only epoch (train.epochs is 1)", ""
        raise UserError(f"{key}: {start} {wrong}; allowed: a fraction from 0 to below 1{allowed}")
    return int(epoch)


class Schedule(ABC):
    """Base of the schedules: the learning rate is ``train.lr`` times the schedule's factor."""

    warmup: float = 0.0
    warmup_from: float = 0.01

    def __post_init__(self) -> None:
        require(0 <= self.warmup < math.inf, "train.schedule.warmup", self.warmup, "0 or more epochs")
        allowed = "above 0 (rules divide by it), at most 1"
        require(0 < self.warmup_from <= 1, "train.schedule.warmup_from", self.warmup_from, allowed)

    def factor(self, epoch: float, epochs: int) -> float:
        """The factor, which is above 0, at a fractional ``epoch`` from 0 to below ``epochs``."""
        if epoch < self.warmup:
            return self.warmup_from + (1 - self.warmup_from) * epoch / self.warmup
        return self.decay(epoch, epochs)

    @abstractmethod
    def decay(self, epoch: float, epochs: int) -> float:
        """The factor at an ``epoch`` after the warm-up."""


@dataclass
class Step(Schedule):
    """The learning rate is multiplied by ``gamma`` at every milestone.

    Args:
        milestones: When it is multiplied: each a fraction of the epochs below 1, or an epoch.
        gamma: Factor at each milestone, above 0, at most 1.
        warmup: Epochs of linear rise at the beginning.
        warmup_from: Share of train.lr with which the rise begins.
    """

    milestones: tuple[int | float, ...] = (0.6, 0.8)
    gamma: float = 0.1
    warmup: float = 0.0
    warmup_from: float = 0.01

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, "train.schedule.gamma", self.gamma, "above 0, at most 1")
        super().__post_init__()

    def decay(self, epoch: float, epochs: int) -> float:
        return self.gamma ** sum(epoch >= epoch_of(m, epochs, "train.schedule.milestones") for m in self.milestones)


@dataclass
class Cosine(Schedule):
    """The learning rate falls along half a cosine from train.lr to ``floor`` times train.lr.

    Args:
        floor: Last share of train.lr, above 0.
        warmup: Epochs of linear rise at the beginning.
        warmup_from: Share of train.lr with which the rise begins.
    """

    floor: float = 0.001
    warmup: float = 0.0
    warmup_from: float = 0.01

    def __post_init__(self) -> None:
        require(0 < self.floor <= 1, "train.schedule.floor", self.floor, "above 0 (rules divide by it), at most 1")
        super().__post_init__()

    def decay(self, epoch: float, epochs: int) -> float:
        progress = (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@dataclass
class Constant(Schedule):
    """The learning rate stays at train.lr.

    Args:
        warmup: Epochs of linear rise at the beginning.
        warmup_from: Share of train.lr with which the rise begins.
    """

    warmup: float = 0.0
    warmup_from: float = 0.01

    def decay(self, epoch: float, epochs: int) -> float:
        return 1.0
