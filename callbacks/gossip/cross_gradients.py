"""Gradients of neighbours' models, and of a node's model on its neighbours' data."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

from lightning_idkd.callback import Context
from lightning_idkd.errors import require
from lightning_idkd.graph import Graph

from .bias_correction import require_undirected
from .dsgd import LocalStep

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class NGC(LocalStep):
    """Neighbourhood gradient clustering (Aketi et al., arXiv 2209.14390, Alg. 1): X <- W X - lr D, where D is a
    weighted mean of gradients over a node and its neighbours. A share ``alpha`` of D comes from the node's model on
    their data (they send these gradients back), the rest from their models on the node's data.

    Where a message is lost, a node uses its own model and its own gradient in place of the neighbour's; of a model that
    only one end has lost, it sends back a gradient of its own model.

    Each neighbour costs one more gradient per step, and gradients are sent besides parameters. A node's own gradient is
    taken at its x, as in Alg. 1; the authors' code takes it at W x.

    Args:
        alpha: Share of the gradients on the neighbours' data, 0 to 1; at 0 no gradients are sent.
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    columnwise = False
    every_step = True
    sends: ClassVar = ("swap",)

    def __init__(self, alpha: float = 1.0, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        require(0 <= alpha <= 1, "gossip.alpha", alpha, "0 to 1")
        self.alpha = alpha
        self.shares = "gradients of neighbours' models" if alpha else ""

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_undirected(self, graph, ", since gradients are sent back")

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        node = X.new_tensor(ctx.edges[:, 0]).long()
        w = X.new_tensor(ctx.weights)[:, None]
        models = ctx.swap(X[node])
        theirs = evaluate_at_neighbours(models, ctx.gradient, G, X, node, ctx)
        D = (1 - self.alpha) * mix_received(G, theirs, node, w)
        if self.alpha:
            D = D + self.alpha * mix_received(G, ctx.swap(theirs, kind="other", instead=G[node]), node, w)
        return mix_received(X, models, node, w) - ctx.lr * self.direction(X, D, state)


def evaluate_at_neighbours(models: Tensor, function: Callable[[Tensor], Tensor], own: Tensor, X: Tensor, node: Tensor,
                           ctx: Context) -> Tensor:  # fmt: skip
    """Evaluates ``function`` at each neighbour's model on the node's own data; returns [e, ...], one row per edge.

    One call evaluates the k-th neighbour of all nodes.

    Args:
        models: The neighbours' models [e, P].
        function: Maps parameters [n, P] to values [n, ...], such as the gradient or the features.
        own: The values [n, ...] at the nodes' own models ``X`` [n, P].
        node: Row [e] of the node at which each edge begins.
    """
    values, sender = own.new_empty(len(models), *own.shape[1:]), ctx.edges[:, 0]
    k_of = np.arange(len(sender)) - np.searchsorted(sender, sender)  # number of the edge among its sender's edges
    for k in np.unique(k_of):
        edges = node.new_tensor(np.flatnonzero(k_of == k))
        values[edges] = function(X.index_copy(0, node[edges], models[edges]))[node[edges]]
    return values


def mix_received(own: Tensor, theirs: Tensor, node: Tensor, w: Tensor) -> Tensor:
    """Returns W times ``own`` [n, P], given ``theirs`` [e, P], which came over edges of weights ``w`` [e, 1]."""
    return own.index_add(0, node, w * (theirs - own[node]))
