"""Refits the last layer of every node to statistics that nodes gossip."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_idkd.callback import Callback, Run
from lightning_idkd.errors import UserError, require

from .fits import LDA, Head, Statistics

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor

NEVER = 1e4
"""Difference between the smallest other bias and the bias of a class that no node has."""


class CalibratedHead(Callback):
    """Refits every node's last layer after the final gossip, to class counts, sums and second moments of the features
    of all nodes' private samples, which the nodes gossip (they are counted as other bytes).

    The first message of a node holds statistics of its own samples alone, so gossip reveals its class means. In each
    round, every node sends the weighted mean of what it has received. After enough rounds, all nodes have the
    statistics of all samples, up to a factor that cancels.

    Args:
        head: How the layer follows from the statistics: LDA, NearestMean or VirtualFeatures.
        rounds: Rounds of gossip, 1 or more.
        every: Epochs between further refits during training; null: only one refit, at the end.
        noise: Standard deviation of Gaussian noise that a node adds to its sums and second moments before it sends
            them, as a multiple of their size for one sample; 0 for none. It does not prove privacy.
        distilled: Whether to count the node's distilled samples too, by their soft labels.
    """

    shares = "class counts, sums and second moments of features"

    def __init__(self, head: Head | None = None, rounds: int = 20, every: int | None = None, noise: float = 0.0,
                 distilled: bool = False):  # fmt: skip
        require(rounds >= 1, "callbacks.rounds", rounds, "1 or more")
        require(every is None or every >= 1, "callbacks.every", every, "1 or more, or null")
        require(0 <= noise < math.inf, "callbacks.noise", noise, "0 or more")
        self.every, self.refit = every, Refit(head or LDA(), rounds, noise, distilled)

    def on_check(self, run: Run) -> None:
        self.refit.check(run, "callbacks: CalibratedHead")

    def on_epoch_end(self, run: Run, epoch: int) -> None:
        if self.every is not None and epoch % self.every == 0 and epoch < run.epochs:
            self.refit(run)

    def on_training_end(self, run: Run) -> None:
        self.refit(run)


@dataclass
class Refit:
    """Gossips the statistics and sets the last layer of every node of a run."""

    head: Head
    rounds: int
    noise: float
    distilled: bool = False

    def check(self, run: Run, who: str) -> None:
        """Refuses a network without a layer that can be refitted, in the name of ``who``."""
        node = run.stack.modules[0]
        if not node.has_features:
            raise UserError(f"{who} needs features(x) [B, F] and a head, which this network has not")
        if node.network.head.bias is None or not node.network.head.weight.requires_grad:
            raise UserError(f"{who} needs a trained head with a bias, which this network has not")

    def __call__(self, run: Run) -> None:
        import torch

        from lightning_idkd.randomness import derive_seed

        sums = torch.stack([self.sum_features(run, i) for i in range(run.stack.n)])
        for turn in range(self.rounds):
            sums = run.network.mix(sums, run.step + turn, kind="other")
        k, unusable = run.store.k, []
        for i, (node, own) in enumerate(zip(run.store.rows, sums, strict=True)):
            layer = run.stack.modules[i].network.head
            statistics = compute_statistics(own.double(), k, layer.in_features, self.head.per_class)
            generator = torch.Generator().manual_seed(derive_seed(run.seed, "head", node, run.step))
            absent = statistics.share <= 0
            sound = all(part.isfinite().all() for part in vars(statistics).values()) and not absent.all()
            if sound:  # lies of other nodes can make them arbitrary
                weight, bias = self.head.fit(statistics, generator)
                sound = bool(weight.isfinite().all() and bias.isfinite().all())
            if not sound:
                unusable.append(node)
                continue
            bias = bias.masked_fill(absent, (bias[~absent].min() - NEVER).item())
            with torch.no_grad():
                layer.weight.copy_(weight.masked_fill(absent[:, None], 0))
                layer.bias.copy_(bias)
        if unusable:
            run.say(f"the statistics of nodes {', '.join(map(str, unusable))} are no class means, so their heads stay")

    def sum_features(self, run: Run, i: int) -> Tensor:
        """What the node in row ``i`` of this process sends: counts [k], sums [k, F] and second moments, as one row."""
        import torch

        from lightning_idkd.nodes.stack import run_network
        from lightning_idkd.randomness import derive_seed

        batches, classes = run.store.labelled_batches(i, self.distilled)
        features = run_network(run.stack.modules[i], batches).features
        assert features is not None  # ensured by `check`
        features, classes = features.double(), classes.double()
        second = torch.einsum("nc,nf,ng->cfg" if self.head.per_class else "nc,nf,ng->fg", classes, features, features)
        rows, columns = torch.triu_indices(*second.shape[-2:])
        parts = [classes.sum(0), (classes.T @ features).flatten(), second[..., rows, columns].flatten()]
        if self.noise:
            generator = torch.Generator().manual_seed(derive_seed(run.seed, "head noise", run.store.rows[i], run.step))
            for place, sizes in ((1, features), (2, features.square())):
                scale = self.noise * sizes.square().mean().sqrt()
                noise = torch.randn(len(parts[place]), generator=generator, dtype=torch.float64)
                parts[place] = parts[place] + scale * noise.to(features)
        return torch.cat(parts).to(run.stack.X.dtype)


def compute_statistics(sums: Tensor, k: int, F: int, per_class: bool) -> Statistics:
    """Class means and covariances from summed counts, features and second moments; a common factor cancels."""
    counts, first, second = sums.split([k, k * F, len(sums) - k - k * F])
    first = first.view(k, F)
    rows, columns = sums.new_ones(F, F).triu().nonzero(as_tuple=True)
    moments = sums.new_zeros(k if per_class else 1, F, F)
    moments[:, rows, columns] = second.view(len(moments), -1)
    moments[:, columns, rows] = second.view(len(moments), -1)
    mean = first / counts.clamp(min=1e-30)[:, None] * (counts > 0)[:, None]
    if per_class:
        outer = mean[:, :, None] * mean[:, None, :]
        covariance = (moments / counts.clamp(min=1e-30)[:, None, None] - outer) * (counts > 0)[:, None, None]
    else:
        covariance = (moments[0] - mean.T @ (counts[:, None] * mean)) / counts.sum()
    return Statistics(counts / counts.sum(), mean, covariance)
