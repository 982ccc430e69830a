"""A node whose features are clusters, and what tests of scores have in common."""

import math

import pytest
import torch
from torch import nn

from lightning_idkd.callback import OodScore
from lightning_idkd.labels import Outputs

CLASSES, FEATURES = 10, 16


def name_of(value):
    return type(value).__name__ if isinstance(value, OodScore) else None


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits(samples=500, classes=CLASSES, scale=3.0, dtype=torch.float64, seed=0):
    return scale * draws(samples, classes, seed=seed, dtype=dtype)


def sure_logits(samples=160, low=0.0, high=60.0, seed=1):
    """float32 logits whose largest is ahead by ``low`` to ``high``, of any class and any level."""
    z = logits(samples, dtype=torch.float32, scale=2.0, seed=seed)
    top = torch.arange(samples) * 7 % CLASSES
    others = z.scatter(1, top[:, None], -math.inf).amax(1)
    ahead = low + (high - low) * (torch.arange(samples) + 0.5) / samples
    return z.scatter(1, top[:, None], (others + ahead)[:, None]) + 20 * draws(samples, 1, seed=seed + 1)


def same_order(ours, theirs, slack=1e-5):
    """Whether two scores rank alike: only neighbours that are closer than ``slack`` of the range may trade places."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    both = ours[theirs.argsort()], theirs[ours.argsort()]
    return all(((v.cummax(0).values - v) <= slack * (v.max() - v.min())).all() for v in both)


CENTRES = 6 * draws(CLASSES, FEATURES, seed=11).abs()


def head(bias=True):
    """The best linear classifier of the clusters around ``CENTRES``."""
    made = nn.Linear(FEATURES, CLASSES, bias=bias)
    with torch.no_grad():
        made.weight.copy_(CENTRES)
        if bias:
            made.bias.copy_(-CENTRES.square().sum(1) / 2)
    return made.requires_grad_(False)


HEAD = head()


def outputs(x, of=HEAD):
    return Outputs(of(x), x, of)


def clusters(samples, held=range(CLASSES), seed=0, noise=1.0):
    """Features and labels of samples of the classes ``held``."""
    held = torch.tensor(list(held))
    y = held[torch.arange(samples) % len(held)]
    return (CENTRES[y] + noise * draws(samples, FEATURES, seed=seed)).relu(), y


def strangers(samples, seed=5):
    """Features far from all clusters, between which the head cannot tell."""
    return (CENTRES.mean(0) + 2 * draws(samples, FEATURES, seed=seed)).relu()


def fitted(score, held=range(CLASSES), samples=120):
    x, y = clusters(samples, held)
    score.fit(outputs(x), y)
    return score


def detector(name):
    """A detector of pytorch-ood, where that is installed."""
    return getattr(pytest.importorskip("pytorch_ood.detector"), name)
