"""Quasi-global momentum."""

from __future__ import annotations

import math
from types import SimpleNamespace

from lightning_idkd.callback import Context, Gossip
from lightning_idkd.errors import require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class QGDSGDm(Gossip):
    """QG-DSGDm, and with ``nesterov`` QG-DSGDm-N (Lin et al., ICML 2021, Alg. 1, with its beta = mu = ``momentum``).

    Args:
        momentum: Factor of the quasi-global momentum.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    buffers = ("M",)

    def __init__(self, momentum: float = 0.9, nesterov: bool = True, weight_decay: float = 0.0):
        require(0 <= momentum < 1, "gossip.momentum", momentum, "0 to below 1")
        require(0 <= weight_decay < math.inf, "gossip.weight_decay", weight_decay, "0 or more")
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        D = G + self.weight_decay * X
        M = self.momentum * state.M + D  # the local step uses the quasi-global buffer
        X_new = ctx.mix(X - ctx.lr * (D + self.momentum * M if self.nesterov else M))
        state.M = self.momentum * state.M + (1 - self.momentum) * (X - X_new) / ctx.lr
        return X_new
