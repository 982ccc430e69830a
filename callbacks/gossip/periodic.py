"""Rules that communicate differently in some steps."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import NoReturn

from lightning_idkd.callback import HOOKS, Context, Gossip
from lightning_idkd.errors import UserError, require
from lightning_idkd.graph import Graph

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

    def __init__(self, period: int = 6, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        require(period >= 1, "gossip.period", period, "1 or more")
        self.period = period

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        average = ctx.mean if (ctx.step + 1) % self.period == 0 else ctx.mix
        return average(X - ctx.lr * self.direction(X, G, state))


class LocalSteps(Gossip):
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
        self.rule, self.every = rule, every
        for hook in HOOKS:
            if hasattr(rule, hook):
                setattr(self, hook, getattr(rule, hook))

    every_step = True  # LocalSteps around LocalSteps does no more than one of them
    # As the rule has them, which may compute them. Nothing assigns them, as their declaration in Gossip would allow.
    buffers = property(lambda self: self.rule.buffers)  # ty: ignore[invalid-assignment]
    columnwise = property(lambda self: self.rule.columnwise)  # ty: ignore[invalid-assignment]
    shares = property(lambda self: self.rule.shares)  # ty: ignore[invalid-assignment]
    takes = property(lambda self: self.rule.takes)  # ty: ignore[invalid-assignment]
    assumes = property(lambda self: self.rule.assumes)  # ty: ignore[invalid-assignment]
    needs_features = property(lambda self: self.rule.needs_features)  # ty: ignore[invalid-assignment]

    def check(self, graph: Graph) -> None:
        self.rule.check(graph)

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        if (ctx.step + 1) % self.every:
            ctx = dataclasses.replace(ctx, mix=keep, mean=keep, swap=self.refuse)
        return self.rule.update(X, G, state, ctx)

    def refuse(self, M: Tensor, **_: object) -> NoReturn:
        """Raises a UserError: the rule swaps messages in a step in which nothing is sent."""
        raise UserError(f"gossip.rule: {type(self.rule).__name__} swaps messages, so it must set every_step = True")

    def combine(self, X: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return self.rule.combine(X, state, ctx)

    def state_dict(self) -> dict:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.rule.load_state_dict(state)


def keep(T: Tensor, **_: object) -> Tensor:
    """Returns ``T`` unchanged, as a mixing with W = I."""
    return T
