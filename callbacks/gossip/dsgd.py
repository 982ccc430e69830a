"""Decentralised SGD and its two limits, all-reduce and no communication."""

from __future__ import annotations

import math
from typing import ClassVar

from lightning_idkd.callback import Gossip
from lightning_idkd.errors import require


class LocalStep(Gossip):
    """Base of rules whose local step is SGD's, with weight decay and (Nesterov) momentum.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def __init__(self, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        require(0 <= momentum < 1, "gossip.momentum", momentum, "0 to below 1")
        require(0 <= weight_decay < math.inf, "gossip.weight_decay", weight_decay, "0 or more")
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay
        self.buffers = ("M",) if momentum else ()

    def direction(self, X, G, state):
        """The local step's direction [n, P]; moves the momentum."""
        return self.accelerate(G + self.weight_decay * X, state)

    def accelerate(self, D, state):
        """``D`` with (Nesterov) momentum, which it moves."""
        if not self.momentum:
            return D
        state.M = self.momentum * state.M + D
        return D + self.momentum * state.M if self.nesterov else state.M


class DSGD(LocalStep):
    """Adapt, then combine: X <- W (X - lr D), with local (Nesterov) momentum (Lian et al., NeurIPS 2017, whose Alg. 1 combines
    first: :class:`CombineThenAdapt`).

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    takes: ClassVar = ("doubly", "row")  # rows alone bias the mean, as epidemic learning accepts

    def update(self, X, G, state, ctx):
        return self.combine(X - ctx.lr * self.direction(X, G, state), state, ctx)


class CombineThenAdapt(DSGD):
    """Combine, then adapt: X <- W X - lr D (the order of D-PSGD, Lian et al., NeurIPS 2017, Alg. 1).

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def update(self, X, G, state, ctx):
        return self.combine(X, state, ctx) - ctx.lr * self.direction(X, G, state)


class AllReduce(DSGD):
    """Every node gets the exact mean after every step: synchronous centralised SGD, the upper bound.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def combine(self, X, state, ctx):
        return ctx.mean(X)


class Isolated(DSGD):
    """Nodes never communicate: the lower bound.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def combine(self, X, state, ctx):
        return X
