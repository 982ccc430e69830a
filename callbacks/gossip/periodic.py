"""Rules that communicate differently in some steps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import ClassVar, NoReturn

from lightning_idkd.callback import Context, Gossip
from lightning_idkd.errors import UserError, require

from .around import Around
from .dsgd import DSGD

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class GossipPGA(DSGD):
    """Gossip SGD with periodic global averaging (Chen et al., ICML 2021, Alg. 1): DSGD, but every ``period`` steps the
    exact mean over all nodes replaces the mixing.

    Args:
        period: The paper's H, the number of steps from one global average to the next; 1 gives AllReduce.
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    sends: ClassVar = ("mix", "mean")

    def __init__(self, period: int = 6, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        require(period >= 1, "gossip.period", period, "1 or more")
        self.period = period

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        average = ctx.mean if (ctx.step + 1) % self.period == 0 else ctx.mix
        return average(X - ctx.lr * self.direction(X, G, state))


class LocalSteps(Around):
    """Lets a rule mix in every k-th step only: in the other steps it runs with W = I, and nothing is sent.

    Around AllReduce this is local SGD (Stich, ICLR 2019); around DSGD it is local decentralised SGD (Koloskova et al.,
    ICML 2020).

    Args:
        rule: The rule to run; it may only mix, not send other messages.
        every: k, the number of steps from one mixing to the next.
    """

    def __init__(self, rule: Gossip, every: int = 2):
        require(every >= 1, "gossip.every", every, "1 or more")
        if rule.every_step or rule.edge_buffers:
            name = type(rule).__name__
            raise UserError(f"gossip.rule: LocalSteps takes rules that may skip a mixing, but {name} needs every one")
        super().__init__(rule)
        self.every = every

    every_step = True  # LocalSteps around LocalSteps does no more than one of them

    def change(self, ctx: Context) -> Context:
        if (ctx.step + 1) % self.every == 0:
            return ctx
        return dataclasses.replace(ctx, mix=keep, mean=keep, receive=receive_nothing, swap=self.refuse)

    def refuse(self, M: Tensor, **_: object) -> NoReturn:
        """Raises a UserError: the rule swaps messages in a step in which nothing is sent."""
        raise UserError(f"gossip.rule: {type(self.rule).__name__} swaps messages, so it must set every_step = True")


def keep(T: Tensor, **_: object) -> Tensor:
    """Returns ``T`` unchanged, as a mixing with W = I."""
    return T


def receive_nothing(T: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the node's own row of ``T`` with weight 1, as if no neighbour had sent anything."""
    return T[:, None], T.new_ones(len(T), 1)
