"""Faults: lost and late messages, absent nodes and liars, which no gossip rule knows of."""

from .attacks import ALIE, IPM, Dissensus, Noise, SignFlip, WrongLabels
from .dropped import LinkOutage, MessageLoss
from .lateness import Stragglers
from .liars import Liars
from .presence import Churn, Trace

__all__ = [
    "ALIE",
    "IPM",
    "Churn",
    "Dissensus",
    "Liars",
    "LinkOutage",
    "MessageLoss",
    "Noise",
    "SignFlip",
    "Stragglers",
    "Trace",
    "WrongLabels",
]
