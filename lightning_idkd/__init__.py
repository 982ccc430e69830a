"""In-Distribution Knowledge Distillation for decentralised learning.

Light names are imported at once, those that need torch or much else only when used, so that the command line answers
at once.
"""

from importlib import import_module
from typing import Any

from lightning_idkd import checkout
from lightning_idkd.callback import (
    HOOKS,
    Aggregation,
    Aggregator,
    Attack,
    Calibration,
    Callback,
    Compression,
    Context,
    Distillation,
    Encoding,
    Fault,
    Gossip,
    LabelAttack,
    Loss,
    OodScore,
    Teacher,
)
from lightning_idkd.clock import Times
from lightning_idkd.config import Config
from lightning_idkd.data.images import Images
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.partition import Partition
from lightning_idkd.data.samples import Remarks, Samples
from lightning_idkd.data.source import Source
from lightning_idkd.data.vectors import VectorSource
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Topology
from lightning_idkd.labels import FineTuning, Labels, Outputs, Selection
from lightning_idkd.models import Architecture
from lightning_idkd.schedule import Schedule
from lightning_idkd.training.fit import fit

checkout.install()

_LATER = {
    "Network": "network",
    "NodeModule": "nodes.node",
    "NodeStack": "nodes.stack",
    "Orchestrator": "training.orchestrator",
    "Store": "data.store",
    "compare": "analysis.compare",
    "load": "analysis.load",
}

__all__ = [
    "HOOKS",
    "Aggregation",
    "Aggregator",
    "Architecture",
    "Attack",
    "Calibration",
    "Callback",
    "Compression",
    "Config",
    "Context",
    "Distillation",
    "Encoding",
    "Fault",
    "FineTuning",
    "Gossip",
    "Graph",
    "Images",
    "Inputs",
    "LabelAttack",
    "Labels",
    "Loss",
    "OodScore",
    "Outputs",
    "Partition",
    "Remarks",
    "Samples",
    "Schedule",
    "Selection",
    "Source",
    "Teacher",
    "Times",
    "Topology",
    "UserError",
    "VectorSource",
    "fit",
    *_LATER,
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"lightning_idkd.{_LATER[name]}"), name)
    raise AttributeError(f"module 'lightning_idkd' has no attribute '{name}'")
