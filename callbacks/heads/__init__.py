"""Last layers that nodes fit to statistics of all nodes' features, and the callback that does so after training."""

from .calibrated import CalibratedHead
from .fits import LDA, Head, NearestMean, VirtualFeatures

__all__ = ["LDA", "CalibratedHead", "Head", "NearestMean", "VirtualFeatures"]
