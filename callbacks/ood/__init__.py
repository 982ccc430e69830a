"""Out-of-distribution scores (larger = more in-distribution) and thresholds."""

from callbacks.ood.adapter import PytorchOOD
from callbacks.ood.ensemble import RankEnsemble
from callbacks.ood.features import KNN, RMD, DensityRatio, Mahalanobis, ViM
from callbacks.ood.logits import GEN, MSP, Energy, Entropy, KLMatching, Margin, MaxLogit
from callbacks.ood.shaping import ASH, ODIN, SCALE, ReAct
from callbacks.ood.thresholds import Fixed, IdQuantile, Mixture, TargetKept, Youden

__all__ = [
    "ASH", "GEN", "KNN", "MSP", "ODIN", "RMD", "SCALE", "DensityRatio", "Energy", "Entropy", "Fixed", "IdQuantile",
    "KLMatching", "Mahalanobis", "Margin", "MaxLogit", "Mixture", "PytorchOOD", "RankEnsemble", "ReAct", "TargetKept",
    "ViM", "Youden",
]  # fmt: skip
