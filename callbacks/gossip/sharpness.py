"""Sharpness-aware local steps."""

from __future__ import annotations

import math
from types import SimpleNamespace

from lightning_idkd.callback import Context
from lightning_idkd.errors import require

from .dsgd import DSGD

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class SharpnessAwareDSGD(DSGD):
    """DSGD with the gradient at the worst nearby point (SAM, Foret et al., ICLR 2021, Eq. 2), decentralised as in
    DFedSAM (Shi et al., ICML 2023) with one local step.

    Args:
        rho: Radius within which the worst point is sought, above 0.
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    columnwise = False  # the ascent step needs the norm of a whole row

    def __init__(self, rho: float = 0.05, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        require(0 < rho < math.inf, "gossip.rho", rho, "above 0")
        self.rho = rho

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        ascent = self.rho * G / (G.norm(dim=1, keepdim=True) + 1e-12)
        return super().update(X, ctx.gradient(X + ascent), state, ctx)
