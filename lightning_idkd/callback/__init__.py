"""The base classes of what a researcher swaps (gossip rules, scores, thresholds, distillation), and the hooks of a run.

This package does not use postponed annotations (``from __future__ import annotations``): the command line reads these
signatures before torch is loaded, and jsonargparse would execute the TYPE_CHECKING block to resolve postponed ones.
"""

from lightning_idkd.callback.distillation import Aggregation, Distillation, Encoding, Teacher
from lightning_idkd.callback.fault import Attack, Fault, LabelAttack, check_faults
from lightning_idkd.callback.gossip import ASSUMPTIONS, Aggregator, Asynchronous, Compression, Context, Event, Gossip
from lightning_idkd.callback.hooks import HOOKS, Callback, Run
from lightning_idkd.callback.loss import Loss
from lightning_idkd.callback.ood import Calibration, OodScore, format_probability
from lightning_idkd.labels import FineTuning, Selection

__all__ = [
    "ASSUMPTIONS",
    "HOOKS",
    "Aggregation",
    "Aggregator",
    "Asynchronous",
    "Attack",
    "Calibration",
    "Callback",
    "Compression",
    "Context",
    "Distillation",
    "Encoding",
    "Event",
    "Fault",
    "FineTuning",
    "Gossip",
    "LabelAttack",
    "Loss",
    "OodScore",
    "Run",
    "Selection",
    "Teacher",
    "check_faults",
    "format_probability",
]
