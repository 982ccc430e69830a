"""Scores that change activations or samples first; then a score of the logits judges the classifier's answer."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal

from lightning_idkd.callback import OodScore
from lightning_idkd.errors import UserError, require
from lightning_idkd.labels import Outputs

from .logits import Energy, compare_with_top

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor

    from lightning_idkd.nodes.node import NodeModule


class Shaped(OodScore):
    """Base of activation shaping; subclasses define how features [N, F] change.

    Args:
        score: The score of the logits that follow from the changed features; null for Energy.
    """

    def __init__(self, score: OodScore | None = None):
        if score is not None and type(score).perturb is not OodScore.perturb:
            name = type(score).__name__
            raise UserError(
                f"calibration.score.score: {name} changes the samples, not the features; take another score"
            )
        self.score = score or Energy()

    @property
    def title(self) -> str:
        return f"{type(self).__name__}, then {self.score.title}"

    @property
    def fitted(self) -> bool:
        return type(self).fit is not Shaped.fit or self.score.fitted

    @abstractmethod
    def shape(self, features: Tensor) -> Tensor:
        """Returns the features [N, F] that the classifier is given."""

    def reshape(self, outputs: Outputs) -> Outputs:
        """Returns outputs with changed features, and with the logits that the classifier computes from them."""
        import torch

        features = self.shape(self.features(outputs))
        with torch.no_grad():
            return type(outputs)(self.head(outputs)(features), features, outputs.head)

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        if self.score.fitted:
            self.score.fit(self.reshape(outputs), labels)

    def __call__(self, outputs: Outputs) -> Tensor:
        return self.score(self.reshape(outputs))


class ReAct(Shaped):
    """Clips features at a percentile of all activations of the node's training samples (Sun et al., NeurIPS 2021).

    Args:
        score: The score of the logits that follow from the changed features; null for Energy.
        percentile: Share of these activations below the clip, in (0, 1].
    """

    def __init__(self, score: OodScore | None = None, percentile: float = 0.9):
        super().__init__(score)
        require(0 < percentile <= 1, "calibration.score.percentile", percentile, "above 0 to 1")
        self.percentile = percentile

    def fit(self, outputs: Outputs, labels: Tensor) -> None:
        activations = self.features(outputs).flatten().sort().values
        self.clip = activations[min(int(self.percentile * len(activations)), len(activations) - 1)]
        super().fit(outputs, labels)

    def shape(self, features: Tensor) -> Tensor:
        return features.clamp(max=self.clip)


def keep_strongest(features: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """Sets all but the largest ``1 - percentile`` share of each sample's features to 0; returns them and the index of
    the rest."""
    count = max(1, features.shape[1] - round(features.shape[1] * percentile))
    values, index = features.topk(count, dim=1)
    return features.new_zeros(features.shape).scatter(1, index, values), index


class ASH(Shaped):
    """Sets each sample's weakest features to 0, and keeps the rest, makes them equal, or scales them up (Djurisic et
    al., ICLR 2023).

    Args:
        score: The score of the logits that follow from the changed features; null for Energy.
        percentile: Share of a sample's features set to 0, in [0, 1).
        variant: ``p`` keeps the rest; ``b`` makes them equal, with the sum of all features; ``s`` multiplies them by
            exp(sum of all / sum of the rest).
    """

    def __init__(self, score: OodScore | None = None, percentile: float = 0.65, variant: Literal["p", "b", "s"] = "s"):
        super().__init__(score)
        require(0 <= percentile < 1, "calibration.score.percentile", percentile, "0 to below 1")
        self.percentile, self.variant = percentile, variant

    def shape(self, features: Tensor) -> Tensor:
        pruned, index = keep_strongest(features, self.percentile)
        total = features.sum(1, keepdim=True)
        if self.variant == "b":
            return pruned.scatter(1, index, (total / index.shape[1]).expand(index.shape))
        return pruned if self.variant == "p" else pruned * compute_scale(total, pruned)


def compute_scale(total: Tensor, pruned: Tensor) -> Tensor:
    """Returns exp(sum before / sum after pruning) [N, 1]; 1 where the sum after pruning is 0."""
    after = pruned.sum(1, keepdim=True)
    return (total / after).where(after != 0, 0).exp()


class SCALE(Shaped):
    """Multiplies all features by exp(sum of all / sum of the strongest) (Xu et al., ICLR 2024).

    Args:
        score: The score of the logits that follow from the changed features; null for Energy.
        percentile: Share of a sample's features that do not count as strongest, in [0, 1).
    """

    def __init__(self, score: OodScore | None = None, percentile: float = 0.65):
        super().__init__(score)
        require(0 <= percentile < 1, "calibration.score.percentile", percentile, "0 to below 1")
        self.percentile = percentile

    def shape(self, features: Tensor) -> Tensor:
        pruned, _ = keep_strongest(features, self.percentile)
        return features * compute_scale(features.sum(1, keepdim=True), pruned)


class ODIN(OodScore):
    """Maximum softmax probability at a high temperature, as log-odds, of samples moved slightly towards a more
    confident answer (Liang et al., ICLR 2018).

    It costs a forward and backward pass and one more forward pass per sample. The step is taken on normalised inputs.

    Args:
        temperature: T, above 0.
        epsilon: Size of the step, 0 or more.
    """

    unit = "log-odds of the top class at temperature T"

    def __init__(self, temperature: float = 1000.0, epsilon: float = 0.0014):
        require(0 < temperature < math.inf, "calibration.score.temperature", temperature, "above 0")
        require(0 <= epsilon < math.inf, "calibration.score.epsilon", epsilon, "0 or more")
        self.temperature, self.epsilon = temperature, epsilon

    def perturb(self, module: NodeModule, x: Tensor) -> Tensor:
        import torch

        with torch.enable_grad():
            x = x.detach().requires_grad_()
            sure = (module(x) / self.temperature).log_softmax(1).amax(1).sum()
            (slope,) = torch.autograd.grad(sure, x)
        return (x + self.epsilon * slope.sign()).detach()

    def __call__(self, outputs: Outputs) -> Tensor:
        return -compare_with_top(outputs.logits / self.temperature)[0]
