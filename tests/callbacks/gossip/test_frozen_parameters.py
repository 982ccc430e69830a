"""Frozen parameters: no rule moves them, and the rest moves as if they were no parameters."""

from pathlib import Path

import pytest
import torch
from quadratics import driver
from torch import nn

from lightning_idkd.config.parse import configure
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack

CONFIGS = Path(__file__).parents[3] / "configs"
ASYNCHRONOUS = ("adpsgd", "async_gossip", "swarm")  # they act node by node, on rows alone
PRESETS = sorted((CONFIGS / "presets" / "rules").glob("*.yaml"))
RULES = [path for path in PRESETS if path.stem not in ASYNCHRONOUS]  # with momentum and weight decay
N, B, S, K = 4, 6, 3, 5


class Head(nn.Module):
    """A classifier of given features [B, 7, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, K)

    def features(self, x):
        return x.flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


class Tuned(Head):
    """The same behind a frozen convolution and norm."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(2, 7, S), nn.GroupNorm(1, 7), nn.Tanh()).requires_grad_(False)

    def features(self, x):
        return self.trunk(x).flatten(1)


def stack(network):
    return NodeStack(lambda: NodeModule(network()), range(N), dtype=torch.float64)


@pytest.mark.parametrize("preset", RULES, ids=lambda path: path.stem)
def test_every_rule_leaves_them_alone_and_moves_the_rest_as_if_they_were_not_there(preset):
    """Against the rule on the classifier alone, which gets the frozen part's features as its images."""
    config = configure([
        f"--config={CONFIGS / 'ring_digits.yaml'}", f"--config={preset}", f"--graph.nodes={N}", "--distillation=null"
    ])  # fmt: skip
    tuned, alone = stack(Tuned), stack(Head)
    assert tuned.parameters == 8 * K
    assert tuned.frozen_parameters == 7 * 2 * S * S + 7 + 14
    alone.X.copy_(tuned.X)
    before = {k: t.clone() for k, t in tuned.frozen.items()}
    runs = [driver(config.gossip, config.graph.build(0), s) for s in (tuned, alone)]
    g = torch.Generator().manual_seed(0)
    for step in range(7):
        x = torch.randn(N, B, 2, S, S, generator=g, dtype=torch.float64)
        y = torch.randn(N, B, K, generator=g, dtype=torch.float64).softmax(-1)
        with torch.no_grad():
            features = torch.stack([module.network.trunk(xi) for module, xi in zip(tuned.modules, x, strict=True)])
        for run, images in zip(runs, (x, features), strict=True):
            run.step = step
            run.stack.step(images, y, step)
            run.update(0.1 if step < 4 else 0.01, (images, y))
    for run in runs:  # final gossip
        run.combine(7, 0.01)
    torch.testing.assert_close(tuned.X, alone.X, rtol=1e-9, atol=1e-12)
    assert not torch.equal(tuned.X, stack(Tuned).X)
    assert all(torch.equal(before[k], t) for k, t in tuned.frozen.items())
    assert tuned.views_intact()
    counts = [run.network.counts() for run in runs]
    assert counts[0] == counts[1]  # nothing of them is sent
