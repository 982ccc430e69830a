"""All that crosses edges, and the only code that talks to other processes.

Rows are spread over processes in contiguous blocks; every sum runs over the senders in ascending order, or is that of a product
with the whole W (of finite rows), so a result does not depend on how many processes computed it. Bytes are counted by kind, for
every directed edge, whether or not the edge leaves the process; a message to itself is never counted.
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
    """The contiguous block of nodes every process holds."""
    cuts = [len(part) for part in np.array_split(np.arange(nodes), world)]
    ends = np.cumsum(cuts)
    return [range(int(e - c), int(e)) for c, e in zip(cuts, ends, strict=True)]


@dataclass(frozen=True)
class Routes:
    """Of the directed edges at one step those that begin at the nodes of one process."""

    mixing: Mixing
    edges: np.ndarray
    """int64 [e, 2] (sender, receiver), sorted."""
    out: dict[int, np.ndarray]
    """By process that holds the receivers, those that lead there; in the order in which the ones the other way stand there."""
    sent: dict[int, list[int]]
    """By process, the nodes here whose rows it needs, ascending."""
    wanted: dict[int, list[int]]
    """By process, its nodes whose rows are needed here, ascending."""

    @classmethod
    def of(cls, mixing: Mixing, blocks: list[range], rank: int) -> Routes:
        ends = np.array([block.stop for block in blocks])
        owner = np.searchsorted(ends, mixing.edges, side="right")  # [E, 2], of both ends
        edges, to = mixing.edges[owner[:, 0] == rank], owner[owner[:, 0] == rank, 1]
        out, sent, wanted = {}, {}, {}
        for q in (q for q in range(len(blocks)) if q != rank):
            there = np.flatnonzero(to == q)
            out[q] = there[np.lexsort(edges[there].T)]
            sent[q] = np.unique(edges[there, 0]).tolist()
            wanted[q] = np.unique(mixing.edges[(owner[:, 0] == q) & (owner[:, 1] == rank), 0]).tolist()
        return cls(mixing, edges, out, sent, wanted)

    @cached_property
    def back(self) -> np.ndarray:
        """int64 [e], where among the edges the one the other way stands; -1 where its sender is elsewhere."""
        place = {edge: e for e, edge in enumerate(map(tuple, self.edges.tolist()))}
        return np.array([place.get((j, i), -1) for i, j in place], dtype=np.int64)


class Network:
    """Messages between nodes on a graph, for the rows of process ``rank`` of ``world``."""

    def __init__(self, graph: Graph, rank: int = 0, world: int = 1):
        self.graph, self.rank, self.world = graph, rank, world
        self.blocks = assign_rows(graph.nodes, world)
        self.rows = self.blocks[rank]
        self._routes: Routes | None = None  # of the step last asked for
        self._weights: tuple[Mixing, Tensor] | None = None  # W of the step last asked for, where all of it was
        self._bytes = dict.fromkeys(KINDS, 0)
        self._messages = 0

    # ------------------------------------------------------------------ counted messages

    def count(self, kind: str, nbytes: int, messages: int) -> None:
        """Add what the nodes held here sent."""
        self._bytes[kind] += nbytes
        self._messages += messages

    def routes(self, step: int) -> Routes:
        """The edges at ``step`` that begin here."""
        mixing = self.graph.mixing(step)
        if self._routes is None or self._routes.mixing is not mixing:
            self._routes = Routes.of(mixing, self.blocks, self.rank)
        return self._routes

    def mix(self, T: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True, size: int | None = None) -> Tensor:
        """``W(step) @ T`` for the rows ``T`` [rows, C] held here.

        ``messages=False`` counts bytes only: a further block of columns of a message that was counted already. ``size`` is
        the bytes of a message that is written shorter than its C values.
        """
        routes = self.routes(step)
        row, edges = self._known(T, routes), len(routes.edges)
        whole = routes.mixing.dense or T.is_cuda  # where a call costs more than what is 0
        mixed = self._product(row, routes.mixing, T) if whole else self._sums(row, routes.mixing, T)
        self.count(kind, edges * (T.shape[1] * T.element_size() if size is None else size), edges * messages)
        return mixed

    def _sums(self, row: dict[int, Tensor], mixing: Mixing, T: Tensor) -> Tensor:
        """The rows here of W times all rows, sender by sender."""
        mixed = torch.empty_like(T)
        for i, out in zip(self.rows, mixed, strict=True):
            senders, weights = mixing.terms[i]
            torch.mul(row[senders[0]], weights[0], out=out)
            for j, w in zip(senders[1:], weights[1:], strict=True):
                out.add_(row[j], alpha=w)
        return mixed

    def _product(self, row: dict[int, Tensor], mixing: Mixing, T: Tensor) -> Tensor:
        """The same as one product of matrices, which is that of all nodes in every process: so its sums are the same."""
        everyone = T.contiguous()
        if self.world > 1:
            everyone = T.new_zeros(len(mixing.W), T.shape[1])
            for j, known in row.items():
                everyone[j] = known
        if self._weights is None or self._weights[0] is not mixing or self._weights[1].dtype != T.dtype:
            self._weights = mixing, T.new_tensor(mixing.W)
        return (self._weights[1] @ everyone)[self.rows.start : self.rows.stop]

    def edges(self, step: int = 0) -> np.ndarray:
        """Directed edges [e, 2] (sender, receiver) whose sender is held here, sorted: the rows of a ``swap``."""
        return self.routes(step).edges

    def swap(self, M: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True) -> Tensor:
        """One message per directed edge, both ways at once (undirected graphs).

        ``M`` [e, C] lies in the order of :meth:`edges`; row (i, j) of the result is what j sent to i.
        """
        routes = self.routes(step)
        if self.graph.topology.directed:
            raise UserError(f"gossip: messages can be swapped over undirected edges only, and {self.graph.name} is directed")
        received = M[routes.back]
        for q, out in routes.out.items():
            if len(out):  # undirected: as many come as go
                received[out] = self._trade(M[np.sort(out)], q, len(out))
        self.count(kind, M.numel() * M.element_size(), len(M) * messages)
        return received

    def all_reduce(self, T: Tensor, *, kind: str = "parameter", messages: bool = True) -> Tensor:
        """The mean over all nodes in every row of ``T`` [rows, C]; counted as a ring all-reduce, 2 (n - 1) C values."""
        n = self.graph.nodes
        everyone = self.report(T)
        total = everyone[0].clone()
        for row in everyone[1:]:
            total.add_(row)
        share = 2 * (n - 1) * T.shape[1] * T.element_size()
        self.count(kind, share * (self.rows.stop) // n - share * self.rows.start // n, 2 * (n - 1) * len(self.rows) * messages)
        return (total / n).expand_as(T).clone()

    def exchange(self, labels: Sequence[Labels], step: int = 0, *, kind: str = "label") -> list[dict[int, Labels]]:
        """Send every node's labels to its neighbours; returns for each row held here what it has from whom, its own
        included, senders ascending."""
        for message in labels:
            if type(message) is not Labels:
                raise TypeError(f"only labels of public samples leave a node, not {type(message).__name__}")
        routes = self.routes(step)
        known = dict(zip(self.rows, labels, strict=True))
        crossing = {i: message.to("cpu") for i, message in known.items()}
        for q, nodes in routes.sent.items():
            for i, message in self._trade_objects([(i, crossing[i]) for i in nodes], q):
                known[i] = message.to(labels[0].index.device)
        outgoing = routes.edges[:, 0].tolist()
        self.count(kind, sum(known[j].nbytes for j in outgoing), len(outgoing))
        return [{j: known[j] for j in routes.mixing.terms[i][0]} for i in self.rows]

    def share(self, T: Tensor, step: int = 0, *, kind: str = "other") -> dict[int, Tensor]:
        """Send every node's row of ``T`` [rows, C] to its neighbours; returns the rows known here by node."""
        routes = self.routes(step)
        self.count(kind, len(routes.edges) * T.shape[1] * T.element_size(), len(routes.edges))
        return self._known(T, routes)

    def counts(self) -> dict[str, int]:
        """Bytes by kind and messages so far, summed over all nodes."""
        mine = torch.tensor([*self._bytes.values(), self._messages])
        if self.world > 1:
            dist.all_reduce(mine)
        return dict(zip([*(f"{kind}_bytes" for kind in KINDS), "messages"], mine.tolist(), strict=True))

    def restore(self, counts: dict[str, int]) -> None:
        """Continue counting from ``counts``; process 0 carries them."""
        mine = counts if self.rank == 0 else dict.fromkeys(counts, 0)
        self._bytes = {kind: mine[f"{kind}_bytes"] for kind in KINDS}
        self._messages = mine["messages"]

    # ------------------------------------------------------------------ measurements, uncounted

    def report(self, T: Tensor) -> Tensor:
        """All nodes' rows [n, ...] from the rows held here, on every process; for the experimenter, never for training."""
        if self.world == 1:
            return T
        most = max(len(block) for block in self.blocks)
        padded = torch.zeros((most, *T.shape[1:]), dtype=T.dtype, device=T.device)
        padded[: len(T)] = T
        parts = [torch.empty_like(padded) for _ in self.blocks]
        dist.all_gather(parts, padded)
        return torch.cat([part[: len(block)] for part, block in zip(parts, self.blocks, strict=True)])

    def report_objects(self, objects: list) -> list:
        """The same for one Python object a node."""
        if self.world == 1:
            return objects
        parts: list = [None] * self.world
        dist.all_gather_object(parts, objects)
        return [o for part in parts for o in part]

    # ------------------------------------------------------------------ transport

    def _known(self, T: Tensor, routes: Routes) -> dict[int, Tensor]:
        """The rows ``T`` held here and those that neighbours elsewhere send, by node; sends them the ones that they need."""
        rows = dict(zip(self.rows, T, strict=True))
        for q, theirs in routes.wanted.items():
            if routes.sent[q] or theirs:
                got = self._trade(T[[j - self.rows.start for j in routes.sent[q]]], q, len(theirs))
                rows |= dict(zip(theirs, got, strict=True))
        return rows

    def _trade(self, out: Tensor, q: int, incoming: int) -> Tensor:
        """Send rows ``out`` to process ``q`` and receive ``incoming`` rows from it."""
        got = torch.empty((incoming, *out.shape[1:]), dtype=out.dtype, device=out.device)
        requests = []
        if len(out):
            requests.append(dist.isend(out.contiguous(), q))
        if incoming:
            requests.append(dist.irecv(got, q))
        for request in filter(None, requests):
            request.wait()
        return got

    def _trade_objects(self, out: list, q: int) -> list:
        """Send a list of objects to process ``q`` and receive its list; the lower rank speaks first."""
        got: list = [None]
        for sender in sorted([self.rank, q]):
            if sender == self.rank:
                dist.send_object_list([out], dst=q)
            else:
                dist.recv_object_list(got, src=q)
        return got[0]
