"""One label from several."""

from __future__ import annotations

from lightning_idkd.callback import Aggregation


class Mean(Aggregation):
    """Mean of the probabilities of those, self included, that kept the sample (Ravikumar et al., TMLR 2024)."""

    def combine(self, probabilities, kept, senders):
        return probabilities.sum(0) / kept.sum(0)[:, None]


class ClassCount(Aggregation):
    """The label of the one that holds most private samples of the class it predicts, as in the authors' code.

    There a neighbour that did not keep the sample takes part with a label of zeros, which may win and leaves the sample
    without a label; here only those that kept it do. The first of equals wins.
    """

    shares = "class histograms of private data"

    def prepare(self, run):
        self.histograms = run.network.share(run.store.counts(), run.step)

    def combine(self, probabilities, kept, senders):
        import torch

        held = torch.stack([self.histograms[j] for j in senders]).to(probabilities.device)  # [v, k]
        samples = held.gather(1, probabilities.argmax(2)).where(kept, -1)
        best = samples.argmax(0)
        return probabilities[best, torch.arange(len(best), device=best.device)]
