"""What nodes send about public samples and how they learn from it."""

from callbacks.distillation.aggregation import ClassCount, Mean
from callbacks.distillation.idkd import IDKD, VanillaKD

__all__ = ["IDKD", "ClassCount", "Mean", "VanillaKD"]
