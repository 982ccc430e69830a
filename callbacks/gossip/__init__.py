"""Decentralised optimisers: each class is one rule, written as its paper's algebra on the rows of ``X``."""

from .aggregators import BALANCE, RFA, UBAR, CoordinateMedian, CoordinateTrimmedMean, Krum, MultiKrum, SCClip
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
from .robust import Robust
from .sharpness import SharpnessAwareDSGD
from .torch_optimizer import LocalOptimizer
from .tracking import GUT, DecentLaM, GradientTracking, MomentumTracking

__all__ = [
    "ADPSGD",
    "BALANCE",
    "CCL",
    "D2",
    "DSGD",
    "EDM",
    "GUT",
    "NGC",
    "QSGD",
    "RFA",
    "SGP",
    "UBAR",
    "AdaGossip",
    "AllReduce",
    "AsyncGossip",
    "ChocoSGD",
    "CombineThenAdapt",
    "CoordinateMedian",
    "CoordinateTrimmedMean",
    "DecentLaM",
    "GossipPGA",
    "GradientTracking",
    "Isolated",
    "Krum",
    "LocalOptimizer",
    "LocalSteps",
    "MomentumTracking",
    "MultiKrum",
    "QGDSGDm",
    "RandomK",
    "RelaySGD",
    "Robust",
    "SCClip",
    "SharpnessAwareDSGD",
    "Sign",
    "SwarmSGD",
    "TopK",
]
