"""The network carries all messages between nodes, and is the only code that talks to other processes.

Every process holds a contiguous block of the nodes' rows. A sum over senders runs in ascending order, or every process
computes the same product with the whole W, so the number of processes does not change a result (of finite rows). Bytes
are counted by kind for every directed edge, whether or not it leaves the process; a node's message to itself is never
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Mixing
from lightning_idkd.labels import Labels

KINDS = ("parameter", "label", "other")


def assign_rows(nodes: int, world: int) -> list[range]:
    """The contiguous block of nodes that every process holds; their sizes differ by at most 1."""
    sizes = [len(part) for part in np.array_split(np.arange(nodes), world)]
    ends = np.cumsum(sizes)
    return [range(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


@dataclass(frozen=True)
class Routes:
    """The directed edges at one step that leave nodes of this process, and what it exchanges with other processes."""

    mixing: Mixing
    edges: np.ndarray
    """int64 [e, 2] (sender, receiver), sorted."""
    out: dict[int, np.ndarray]
    """Per receiving process: indices of the edges to it, in that process's order of the reverse edges."""
    sent: dict[int, list[int]]
    """Per other process: the nodes of this process whose rows it needs, ascending."""
    wanted: dict[int, list[int]]
    """Per other process: its nodes whose rows this process needs, ascending."""

    @classmethod
    def plan(cls, mixing: Mixing, blocks: list[range], rank: int) -> Routes:
        """Plan the routes of process ``rank``; process q holds the nodes ``blocks[q]``."""
        ends = np.array([block.stop for block in blocks])
        process = np.searchsorted(ends, mixing.edges, side="right")  # [E, 2], of sender and receiver
        outgoing = process[:, 0] == rank
        edges, receiving = mixing.edges[outgoing], process[outgoing, 1]
        out, sent, wanted = {}, {}, {}
        for q in range(len(blocks)):
            if q != rank:
                to_q = np.flatnonzero(receiving == q)
                out[q] = to_q[np.lexsort(edges[to_q].T)]
                sent[q] = np.unique(edges[to_q, 0]).tolist()
                incoming = (process[:, 0] == q) & (process[:, 1] == rank)
                wanted[q] = np.unique(mixing.edges[incoming, 0]).tolist()
        return cls(mixing, edges, out, sent, wanted)

    @cached_property
    def back(self) -> np.ndarray:
        """int64 [e], for every edge the index of its reverse edge; -1 if another process has the reverse edge."""
        index = {edge: e for e, edge in enumerate(map(tuple, self.edges.tolist()))}
        return np.array([index.get((j, i), -1) for i, j in index], dtype=np.int64)


