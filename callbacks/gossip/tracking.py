"""Rules that follow what all nodes together would do: of gradients, of momenta, of whole updates."""

from __future__ import annotations

from callbacks.gossip.bias_correction import eigenvalues_above, static
from callbacks.gossip.dsgd import LocalStep
from lightning_idkd.errors import require


class GradientTracking(LocalStep):
    """Y <- W Y + D - D_old; X <- W (X - lr Y): the mean of Y is that of the gradients (Di Lorenzo and Scutari,
    2016). Momentum accumulates Y. Two messages an edge and step.

    Adapts, then combines, as in RelaySGD's code. Y is without the learning rate; there the steps themselves are tracked, which
    differs only after lr has changed. :class:`MomentumTracking` combines first.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along Y + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def __init__(self, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        self.buffers = (*self.buffers, "Y", "D")

    def update(self, X, G, state, ctx):
        D = G + self.weight_decay * X
        state.Y = ctx.mix(state.Y) + D - state.D
        state.D = D
        return ctx.mix(X - ctx.lr * self.accelerate(state.Y, state))


class MomentumTracking(LocalStep):
    """Momentum tracking (Takezawa et al., TMLR 2023, Alg. 1): M <- momentum M + D; X <- W X - lr (M - C); C <- W (C - M) + M.

    Starts from M = C = 0; the authors' code starts both from D less its mean over all nodes, divided by 1 - momentum, for which
    it needs an all-reduce, and then follows the same lines. Two messages an edge and step.

    Args:
        momentum: Factor of the momentum; 0 gives gradient tracking that combines first.
        weight_decay: L2 coefficient added to the gradient.
    """

    def __init__(self, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(momentum, weight_decay=weight_decay)
        self.buffers = ("M", "C")

    def update(self, X, G, state, ctx):
        M = self.momentum * state.M + G + self.weight_decay * X
        X_new = ctx.mix(X) - ctx.lr * (M - state.C)
        state.C = ctx.mix(state.C - M) + M
        state.M = M
        return X_new


class DecentLaM(LocalStep):
    """DecentLaM (Yuan et al., ICCV 2021, Alg. 2): momentum accumulates (X - W (X - lr D)) / lr, the whole step of DSGD, so that
    it adds nothing to DSGD's bias.

    Args:
        momentum: Factor of the momentum; 0 gives DSGD.
        weight_decay: L2 coefficient added to the gradient.
    """

    every_step = True

    def __init__(self, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(momentum, weight_decay=weight_decay)

    def check(self, graph) -> None:
        super().check(graph)
        static(self, graph)

    def update(self, X, G, state, ctx):
        D = (X - ctx.mix(X - ctx.lr * (G + self.weight_decay * X))) / ctx.lr
        return X - ctx.lr * self.accelerate(D, state)


class GUT(LocalStep):
    """Global update tracking (Aketi et al., NeurIPS 2023, Alg. 1), and QG-GUTm with ``momentum``; one message an edge and step.

    Of x, the rows before mixing, a node tracks Delta = D - (W x - x) / lr. Its neighbours' models tell it their steps, so that
    Y = Delta + scaling (W Y_old - (W x_old - x_old) / lr - Delta_old), and x <- x - lr Y. Momentum (heavy ball or Nesterov) runs
    over Y, which holds the gossip, and is taken off the neighbours' steps again, as in the authors' code. Unlike there, the
    gossip of Delta is divided by the lr of this step, not of the one before, and weights are those of the graph, not a ring's.

    Args:
        scaling: The paper's mu, how much of the tracked difference is added: 0 gives DSGD, whose bias shrinks by 1 - scaling;
            below 1 - momentum.
        momentum: Factor of the momentum; 0 gives GUT.
        nesterov: Step along Y + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
        mixed: Rows are W x, so that gradients are taken there as in the authors' code; false: rows are x, as in Alg. 1.
    """

    every_step = True

    def __init__(self, scaling: float = 0.9, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
                 mixed: bool = True):  # fmt: skip
        super().__init__(momentum, nesterov, weight_decay)
        require(0 <= scaling < 1 - momentum, "gossip.scaling", scaling, f"0 to below 1 - momentum, {1 - momentum:g}")
        self.scaling, self.mixed = scaling, mixed
        self.buffers = (*self.buffers, "V", "C")  # W x - x, and the difference that is tracked
        self.gossips = 1 + momentum + (momentum**2 if nesterov else 0)  # how much of V / lr a step holds

    def check(self, graph) -> None:
        super().check(graph)
        # at which eigenvalue, without gradients, what nodes differ by along its eigenvector only changes sign in a step
        kept = 1 - self.scaling * (self.gossips - 1)
        turned = 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov)
        eigenvalues_above(max((kept - turned) / (kept + 2 * self.scaling), -1.0), self, graph)

    def update(self, X, G, state, ctx):
        x, V, lr = (X - state.V if self.mixed else X), state.V, ctx.lr
        Delta = G + self.weight_decay * X - V / lr
        step = self.accelerate(Delta + self.scaling * state.C, state)
        x_new = x - lr * step
        mixed = ctx.mix(x_new)
        told = (x + V - mixed) / lr  # W step, from the neighbours' models
        state.V, state.C = mixed - x_new, told - self.gossips * V / lr - Delta
        return mixed if self.mixed else x_new
