"""Losses for nodes that lack classes: they change a node's logits by its label counts before the cross-entropy."""

from __future__ import annotations

import math

from lightning_idkd.callback import Loss
from lightning_idkd.errors import require
from lightning_idkd.losses import cross_entropy

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class BalancedSoftmax(Loss):
    """Adds ``tau`` times the log of the node's (add-one) label frequencies to the logits, so that a node does not
    unlearn the classes that it lacks (Ren et al., NeurIPS 2020; Menon et al., ICLR 2021, equation 10).

    Args:
        tau: Factor, 0 or more; 0 is the cross-entropy.
    """

    def __init__(self, tau: float = 1.0):
        require(0 <= tau < math.inf, "node.loss.tau", tau, "0 or more")
        self.tau = tau

    def __call__(self, logits: Tensor, targets: Tensor, counts: Tensor, private: Tensor) -> Tensor:
        frequencies = (counts + 1) / (counts + 1).sum()
        return cross_entropy(logits + self.tau * frequencies.log(), targets)


class CalibratedLogits(Loss):
    """Subtracts a margin ``tau`` n^(-1/4) from the logit of every class of which the node has n samples (FedLC; Zhang
    et al., ICML 2022, equation 8). A class that the node lacks counts as 1e-8 samples, so that it hardly takes part.

    Args:
        tau: Factor of the margins, 0 or more; 0 is the cross-entropy.
    """

    def __init__(self, tau: float = 1.0):
        require(0 <= tau < math.inf, "node.loss.tau", tau, "0 or more")
        self.tau = tau

    def remark(self, counts: Tensor) -> str:
        return describe_single_class(counts) if self.tau > 0 else ""

    def __call__(self, logits: Tensor, targets: Tensor, counts: Tensor, private: Tensor) -> Tensor:
        return cross_entropy(logits - self.tau * counts.clamp(min=1e-8) ** -0.25, targets)


class RestrictedSoftmax(Loss):
    """Multiplies the logits of the classes that the node lacks by ``scale``, which weakens their updates (FedRS; Li and
    Zhan, KDD 2021, equation 8).

    Args:
        scale: Factor, 0 to 1; 1 is the cross-entropy. With 0, the last layer's rows of these classes get no
            gradient.
    """

    def __init__(self, scale: float = 0.5):
        require(0 <= scale <= 1, "node.loss.scale", scale, "0 to 1")
        self.scale = scale

    def remark(self, counts: Tensor) -> str:
        return describe_single_class(counts) if self.scale == 0 else ""

    def __call__(self, logits: Tensor, targets: Tensor, counts: Tensor, private: Tensor) -> Tensor:
        return cross_entropy(logits.where(counts > 0, self.scale * logits), targets)


class CentredLogits(Loss):
    """Cross-entropy with logits from which the mean logits of the distilled samples in the batch are subtracted, so
    that a class gains nothing by logits that rise for all images alike.

    This loss was first tried in this project. In a batch without distilled samples, nothing is subtracted. Gradients
    pass through the mean, also to the distilled samples.

    Args:
        tau: Factor of the log of the node's (add-one) label frequencies, which is added as in BalancedSoftmax, 0 or
            more.
    """

    def __init__(self, tau: float = 0.0):
        require(0 <= tau < math.inf, "node.loss.tau", tau, "0 or more")
        self.tau = tau

    def __call__(self, logits: Tensor, targets: Tensor, counts: Tensor, private: Tensor) -> Tensor:
        public = (~private).to(logits)
        centre = public @ logits / public.sum().clamp(min=1)
        frequencies = (counts + 1) / (counts + 1).sum()
        return cross_entropy(logits - centre + self.tau * frequencies.log(), targets)


def describe_single_class(counts: Tensor) -> str:
    """A remark on a node that has samples of one class only; empty for others."""
    if int((counts > 0).sum()) > 1:
        return ""
    return "one class only, from which the loss leaves out all others, so that the node learns nothing of its samples"
