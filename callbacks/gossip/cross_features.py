"""Features of neighbours' models and data."""

from __future__ import annotations

import dataclasses
import math

from callbacks.gossip.bias_correction import static, undirected
from callbacks.gossip.cross_gradients import average, of_each
from callbacks.gossip.dsgd import DSGD
from callbacks.gossip.quasi_global import QGDSGDm
from lightning_idkd.callback import Gossip
from lightning_idkd.errors import require


class CCL(Gossip):
    """Cross-feature contrastive loss (Aketi and Roy, WACV 2024, arXiv 2310.15890) on QG-DSGDm-N or DSGDm-N: draws a node's
    features of its samples to those of its neighbours' models, and to the means of the samples' classes over their data too.

    As in the authors' code, the loss gains ``lambda_m`` * sum over neighbours j of MSE(features, features of j's model on the
    same batch) and ``lambda_d`` * MSE(features, mean of the sample's class), MSEs being means over samples and features. The
    mean is over the node's own batch and those of its neighbours, which send back what its model makes of theirs as sums and
    counts. Models are those that crossed in the last gossip, before averaging; a node's own features are of the average.

    Unlike in that code, the quasi-global momentum is Lin et al.'s, and neighbours' models run in training mode as one's own. A
    sample's class is its most probable label; distilled samples count as private ones do.

    Args:
        lambda_m: Weight of the model-variant loss.
        lambda_d: Weight of the data-variant loss; at 0 no class sums are sent.
        quasi_global: QG-DSGDm(-N); otherwise DSGDm(-N).
        momentum: Factor of the momentum.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    columnwise = False
    every_step = True
    needs_features = True

    def __init__(self, lambda_m: float = 0.1, lambda_d: float = 0.1, quasi_global: bool = True, momentum: float = 0.9,
                 nesterov: bool = True, weight_decay: float = 0.0):  # fmt: skip
        require(0 <= lambda_m < math.inf, "gossip.lambda_m", lambda_m, "0 or more")
        require(0 <= lambda_d < math.inf, "gossip.lambda_d", lambda_d, "0 or more")
        self.rule = (QGDSGDm if quasi_global else DSGD)(momentum, nesterov, weight_decay)
        self.lambda_m, self.lambda_d, self.buffers = lambda_m, lambda_d, self.rule.buffers
        self.edge_buffers = {"models": None} if lambda_m or lambda_d else {}  # as they crossed in the last gossip
        self.shares = "class sums of features" if lambda_d else ""

    def check(self, graph) -> None:
        super().check(graph)
        undirected(self, graph, ", since features go back")
        static(self, graph)

    def update(self, X, G, state, ctx):
        if not self.edge_buffers:
            return self.rule.update(X, G, state, ctx)
        node = X.new_tensor(ctx.edges[:, 0]).long()
        w = X.new_tensor(ctx.weights)[:, None]
        models = ctx.swap(X[node]) if ctx.step == 0 else state.models

        def mix(half):
            state.models = ctx.swap(half[node])
            return average(half, state.models, node, w)

        G = G + self.gradient(X, models, node, ctx)
        return self.rule.update(X, G, state, dataclasses.replace(ctx, mix=mix))

    def gradient(self, X, models, node, ctx):
        """Of both losses [n, P]."""
        own = ctx.features(X)
        theirs = of_each(models, ctx.features, own, X, node, ctx)
        V = self.lambda_m * own.new_zeros(own.shape).index_add(0, node, own[node] - theirs)
        if self.lambda_d:
            V = V + self.lambda_d * (own - self.class_means(own, theirs, node, ctx))
        return ctx.pull_back(X, 2 / own[0].numel() * V)

    @staticmethod
    def class_means(own, theirs, node, ctx):
        """Of every sample's class [n, B, F]."""
        from torch.nn.functional import one_hot, pad

        member = one_hot(ctx.targets.argmax(2), ctx.targets.shape[2]).to(own)  # [n, B, k]
        sums = member.mT @ pad(own, (0, 1), value=1.0)  # [n, k, F + 1], the last column how many
        back = member[node].mT @ pad(theirs, (0, 1), value=1.0)
        sums = sums.index_add(0, node, ctx.swap(back.flatten(1), kind="other").view_as(back))
        return member @ (sums[..., :-1] / sums[..., -1:].clamp(min=1))
