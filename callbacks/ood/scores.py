"""Scores that need logits only, in forms that float32 does not saturate."""

from __future__ import annotations

import math

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import require


class MSP(OodScore):
    """Maximum softmax probability p (Hendrycks & Gimpel, ICLR 2017) as its log-odds log(p / (1 - p)).

    The order is that of p, without the ties that p itself has in float32 once a network is confident.
    """

    def __call__(self, outputs):
        top, at = outputs.logits.max(1)
        others = outputs.logits.scatter(1, at[:, None], -math.inf)
        return top - others.logsumexp(1)

    def from_probability(self, p: float) -> float:
        return math.log(p / (1 - p))


class Energy(OodScore):
    """Negative free energy T log sum exp(z / T) (Liu et al., NeurIPS 2020, Eq. 4).

    Args:
        temperature: T, above 0.
    """

    def __init__(self, temperature: float = 1.0):
        require(0 < temperature < math.inf, "calibration.score.temperature", temperature, "above 0")
        self.temperature = temperature

    def __call__(self, outputs):
        return self.temperature * (outputs.logits / self.temperature).logsumexp(1)
