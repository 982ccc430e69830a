"""Runs an asynchronous rule: nodes act in the order of simulated time, each at its own pace."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.callback import Asynchronous, Event
from lightning_idkd.clock import Clock
from lightning_idkd.data.store import Store
from lightning_idkd.network import Network
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.training.gossip_step import GossipStep


class AsyncStep(GossipStep):
    """An asynchronous rule with its buffers, and the events of its nodes.

    A node computes a gradient at the row that it has when it begins, acts when its compute time is over, and begins
    again. Gradients that are not yet computed are computed in one call, when the first of them is needed.
    """

    rule: Asynchronous
    ready: np.ndarray
    """float64 [n], the time at which every node has its gradient."""
    computed: np.ndarray
    """bool [n], whether that gradient is computed already."""
    begun: np.ndarray
    """int64 [n], gradients that each node has begun."""
    own: np.ndarray
    """int64 [n], batches that each node has taken of its present set."""
    flights: list[tuple[float, int, int, Tensor]]
    """Messages on their way: time of arrival, index of the receiver's edge to the sender, number, row [P]."""

    def __init__(self, rule: Asynchronous, stack: NodeStack, network: Network, store: Store, clock: Clock, seed: int):
        super().__init__(rule, stack, network, seed)
        self.store, self.clock, n = store, clock, stack.n
        self.ready, self.computed = np.zeros(n), np.zeros(n, dtype=bool)
        self.begun, self.own = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
        self.generation, self.calls, self.updates = store.generation, 0, 0
        self.losses, self.flights = torch.zeros(n, dtype=stack.X.dtype, device=stack.device), []

    def advance(self, step: int, lr: float) -> Tensor:
        """Let nodes act n times, in the order of time; returns the sums [n] of the losses of each node's gradients."""
        if self.updates == 0:
            for node in range(self.stack.n):
                self.begin(node, 0.0)
        total = torch.zeros_like(self.losses)
        for _ in range(self.stack.n):
            node = int(self.ready.argmin())
            self.land(self.ready[node])
            if not self.computed[node]:
                self.compute()
            total[node] += self.losses[node]
            self.act(node, step, lr)
        return total

    def act(self, node: int, step: int, lr: float) -> None:
        """Let ``node`` act on its gradient, and begin the next one."""
        now, row, X = float(self.ready[node]), slice(node, node + 1), self.stack.X
        self.clock.time[node] = now
        state = {k: v[row] for k, v in self.buffers.items()}
        event, own = Conversation(self, node, step, lr, now), SimpleNamespace(**state)
        self.rule.act(X, self.buffers["D"][row], own, event)
        for name, matrix in state.items():
            if getattr(own, name) is not matrix:
                matrix.copy_(getattr(own, name))
        self.updates += 1
        self.begin(node, now, event.busy)

    def begin(self, node: int, now: float, busy: float = 0.0) -> None:
        """Let ``node`` begin a gradient at its row; its messages keep it from acting for ``busy`` seconds."""
        self.buffers["S"][node] = self.stack.X[node]
        self.computed[node] = False
        seconds = self.clock.compute_seconds(int(self.begun[node]), np.array([node]))[0]
        self.ready[node] = now + max(float(seconds), busy)
        self.begun[node] += 1

    def delay(self, seconds: np.ndarray) -> None:
        """Let every node act ``seconds`` [n] later, since it waits for messages outside the rule, such as labels."""
        self.ready = self.ready + seconds

    def compute(self) -> None:
        """Compute all gradients that nodes have begun, each at the row with which it began."""
        if self.generation != self.store.generation:
            self.generation, self.own = self.store.generation, np.zeros_like(self.own)
        store, stack, pending = self.store, self.stack, ~self.computed
        batch = store.batch(store.next_positions(torch.from_numpy(self.own)), self.calls)
        with stack.use_parameters(self.buffers["S"]), stack.keep_buffers(pending):
            losses = stack.step(*batch[:2], self.calls, *batch[2:])
        which = torch.from_numpy(pending).to(stack.device)
        self.buffers["D"][which] = stack.G[which]
        self.losses = torch.where(which, losses.to(self.losses), self.losses)
        self.own, self.calls, self.computed = self.own + pending, self.calls + 1, np.ones_like(pending)

    def land(self, now: float) -> None:
        """Deliver the messages that have arrived by ``now``; of several over an edge the last one sent stays."""
        arrived = [flight for flight in self.flights if flight[0] <= now]
        self.flights = [flight for flight in self.flights if flight[0] > now]
        for _time, edge, number, row in arrived:
            if number > self.edge_buffers["arrived"][edge, 0]:
                self.edge_buffers["inbox"][edge], self.edge_buffers["arrived"][edge] = row, number

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the buffers."""
        return {
            "ready": torch.from_numpy(self.ready), "computed": torch.from_numpy(self.computed),
            "begun": torch.from_numpy(self.begun), "own": torch.from_numpy(self.own), "losses": self.losses,
            "counters": (self.generation, self.calls, self.updates), "flights": self.flights,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name in ("ready", "computed", "begun", "own"):
            setattr(self, name, state[name].numpy().copy())
        self.generation, self.calls, self.updates = state["counters"]
        self.losses = state["losses"].to(self.losses)
        self.flights = [(*flight, row.to(self.stack.X)) for *flight, row in state["flights"]]


class Conversation(Event):
    """What a node sends and receives when it acts."""

    def __init__(self, step: AsyncStep, node: int, number: int, lr: float, now: float):
        self._of, self._number = step, number
        self.node, self.lr, self.time, self.busy = node, lr, now, 0.0
        self.count, self.edges = int(step.begun[node]) - 1, step.network.graph.mixing(number).edges

    def uniform(self, purpose: str) -> float:
        return float(randomness.uniform(self._of.seed, purpose, self._of.updates))

    def peer(self) -> int:
        neighbours = self._of.network.graph.mixing(self._number).neighbours(self.node)
        return neighbours[min(int(self.uniform("peer") * len(neighbours)), len(neighbours) - 1)]

    def exchange(self, peer: int) -> None:
        both, nbytes = np.array([[self.node, peer], [peer, self.node]]), self._of.stack.X[0].nbytes
        seconds = self._of.clock.transfer_seconds(self._of.updates, both, nbytes)
        self._of.network.count("parameter", 2 * nbytes, 2)
        self.busy = max(self.busy, float(seconds.max()))

    def send(self, row: Tensor) -> None:
        edges, nbytes = self.edges, self._of.stack.X[0].nbytes
        mine = np.flatnonzero(edges[:, 0] == self.node)
        seconds = self._of.clock.transfer_seconds(self._of.updates, edges[mine], nbytes)
        self._of.network.count("parameter", len(mine) * nbytes, len(mine))
        place, values = {edge: k for k, edge in enumerate(map(tuple, edges.tolist()))}, row.flatten().clone()
        for (sender, receiver), took in zip(edges[mine].tolist(), seconds.tolist(), strict=True):
            flight = self.time + took, place[receiver, sender], self._of.updates + 1, values
            self._of.flights.append(flight)

    def inbox(self) -> tuple[Tensor, Tensor]:
        mine = np.flatnonzero(self.edges[:, 0] == self.node)
        arrived = self._of.edge_buffers["arrived"][mine, 0] > 0
        senders, mixing = self.edges[mine, 1], self._of.network.graph.mixing(self._number)
        weights = self._of.stack.X.new_tensor(mixing.entries(np.full(len(senders), self.node), senders))
        return self._of.edge_buffers["inbox"][mine][arrived], weights[arrived]
