"""Exact diffusion: each step corrects the bias that different local data caused in the step before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

from lightning_idkd.callback import Context, Gossip
from lightning_idkd.errors import UserError
from lightning_idkd.graph import LARGE, Graph

from .dsgd import LocalStep

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class D2(LocalStep):
    """D2 (Tang et al., ICML 2018, Alg. 1): X+ <- W (2 X - X_old - lr D + lr_old D_old), written as exact diffusion
    (Yuan et al., 2019): Psi = X - lr D, X+ <- W (Psi + X - Psi_old), with momentum inside Psi (as in Vogels et al.,
    NeurIPS 2021).

    The correction contains the learning rate of the previous step, as in RelaySGD's code. Therefore nodes move apart
    for some steps after the learning rate drops.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    every_step = True
    assumes: ClassVar = ("static",)

    def __init__(self, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        self.buffers = (*self.buffers, "C")  # the correction X - Psi_old

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_eigenvalues_above(-1 / 3, self, graph)

    def update(self, X: Tensor, G: Tensor, state: SimpleNamespace, ctx: Context) -> Tensor:
        Psi = X - ctx.lr * self.direction(X, G, state)
        X_new = ctx.mix(Psi + state.C)
        state.C = X_new - Psi
        return X_new


class EDM(D2):
    """Exact diffusion with momentum (Hu et al., arXiv 2501.19082): M <- momentum M + (1 - momentum) D, Psi = X - lr M.

    Args:
        momentum: Factor of the momentum; 0 gives D2.
        weight_decay: L2 coefficient added to the gradient.
    """

    def __init__(self, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(momentum, weight_decay=weight_decay)

    def accelerate(self, D: Tensor, state: SimpleNamespace) -> Tensor:
        return super().accelerate((1 - self.momentum) * D, state)


def require_static(rule: Gossip, graph: Graph) -> None:
    """Refuses a graph that changes, since ``rule`` corrects what the same weights did in the step before."""
    if graph.period != 1:
        raise UserError(f"gossip: {type(rule).__name__} takes static graphs, but graph.topology {graph.name} changes")


def require_undirected(rule: Gossip, graph: Graph, why: str = "") -> None:
    """Refuses a directed graph; ``why`` is appended to what the rule takes."""
    if graph.topology.directed:
        name = type(rule).__name__
        raise UserError(f"gossip: {name} takes undirected graphs{why}, but graph.topology {graph.name} is directed")


def require_eigenvalues_above(least: float, rule: Gossip, graph: Graph) -> None:
    """Refuses eigenvalues of ``least`` or less, with which differences between nodes would not decay."""
    name = type(rule).__name__
    require_static(rule, graph)
    require_undirected(rule, graph)
    smallest = graph.smallest_eigenvalue()
    if smallest < least + (1e-9 if graph.nodes <= LARGE else 1e-4):
        raise UserError(
            f"gossip: {name} takes mixing weights whose eigenvalues lie above {least:.4f}, but the smallest of this "
            f"{graph.name} is {smallest:.4f}; set graph.weights: lazy"
        )
