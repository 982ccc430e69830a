"""A loss on the features that neighbours' models and neighbours' data give."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Context, Gossip
from lightning_idkd.errors import require
from lightning_idkd.graph import Graph

from .bias_correction import require_static, require_undirected
from .cross_gradients import evaluate_at_neighbours, mix_received
from .dsgd import DSGD
from .quasi_global import QGDSGDm

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class CCL(Gossip):
    """Cross-feature contrastive loss (Aketi and Roy, WACV 2024, arXiv 2310.15890) on QG-DSGDm-N or DSGDm-N. It pulls
    the features of a node's samples towards those that its neighbours' models give, and towards the class means of
    features over the data of the node and its neighbours.

    As in the authors' code, the loss gains ``lambda_m`` * sum over neighbours j of MSE(features, features of j's model
    on the same batch) and ``lambda_d`` * MSE(features, mean of the sample's class). An MSE is a mean over samples and
    features. The class mean is over the node's own batch and its neighbours' batches: neighbours evaluate the node's
    model on their batches, and send back a sum and a count per class. Neighbours' models are those sent in the last
    gossip, before averaging; the node's own features are those of its averaged model.

    Unlike in that code, the quasi-global momentum is that of Lin et al., and neighbours' models run in training mode
    like the node's own. The class of a sample is its most probable label; distilled samples count like private ones.

    Args:
        lambda_m: Weight of the model-variant loss.
        lambda_d: Weight of the data-variant loss; at 0 no class sums are sent.
        quasi_global: Whether the momentum is quasi-global, as in QG-DSGDm(-N); false gives DSGDm(-N).
        momentum: Factor of the momentum.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    columnwise = False
    every_step = True
    sends: ClassVar = ("swap",)
    needs_features = True

    def __init__(self, lambda_m: float = 0.1, lambda_d: float = 0.1, quasi_global: bool = True, momentum: float = 0.9,
                 nesterov: bool = True, weight_decay: float = 0.0):  # fmt: skip
        require(0 <= lambda_m < math.inf, "gossip.lambda_m", lambda_m, "0 or more")
        require(0 <= lambda_d < math.inf, "gossip.lambda_d", lambda_d, "0 or more")
        self.rule = (QGDSGDm if quasi_global else DSGD)(momentum, nesterov, weight_decay)
        self.lambda_m, self.lambda_d, self.buffers = lambda_m, lambda_d, self.rule.buffers
        self.edge_buffers = {"models": None} if lambda_m or lambda_d else {}  # as sent in the last gossip
        self.shares = "class sums of features" if lambda_d else ""

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_undirected(self, graph, ", since features are sent back")
        require_static(self, graph)

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        if not self.edge_buffers:
            return self.rule.update(X, G, state, ctx)
        node = X.new_tensor(ctx.edges[:, 0]).long()
        w = X.new_tensor(ctx.weights)[:, None]
        models = ctx.swap(X[node]) if ctx.step == 0 else state.models

        def mix(half: Tensor) -> Tensor:
            state.models = ctx.swap(half[node])
            return mix_received(half, state.models, node, w)

        G = G + self.gradient(X, models, node, ctx)
        return self.rule.update(X, G, state, dataclasses.replace(ctx, mix=mix))

    def gradient(self, X: Tensor, models: Tensor, node: Tensor, ctx: Context) -> Tensor:
        """Returns the gradient [n, P] of both losses."""
        own = ctx.features(X)
        theirs = evaluate_at_neighbours(models, ctx.features, own, X, node, ctx)
        V = self.lambda_m * own.new_zeros(own.shape).index_add(0, node, own[node] - theirs)
        if self.lambda_d:
            V = V + self.lambda_d * (own - self.class_means(own, theirs, node, ctx))
        return ctx.pull_back(X, 2 / own[0].numel() * V)

    @staticmethod
    def class_means(own: Tensor, theirs: Tensor, node: Tensor, ctx: Context) -> Tensor:
        """Returns the mean features [n, B, F] of each sample's class."""
        import torch
        from torch.nn.functional import one_hot, pad

        targets = ctx.targets
        assert targets is not None  # a rule that is not columnwise has them
        member = one_hot(targets.argmax(2), targets.shape[2]).to(own)  # [n, B, k]
        sums = member.mT @ pad(own, (0, 1), value=1.0)  # [n, k, F + 1]; the last column counts samples
        back = member[node].mT @ pad(theirs, (0, 1), value=1.0)
        flat = back.flatten(1)
        received = ctx.swap(flat, kind="other", instead=torch.zeros_like(flat))
        sums = sums.index_add(0, node, received.view_as(back))
        return member @ (sums[..., :-1] / sums[..., -1:].clamp(min=1))
