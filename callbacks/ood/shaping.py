"""Scores of changed activations or inputs: they change what the classifier sees, then any logit score judges its answer."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

from callbacks.ood.logits import Energy, behind
from lightning_idkd.callback import OodScore
from lightning_idkd.errors import UserError, require


class Shaped(OodScore):
    """Base of the activation shapings: subclasses say how features [N, F] change.

    Args:
        score: The score of the logits that follow; null for Energy.
    """

    def __init__(self, score: OodScore | None = None):
        if score is not None and type(score).perturb is not OodScore.perturb:
            raise UserError("calibration.score.score: ODIN changes the images, not their features; take another")
        self.score = score or Energy()

    @property
    def title(self):
        return f"{type(self).__name__}, then {self.score.title}"

    @property
    def fitted(self):
        return type(self).fit is not Shaped.fit or self.score.fitted

    @abstractmethod
    def shape(self, features):
        """The features [N, F] that the classifier gets."""

    def reshaped(self, outputs):
        """Outputs with shaped features and the logits that the classifier makes of them."""
        import torch

        features = self.shape(self.features(outputs))
        with torch.no_grad():
            return type(outputs)(self.head(outputs)(features), features, outputs.head)

    def fit(self, outputs, labels):
        if self.score.fitted:
            self.score.fit(self.reshaped(outputs), labels)

    def __call__(self, outputs):
        return self.score(self.reshaped(outputs))


class ReAct(Shaped):
    """Features clipped at a percentile of all own activations (Sun et al., NeurIPS 2021).

    Args:
        score: The score of the logits that follow; null for Energy.
        percentile: Share of the own activations below the clip, in (0, 1].
    """

    def __init__(self, score: OodScore | None = None, percentile: float = 0.9):
        super().__init__(score)
        require(0 < percentile <= 1, "calibration.score.percentile", percentile, "above 0 to 1")
        self.percentile = percentile

    def fit(self, outputs, labels):
        activations = self.features(outputs).flatten().sort().values
        self.clip = activations[min(int(self.percentile * len(activations)), len(activations) - 1)]
        super().fit(outputs, labels)

    def shape(self, features):
        return features.clamp(max=self.clip)


def strongest(features, percentile: float):
    """The features with all but their largest ``1 - percentile`` share, a sample, set to 0; and how many stay."""
    kept = max(1, features.shape[1] - round(features.shape[1] * percentile))
    values, at = features.topk(kept, dim=1)
    return features.new_zeros(features.shape).scatter(1, at, values), at


class ASH(Shaped):
    """Features with the weakest removed, the rest kept, made equal, or scaled up (Djurisic et al., ICLR 2023).

    Args:
        score: The score of the logits that follow; null for Energy.
        percentile: Share of a sample's features set to 0, in [0, 1).
        variant: ``p`` keeps the rest, ``b`` makes them equal with the old sum, ``s`` scales them by exp(old / new sum).
    """

    def __init__(self, score: OodScore | None = None, percentile: float = 0.65, variant: Literal["p", "b", "s"] = "s"):
        super().__init__(score)
        require(0 <= percentile < 1, "calibration.score.percentile", percentile, "0 to below 1")
        self.percentile, self.variant = percentile, variant

    def shape(self, features):
        pruned, at = strongest(features, self.percentile)
        total = features.sum(1, keepdim=True)
        if self.variant == "b":
            return pruned.scatter(1, at, (total / at.shape[1]).expand(at.shape))
        return pruned if self.variant == "p" else pruned * scaling(total, pruned)


def scaling(total, pruned):
    """exp of the sum before over the sum after pruning; 1 where nothing is active."""
    after = pruned.sum(1, keepdim=True)
    return (total / after).where(after != 0, 0).exp()


class SCALE(Shaped):
    """All features scaled by exp(sum of all / sum of the strongest) (Xu et al., ICLR 2024).

    Args:
        score: The score of the logits that follow; null for Energy.
        percentile: Share of a sample's features that are not among the strongest, in [0, 1).
    """

    def __init__(self, score: OodScore | None = None, percentile: float = 0.65):
        super().__init__(score)
        require(0 <= percentile < 1, "calibration.score.percentile", percentile, "0 to below 1")
        self.percentile = percentile

    def shape(self, features):
        return features * scaling(features.sum(1, keepdim=True), strongest(features, self.percentile)[0])


class ODIN(OodScore):
    """Softmax at a high temperature of images moved a little towards a surer answer (Liang et al., ICLR 2018), as log-odds.

    Costs a pass with gradients and one more a sample; the step is taken on normalised pixels.

    Args:
        temperature: T, above 0.
        epsilon: Size of the step.
    """

    unit = "log-odds of the top class at temperature T"

    def __init__(self, temperature: float = 1000.0, epsilon: float = 0.0014):
        require(0 < temperature < math.inf, "calibration.score.temperature", temperature, "above 0")
        require(0 <= epsilon < math.inf, "calibration.score.epsilon", epsilon, "0 or more")
        self.temperature, self.epsilon = temperature, epsilon

    def perturb(self, module, x):
        import torch

        with torch.enable_grad():
            x = x.detach().requires_grad_()
            sure = (module(x) / self.temperature).log_softmax(1).amax(1).sum()
            (slope,) = torch.autograd.grad(sure, x)
        return (x + self.epsilon * slope.sign()).detach()

    def __call__(self, outputs):
        return -behind(outputs.logits / self.temperature)[0]
