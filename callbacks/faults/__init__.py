"""Faults: lost messages and absent nodes, which no gossip rule knows of."""

from .messages import LinkOutage, MessageLoss
from .presence import Churn, Trace

__all__ = ["Churn", "LinkOutage", "MessageLoss", "Trace"]
