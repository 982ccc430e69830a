"""Measures of scores, labels and rows. The ROC sorts raw scores itself; torchmetrics would squash them to [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def roc(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thresholds (descending, distinct) with the true- and false-positive rates of "score >= threshold", float64."""
    scores = torch.cat([positive, negative])
    order = torch.argsort(scores, descending=True, stable=True)
    scores, is_positive = scores[order], order < len(positive)
    last = torch.ones_like(is_positive)
    last[:-1] = scores[1:] != scores[:-1]  # equal scores share a threshold
    tpr = is_positive.cumsum(0)[last].double() / len(positive)
    fpr = (~is_positive).cumsum(0)[last].double() / len(negative)
    return scores[last], tpr, fpr


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC: the probability that a positive scores higher (ties count half); nan if either is empty."""
    if not len(positive) or not len(negative):
        return float("nan")
    _, tpr, fpr = roc(positive, negative)
    zero = tpr.new_zeros(1)
    return torch.trapezoid(torch.cat([zero, tpr]), torch.cat([zero, fpr])).item()


def youden(positive: Tensor, negative: Tensor) -> float:
    """The threshold with the largest true- minus false-positive rate (Youden's J); of several, the largest."""
    thresholds, tpr, fpr = roc(positive, negative)
    j = tpr - fpr
    return thresholds[(j > j.max() - 1e-12).nonzero()[0, 0]].item()  # 1/3 - 0 and 1 - 2/3 differ in the last bit


def quantile(scores: Tensor, q: float) -> float:
    """The score below which at most a share ``q`` of the scores lies: always one of the scores, never interpolated."""
    return scores.sort().values[int(q * len(scores))].item()


def entropy(p: Tensor) -> Tensor:
    """Entropy [...] of distributions [..., k], in nats."""
    return -torch.xlogy(p, p).sum(-1)


def confidence(p: Tensor) -> Tensor:
    """Confidence [...] of distributions [..., k], 1 - entropy / log k: 0 if uniform, 1 if all mass is on one class."""
    return (1 - entropy(p) / math.log(p.shape[-1])).clamp(0, 1)


def agreement(p: Tensor, votes: Tensor) -> Tensor:
    """How far v distributions [v, s, k] agree about each sample, [s]: 1 if all are equal, 0 if they exclude each other.

    It is 1 - JS / log(number of voters), with the Jensen-Shannon divergence JS between those with ``votes`` [v, s]
    above 0, all counting alike; 1 for a single voter.
    """
    voting = (votes > 0).to(p)
    voters = voting.sum(0)
    mean = (p * voting[..., None]).sum(0) / voters[:, None]
    divergence = entropy(mean) - (entropy(p) * voting).sum(0) / voters
    return (1 - divergence / voters.clamp(min=2).log()).clamp(0, 1)


def heterogeneity(mass: Tensor, reference: Tensor) -> dict[str, float]:
    """How much the nodes' label distributions differ, as means over nodes; files call it homogeneity.

    ``mass`` [n, k] and ``reference`` [k] hold the mass of every class and need not be normalised. ``tv`` is the total
    variation between a node's distribution and the reference, ``js`` the Jensen-Shannon divergence between them in bits
    (both 0 if equal), ``classes`` the effective number of classes, exp(entropy) (k if uniform).
    """
    p = mass.double() / mass.double().sum(1, keepdim=True)
    q = (reference.double() / reference.double().sum()).expand_as(p)
    middle = (p + q) / 2
    return {
        "tv": (p - q).abs().sum(1).div(2).mean().item(),
        "js": (entropy(middle) - (entropy(p) + entropy(q)) / 2).div(math.log(2)).clamp_min(0).mean().item(),
        "classes": entropy(p).exp().mean().item(),
    }


def square_distances(X: Tensor, mean: Tensor) -> Tensor:
    """Squared distance of every row of ``X`` [n, P] to ``mean`` [P], float64 [n]."""
    return torch.stack([(row - mean).double().square().sum() for row in X])


def consensus_distance(squares: Tensor, mean: Tensor) -> float:
    """Root mean square over nodes of the distance to their mean, divided by the norm of the mean.

    ``squares`` [n] are the nodes' squared distances to ``mean`` [P], see :func:`square_distances`.
    """
    return (squares.mean().sqrt() / mean.double().norm().clamp_min(1e-30)).item()


def lacks(counts: Tensor) -> Tensor:
    """Which classes each node lacks, bool [n, k]: less than 1/k of its samples, by its label ``counts`` [n, k]."""
    return counts * counts.shape[1] < counts.sum(1, keepdim=True)
