"""Gossip of compressed differences; later messages correct the error of the compression."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Compression, Context
from lightning_idkd.errors import require
from lightning_idkd.graph import Graph

from .bias_correction import require_static
from .dsgd import LocalStep

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class ChocoSGD(LocalStep):
    """CHOCO-SGD (Koloskova et al., ICML 2019, Alg. 2; with momentum as in their ICLR 2020 paper).

    Each node's row has a replica H that its neighbours know too. A step compresses the difference between row and
    replica to Q, adds Q to H, and moves the row by gamma (W H - H). A node stores W H instead of its neighbours'
    replicas. Replicas start at zero as in the paper, so a large gamma pulls rows towards zero in the first steps. Final
    gossip is not compressed.

    Args:
        compression: TopK, RandomK, Sign, QSGD or a class of yours; null for none, which with a gamma of 1 gives DSGD.
        gamma: Consensus step size, above 0 to 1; stronger compression needs a smaller one.
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    columnwise = False  # a compression needs whole rows
    every_step = True
    assumes: ClassVar = ("static",)

    def __init__(self, compression: Compression | None = None, gamma: float = 1.0, momentum: float = 0.0,
                 nesterov: bool = False, weight_decay: float = 0.0):  # fmt: skip
        super().__init__(momentum, nesterov, weight_decay)
        require(0 < gamma <= 1, "gossip.gamma", gamma, "above 0 to 1")
        self.compression, self.gamma = compression, gamma
        self.buffers = (*self.buffers, "H", "WH")

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_static(self, graph)  # a replica is the sum of all that its node has sent to the same neighbours

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        half = X - ctx.lr * self.direction(X, G, state)
        ahead = half - state.H
        Q = ahead if self.compression is None else self.compression(ahead, ctx)
        state.H = state.H + Q
        state.WH = state.WH + ctx.mix(Q, size=None if self.compression is None else self.compression.size(Q))
        return half + self.towards(state.WH - state.H, state, ctx)

    def towards(self, R: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        """Returns the consensus step of the rows, given ``R`` = W H - H [n, P]."""
        return self.gamma * R


class AdaGossip(ChocoSGD):
    """CHOCO-SGD whose consensus step is smaller where rows still differ much: gamma R / sqrt(V), where R = W H - H and
    V is a running mean of R squared (AdaG-SGD, Aketi et al., arXiv 2404.05919).

    As in the authors' code, V is corrected for its start at zero, and the step is at most R.

    Args:
        compression: TopK, RandomK, Sign, QSGD or a class of yours; null for none.
        gamma: Consensus step size, above 0 to 1.
        beta: Factor of the running mean, 0 to below 1.
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def __init__(self, compression: Compression | None = None, gamma: float = 1.0, beta: float = 0.999,
                 momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):  # fmt: skip
        super().__init__(compression, gamma, momentum, nesterov, weight_decay)
        require(0 <= beta < 1, "gossip.beta", beta, "0 to below 1")
        self.beta = beta
        self.buffers = (*self.buffers, "V")

    def towards(self, R: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        state.V = self.beta * state.V + (1 - self.beta) * R**2
        spread = (state.V / (1 - self.beta ** (ctx.step + 1))).sqrt() + 1e-8
        return (self.gamma / spread).clamp(max=1) * R
