"""Rules whose nodes do not wait for each other: each acts when it has its gradient, in simulated time."""

from __future__ import annotations

from types import SimpleNamespace

from lightning_idkd.callback import Asynchronous, Event
from lightning_idkd.errors import require
from lightning_idkd.graph import Graph

from .bias_correction import require_undirected
from .dsgd import LocalStep

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class AsyncLocalStep(Asynchronous, LocalStep):
    """Base of asynchronous rules with the local step of SGD.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def step(self, x: Tensor, G: Tensor, state: SimpleNamespace, event: Event) -> Tensor:
        """Returns a row [1, P] after the local step."""
        return x - event.lr * self.direction(x, G, state)


class ADPSGD(AsyncLocalStep):
    """Asynchronous decentralised parallel SGD (Lian et al., ICML 2018, Alg. 1): a node that has its gradient averages
    its row with the row of a neighbour, drawn uniformly, and then applies the gradient, which is that of an older row.

    The average replaces both rows at once; the node computes its next gradient during the transfer.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_undirected(self, graph, ", since two nodes average with each other")

    def act(self, X: Tensor, G: Tensor, state: SimpleNamespace, event: Event) -> None:
        i, j = event.node, event.peer()
        event.exchange(j)
        X[[i, j]] = (X[i] + X[j]) / 2
        X[i] = self.step(X[i : i + 1], G, state, event)[0]


class SwarmSGD(AsyncLocalStep):
    """SwarmSGD (Nadiradze et al., NeurIPS 2021, Alg. 1): a node takes some local steps, and then averages with a
    neighbour, drawn uniformly.

    The number of local steps is ``local_steps`` for every node, as in their experiments; the analysis draws it at
    random. The neighbour does not wait: it goes on with its gradient, which it applies to the average.

    Args:
        local_steps: The paper's H, the number of local steps from one averaging to the next.
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    def __init__(self, local_steps: int = 2, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(momentum, nesterov, weight_decay)
        require(local_steps >= 1, "gossip.local_steps", local_steps, "1 or more")
        self.local_steps = local_steps

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_undirected(self, graph, ", since two nodes average with each other")

    def act(self, X: Tensor, G: Tensor, state: SimpleNamespace, event: Event) -> None:
        i = event.node
        X[i] = self.step(X[i : i + 1], G, state, event)[0]
        if (event.count + 1) % self.local_steps == 0:
            j = event.peer()
            event.exchange(j)
            X[[i, j]] = (X[i] + X[j]) / 2


class AsyncGossip(AsyncLocalStep):
    """DSGD without waiting: a node that has its gradient applies it, mixes with the last rows that have arrived from
    its neighbours, by the weights of W, and sends them its row from before the mixing.

    Until a neighbour's first row has arrived, the node's own row takes the neighbour's weight.

    Args:
        momentum: Factor of the local momentum; 0 for none.
        nesterov: Step along D + momentum * M instead of M.
        weight_decay: L2 coefficient added to the gradient.
    """

    edge_buffers = {"inbox": None, "arrived": 1}  # noqa: RUF012  the last row that has arrived, and its number
    takes = ("doubly", "row")

    def check(self, graph: Graph) -> None:
        super().check(graph)
        require_undirected(self, graph, ", since a row waits at the edge on which its receiver answers")

    def act(self, X: Tensor, G: Tensor, state: SimpleNamespace, event: Event) -> None:
        i = event.node
        half = self.step(X[i : i + 1], G, state, event)
        rows, weights = event.inbox()
        X[i] = half[0] + weights @ (rows - half)
        event.send(half)
