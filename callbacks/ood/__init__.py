"""Out-of-distribution scores (larger = more in-distribution) and thresholds."""

from .adapter import PytorchOOD
from .ensemble import RankEnsemble
from .features import KNN, RMD, DensityRatio, Mahalanobis, ViM
from .logits import GEN, MSP, Energy, Entropy, KLMatching, Margin, MaxLogit
from .shaping import ASH, ODIN, SCALE, ReAct
from .thresholds import Fixed, IdQuantile, Mixture, TargetKept, Youden

__all__ = [
    "ASH", "GEN", "KNN", "MSP", "ODIN", "RMD", "SCALE", "DensityRatio", "Energy", "Entropy", "Fixed", "IdQuantile",
    "KLMatching", "Mahalanobis", "Margin", "MaxLogit", "Mixture", "PytorchOOD", "RankEnsemble", "ReAct", "TargetKept",
    "ViM", "Youden",
]  # fmt: skip
