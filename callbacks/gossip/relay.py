"""Sums of models that nodes relay along a tree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Context
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph

from .dsgd import DSGD

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class RelaySGD(DSGD):
    """RelaySGD with RelaySum/Model on a tree (Vogels et al., NeurIPS 2021, Alg. 1).

    Each node sends over every edge the sum of its own model and of the sums that it received over its other edges. Its
    next model is the sum of its own model and everything it received, divided by the number of models in that sum. Once
    messages have crossed the tree, this is the (delayed) average of all nodes.

    Until then the authors' code, unless its option to divide by counts is set, divides by n and uses the common initial
    model for models that have not arrived.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    every_step = True
    sends: ClassVar = ("swap",)
    edge_buffers = {"R": None, "C": 1}  # noqa: RUF012  the last sum received over each edge, and the number of models in it

    def check(self, graph: Graph) -> None:
        super().check(graph)
        static = graph.period == 1 and not graph.topology.directed
        if not static or len(graph.mixing(0).edges) != 2 * (graph.nodes - 1):  # every graph is connected
            raise UserError(
                "gossip: RelaySGD takes a static tree, such as Chain or a SpanningTree of another graph, but "
                f"graph.topology {graph.name} is not one"
            )

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        import torch

        half = X - ctx.lr * self.direction(X, G, state)
        sender = X.new_tensor(ctx.edges[:, 0]).long()
        total = half.index_add(0, sender, state.R)
        models = X.new_ones(len(X), 1).index_add(0, sender, state.C)
        message = torch.cat([total[sender] - state.R, models[sender] - state.C], 1)  # [e, P + 1]; the last is the count
        state.R, state.C = ctx.swap(message, instead=torch.cat([state.R, state.C], 1)).split([X.shape[1], 1], 1)
        models = X.new_ones(len(X), 1).index_add(0, sender, state.C)
        return half.index_add(0, sender, state.R) / models
