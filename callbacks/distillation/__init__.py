"""Distillation: what nodes send about public samples, how they average it, and how they learn from it."""

from callbacks.distillation.aggregation import ERA, ClassCount, ConfidenceMean, LogitMean, Mean, Vote
from callbacks.distillation.idkd import IDKD, VanillaKD
from callbacks.distillation.mutual import MutualKD
from callbacks.distillation.payload import Packed
from callbacks.distillation.teachers import Gossiped, MovingAverage

__all__ = [
    "ERA", "IDKD", "ClassCount", "ConfidenceMean", "Gossiped", "LogitMean", "Mean", "MovingAverage", "MutualKD", "Packed",
    "VanillaKD", "Vote",
]  # fmt: skip
