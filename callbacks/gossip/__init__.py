"""Decentralised optimisers: each class is one rule, written as its paper's algebra on the rows of ``X``."""

from callbacks.gossip.bias_correction import D2, EDM
from callbacks.gossip.compressed import AdaGossip, ChocoSGD
from callbacks.gossip.compression import QSGD, RandomK, Sign, TopK
from callbacks.gossip.cross_features import CCL
from callbacks.gossip.cross_gradients import NGC
from callbacks.gossip.dsgd import DSGD, AllReduce, CombineThenAdapt, Isolated
from callbacks.gossip.periodic import GossipPGA, LocalSteps
from callbacks.gossip.push_sum import SGP
from callbacks.gossip.quasi_global import QGDSGDm
from callbacks.gossip.relay import RelaySGD
from callbacks.gossip.sharpness import SharpnessAwareDSGD
from callbacks.gossip.torch_optimizer import LocalOptimizer
from callbacks.gossip.tracking import GUT, DecentLaM, GradientTracking, MomentumTracking

__all__ = [
    "CCL",
    "D2",
    "DSGD",
    "EDM",
    "GUT",
    "NGC",
    "QSGD",
    "SGP",
    "AdaGossip",
    "AllReduce",
    "ChocoSGD",
    "CombineThenAdapt",
    "DecentLaM",
    "GossipPGA",
    "GradientTracking",
    "Isolated",
    "LocalOptimizer",
    "LocalSteps",
    "MomentumTracking",
    "QGDSGDm",
    "RandomK",
    "RelaySGD",
    "SharpnessAwareDSGD",
    "Sign",
    "TopK",
]
