"""Decentralised SGD and its two limits, all-reduce and no communication."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Context, Gossip
from lightning_idkd.errors import require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class LocalStep(Gossip):
    """Base of rules with the local step of SGD, with weight decay and (Nesterov) momentum.

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

    def direction(self, X: Tensor, G: Tensor, state: SimpleNamespace) -> Tensor:
        """Returns the direction [n, P] of the local step, and updates the momentum."""
        return self.accelerate(G + self.weight_decay * X, state)

    def accelerate(self, D: Tensor, state: SimpleNamespace) -> Tensor:
        """Adds (Nesterov) momentum to ``D`` [n, P], and updates the momentum."""
        if not self.momentum:
            return D
        state.M = self.momentum * state.M + D
        return D + self.momentum * state.M if self.nesterov else state.M


class DSGD(LocalStep):
    """Decentralised SGD that adapts, then combines: X <- W (X - lr D), with local (Nesterov) momentum (Lian et al.,
    NeurIPS 2017; their Alg. 1 combines first, as CombineThenAdapt does).

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    takes: ClassVar = ("doubly", "row")  # rows alone summing to 1 bias the mean; epidemic learning accepts it

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return self.combine(X - ctx.lr * self.direction(X, G, state), state, ctx)


class CombineThenAdapt(DSGD):
    """Decentralised SGD that combines, then adapts: X <- W X - lr D (the order of D-PSGD, Lian et al., NeurIPS 2017,
    Alg. 1).

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    mixes_first = True

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return self.combine(X, state, ctx) - ctx.lr * self.direction(X, G, state)


class AllReduce(DSGD):
    """Sets every node to the exact mean after every step: synchronous centralised SGD, the upper bound.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    sends: ClassVar = ("mean",)

    def combine(self, X: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return ctx.mean(X)


class Isolated(DSGD):
    """Trains every node alone, without communication: the lower bound.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    sends: ClassVar = ()

    def combine(self, X: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return X
