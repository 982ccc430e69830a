"""The network carries all messages between nodes.

Every process holds a contiguous block of the nodes' rows. A sum over senders runs in ascending order, or every process
computes the same product with the whole W, so the number of processes does not change a result (of finite rows). Bytes
are counted by kind for every directed edge, whether or not it leaves the process; a node's message to itself is never
counted. What leaves the process goes through :class:`~lightning_idkd.transport.Transport`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_idkd import metrics
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph
from lightning_idkd.labels import Labels
from lightning_idkd.lies import Lies
from lightning_idkd.links import Links, reverse_edges
from lightning_idkd.mixing import Mixing
from lightning_idkd.transport import Transport, assign_rows

KINDS = ("parameter", "label", "other")
BLOCK = 2**18  # values of a matrix that are treated at once on a CPU: intermediate results stay in the caches


def block_columns(nodes: int, device: torch.device) -> int:
    """Number of columns in a block.

    It depends on the number of nodes, not on how rows are split over processes. Many nodes get more columns, up to
    32 MiB a block, which the allocator reuses. A CUDA device has larger caches, and every call costs more there.
    """
    if device.type != "cpu":
        return 256 * BLOCK // nodes
    return max(BLOCK // nodes, min(8192, 32 * BLOCK // nodes))


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
    outgoing: np.ndarray
    """bool [E]: the edges of ``mixing`` that leave nodes of this process."""

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
        return cls(mixing, edges, out, sent, wanted, outgoing)

    @cached_property
    def back(self) -> np.ndarray:
        """int64 [e], for every edge the index of its reverse edge; -1 if another process has the reverse edge."""
        index = {edge: e for e, edge in enumerate(map(tuple, self.edges.tolist()))}
        return np.array([index.get((j, i), -1) for i, j in index], dtype=np.int64)


class Traffic(NamedTuple):
    """What a clock needs to know of the messages of all nodes at one step of the graph, or of an all-reduce."""

    step: int | None
    """Step of the graph; None: an all-reduce."""
    edges: np.ndarray
    """int64 [E, 2], (sender, receiver) of the messages that arrive; of an all-reduce, [0, 2]."""
    rounds: int
    """Number of messages over every edge, one after the other."""
    nbytes: np.ndarray
    """int64 [n], bytes of these messages over each edge of a sender; of an all-reduce, bytes of the reduced vectors."""


class Network:
    """Carries messages between the nodes of a graph, for the rows that process ``rank`` of ``world`` holds.

    ``links`` say which messages arrive, rebuild the weights from that, and know who lies; None: all messages arrive,
    and all are true. A node that lies keeps its own row as it is.
    """

    def __init__(self, graph: Graph, rank: int = 0, world: int = 1, links: Links | None = None):
        self.graph, self.rank, self.world, self.links = graph, rank, world, links or Links(graph)
        self.lies = Lies(self.links)
        self.blocks = assign_rows(graph.nodes, world)
        self.rows = self.blocks[rank]
        self.transport = Transport(rank, self.blocks)
        self._routes: list[Routes] = []  # of the last graph and the last links used
        self._weights: tuple[Mixing, Tensor] | None = None  # W as a tensor, of the last step with a whole product
        self._bytes = dict.fromkeys(KINDS, 0)
        self._messages = 0
        self._late: tuple[np.ndarray, int] | None = None  # ages of this step, and the largest possible one
        self._early: tuple[Tensor, Mixing, Callable[[], None], dict[int, Tensor]] | None = None
        self.history: list[list[dict[int, Tensor]]] = []  # per mixing of a step: rows by node, the latest first
        self.timed = False  # whether a clock takes the traffic
        self._traffic: dict[int | None, tuple[np.ndarray, np.ndarray]] = {}  # by step: edges; rounds, bytes [rows, 2]

    # ------------------------------------------------------------------ counted messages

    def count(self, kind: str, nbytes: int, messages: int) -> None:
        """Count bytes and messages that the nodes of this process send."""
        self._bytes[kind] += nbytes
        self._messages += messages

    def mixing(self, step: int) -> Mixing:
        """Weights and edges of the messages that arrive at ``step``."""
        return self.links.at(step).mixing

    def routes(self, mixing: Mixing) -> Routes:
        """The routes of messages over the edges of ``mixing``."""
        for routes in self._routes:
            if routes.mixing is mixing:
                return routes
        routes = Routes.plan(mixing, self.blocks, self.rank)
        self._routes = [*self._routes[-1:], routes]
        return routes

    def present(self, step: int) -> np.ndarray | None:
        """bool [rows]: the nodes of this process that train and talk at ``step``; None if all nodes do."""
        present = self.links.at(step).present
        return None if present is None else present[self.rows.start : self.rows.stop]

    def returning(self, step: int) -> np.ndarray | None:
        """bool [n]: nodes that return at ``step`` without a memory; None if none does."""
        return self.links.returning(step)

    def honest(self, T: Tensor) -> Tensor:
        """Those rows of ``T`` [n, ...] that belong to honest nodes; all without liars."""
        return T[torch.from_numpy(self.links.honest).to(T.device)] if self.links.liars else T

    def senders(self, step: int) -> np.ndarray:
        """The sender [m] of every message that leaves a node of this process at ``step``, lost ones included."""
        return self.edges(step)[self._sent(step), 0]

    def _sent(self, step: int) -> np.ndarray | slice:
        """Which of :meth:`edges` carry a message; it may be lost."""
        sent = self.links.at(step).sent
        return slice(None) if sent is None else sent[self.routes(self.graph.mixing(step)).outgoing]

    def mix(
        self, T: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True, size: int | None = None
    ) -> Tensor:
        """``W(step) @ T`` for the rows ``T`` [rows, C] of this process.

        ``messages=False`` counts bytes only: ``T`` is a further block of columns of a message that is already counted.
        ``size`` is the bytes of a message that is encoded shorter than its C values.
        """
        routes = self.routes(self.mixing(step))
        row, edges = self._gather_rows(T, routes), len(self.senders(step))
        whole = routes.mixing.dense or T.is_cuda  # on a GPU a call per edge costs more than the products with zeros
        mixed = self._mix_by_product(row, routes.mixing, T) if whole else self._mix_by_sums(row, routes.mixing, T)
        self._add_lies(mixed, row, routes.mixing, step)
        nbytes = T.shape[1] * T.element_size() if size is None else size
        self.count(kind, edges * nbytes, edges * messages)
        self._time(step, nbytes, messages)
        if self._late is not None:
            self._take_late_rows(mixed, row, routes.mixing, *self._late)
        return mixed

    @contextmanager
    def late(self, ages: np.ndarray, max_age: int) -> Generator[None, None, None]:
        """Within the context, mixing takes older rows of the same mixing in earlier contexts.

        Args:
            ages: how many contexts ago each edge's row was sent, int64 [E].
            max_age: the largest possible age.
        """
        self._late, self._call = (ages, max_age), 0
        yield
        self._late = None

    def _take_late_rows(
        self, mixed: Tensor, row: dict[int, Tensor], mixing: Mixing, ages: np.ndarray, max_age: int
    ) -> None:
        """Put older rows into the product ``mixed`` of W and the rows, and remember these rows."""
        if self._call == len(self.history):
            self.history.append([])
        earlier = self.history[self._call]
        earlier.insert(0, {j: values.clone() for j, values in row.items()})
        del earlier[max_age + 1 :]
        self._call += 1
        for (j, i), w, age in zip(mixing.edges.tolist(), mixing.weights.tolist(), ages.tolist(), strict=True):
            if age and i in self.rows:
                mixed[i - self.rows.start].add_(earlier[age][j] - row[j], alpha=w)

    def late_rows(self) -> list[list[Tensor | None]]:
        """The rows [n, C] that messages may still bring, per mixing of a step, the latest first, in the first process.

        For a checkpoint. The other processes get None in place of each matrix.
        """
        return [[self.collect(torch.stack([e[j] for j in self.rows])) for e in earlier] for earlier in self.history]

    def restore_late_rows(self, rows: list[list[Tensor]], device: torch.device) -> None:
        """Continue with what :meth:`late_rows` returned."""
        self.history = [[dict(enumerate(T.to(device))) for T in earlier] for earlier in rows]

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
        """This process's rows of W times all rows, by one matrix product for every block of columns.

        Every process computes the product for all nodes, and in the same blocks, so that the order of its sums does not
        depend on the number of processes.
        """
        if self._weights is None or self._weights[0] is not mixing or self._weights[1].dtype != T.dtype:
            self._weights = mixing, T.new_tensor(mixing.W)
        W, blocks, width = self._weights[1], [], block_columns(self.graph.nodes, T.device)
        for start in range(0, T.shape[1], width):
            columns = slice(start, start + width)
            everyone = T[:, columns].contiguous()
            if self.world > 1:
                everyone = T.new_zeros(len(W), everyone.shape[1])
                for j, values in row.items():
                    everyone[j] = values[columns]
            blocks.append((W @ everyone)[self.rows.start : self.rows.stop])
        return torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0]

    def _lie(self, row: dict[int, Tensor], mixing: Mixing, step: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """The edges [l, 2] over which nodes of this process receive lies, the true rows [l, C] and the lies [l, C].

        What liars read are rows that their receiver gets, so that ``row`` has them.
        """
        edges = self.lies.edges(mixing.edges, self.rows)
        some = row[self.rows.start]
        true = torch.stack([row[j] for j in edges[:, 0].tolist()]) if len(edges) else some.new_empty(0, len(some))
        return edges, true, self.lies.to_neighbours(true, row, mixing, edges, step)

    def _add_lies(self, mixed: Tensor, row: dict[int, Tensor], mixing: Mixing, step: int) -> None:
        """Put lies in the place of true rows into the product ``mixed`` of W and the rows."""
        if self.lies.in_rows:
            edges, true, lies = self._lie(row, mixing, step)
            weights = mixing.entries(edges[:, 1], edges[:, 0]).tolist()
            for i, w, truth, lie in zip(edges[:, 1].tolist(), weights, true, lies, strict=True):
                mixed[i - self.rows.start].add_(lie - truth, alpha=w)

    def receive(self, T: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What every node has after it sent its row of ``T`` [rows, C] to its neighbours, not yet averaged.

        Returns:
            V [rows, D, C]: a node's own row, what it received by ascending sender, and its own row again up to D.
            w [rows, D]: their weights in W(step); 0 for the rows that fill V up.
        """
        routes = self.routes(self.mixing(step))
        row, (senders, weights) = self._gather_rows(T, routes), routes.mixing.received
        place = np.zeros(self.graph.nodes, dtype=np.int64)
        place[list(row)] = np.arange(len(row))
        mine = slice(self.rows.start, self.rows.stop)
        rows = T if self.world == 1 else torch.stack(list(row.values()))
        V, w = rows[torch.from_numpy(place[senders[mine]]).to(T.device)], T.new_tensor(weights[mine])
        if self.lies.in_rows:
            lying, _true, lies = self._lie(row, routes.mixing, step)
            for (j, i), lie in zip(lying, lies, strict=True):
                V[i - self.rows.start, int(np.flatnonzero(senders[i] == j)[0])] = lie
        edges = len(self.senders(step))
        self.count(kind, edges * T.shape[1] * T.element_size(), edges * messages)
        self._time(step, T.shape[1] * T.element_size(), messages)
        return V, w

    def welcome(self, T: Tensor, step: int) -> Tensor:
        """``T`` [rows, C], in which nodes that return at ``step`` have the mean of what their neighbours send them."""
        returning, mixing, n = self.links.returning(step), self.mixing(step), self.graph.nodes
        if returning is None:
            return T
        greets = returning[mixing.edges[:, 1]] & ~returning[mixing.edges[:, 0]]
        edges = mixing.edges[greets]
        greetings = np.bincount(edges[:, 1], minlength=n)
        greeting = Mixing(edges, 1 / greetings[edges[:, 1]], np.where(greetings == 0, 1.0, 0.0), "row")
        routes = self.routes(greeting)
        self.count("parameter", len(routes.edges) * T.shape[1] * T.element_size(), len(routes.edges))
        self._time(step, T.shape[1] * T.element_size(), edges=edges)
        row = self._gather_rows(T, routes)
        greeted = self._mix_by_sums(row, greeting, T)
        self._add_lies(greeted, row, greeting, step)
        return greeted

    def edges(self, step: int = 0) -> np.ndarray:
        """Directed edges [e, 2] (sender, receiver) whose sender is in this process, sorted: the rows of a ``swap``."""
        return self.routes(self.graph.mixing(step)).edges

    def swap(self, M: Tensor, step: int = 0, *, kind: str = "parameter", messages: bool = True,
             instead: Tensor | None = None) -> Tensor:  # fmt: skip
        """Send one message over every directed edge of an undirected graph, in both directions at once.

        The rows of ``M`` [e, C] are in the order of :meth:`edges`; row (i, j) of the result is what j sent to i, or row
        (i, j) of ``instead`` if that message did not arrive. None: the row of ``M``.

        Raises:
            UserError: the graph is directed.
        """
        routes, arrived = self.routes(self.graph.mixing(step)), self.links.at(step).arrived
        if self.graph.topology.directed:
            raise UserError(
                f"gossip: messages can be swapped over undirected edges only, and {self.graph.name} is directed"
            )
        sent = self.lies.over_edges(M, routes.edges, step) if self.lies.in_rows else M
        received, out = sent[routes.back], {q: edges for q, edges in routes.out.items() if len(edges)}
        incoming = {q: sent.new_empty(len(edges), sent.shape[1]) for q, edges in out.items()}
        self.transport.exchange({q: sent[np.sort(edges)] for q, edges in out.items()}, incoming)
        for q, edges in out.items():  # the graph is undirected: as many messages arrive as leave
            received[edges] = incoming[q]
        if arrived is not None:
            fails = M.new_tensor(~arrived[reverse_edges(routes.mixing.edges)][routes.outgoing], dtype=torch.bool)
            received = torch.where(fails[:, None], M if instead is None else instead, received)
        edges = len(self.senders(step))
        self.count(kind, edges * M.shape[1] * M.element_size(), edges * messages)
        self._time(step, M.shape[1] * M.element_size(), messages)
        return received

    def all_reduce(self, T: Tensor, step: int | None = None, *, kind: str = "parameter", messages: bool = True,
                   true: bool = False) -> Tensor:  # fmt: skip
        """Set every row of ``T`` [rows, C] to the mean of all nodes; counts a ring all-reduce, 2 (n - 1) C values.

        At a ``step`` (None: apart from the steps) it is the mean of those that are present. It loses no message. A node
        lies to all alike, unless ``true``: T has numbers of the run itself, such as sizes that fix its steps.
        """
        present = None if step is None else self.links.at(step).present
        present = np.ones(self.graph.nodes, bool) if present is None else present
        taking, n = np.flatnonzero(present).tolist(), int(present.sum())
        if n == 0:
            return T
        if self.lies.in_rows and not true:
            total = sum_rows(self.lies.to_everyone(self.report(T), step, present), taking)
        else:
            total = self.transport.reduce(T, lambda everyone: sum_rows(everyone, taking))
        share, before = 2 * (n - 1) * T.shape[1] * T.element_size(), int(present[: self.rows.start].sum())
        mine = int(present[self.rows.start : self.rows.stop].sum())
        self.count(kind, share * (before + mine) // n - share * before // n, 2 * (n - 1) * mine * messages)
        self._time(None, T.shape[1] * T.element_size(), messages)
        return (total / n).expand_as(T).clone()

    def exchange(self, labels: Sequence[Labels], step: int = 0, *, kind: str = "label") -> list[dict[int, Labels]]:
        """Send every node's labels to its neighbours.

        Returns, for every row of this process, the labels that it has by sender, its own included, senders ascending.
        """
        for message in labels:
            if type(message) is not Labels:
                raise TypeError(f"only labels of public samples leave a node, not {type(message).__name__}")
        routes = self.routes(self.mixing(step))
        mine, sent = dict(zip(self.rows, labels, strict=True)), labels
        if self.links.liars:
            sent = self.lies.about(labels, self.rows, step)
        message_of = dict(zip(self.rows, sent, strict=True))
        device = labels[0].index.device
        leaving = {q: {i: message_of[i].to("cpu") for i in nodes} for q, nodes in routes.sent.items() if nodes}
        senders = [q for q, nodes in routes.wanted.items() if nodes]
        for messages in self.transport.exchange_objects(leaving, senders).values():
            message_of |= {i: message.to(device) for i, message in messages.items()}
        senders = self.senders(step).tolist()
        self.count(kind, sum(message_of[j].nbytes for j in senders), len(senders))
        self._time(step, [message_of[j].nbytes for j in self.rows])
        return [{j: mine[j] if j == i else message_of[j] for j in routes.mixing.terms[i][0]} for i in self.rows]

    def share(self, T: Tensor, step: int = 0, *, kind: str = "other") -> dict[int, Tensor]:
        """Send every node's row of ``T`` [rows, C] to its neighbours; returns the rows in this process by node.

        A node lies to all neighbours alike, as in an all-reduce; the row of its number is the one that it sends.
        """
        if self.lies.in_rows:
            present = self.links.at(step).present
            present = np.ones(self.graph.nodes, bool) if present is None else present
            T = self.lies.to_everyone(self.report(T), step, present)[self.rows.start : self.rows.stop]
        edges = len(self.senders(step))
        self.count(kind, edges * T.shape[1] * T.element_size(), edges)
        self._time(step, T.shape[1] * T.element_size())
        return self._gather_rows(T, self.routes(self.mixing(step)))

    def counts(self) -> dict[str, int]:
        """Bytes by kind and number of messages since the start, summed over all nodes."""
        counted = self.transport.sum(torch.tensor([*self._bytes.values(), self._messages])).tolist()
        return dict(zip([*(f"{kind}_bytes" for kind in KINDS), "messages"], counted, strict=True))

    def restore(self, counts: dict[str, int]) -> None:
        """Continue counting from ``counts``, which process 0 takes over."""
        mine = counts if self.rank == 0 else dict.fromkeys(counts, 0)
        self._bytes = {kind: mine[f"{kind}_bytes"] for kind in KINDS}
        self._messages = mine["messages"]

    # ------------------------------------------------------------------ traffic, for a clock

    def _time(self, step: int | None, nbytes: int | list[int], messages: bool = True,
              edges: np.ndarray | None = None) -> None:  # fmt: skip
        """Note, where there is a clock, the bytes that each node of this process sends over each of its edges.

        ``edges`` [E, 2] carry messages of all nodes; None: all of the step. A ``step`` of None is an all-reduce.
        """
        if self.timed:
            if edges is None:
                edges = np.zeros((0, 2), dtype=np.int64) if step is None else self.mixing(step).edges
            _edges, table = self._traffic.setdefault(step, (edges, np.zeros((len(self.rows), 2), dtype=np.int64)))
            table[:, 0] += messages
            table[:, 1] += nbytes

    def take_traffic(self) -> list[Traffic]:
        """The messages of all nodes since the last call, by step of the graph, in the order in which they began."""
        taken, self._traffic = self._traffic, {}
        traffic = []
        for step, (edges, table) in taken.items():
            rounds, nbytes = self.report(torch.from_numpy(table)).numpy().T
            traffic.append(Traffic(step, edges, int(rounds[0]), nbytes))
        return traffic

    # ------------------------------------------------------------------ measurements, uncounted

    def report(self, T: Tensor) -> Tensor:
        """Gather the rows of all nodes [n, ...] on every process. For short rows: measurements, never for training."""
        return self.transport.gather(T)

    def report_mean(self, T: Tensor, honest: bool = False) -> Tensor:
        """The mean [C] of all nodes' rows ``T`` [rows, C], or of the honest nodes' rows, on every process.

        The rows are summed in ascending order, and no process gathers all of them.
        """
        nodes = np.flatnonzero(self.links.honest).tolist() if honest else range(self.graph.nodes)
        return self.transport.reduce(T, lambda everyone: sum_rows(everyone, nodes) / len(nodes))

    def report_distance(self, T: Tensor, mean: Tensor, honest: bool = False) -> float:
        """Distance of all nodes' rows ``T`` [rows, C], or of the honest nodes' rows, to their ``mean`` [C], see
        :func:`metrics.consensus_distance`."""
        squares = self.report(metrics.square_distances(T, mean)[:, None])[:, 0]
        return metrics.consensus_distance(self.honest(squares) if honest else squares, mean)

    def collect(self, T: Tensor) -> Tensor | None:
        """Gather the rows of all nodes [n, ...] in the first process; None in the others. For checkpoints."""
        return self.transport.collect(T)

    def collect_edges(self, T: Tensor) -> Tensor | None:
        """Gather a matrix with a row for each directed edge [E, ...], in the order of the edges, as :meth:`collect`."""
        senders = self.graph.mixing(0).edges[:, 0]
        counts = [int(((senders >= block.start) & (senders < block.stop)).sum()) for block in self.blocks]
        return self.transport.collect(T, counts)

    def collect_objects(self, objects: list) -> list | None:
        """Gather one Python object per node, whose tensors are on the CPU, in the first process; None in the others."""
        return self.transport.collect_objects(objects)

    # ------------------------------------------------------------------ rows of other processes

    def send_early(self, T: Tensor, step: int) -> None:
        """Send the rows ``T`` to other processes, without waiting for what they send: the next mixing is of these."""
        routes = self.routes(self.mixing(step))
        self._early = T, routes.mixing, *self._post_rows(T, routes)

    def _post_rows(self, T: Tensor, routes: Routes) -> tuple[Callable[[], None], dict[int, Tensor]]:
        """Begin to exchange rows with other processes; returns what waits for it, and the rows to come by process."""
        sent = {q: T[[j - self.rows.start for j in nodes]] for q, nodes in routes.sent.items() if nodes}
        received = {q: T.new_empty(len(nodes), *T.shape[1:]) for q, nodes in routes.wanted.items() if nodes}
        return self.transport.post(sent, received), received

    def _gather_rows(self, T: Tensor, routes: Routes) -> dict[int, Tensor]:
        """Exchange rows with other processes; returns, by node, the rows ``T`` and those that this process receives."""
        if self._early is None:
            wait, received = self._post_rows(T, routes)
        else:
            (early, mixing, wait, received), self._early = self._early, None
            if T.data_ptr() != early.data_ptr() or T.shape != early.shape or mixing is not routes.mixing:
                raise UserError("gossip: a rule with mixes_first = True must mix X before anything else")
        wait()
        rows = dict(zip(self.rows, T, strict=True))
        for q, theirs in received.items():
            rows |= dict(zip(routes.wanted[q], theirs, strict=True))
        return rows


def sum_rows(rows: Tensor, nodes: Sequence[int]) -> Tensor:
    """The sum [C] of the rows of ``nodes``, one after the other: the order fixes its bits for every column alone."""
    total = rows[nodes[0]].clone()
    for node in nodes[1:]:
        total.add_(rows[node])
    return total
