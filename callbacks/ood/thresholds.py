"""How a node fixes its threshold."""

from __future__ import annotations

import math

from lightning_idkd.callback import Calibration, OodScore
from lightning_idkd.errors import UserError, require


class Youden(Calibration):
    """Largest true- minus false-positive rate of held-out private against public samples (Youden's J).

    Args:
        score: The out-of-distribution score.
    """

    def __init__(self, score: OodScore):
        super().__init__(score)

    def threshold(self, private, public):
        from lightning_idkd.metrics import youden

        return youden(private, public)


class IdQuantile(Calibration):
    """The ``q`` quantile of the held-out private scores: a share 1 - q of own data would be kept.

    Args:
        score: The out-of-distribution score.
        q: Share of own data given up, at least 0 and below 1.
    """

    fallback_below = 0  # it is a quantile already

    def __init__(self, score: OodScore, q: float = 0.05):
        super().__init__(score)
        require(0 <= q < 1, "calibration.q", q, "0 to below 1")
        self.q = q

    def threshold(self, private, public):
        from lightning_idkd.metrics import quantile

        return quantile(private, self.q)


class Fixed(Calibration):
    """The same threshold for all nodes, as in the authors' code (probability 0.98).

    Args:
        score: The out-of-distribution score.
        probability: For MSP: keep samples whose top class has at least this probability.
        threshold: In the score's own unit, instead of a probability.
    """

    fallback_below = 0  # nothing is estimated

    def __init__(self, score: OodScore, probability: float | None = None, threshold: float | None = None):
        super().__init__(score)
        if (probability is None) == (threshold is None):
            raise UserError("calibration: Fixed takes either calibration.probability or calibration.threshold")
        if probability is not None:
            require(0 < probability < 1, "calibration.probability", probability, "between 0 and 1")
        if threshold is not None:
            require(math.isfinite(threshold), "calibration.threshold", threshold, "a finite number")
        self.value = threshold if probability is None else score.from_probability(probability)

    def threshold(self, private, public):
        return self.value
