"""Ways to fit a linear layer to class means and covariances of features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from lightning_idkd.errors import require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass
class Statistics:
    """Statistics of the features [N, F] of all nodes, by class, as one node has them."""

    share: Tensor
    """Frequency of every class [k]."""
    mean: Tensor
    """Mean features of every class [k, F]; 0 for a class that no node has."""
    covariance: Tensor
    """Covariance [k, F, F] of the features of every class or, pooled over the classes, [F, F]."""

    @property
    def pooled(self) -> Tensor:
        """Covariance [F, F] of features around the mean of their class, over all classes."""
        if self.covariance.dim() == 2:
            return self.covariance
        return (self.share[:, None, None] * self.covariance).sum(0)


class Head(ABC):
    """A way to fit the last layer. All classes count alike, however many samples they have."""

    per_class: bool = False
    """Whether the fit needs a covariance for every class, instead of one for all classes."""

    @abstractmethod
    def fit(self, statistics: Statistics, generator: Generator) -> tuple[Tensor, Tensor]:
        """Weight [k, F] and bias [k] of the layer, in the type of the statistics."""


def shrink(covariance: Tensor, shrinkage: float) -> Tensor:
    """Covariances [..., F, F], of which a share is replaced by the sphere of the same trace."""
    import torch

    F = covariance.shape[-1]
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    sphere = torch.eye(F, dtype=covariance.dtype, device=covariance.device) * scale.clamp(min=1e-12)
    return (1 - shrinkage) * covariance + shrinkage * sphere


class LDA(Head):
    """Linear discriminant analysis with equal class frequencies.

    Args:
        shrinkage: Share of the covariance that is replaced by a sphere of the same trace, 0 to 1.
    """

    def __init__(self, shrinkage: float = 0.01):
        require(0 <= shrinkage <= 1, "callbacks.head.shrinkage", shrinkage, "0 to 1")
        self.shrinkage = shrinkage

    def fit(self, statistics: Statistics, generator: Generator) -> tuple[Tensor, Tensor]:
        import torch

        covariance = shrink(statistics.pooled, self.shrinkage)
        weight = torch.linalg.lstsq(covariance, statistics.mean.T).solution.T
        return weight, -0.5 * (weight * statistics.mean).sum(1)


class NearestMean(Head):
    """The class whose mean features are nearest (NCM; Mensink et al., TPAMI 2013)."""

    def fit(self, statistics: Statistics, generator: Generator) -> tuple[Tensor, Tensor]:
        return statistics.mean, -0.5 * statistics.mean.square().sum(1)


class VirtualFeatures(Head):
    """Logistic regression on features that are drawn from a normal distribution of every class (CCVR; Luo et al.,
    NeurIPS 2021).

    Args:
        samples: Number of features drawn for a class.
        weight_decay: L2 coefficient of the regression.
        shrinkage: Share of every covariance that is replaced by a sphere of the same trace, 0 to 1.
    """

    per_class = True

    def __init__(self, samples: int = 200, weight_decay: float = 1e-3, shrinkage: float = 0.01):
        require(samples >= 1, "callbacks.head.samples", samples, "1 or more")
        require(0 < weight_decay < math.inf, "callbacks.head.weight_decay", weight_decay, "above 0")
        require(0 <= shrinkage <= 1, "callbacks.head.shrinkage", shrinkage, "0 to 1")
        self.samples, self.weight_decay, self.shrinkage = samples, weight_decay, shrinkage

    def fit(self, statistics: Statistics, generator: Generator) -> tuple[Tensor, Tensor]:
        import torch

        x, y = self.draw(statistics, generator)
        k, F = statistics.mean.shape
        scale = x.square().mean().sqrt().clamp(min=1e-12)  # the regression sees features of size 1
        parameters = x.new_zeros(k, F + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = x / scale @ parameters[:, :F].T + parameters[:, F]
            value = torch.nn.functional.cross_entropy(logits, y) + self.weight_decay * parameters[:, :F].square().sum()
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        fitted = parameters.detach()
        return fitted[:, :F] / scale, fitted[:, F]

    def draw(self, statistics: Statistics, generator: Generator) -> tuple[Tensor, Tensor]:
        """Features [k * samples, F] and their classes; ``samples`` of every class that a node has."""
        import torch

        values, vectors = torch.linalg.eigh(shrink(statistics.covariance, self.shrinkage))
        roots = vectors * values.clamp(min=0).sqrt()[:, None, :]
        classes = (statistics.share > 0).nonzero()[:, 0]
        shape = len(classes), self.samples, statistics.mean.shape[1]
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(statistics.mean)
        x = statistics.mean[classes, None] + noise @ roots[classes].mT
        return x.flatten(0, 1), classes.repeat_interleave(self.samples)