class Network:
    """Carries messages between the nodes of a graph, for the rows that process ``rank`` of ``world`` holds."""

    def __init__(self, graph: Graph, rank: int = 0, world: int = 1):
        self.graph, self.rank, self.world = graph, rank, world
        self.blocks = assign_rows(graph.nodes, world)
        self.rows = self.blocks[rank]
        self._routes: Routes | None = None  # of the last step used
        self._weights: tuple[Mixing, Tensor] | None = None  # W as a tensor, of the last step with a whole product
        self._bytes = dict.fromkeys(KINDS, 0)
        self._messages = 0

    # ------------------------------------------------------------------ counted messages

    def count(self, kind: str, nbytes: int, messages: int) -> None:
        """Count bytes and messages that the nodes of this process send."""
        self._bytes[kind] += nbytes
        self._messages += messages

    def routes(self, step: int) -> Routes:
        """The routes at ``step``."""
        mixing = self.graph.mixing(step)
        if self._routes is None or self._routes.mixing is not mixing:
            self._routes = Routes.plan(mixing, self.blocks, self.rank)
        return self._routes

    def mix(
        self, T: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True, size: int | None = None
    ) -> Tensor:
        """``W(step) @ T`` for the rows ``T`` [rows, C] of this process.

        ``messages=False`` counts bytes only: ``T`` is a further block of columns of a message that is already counted.
        ``size`` is the bytes of a message that is encoded shorter than its C values.
        """
        routes = self.routes(step)
        row, edges = self._gather_rows(T, routes), len(routes.edges)
        whole = routes.mixing.dense or T.is_cuda  # on a GPU a call per edge costs more than the products with zeros
        mixed = self._mix_by_product(row, routes.mixing, T) if whole else self._mix_by_sums(row, routes.mixing, T)
        self.count(kind, edges * (T.shape[1] * T.element_size() if size is None else size), edges * messages)
        return mixed

    def _mix_by_sums(self, row: dict[int, Tensor], mixing: Mixing, T: Tensor) -> Tensor:
        """This process's rows of W times all rows, summed sender by sender."""
        mixed = torch.empty_like(T)
        for i, out in zip(self.rows, mixed, strict=True):
            senders, weights = mixing.terms[i]
            torch.mul(row[senders[0]], weights[0], out=out)
            for j, w in zip(senders[1:], weights[1:], strict=True):
                out.add_(row[j], alpha=w)
        return mixed

    def _mix_by_product(self, row: dict[int, Tensor], mixing: Mixing, T: Tensor) -> Tensor:
        """This process's rows of W times all rows, by one matrix product.

        Every process computes the product for all nodes, so that the order of its sums does not depend on their number.
        """
        everyone = T.contiguous()
        if self.world > 1:
            everyone = T.new_zeros(len(mixing.W), T.shape[1])
            for j, values in row.items():
                everyone[j] = values
        if self._weights is None or self._weights[0] is not mixing or self._weights[1].dtype != T.dtype:
            self._weights = mixing, T.new_tensor(mixing.W)
        return (self._weights[1] @ everyone)[self.rows.start : self.rows.stop]

    def edges(self, step: int = 0) -> np.ndarray:
        """Directed edges [e, 2] (sender, receiver) whose sender is in this process, sorted: the rows of a ``swap``."""
        return self.routes(step).edges

    def swap(self, M: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True) -> Tensor:
        """Send one message over every directed edge of an undirected graph, in both directions at once.

        The rows of ``M`` [e, C] are in the order of :meth:`edges`; row (i, j) of the result is what j sent to i.

        Raises:
            UserError: the graph is directed.
        """
        routes = self.routes(step)
        if self.graph.topology.directed:
            raise UserError(
                f"gossip: messages can be swapped over undirected edges only, and {self.graph.name} is directed"
            )
        received = M[routes.back]
        for q, out in routes.out.items():
            if len(out):  # the graph is undirected: as many messages arrive as leave
                received[out] = self._exchange_rows(M[np.sort(out)], q, len(out))
        self.count(kind, M.numel() * M.element_size(), len(M) * messages)
        return received

    def all_reduce(self, T: Tensor, *, kind: str = "parameter", messages: bool = True) -> Tensor:
        """Set every row of ``T`` [rows, C] to the mean of all nodes; counts a ring all-reduce, 2 (n - 1) C values."""
        n = self.graph.nodes
        everyone = self.report(T)
        total = everyone[0].clone()
        for row in everyone[1:]:
            total.add_(row)
        share = 2 * (n - 1) * T.shape[1] * T.element_size()
        self.count(
            kind, share * (self.rows.stop) // n - share * self.rows.start // n, 2 * (n - 1) * len(self.rows) * messages
        )
        return (total / n).expand_as(T).clone()

    def exchange(self, labels: Sequence[Labels], step: int = 0, *, kind: str = "label") -> list[dict[int, Labels]]:
        """Send every node's labels to its neighbours.

        Returns, for every row of this process, the labels that it has by sender, its own included, senders ascending.
        """
        for message in labels:
            if type(message) is not Labels:
                raise TypeError(f"only labels of public samples leave a node, not {type(message).__name__}")
        routes = self.routes(step)
        message_of = dict(zip(self.rows, labels, strict=True))
        on_cpu = {i: message.to("cpu") for i, message in message_of.items()}
        for q, nodes in routes.sent.items():
            for i, message in self._exchange_objects([(i, on_cpu[i]) for i in nodes], q):
                message_of[i] = message.to(labels[0].index.device)
        senders = routes.edges[:, 0].tolist()
        self.count(kind, sum(message_of[j].nbytes for j in senders), len(senders))
        return [{j: message_of[j] for j in routes.mixing.terms[i][0]} for i in self.rows]

    def share(self, T: Tensor, step: int = 0, *, kind: str = "other") -> dict[int, Tensor]:
        """Send every node's row of ``T`` [rows, C] to its neighbours; returns the rows in this process by node."""
        routes = self.routes(step)
        self.count(kind, len(routes.edges) * T.shape[1] * T.element_size(), len(routes.edges))
        return self._gather_rows(T, routes)

    def counts(self) -> dict[str, int]:
        """Bytes by kind and number of messages since the start, summed over all nodes."""
        mine = torch.tensor([*self._bytes.values(), self._messages])
        if self.world > 1:
            dist.all_reduce(mine)
        return dict(zip([*(f"{kind}_bytes" for kind in KINDS), "messages"], mine.tolist(), strict=True))

    def restore(self, counts: dict[str, int]) -> None:
        """Continue counting from ``counts``, which process 0 takes over."""
        mine = counts if self.rank == 0 else dict.fromkeys(counts, 0)
        self._bytes = {kind: mine[f"{kind}_bytes"] for kind in KINDS}
        self._messages = mine["messages"]

    # ------------------------------------------------------------------ measurements, uncounted

    def report(self, T: Tensor) -> Tensor:
        """Gather the rows of all nodes [n, ...] on every process. For measurements, never for training."""
        if self.world == 1:
            return T
        largest = max(len(block) for block in self.blocks)
        padded = torch.zeros((largest, *T.shape[1:]), dtype=T.dtype, device=T.device)
        padded[: len(T)] = T
        parts = [torch.empty_like(padded) for _ in self.blocks]
        dist.all_gather(parts, padded)
        return torch.cat([part[: len(block)] for part, block in zip(parts, self.blocks, strict=True)])

    def report_objects(self, objects: list) -> list:
        """Gather one Python object per node on every process, in the order of the nodes."""
        if self.world == 1:
            return objects
        parts: list = [None] * self.world
        dist.all_gather_object(parts, objects)
        return [o for part in parts for o in part]

    # ------------------------------------------------------------------ transport

    def _gather_rows(self, T: Tensor, routes: Routes) -> dict[int, Tensor]:
        """Exchange rows with other processes; returns, by node, the rows ``T`` and those that this process receives."""
        rows = dict(zip(self.rows, T, strict=True))
        for q, theirs in routes.wanted.items():
            if routes.sent[q] or theirs:
                mine = T[[j - self.rows.start for j in routes.sent[q]]]
                rows |= dict(zip(theirs, self._exchange_rows(mine, q, len(theirs)), strict=True))
        return rows

    def _exchange_rows(self, out: Tensor, q: int, incoming: int) -> Tensor:
        """Send rows ``out`` to process ``q`` and receive ``incoming`` rows from it."""
        received = torch.empty((incoming, *out.shape[1:]), dtype=out.dtype, device=out.device)
        requests = []
        if len(out):
            requests.append(dist.isend(out.contiguous(), q))
        if incoming:
            requests.append(dist.irecv(received, q))
        for request in filter(None, requests):
            request.wait()
        return received

    def _exchange_objects(self, out: list, q: int) -> list:
        """Send a list of objects to process ``q`` and receive its list; the lower rank sends first."""
        received: list = [None]
        for sender in sorted([self.rank, q]):
            if sender == self.rank:
                dist.send_object_list([out], dst=q)
            else:
                dist.recv_object_list(received, src=q)
        return received[0]
