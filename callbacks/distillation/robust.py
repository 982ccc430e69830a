"""Aggregations of labels that bear some senders who lie."""

from __future__ import annotations

import math

from lightning_idkd.callback import Aggregation, Run
from lightning_idkd.errors import UserError, require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class TrimmedMean(Aggregation):
    """Mean of the probabilities of each class without the ``trim`` largest and the ``trim`` smallest of a sample's
    labels (coordinate-wise trimmed mean; Yin et al., ICML 2018), scaled to sum to 1. It bears ``trim`` liars.

    A sample with 2 ``trim`` labels or fewer loses as many as leave one or two.

    Args:
        trim: Number of labels to drop at either end, 0 or more; 0 is the mean. Weights of labels do not count.
    """

    def __init__(self, trim: int = 1):
        require(trim >= 0, "distillation.aggregation.trim", trim, "0 or more")
        self.trim = trim

    def on_check(self, run: Run) -> None:
        mixing = run.network.graph.mixing(0)
        most = max(len(senders) for senders, _weights in mixing.terms)
        if 2 * self.trim >= most:
            raise UserError(
                f"distillation.aggregation.trim: {self.trim} given; a node has {most} labels of a sample at most, with "
                f"its own; allowed: {(most - 1) // 2} or less"
            )

    def bears(self, received: int) -> int | None:
        return min(self.trim, received // 2)

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        return trim_and_average(probabilities, votes > 0, self.trim)


class Median(Aggregation):
    """Median of the probabilities of each class, scaled to sum to 1 (coordinate-wise median; Yin et al., ICML 2018). It
    bears fewer liars than half of a sample's labels. The median of an even number is the mean of the middle two."""

    def bears(self, received: int) -> int | None:
        return received // 2

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        return trim_and_average(probabilities, votes > 0, len(senders))


def trim_and_average(p: Tensor, voted: Tensor, trim: int) -> Tensor:
    """Mean over senders of ``p`` [v, s, k] where they ``voted`` [v, s], without ``trim`` values at either end, or as
    many as leave one or two; every row of the result [s, k] sums to 1."""
    import torch

    ascending = p.masked_fill(~voted[..., None], math.inf).sort(0).values
    voters = voted.sum(0)  # [s]
    dropped = ((voters - 1) // 2).clamp(max=trim)
    place = torch.arange(len(p), device=p.device)[:, None]
    kept = (place >= dropped) & (place < voters - dropped)  # [v, s]
    total = ascending.masked_fill(~kept[..., None], 0).sum(0)
    total = total.where(total.sum(1, keepdim=True) > 0, 1)  # labels that exclude each other
    return total / total.sum(1, keepdim=True)


class AgreementMean(Aggregation):
    """Mean of the probabilities, in which a sender counts by how far it agrees with the others.

    The agreement of two senders is 1 minus the total variation between their labels, averaged over the samples that
    both kept; a sender's weight is its mean agreement with the others that kept some of its samples, to a power.

    Args:
        power: Exponent, 0 or more; 0 is the mean.
    """

    def __init__(self, power: float = 4.0):
        require(0 <= power < math.inf, "distillation.aggregation.power", power, "0 or more")
        self.power = power

    def combine(self, probabilities: Tensor, votes: Tensor, senders: list[int]) -> Tensor:
        weights = votes * self.weigh(probabilities, votes > 0)[:, None]
        return (probabilities * weights[..., None]).sum(0) / weights.sum(0)[:, None]

    def weigh(self, p: Tensor, voted: Tensor) -> Tensor:
        """Weight [v] of every sender, from its labels ``p`` [v, s, k] of the samples that it ``voted`` [v, s] on."""
        import torch

        weights = p.new_ones(len(p))
        for i in range(len(p)):
            agreements = []
            for j in range(len(p)):
                both = voted[i] & voted[j]
                if j != i and both.any():
                    agreements.append(1 - 0.5 * (p[i, both] - p[j, both]).abs().sum(1).mean())
            if agreements:
                weights[i] = torch.stack(agreements).mean().clamp(min=1e-6) ** self.power
        return weights
