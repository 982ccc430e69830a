"""Learning-rate schedules and starts of phases, in epochs. No schedule returns 0: rules divide by the learning rate."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lightning_idkd.errors import UserError, require


def epoch_of(start: int | float, epochs: int, key: str) -> int:
    """The epoch that ``start`` names: below 1 a fraction of the epochs, else an epoch. Refused beyond the last one."""
    epoch = math.floor(start * epochs + 1e-9) if 0 <= start < 1 else start
    if not 0 <= epoch < epochs or epoch != int(epoch):
        last = f", or an epoch from 1 to {epochs - 1}" if epochs > 1 else ""
        within = f"within {epochs} epochs" if epochs > 1 else "within the only epoch (train.epochs is 1)"
        raise UserError(f"{key}: {start} is no start {within}; allowed: a fraction from 0 to below 1{last}")
    return int(epoch)


class Schedule(ABC):
    """Base: ``factor`` times ``train.lr`` is the learning rate."""

    warmup: float = 0.0
    warmup_from: float = 0.01

    def __post_init__(self):
        require(0 <= self.warmup < math.inf, "train.schedule.warmup", self.warmup, "0 or more epochs")
        require(
            0 < self.warmup_from <= 1, "train.schedule.warmup_from", self.warmup_from, "above 0 (rules divide by it), at most 1"
        )

    def factor(self, epoch: float, epochs: int) -> float:
        """The factor, above 0, at a fractional ``epoch`` in [0, epochs)."""
        if epoch < self.warmup:
            return self.warmup_from + (1 - self.warmup_from) * epoch / self.warmup
        return self.decay(epoch, epochs)

    @abstractmethod
    def decay(self, epoch: float, epochs: int) -> float:
        """The factor after the warm-up."""


@dataclass
class Step(Schedule):
    """The factor falls by ``gamma`` at every milestone.

    Args:
        milestones: Starts (a fraction of the epochs, or an epoch).
        gamma: Factor at each milestone.
        warmup: Epochs of linear rise at the beginning.
        warmup_from: Factor that the rise begins with.
    """

    milestones: tuple[int | float, ...] = (0.6, 0.8)
    gamma: float = 0.1
    warmup: float = 0.0
    warmup_from: float = 0.01

    def __post_init__(self):
        require(0 < self.gamma <= 1, "train.schedule.gamma", self.gamma, "above 0, at most 1")
        super().__post_init__()

    def decay(self, epoch: float, epochs: int) -> float:
        return self.gamma ** sum(epoch >= epoch_of(m, epochs, "train.schedule.milestones") for m in self.milestones)


@dataclass
class Cosine(Schedule):
    """Half a cosine from 1 to ``floor``.

    Args:
        floor: Last factor, above 0.
        warmup: Epochs of linear rise at the beginning.
        warmup_from: Factor that the rise begins with.
    """

    floor: float = 0.001
    warmup: float = 0.0
    warmup_from: float = 0.01

    def __post_init__(self):
        require(0 < self.floor <= 1, "train.schedule.floor", self.floor, "above 0 (rules divide by it), at most 1")
        super().__post_init__()

    def decay(self, epoch: float, epochs: int) -> float:
        progress = (epoch - self.warmup) / max(epochs - self.warmup, 1e-9)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@dataclass
class Constant(Schedule):
    """The learning rate stays.

    Args:
        warmup: Epochs of linear rise at the beginning.
        warmup_from: Factor that the rise begins with.
    """

    warmup: float = 0.0
    warmup_from: float = 0.01

    def decay(self, epoch: float, epochs: int) -> float:
        return 1.0
