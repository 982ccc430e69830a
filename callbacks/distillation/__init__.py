"""Distillation: what nodes send about public samples, how they average it, and how they learn from it."""

from .aggregation import ERA, ClassCount, ConfidenceMean, LogitMean, Mean, Vote
from .idkd import IDKD, VanillaKD
from .mutual import MutualKD
from .payload import Packed
from .private_labels import LaplaceLabels, RandomizedResponse
from .robust import AgreementMean, Median, TrimmedMean
from .self_training import SelfTraining
from .teachers import Gossiped, MovingAverage, Refitted

__all__ = [
    "ERA",
    "IDKD",
    "AgreementMean",
    "ClassCount",
    "ConfidenceMean",
    "Gossiped",
    "LaplaceLabels",
    "LogitMean",
    "Mean",
    "Median",
    "MovingAverage",
    "MutualKD",
    "Packed",
    "RandomizedResponse",
    "Refitted",
    "SelfTraining",
    "TrimmedMean",
    "VanillaKD",
    "Vote",
]
