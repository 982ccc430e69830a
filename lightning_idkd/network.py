"""All that crosses edges, and the only code that talks to other processes.

Rows are spread over processes in contiguous blocks; every sum runs over the senders in ascending order, so a result does
not depend on how many processes computed it. Bytes are counted by kind, for every directed edge, whether or not the edge
leaves the process; a message to itself is never counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_idkd.graph import Graph

KINDS = ("parameter", "label", "other")


@dataclass
class Labels:
    """Soft labels of public samples, all that distillation may send: ``index`` int64 [s] into the public set, ascending,
    ``probabilities`` [s, k], and ``weights`` [s] where their sender weighs them. ``size`` in bytes, where they were encoded."""

    index: Tensor
    probabilities: Tensor
    weights: Tensor | None = None
    size: int | None = None

    @property
    def nbytes(self) -> int:
        """Size on an edge: as encoded, else a 4-byte index and float32 probabilities (and weight) for every sample."""
        if self.size is not None:
            return self.size
        return 4 * (self.index.numel() + self.probabilities.numel() + (0 if self.weights is None else self.weights.numel()))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: Tensor) -> Labels:
        """Some of them, by a mask or indices in ascending order."""
        return Labels(self.index[which], self.probabilities[which], None if self.weights is None else self.weights[which])

    def over(self, old: Labels) -> Labels:
        """These, and ``old`` ones of other samples."""
        new = torch.isin(old.index, self.index, invert=True)
        index = torch.cat([self.index, old.index[new]])
        order = index.argsort()
        return Labels(index[order], torch.cat([self.probabilities, old.probabilities[new]])[order])

    def to(self, device: torch.device | str) -> Labels:
        weights = None if self.weights is None else self.weights.to(device)
        return Labels(self.index.to(device), self.probabilities.to(device), weights, self.size)


def rows_of(nodes: int, world: int) -> list[range]:
    """The contiguous block of nodes every process holds."""
    cuts = [len(part) for part in np.array_split(np.arange(nodes), world)]
    ends = np.cumsum(cuts)
    return [range(int(e - c), int(e)) for c, e in zip(cuts, ends, strict=True)]


class Network:
    """Messages between nodes on a graph, for the rows of process ``rank`` of ``world``."""

    def __init__(self, graph: Graph, rank: int = 0, world: int = 1):
        self.graph, self.rank, self.world = graph, rank, world
        self.blocks = rows_of(graph.nodes, world)
        self.rows = self.blocks[rank]
        self.owner = {i: q for q, block in enumerate(self.blocks) for i in block}
        self._bytes = dict.fromkeys(KINDS, 0)
        self._messages = 0

    # ------------------------------------------------------------------ counted messages

    def count(self, kind: str, nbytes: int, messages: int) -> None:
        """Add what the nodes held here sent."""
        self._bytes[kind] += nbytes
        self._messages += messages

    def mix(self, T: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True, size: int | None = None) -> Tensor:
        """``W(step) @ T`` for the rows ``T`` [rows, C] held here.

        ``messages=False`` counts bytes only: a further block of columns of a message that was counted already. ``size`` is
        the bytes of a message that is written shorter than its C values.
        """
        mixing = self.graph.mixing(step)
        row = {i: T[i - self.rows.start] for i in self.rows}
        row |= self._fetch(T, mixing.edges)
        mixed = torch.empty_like(T)
        for i in self.rows:
            first, *others = sorted([i, *mixing.neighbours(i)])
            out = torch.mul(row[first], float(mixing.W[i, first]), out=mixed[i - self.rows.start])
            for j in others:
                out.add_(row[j], alpha=float(mixing.W[i, j]))
        edges = sum(1 for j, _ in mixing.edges if j in self.rows)
        self.count(kind, edges * (T.shape[1] * T.element_size() if size is None else size), edges * messages)
        return mixed

    def edges(self, step: int = 0) -> np.ndarray:
        """Directed edges [e, 2] (sender, receiver) whose sender is held here, sorted: the rows of a ``swap``."""
        edges = self.graph.mixing(step).edges
        return edges[[int(j) in self.rows for j, _ in edges]] if len(edges) else edges

    def swap(self, M: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True) -> Tensor:
        """One message per directed edge, both ways at once (undirected graphs).

        ``M`` [e, C] lies in the order of :meth:`edges`; row (i, j) of the result is what j sent to i.
        """
        local = [(int(i), int(j)) for i, j in self.edges(step)]
        received = torch.empty_like(M)
        here = {edge: M[e] for e, edge in enumerate(local)}
        for q in range(self.world):
            if q == self.rank:
                continue
            out = [e for e, (_, j) in enumerate(local) if self.owner[j] == q]
            if out:  # undirected: as many come as go, the incoming ones in the sender's order
                back = sorted((local[e][1], local[e][0]) for e in out)
                got = self._trade(M[out], q, len(out))
                here |= dict(zip(back, got, strict=True))
        for e, (i, j) in enumerate(local):
            received[e] = here[(j, i)]
        self.count(kind, M.numel() * M.element_size(), len(local) * messages)
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
        mixing = self.graph.mixing(step)
        known = dict(zip(self.rows, labels, strict=True))
        crossing = {i: message.to("cpu") for i, message in known.items()}
        for q in range(self.world):
            if q != self.rank:
                wanted = sorted({int(j) for j, i in mixing.edges if j in self.rows and self.owner[int(i)] == q})
                for i, message in self._trade_objects([(i, crossing[i]) for i in wanted], q):
                    known[i] = message.to(labels[0].index.device)
        outgoing = [int(j) for j, _ in mixing.edges if j in self.rows]
        self.count(kind, sum(known[j].nbytes for j in outgoing), len(outgoing))
        return [{j: known[j] for j in sorted([i, *mixing.neighbours(i)])} for i in self.rows]

    def share(self, T: Tensor, step: int = 0, *, kind: str = "other") -> dict[int, Tensor]:
        """Send every node's row of ``T`` [rows, C] to its neighbours; returns the rows known here by node."""
        mixing = self.graph.mixing(step)
        known = {i: T[i - self.rows.start] for i in self.rows} | self._fetch(T, mixing.edges)
        edges = sum(1 for j, _ in mixing.edges if j in self.rows)
        self.count(kind, edges * T.shape[1] * T.element_size(), edges)
        return known

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

    def _fetch(self, T: Tensor, edges: np.ndarray) -> dict[int, Tensor]:
        """The rows of ``T`` that neighbours elsewhere send here, by sender; sends them the ones that they need."""
        rows: dict[int, Tensor] = {}
        for q in range(self.world):
            if q == self.rank:
                continue
            theirs = sorted({int(j) for j, i in edges if j in self.blocks[q] and i in self.rows})
            mine = sorted({int(j) for j, i in edges if j in self.rows and i in self.blocks[q]})
            if mine or theirs:
                got = self._trade(T[[j - self.rows.start for j in mine]], q, len(theirs))
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
        for request in requests:
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
