"""Losses of private samples, some of which use a node's own label counts."""

from lightning_idkd.losses import CrossEntropy

from .label_skew import BalancedSoftmax, CalibratedLogits, CentredLogits, RestrictedSoftmax
from .reweighted import Focal, LabelSmoothing

__all__ = [
    "BalancedSoftmax", "CalibratedLogits", "CentredLogits", "CrossEntropy", "Focal", "LabelSmoothing",
    "RestrictedSoftmax",
]  # fmt: skip
