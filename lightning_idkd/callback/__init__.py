"""What a researcher swaps: the bases of gossip rules, scores, thresholds and distillation, and the hooks they may use.

No postponed annotations in this package: the command line reads these signatures before torch is loaded, and to resolve postponed
ones jsonargparse would execute the TYPE_CHECKING block.
"""

from lightning_idkd.callback.distillation import Aggregation, Distillation, Encoding, Teacher
from lightning_idkd.callback.gossip import Compression, Context, Gossip
from lightning_idkd.callback.hooks import HOOKS, Callback, Run
from lightning_idkd.callback.ood import Calibration, OodScore, chance
from lightning_idkd.labels import FineTuning, Selection

__all__ = [
    "HOOKS",
    "Aggregation",
    "Calibration",
    "Callback",
    "Compression",
    "Context",
    "Distillation",
    "Encoding",
    "FineTuning",
    "Gossip",
    "OodScore",
    "Run",
    "Selection",
    "Teacher",
    "chance",
]
