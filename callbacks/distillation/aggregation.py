"""One label from several."""

from __future__ import annotations

import math

from lightning_idkd.callback import Aggregation
from lightning_idkd.errors import require


class Mean(Aggregation):
    """Mean of the probabilities of those, self included, that kept the sample (Ravikumar et al., TMLR 2024)."""

    def combine(self, probabilities, votes, senders):
        return (probabilities * votes[..., None]).sum(0) / votes.sum(0)[:, None]


class LogitMean(Aggregation):
    """Softmax of the mean logits (FedMD, Li & Wang 2019; FedDF, Lin et al., NeurIPS 2020), of log p instead: they differ by a
    constant a sample, which the softmax does not see."""

    def combine(self, probabilities, votes, senders):
        logs = probabilities.clamp_min(1e-30).log()
        return ((logs * votes[..., None]).sum(0) / votes.sum(0)[:, None]).softmax(1)


class ConfidenceMean(Mean):
    """Mean of the probabilities, each weighted by how sure it is: 1 - entropy / log k."""

    def combine(self, probabilities, votes, senders):
        from lightning_idkd.metrics import confidence

        sure = confidence(probabilities).clamp_min(1e-6)  # all at random count alike
        return super().combine(probabilities, votes * sure, senders)


class ERA(Mean):
    """The mean sharpened by a softmax of its own, entropy-reduction aggregation (DS-FL, Itahara et al., 2021, Eq. 14).

    Args:
        temperature: T of softmax(mean / T), above 0; small is sharp.
    """

    def __init__(self, temperature: float = 0.1):
        require(0 < temperature < math.inf, "distillation.aggregation.temperature", temperature, "above 0")
        self.temperature = temperature

    def combine(self, probabilities, votes, senders):
        return (super().combine(probabilities, votes, senders) / self.temperature).softmax(1)


class Vote(Mean):
    """Share of the votes for each class, one sender one vote."""

    def combine(self, probabilities, votes, senders):
        import torch.nn.functional as F

        ballots = F.one_hot(probabilities.argmax(2), probabilities.shape[2]).to(probabilities)
        return super().combine(ballots, votes, senders)


class ClassCount(Aggregation):
    """The label of the one that holds most private samples of the class it predicts, as in the authors' code.

    There a neighbour that did not keep the sample takes part with a label of zeros, which may win and leaves the sample
    without a label; here only those that kept it do. The first of equals wins.
    """

    shares = "class histograms of private data"

    def prepare(self, run, step):
        self.histograms = run.network.share(run.store.counts(), step)

    def combine(self, probabilities, votes, senders):
        import torch

        held = torch.stack([self.histograms[j] for j in senders]).to(probabilities.device)  # [v, k]
        samples = held.gather(1, probabilities.argmax(2)).where(votes > 0, -1)
        best = samples.argmax(0)
        return probabilities[best, torch.arange(len(best), device=best.device)]
