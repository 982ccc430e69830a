"""What a researcher swaps: gossip rules, scores and thresholds, distillation. Named in configs by ``class_path``."""

from callbacks.distillation import IDKD, VanillaKD
from callbacks.gossip import DSGD, AllReduce, Isolated, QGDSGDm, RelaySGD, SharpnessAwareDSGD
from callbacks.ood import MSP, Energy, Fixed, IdQuantile, Youden

__all__ = ["DSGD", "IDKD", "MSP", "AllReduce", "Energy", "Fixed", "IdQuantile", "Isolated", "QGDSGDm", "RelaySGD",
           "SharpnessAwareDSGD", "VanillaKD", "Youden"]  # fmt: skip
