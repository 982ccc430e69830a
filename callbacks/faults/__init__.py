"""Faults: lost and late messages, and absent nodes, which no gossip rule knows of."""

from .lateness import Stragglers
from .messages import LinkOutage, MessageLoss
from .presence import Churn, Trace

__all__ = ["Churn", "LinkOutage", "MessageLoss", "Stragglers", "Trace"]
