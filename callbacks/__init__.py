"""What a researcher swaps: gossip rules, scores and thresholds, distillation. Named in configs by ``class_path``."""

from callbacks.distillation import IDKD, ClassCount, Mean, VanillaKD
from callbacks.gossip import DSGD, AllReduce, Isolated, QGDSGDm, RelaySGD, SharpnessAwareDSGD
from callbacks.ood import MSP, Energy, Fixed, IdQuantile, Youden

__all__ = [
    "DSGD",
    "IDKD",
    "MSP",
    "AllReduce",
    "ClassCount",
    "Energy",
    "Fixed",
    "IdQuantile",
    "Isolated",
    "Mean",
    "QGDSGDm",
    "RelaySGD",
    "SharpnessAwareDSGD",
    "VanillaKD",
    "Youden",
]
