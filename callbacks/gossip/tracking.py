"""Tracking: each node estimates the mean over all nodes of the gradients, the momenta or the whole updates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Context
from lightning_idkd.errors import require
from lightning_idkd.graph import Graph

from .bias_correction import require_eigenvalues_above, require_static
from .dsgd import LocalStep

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class GradientTracking(LocalStep):
    """Gradient tracking (Di Lorenzo and Scutari, 2016): Y <- W Y + D - D_old; X <- W (X - lr Y), so that the mean of Y
    is the mean of the gradients. Momentum accumulates Y. Each step sends two messages per edge.

    The rule adapts, then combines, as in RelaySGD's code. That code tracks whole steps, while Y does not contain the
    learning rate; the two differ only after lr has changed. :class:`MomentumTracking` combines first.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along Y + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    assumes: ClassVar = ("sums",)

    def __init__(self, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        self.buffers = (*self.buffers, "Y", "D")

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        D = G + self.weight_decay * X
        state.Y = ctx.mix(state.Y) + D - state.D
        state.D = D
        return ctx.mix(X - ctx.lr * self.accelerate(state.Y, state))


class MomentumTracking(LocalStep):
    """Momentum tracking (Takezawa et al., TMLR 2023, Alg. 1): M <- momentum M + D; X <- W X - lr (M - C); C <- W (C -
    M) + M.

    Each step sends two messages per edge. The rule starts from M = C = 0. The authors' code needs an all-reduce, since
    it starts M and C from D minus its mean over all nodes, divided by 1 - momentum; after that it computes the same.

    Args:
        momentum: Factor of the momentum; 0 gives gradient tracking that combines first.
        weight_decay: L2 coefficient added to the gradient.
    """

    assumes: ClassVar = ("sums",)

    def __init__(self, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(momentum, weight_decay=weight_decay)
        self.buffers = ("M", "C")

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        M = self.momentum * state.M + G + self.weight_decay * X
        X_new = ctx.mix(X) - ctx.lr * (M - state.C)
        state.C = ctx.mix(state.C - M) + M
        state.M = M
        return X_new


class DecentLaM(LocalStep):
    """DecentLaM (Yuan et al., ICCV 2021, Alg. 2): momentum accumulates (X - W (X - lr D)) / lr, the whole step of DSGD,
    and therefore adds nothing to DSGD's bias.

    Args:
        momentum: Factor of the momentum; 0 gives DSGD.
        weight_decay: L2 coefficient added to the gradient.
    """

    every_step = True
    assumes: ClassVar = ("static",)

    def __init__(self, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(momentum, weight_decay=weight_decay)

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_static(self, graph)

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        D = (X - ctx.mix(X - ctx.lr * (G + self.weight_decay * X))) / ctx.lr
        return X - ctx.lr * self.accelerate(D, state)


class GUT(LocalStep):
    """Global update tracking (Aketi et al., NeurIPS 2023, Alg. 1), and with ``momentum`` QG-GUTm. Each step sends one
    message per edge.

    With x the rows before mixing, a node tracks Delta = D - (W x - x) / lr. It computes its neighbours' steps from the
    models they send, so that Y = Delta + scaling (W Y_old - (W x_old - x_old) / lr - Delta_old), and x <- x - lr Y.
    Momentum (heavy ball or Nesterov) accumulates Y, which includes the gossip, and is subtracted from the neighbours'
    steps again, as in the authors' code. Unlike in that code, the gossip in Delta is divided by the lr of this step,
    not of the previous one, and W is that of the graph, not of a ring.

    Args:
        scaling: The paper's mu, the factor of the tracked difference, from 0 (which gives DSGD) to below 1 - momentum;
            it shrinks the bias of DSGD by a factor 1 - scaling.
        momentum: Factor of the momentum; 0 gives GUT.
        nesterov: Step along Y + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
        mixed: Whether rows are W x, where the authors' code takes gradients; false: rows are x, as in Alg. 1.
    """

    every_step = True
    assumes: ClassVar = ("static",)

    def __init__(self, scaling: float = 0.9, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
                 mixed: bool = True):  # fmt: skip
        super().__init__(momentum, nesterov, weight_decay)
        require(0 <= scaling < 1 - momentum, "gossip.scaling", scaling, f"0 to below 1 - momentum, {1 - momentum:g}")
        self.scaling, self.mixed = scaling, mixed
        self.buffers = (*self.buffers, "V", "C")  # V = W x - x; C is the tracked difference
        self.gossip_factor = 1 + momentum + (momentum**2 if nesterov else 0)  # of V / lr in a step

    def check(self, graph: Graph) -> None:
        super().check(graph)
        # The bound is the eigenvalue along whose eigenvector a step without gradients only flips the differences' sign.
        kept = 1 - self.scaling * (self.gossip_factor - 1)
        turned = 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov)
        require_eigenvalues_above(max((kept - turned) / (kept + 2 * self.scaling), -1.0), self, graph)

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        x, V, lr = (X - state.V if self.mixed else X), state.V, ctx.lr
        Delta = G + self.weight_decay * X - V / lr
        step = self.accelerate(Delta + self.scaling * state.C, state)
        x_new = x - lr * step
        mixed = ctx.mix(x_new)
        W_step = (x + V - mixed) / lr  # computed from the neighbours' models
        state.V, state.C = mixed - x_new, W_step - self.gossip_factor * V / lr - Delta
        return mixed if self.mixed else x_new
