"""How a node fixes its threshold."""

from __future__ import annotations

import math
from typing import Literal

from lightning_idkd.callback import Calibration, OodScore
from lightning_idkd.errors import UserError, require


class Youden(Calibration):
    """Largest true- minus false-positive rate of held-out private against other samples (Youden's J).

    Args:
        score: The out-of-distribution score; null in a config for MSP.
        against: What is not a node's own: the ``public`` set, or uniform ``noise`` images.
        pooled: Average the threshold with those of the neighbours, which are told it.
    """

    def __init__(self, score: OodScore | None = None, against: Literal["public", "noise"] = "public", pooled: bool = False):
        super().__init__(score, against, pooled)

    def threshold(self, private, others):
        from lightning_idkd.metrics import youden

        return youden(private, others)


class IdQuantile(Calibration):
    """The ``q`` quantile of the held-out private scores: a share 1 - q of own data would be kept.

    Args:
        score: The out-of-distribution score; null in a config for MSP.
        q: Share of own data given up, at least 0 and below 1.
        pooled: Average the threshold with those of the neighbours, which are told it.
    """

    fallback_below = 0  # it is a quantile already

    def __init__(self, score: OodScore | None = None, q: float = 0.05, pooled: bool = False):
        super().__init__(score, pooled=pooled)
        require(0 <= q < 1, "calibration.q", q, "0 to below 1")
        self.q = q

    def threshold(self, private, others):
        from lightning_idkd.metrics import quantile

        return quantile(private, self.q)


class TargetKept(Calibration):
    """The threshold that keeps a given share of the public set: its largest scores, and those equal to the last of them.

    Args:
        score: The out-of-distribution score; null in a config for MSP.
        fraction: The share, above 0, to 1; with ``pooled`` that of a node's own threshold.
        pooled: Average the threshold with those of the neighbours, which are told it.
    """

    fallback_below = 0

    def __init__(self, score: OodScore | None = None, fraction: float = 0.5, pooled: bool = False):
        super().__init__(score, pooled=pooled)
        require(0 < fraction <= 1, "calibration.fraction", fraction, "above 0 to 1")
        self.fraction = fraction

    def threshold(self, private, others):
        kept = max(1, round(self.fraction * len(others)))
        return others.sort(descending=True).values[kept - 1].item()


class Mixture(Calibration):
    """Where two Gaussians fitted to the public scores are equally likely: no held-out data, no labels.

    The upper one is taken for samples like a node's own. Where they do not cross between their means, the middle of these.

    Args:
        score: The out-of-distribution score; null in a config for MSP.
        pooled: Average the threshold with those of the neighbours, which are told it.
    """

    fallback_below = 0

    def __init__(self, score: OodScore | None = None, pooled: bool = False):
        super().__init__(score, pooled=pooled)

    def threshold(self, private, others):
        import numpy as np
        from sklearn.mixture import GaussianMixture

        values = others.double().cpu().numpy()
        if np.ptp(values) == 0:
            return float(values[0])
        middle, spread = values.mean(), values.std()
        values = (values - middle) / spread  # the fit adds a constant to the variances
        low, high = np.quantile(values, [0.25, 0.75])
        fit = GaussianMixture(2, means_init=[[low], [high]], random_state=0).fit(values[:, None])
        first, second = np.argsort(fit.means_[:, 0])
        grid = np.linspace(*fit.means_[[first, second], 0], 1001)
        ahead = fit.predict_proba(grid[:, None])[:, second] >= 0.5
        return float(middle + spread * (grid[ahead.argmax()] if ahead.any() and not ahead[0] else grid[500]))


class Fixed(Calibration):
    """The same threshold for all nodes, as in the authors' code (probability 0.98).

    Args:
        score: The out-of-distribution score; null in a config for MSP.
        probability: For MSP: keep samples whose top class has at least this probability.
        threshold: In the score's own unit, instead of a probability.
    """

    fallback_below = 0  # nothing is estimated

    def __init__(self, score: OodScore | None = None, probability: float | None = None, threshold: float | None = None):
        super().__init__(score)
        if (probability is None) == (threshold is None):
            raise UserError("calibration: Fixed takes either calibration.probability or calibration.threshold")
        if probability is not None:
            require(0 < probability < 1, "calibration.probability", probability, "between 0 and 1")
        if threshold is not None:
            require(math.isfinite(threshold), "calibration.threshold", threshold, "a finite number")
        self.value = threshold if probability is None else score.from_probability(probability)

    def threshold(self, private, others):
        return self.value
