"""The rule that replaces the mixing of another rule by a robust aggregation."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import ClassVar, NoReturn

from lightning_idkd.callback import ASSUMPTIONS, Aggregator, Context, Gossip, Run
from lightning_idkd.errors import UserError, require_shape
from lightning_idkd.graph import Graph

from .around import Around

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor

ACTIONS = {
    "mean": "averages over all nodes",
    "swap": "swaps messages",
    "receive": "aggregates already",
    "act": "acts node by node",
}
"""What a rule does besides mixing, by its word in ``sends``."""


class Robust(Around):
    """Replaces every mixing of a rule, and the final gossip, by a robust aggregation of what each node receives.

    Numbers that are not finite never reach the aggregator. An aggregator that works on columns gets the node's own
    numbers instead; for others, the whole row counts as lost.

    Args:
        rule: The rule to run. It must mix and do no more, and must not rely on constant weights or on sums over nodes.
        aggregator: The aggregation in place of the sum weighted by W.
    """

    sends: ClassVar = ("receive",)

    def __init__(self, rule: Gossip, aggregator: Aggregator):
        if reason := self.explain_refusal(rule):
            raise UserError(f"gossip.rule: Robust takes rules that only mix, but {type(rule).__name__} {reason}")
        super().__init__(rule)
        self.aggregator = aggregator

    # as in Around
    columnwise = property(lambda self: self.rule.columnwise and self.aggregator.columnwise)  # ty: ignore[invalid-assignment]
    every_step = property(lambda self: self.rule.every_step)  # ty: ignore[invalid-assignment]

    @staticmethod
    def explain_refusal(rule: Gossip) -> str | None:
        """Returns why an aggregation cannot replace the mixing of ``rule``; None if it can."""
        if rule.sends != ("mix",):
            return next((ACTIONS[name] for name in rule.sends if name != "mix"), "sends nothing")
        if "column" in rule.takes:
            return "sends weights with its parameters"
        return next((f"relies on {ASSUMPTIONS[word]}" for word in rule.assumes if word in ("static", "sums")), None)

    def on_check(self, run: Run) -> None:
        if on_check := getattr(self.rule, "on_check", None):
            on_check(run)
        self.aggregator.on_check(run)

    def check(self, graph: Graph) -> None:
        super().check(graph)
        self.aggregator.check(graph)

    def change(self, ctx: Context) -> Context:
        refusals = {name: functools.partial(self.refuse, name) for name in ("mean", "swap", "receive")}
        return dataclasses.replace(ctx, mix=functools.partial(self.aggregate, ctx=ctx), **refusals)

    def combine(self, X: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return self.rule.combine(X, state, self.change(ctx))

    def aggregate(self, T: Tensor, ctx: Context, **_: object) -> Tensor:
        """Returns the aggregation of the rows of ``T`` that every node of this process has after a gossip step."""
        V, w = discard(*ctx.receive(T), by_column=self.aggregator.columnwise)
        return require_shape(self.aggregator(V, w, ctx), T.shape, f"gossip: {type(self.aggregator).__name__} returns")

    def refuse(self, name: str, *_: object, **__: object) -> NoReturn:
        """Raises a UserError: the rule does more than mixing, without declaring it."""
        raise UserError(
            f"gossip.rule: Robust takes rules that only mix, but {type(self.rule).__name__} {ACTIONS[name]}, so it "
            f"must have '{name}' in sends"
        )


def discard(V: Tensor, w: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
    """Replaces rows of ``V`` [r, D, C] that are not finite by the node's own row or, ``by_column``, numbers by its own.

    The weight of a replaced row goes to the node itself. A row whose sum overflows counts as not finite, too.
    """
    finite = V.sum(2).isfinite()  # without a temporary matrix as large as V
    if finite.all():
        return V, w
    if by_column:
        return V.where(V.isfinite(), V[:, :1]), w
    kept = w * finite
    kept[:, 0] = w[:, 0] + (w - kept)[:, 1:].sum(1)
    return V.where(finite[..., None], V[:, :1]), kept
