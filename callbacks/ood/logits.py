"""Scores of the logits alone, in forms that do not saturate where p is 1 in float32, as of a confident network."""

from __future__ import annotations

import math

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import require
from lightning_idkd.labels import Outputs

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


def compare_with_top(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log S [N], the top logit [N, 1] and its class [N, 1], where S is the sum of exp(z_j - z_top) over the
    other classes, so that p_top = 1 / (1 + S)."""
    top, top_class = logits.max(1, keepdim=True)
    return logits.scatter(1, top_class, -math.inf).logsumexp(1) - top[:, 0], top, top_class


class MSP(OodScore):
    """Maximum softmax probability p (Hendrycks & Gimpel, ICLR 2017), as its log-odds log(p / (1 - p)).

    The order is that of p, without the ties that p has in float32 when a network is confident.
    """

    unit = "log-odds of the top class"

    def __call__(self, outputs: Outputs) -> Tensor:
        return -compare_with_top(outputs.logits)[0]

    def from_probability(self, p: float) -> float:
        return math.log(p / (1 - p))

    def probability(self, score: float) -> float:
        return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


class MaxLogit(OodScore):
    """The largest logit (Hendrycks et al., ICML 2022)."""

    unit = "a logit"

    def __call__(self, outputs: Outputs) -> Tensor:
        return outputs.logits.amax(1)


class Margin(OodScore):
    """The largest logit minus the second largest, which is the log of the ratio of their probabilities."""

    unit = "difference of two logits"

    def __call__(self, outputs: Outputs) -> Tensor:
        first, second = outputs.logits.topk(2, dim=1).values.unbind(1)
        return first - second


class Energy(OodScore):
    """Negative free energy T log sum exp(z / T) (Liu et al., NeurIPS 2020, Eq. 4).

    Args:
        temperature: T, above 0.
    """

    unit = "a logit"

    def __init__(self, temperature: float = 1.0):
        require(0 < temperature < math.inf, "calibration.score.temperature", temperature, "above 0")
        self.temperature = temperature

    def __call__(self, outputs: Outputs) -> Tensor:
        return self.temperature * (outputs.logits / self.temperature).logsumexp(1)


class Entropy(OodScore):
    """Negative entropy H of the softmax, as -log H, which has the same order and no ties where H is tiny.

    With S = (1 - p_top) / p_top, H / S = log(1 + S) / S + (mean of z_top - z_j over the other classes, weighted by
    their probabilities) / (1 + S).
    """

    unit = "minus the log of nats"

    def __call__(self, outputs: Outputs) -> Tensor:
        logits = outputs.logits
        log_s, top, top_class = compare_with_top(logits)
        s = log_s.exp()
        others = logits.scatter(1, top_class, -math.inf).softmax(1)
        gap = (others * (top - logits)).sum(1)
        share = (s.log1p() / s).where(s > 1e-30, 1.0)
        return -(log_s + (share + gap / (1 + s)).log())


class GEN(OodScore):
    """Negative generalised entropy: minus the sum of (p (1 - p))^gamma over the largest probabilities (Liu et al., CVPR
    2023, Eq. 4).

    Args:
        gamma: Exponent, in (0, 1].
        largest: Number of largest probabilities in the sum; null for all.
    """

    unit = "minus a generalised entropy"

    def __init__(self, gamma: float = 0.1, largest: int | None = None):
        require(0 < gamma <= 1, "calibration.score.gamma", gamma, "above 0 to 1")
        require(largest is None or largest >= 1, "calibration.score.largest", largest, "1 or more, or null for all")
        self.gamma, self.largest = gamma, largest

    def __call__(self, outputs: Outputs) -> Tensor:
        import torch

        logits = outputs.logits
        log_s, _, top_class = compare_with_top(logits)
        log_top = -log_s.exp().log1p()[:, None]
        log_p = logits.log_softmax(1).scatter(1, top_class, log_top)
        log_not_p = (-log_p.exp()).log1p().scatter(1, top_class, log_s[:, None] + log_top)
        terms = torch.exp(self.gamma * (log_p + log_not_p))
        if self.largest is not None:
            terms = terms.gather(1, logits.topk(min(self.largest, logits.shape[1]), dim=1).indices)
        return -terms.sum(1)


class KLMatching(OodScore):
    """Minus the smallest KL(p || typical p of a class) over the classes that a node predicts (Hendrycks et al., ICML
    2022).

    The typical p of a class is the mean over the node's training samples that it predicts to be of that class. All is
    computed in float64, since the divergence between two confident predictions is a tiny difference.
    """

    unit = "minus nats"

    @staticmethod
    def _log_p(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns log p [N, k] and the top class [N]; log p_top = -log(1 + S) is exact even where p_top is nearly 1."""
        logits = logits.double()
        log_s, _, top_class = compare_with_top(logits)
        return logits.log_softmax(1).scatter(1, top_class, -log_s.exp().log1p()[:, None]), top_class[:, 0]

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        import torch

        log_p, predicted = self._log_p(outputs.logits)
        self.typical = torch.stack([self._log_mean(log_p[predicted == c], c) for c in predicted.unique()])

    @staticmethod
    def _log_mean(log_p: Tensor, top: Tensor) -> Tensor:
        """Returns the log [k] of the mean probabilities of samples that have the same class ``top`` on top."""
        mean = log_p.logsumexp(0) - math.log(len(log_p))
        mean[top] = log_p[:, top].expm1().mean().log1p()
        return mean

    def __call__(self, outputs: Outputs) -> Tensor:
        log_p, _ = self._log_p(outputs.logits)
        p = log_p.exp()
        return ((p @ self.typical.T) - (p * log_p).sum(1, keepdim=True)).amax(1).float()
