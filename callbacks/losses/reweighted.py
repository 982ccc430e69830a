"""Losses that use the targets or the difficulty of a sample, but no label counts."""

from __future__ import annotations

import math

from lightning_idkd.callback import Loss
from lightning_idkd.errors import require
from lightning_idkd.losses import cross_entropy

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class LabelSmoothing(Loss):
    """Cross-entropy with targets that are mixed with the uniform distribution (Szegedy et al., CVPR 2016, section 7).

    Args:
        epsilon: Share of the uniform distribution, 0 to below 1.
    """

    def __init__(self, epsilon: float = 0.1):
        require(0 <= epsilon < 1, "node.loss.epsilon", epsilon, "0 to below 1")
        self.epsilon = epsilon

    def __call__(self, logits: Tensor, targets: Tensor, counts: Tensor, private: Tensor) -> Tensor:
        return cross_entropy(logits, (1 - self.epsilon) * targets + self.epsilon / targets.shape[1])


class Focal(Loss):
    """Cross-entropy with each term multiplied by (1 - p)^gamma, so that samples that are classified well count less
    (Lin et al., ICCV 2017, equation 4).

    Args:
        gamma: Exponent, 0 or more; 0 is the cross-entropy.
    """

    def __init__(self, gamma: float = 2.0):
        require(0 <= gamma < math.inf, "node.loss.gamma", gamma, "0 or more")
        self.gamma = gamma

    def __call__(self, logits: Tensor, targets: Tensor, counts: Tensor, private: Tensor) -> Tensor:
        log_p = logits.log_softmax(1)
        others = (1 - log_p.exp()).clamp(min=1e-12)  # a power below 1 has no gradient at 0
        return -(targets * others**self.gamma * log_p).sum(1)
