"""Aggregations: ways to combine several labels of a sample into one."""

from __future__ import annotations

import math

from lightning_idkd.callback import Aggregation, Run
from lightning_idkd.errors import require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class Mean(Aggregation):
    """Mean of the probabilities from the nodes (itself included) that kept the sample (Ravikumar et al., TMLR 2024)."""

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        return (probabilities * votes[..., None]).sum(0) / votes.sum(0)[:, None]


class LogitMean(Aggregation):
    """Softmax of the mean logits (FedMD, Li & Wang 2019; FedDF, Lin et al., NeurIPS 2020). Means are over log p, which
    differs from the logits by a constant per sample, to which the softmax is invariant."""

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        logs = probabilities.clamp_min(1e-30).log()
        return ((logs * votes[..., None]).sum(0) / votes.sum(0)[:, None]).softmax(1)


class ConfidenceMean(Mean):
    """Mean of the probabilities, each weighted by its confidence, 1 - entropy / log k."""

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        from lightning_idkd.metrics import confidence

        weights = confidence(probabilities).clamp_min(1e-6)  # equal weights if all labels are uniform
        return super().combine(probabilities, votes * weights, senders)


class ERA(Mean):
    """Entropy-reduction aggregation: the softmax of the mean probabilities at a low temperature (DS-FL, Itahara et al.,
    2021, Eq. 14).

    Args:
        temperature: T in softmax(mean / T), above 0; a smaller T gives sharper labels.
    """

    def __init__(self, temperature: float = 0.1):
        require(0 < temperature < math.inf, "distillation.aggregation.temperature", temperature, "above 0")
        self.temperature = temperature

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        return (super().combine(probabilities, votes, senders) / self.temperature).softmax(1)


class Vote(Mean):
    """Share of votes for each class, where each sender votes for its most probable class."""

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        import torch.nn.functional as F

        ballots = F.one_hot(probabilities.argmax(2), probabilities.shape[2]).to(probabilities)
        return super().combine(ballots, votes, senders)


class ClassCount(Aggregation):
    """The label of the node that has most private samples of the class that it predicts, as in the authors' code.

    In that code a neighbour that did not keep the sample takes part with a label of zeros, which may win and leave the
    sample without a label; here only nodes that kept the sample take part. Of equals the first wins. A node that lies
    about its histogram reads the false one, too, when it combines labels for itself.
    """

    shares = "class histograms of private data"

    def prepare(self, run: Run, step: int) -> None:
        self.histograms = run.network.share(run.store.counts(), step)

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        import torch

        histograms = torch.stack([self.histograms[j] for j in senders]).to(probabilities.device)  # [v, k]
        samples = histograms.gather(1, probabilities.argmax(2)).where(votes > 0, -1)
        best = samples.argmax(0)
        return probabilities[best, torch.arange(len(best), device=best.device)]
