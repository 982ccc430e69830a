"""Decentralised optimisers: each class is one rule, written as its paper's algebra on the rows of ``X``."""

from .asynchronous import ADPSGD, AsyncGossip, SwarmSGD
from .bias_correction import D2, EDM
from .compressed import AdaGossip, ChocoSGD
from .compression import QSGD, RandomK, Sign, TopK
from .cross_features import CCL
from .cross_gradients import NGC
from .dsgd import DSGD, AllReduce, CombineThenAdapt, Isolated
from .periodic import GossipPGA, LocalSteps
from .push_sum import SGP
from .quasi_global import QGDSGDm
from .relay import RelaySGD
from .sharpness import SharpnessAwareDSGD
from .torch_optimizer import LocalOptimizer
from .tracking import GUT, DecentLaM, GradientTracking, MomentumTracking

__all__ = [
    "ADPSGD",
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
    "AsyncGossip",
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
    "SwarmSGD",
    "TopK",
]
