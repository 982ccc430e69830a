"""The base of rules that run another rule and change how it communicates."""

from __future__ import annotations

from abc import abstractmethod
from types import SimpleNamespace

from lightning_idkd.callback import HOOKS, Context, Gossip
from lightning_idkd.graph import Graph

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class Around(Gossip):
    """Runs ``rule``, whose buffers, hooks and state it has, with the context that :meth:`change` returns.

    Args:
        rule: The rule to run.
    """

    def __init__(self, rule: Gossip):
        self.rule = rule
        for hook in HOOKS:
            if hasattr(rule, hook) and not hasattr(self, hook):
                setattr(self, hook, getattr(rule, hook))

    # Properties, since the rule may compute them. Nothing assigns to them, as their declaration in Gossip would allow.
    buffers = property(lambda self: self.rule.buffers)  # ty: ignore[invalid-assignment]
    columnwise = property(lambda self: self.rule.columnwise)  # ty: ignore[invalid-assignment]
    shares = property(lambda self: self.rule.shares)  # ty: ignore[invalid-assignment]
    needs_features = property(lambda self: self.rule.needs_features)  # ty: ignore[invalid-assignment]
    assumes = property(lambda self: self.rule.assumes)  # ty: ignore[invalid-assignment]
    sends = property(lambda self: self.rule.sends)  # ty: ignore[invalid-assignment]
    takes = property(lambda self: self.rule.takes)  # ty: ignore[invalid-assignment]

    @abstractmethod
    def change(self, ctx: Context) -> Context:
        """Returns the context in which the rule runs instead of ``ctx``."""

    def check(self, graph: Graph) -> None:
        self.rule.check(graph)

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return self.rule.update(X, G, state, self.change(ctx))

    def combine(self, X: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        return self.rule.combine(X, state, ctx)

    def state_dict(self) -> dict:
        return self.rule.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.rule.load_state_dict(state)
