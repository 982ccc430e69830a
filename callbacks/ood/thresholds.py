"""Calibrations: ways to choose a node's threshold."""

from __future__ import annotations

import math
from typing import Literal

from lightning_idkd.callback import Calibration, OodScore
from lightning_idkd.errors import UserError, require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class Youden(Calibration):
    """Maximises the true-positive minus the false-positive rate of held-out private against other samples (Youden's J).

    Args:
        score: The out-of-distribution score; null in a config means MSP.
        against: The samples that are not a node's own: the ``public`` set, or uniform ``noise``.
        pooled: Average the threshold with those of the neighbours, which requires sending it to them.
    """

    def __init__(self, score: OodScore | None = None, against: Literal["public", "noise"] = "public",
                 pooled: bool = False):  # fmt: skip
        super().__init__(score, against, pooled)

    def threshold(self, private: Tensor, others: Tensor) -> float:
        from lightning_idkd.metrics import youden

        return youden(private, others)


class IdQuantile(Calibration):
    """Takes the ``q`` quantile of the held-out private scores, so that a share 1 - q of own data would be kept.

    Args:
        score: The out-of-distribution score; null in a config means MSP.
        q: Share of the node's own data that would not be kept, at least 0 and below 1.
        pooled: Average the threshold with those of the neighbours, which requires sending it to them.
    """

    fallback_below = 0  # the threshold is a quantile already

    def __init__(self, score: OodScore | None = None, q: float = 0.05, pooled: bool = False):
        super().__init__(score, pooled=pooled)
        require(0 <= q < 1, "calibration.q", q, "0 to below 1")
        self.q = q

    def threshold(self, private: Tensor, others: Tensor) -> float:
        from lightning_idkd.metrics import quantile

        return quantile(private, self.q)


class TargetKept(Calibration):
    """Keeps a given share of the public set: the samples with the largest scores, and those equal to the last of these.

    Args:
        score: The out-of-distribution score; null in a config means MSP.
        fraction: The share that is kept, above 0 to 1; with ``pooled`` it applies to the thresholds before averaging.
        pooled: Average the threshold with those of the neighbours, which requires sending it to them.
    """

    fallback_below = 0

    def __init__(self, score: OodScore | None = None, fraction: float = 0.5, pooled: bool = False):
        super().__init__(score, pooled=pooled)
        require(0 < fraction <= 1, "calibration.fraction", fraction, "above 0 to 1")
        self.fraction = fraction

    def threshold(self, private: Tensor, others: Tensor) -> float:
        count = max(1, round(self.fraction * len(others)))
        return others.sort(descending=True).values[count - 1].item()


class Mixture(Calibration):
    """Fits two Gaussians to the public scores, and takes the score at which both are equally likely; this needs neither
    held-out data nor labels.

    The upper Gaussian is assumed to be of samples like the node's own. If the two do not cross between their means, the
    threshold is halfway between the means.

    Args:
        score: The out-of-distribution score; null in a config means MSP.
        pooled: Average the threshold with those of the neighbours, which requires sending it to them.
    """

    fallback_below = 0

    def __init__(self, score: OodScore | None = None, pooled: bool = False):
        super().__init__(score, pooled=pooled)

    def threshold(self, private: Tensor, others: Tensor) -> float:
        import numpy as np
        from sklearn.mixture import GaussianMixture

        values = others.double().cpu().numpy()
        if np.ptp(values) == 0:
            return float(values[0])
        mean, deviation = values.mean(), values.std()
        values = (values - mean) / deviation  # since the fit adds a constant to the variances
        low, high = np.quantile(values, [0.25, 0.75])
        fit = GaussianMixture(2, means_init=[[low], [high]], random_state=0).fit(values[:, None])
        first, second = np.argsort(fit.means_[:, 0])
        grid = np.linspace(*fit.means_[[first, second], 0], 1001)
        upper = fit.predict_proba(grid[:, None])[:, second] >= 0.5
        crossing = grid[upper.argmax()] if upper.any() and not upper[0] else grid[500]
        return float(mean + deviation * crossing)


class Fixed(Calibration):
    """Uses the same threshold at all nodes, as in the authors' code (probability 0.98).

    Args:
        score: The out-of-distribution score; null in a config means MSP.
        probability: With the score MSP, keep samples whose top class has at least this probability.
        threshold: The threshold in the score's own unit, instead of a probability.
    """

    fallback_below = 0  # nothing is estimated

    def __init__(self, score: OodScore | None = None, probability: float | None = None, threshold: float | None = None):
        super().__init__(score)
        if (probability is None) == (threshold is None):
            raise UserError("calibration: Fixed takes either calibration.probability or calibration.threshold")
        if probability is not None:
            require(0 < probability < 1, "calibration.probability", probability, "between 0 and 1")
            self.value = self.score.from_probability(probability)
        if threshold is not None:
            require(math.isfinite(threshold), "calibration.threshold", threshold, "a finite number")
            self.value = threshold

    def threshold(self, private: Tensor, others: Tensor) -> float:
        return self.value
