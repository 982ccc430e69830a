"""Out-of-distribution scores (larger = more in-distribution) and thresholds."""

from callbacks.ood.scores import MSP, Energy
from callbacks.ood.thresholds import Fixed, IdQuantile, Youden

__all__ = ["MSP", "Energy", "Fixed", "IdQuantile", "Youden"]
