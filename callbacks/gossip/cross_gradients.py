"""Gradients of neighbours' models."""

from __future__ import annotations

import numpy as np

from callbacks.gossip.bias_correction import undirected
from callbacks.gossip.dsgd import LocalStep
from lightning_idkd.errors import require


class NGC(LocalStep):
    """Neighbourhood gradient clustering (Aketi et al., arXiv 2209.14390, Alg. 1): X <- W X - lr D with D the weighted mean of
    gradients, over a node and its neighbours, of the node's model on their data (share ``alpha``, sent back by them) and of
    their models on its data (computed here).

    Takes a further gradient for each neighbour, and sends gradients besides parameters. A node's own gradient is taken at its x,
    as in Alg. 1; the authors' code takes it at W x.

    Args:
        alpha: Share of the gradients on the neighbours' data, 0 to 1; at 0 none are sent.
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    columnwise = False
    every_step = True

    def __init__(self, alpha: float = 1.0, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        require(0 <= alpha <= 1, "gossip.alpha", alpha, "0 to 1")
        self.alpha = alpha
        self.shares = "gradients of their models" if alpha else ""

    def check(self, graph) -> None:
        super().check(graph)
        undirected(self, graph, ", since gradients go back")

    def update(self, X, G, state, ctx):
        node = X.new_tensor(ctx.edges[:, 0]).long()
        w = X.new_tensor(ctx.weights)[:, None]
        models = ctx.swap(X[node])
        of_theirs = of_each(models, ctx.gradient, G, X, node, ctx)
        D = (1 - self.alpha) * average(G, of_theirs, node, w)
        if self.alpha:
            D = D + self.alpha * average(G, ctx.swap(of_theirs, kind="other"), node, w)
        return average(X, models, node, w) - ctx.lr * self.direction(X, D, state)


def of_each(models, of, own, X, node, ctx):
    """What ``of`` gives, as ``own`` [n, ...] at ``X``, at each neighbour's model [e, P] on one's own data, an edge a row; all
    nodes take their k-th neighbour at once."""
    found, sender = own.new_empty(len(models), *own.shape[1:]), ctx.edges[:, 0]
    place = np.arange(len(sender)) - np.searchsorted(sender, sender)  # among the edges of its sender
    for k in np.unique(place):
        edges = node.new_tensor(np.flatnonzero(place == k))
        found[edges] = of(X.index_copy(0, node[edges], models[edges]))[node[edges]]
    return found


def average(own, theirs, node, w):
    """W times ``own`` [n, P], of which ``theirs`` [e, P] came over the edges of weights ``w`` [e, 1]."""
    return own.index_add(0, node, w * (theirs - own[node]))
