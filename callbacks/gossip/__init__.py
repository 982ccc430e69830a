"""Decentralised optimisers: one rule a class, the paper's algebra on the rows."""

from callbacks.gossip.dsgd import DSGD, AllReduce, CombineThenAdapt, Isolated
from callbacks.gossip.quasi_global import QGDSGDm
from callbacks.gossip.relay import RelaySGD
from callbacks.gossip.sharpness import SharpnessAwareDSGD

__all__ = [
    "DSGD",
    "AllReduce",
    "CombineThenAdapt",
    "Isolated",
    "QGDSGDm",
    "RelaySGD",
    "SharpnessAwareDSGD",
]
