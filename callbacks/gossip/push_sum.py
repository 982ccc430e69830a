"""Push-sum: averages over directed edges, with weights that sum to 1 over what a node sends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Context

from .dsgd import LocalStep

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class SGP(LocalStep):
    """Stochastic gradient push (Assran et al., ICML 2019, Alg. 1): push-sum, also on directed graphs that change.

    Rows are the paper's de-biased z = x / w. Weights whose columns sum to 1 mix x = w z and the push weight w, which is
    one more value per message. With doubly stochastic weights w stays 1, and the rule is DSGD. The consensus model is
    the mean of the z.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    takes: ClassVar[tuple[str, ...]] = ("doubly", "column")

    def __init__(self, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        self.buffers = dict.fromkeys(self.buffers) | {"E": 1}  # w - 1, since buffers start at zero

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return self.combine(X - ctx.lr / (1 + state.E) * self.direction(X, G, state), state, ctx)

    def combine(self, X: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        import torch

        w = 1 + state.E
        x, w = ctx.mix(torch.cat([w * X, w], 1)).split([X.shape[1], 1], 1)
        state.E = w - 1
        return x / w
