"""Simulated time: how long nodes compute and messages travel, and when every node has finished its step.

A clock by itself does not change training: it counts the seconds that the run would take on a network of given speed.
Nodes wait for their neighbours' messages only, so times follow a max-plus recursion: with c_i the compute time of node
i and d_ji the transfer time of the message from j to i,

    t_i <- max(t_i + c_i, max over the in-neighbours j of t_j + c_j + d_ji).

Times are a pure function of (seed, step, node or edge), so they depend neither on the engine nor on the number of
processes, nor on resuming.
"""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd.errors import UserError, require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_idkd.graph import Graph
    from lightning_idkd.network import Traffic


class Times(ABC):
    """A distribution of times: of a node's computation in a step, or of the latency of an edge."""

    @abstractmethod
    def draw(self, u: np.ndarray, nodes: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Returns seconds [k], none of them negative.

        Args:
            u: Random numbers [k], uniform between 0 and 1, both excluded.
            nodes: The nodes [k] that compute, or the senders of the edges.
            step: The numbers [k] of the steps.
        """

    def check(self, key: str, nodes: int) -> None:  # noqa: B027 (not every class has something to refuse)
        """Raises a UserError if the arguments, which stand at the config key ``key``, do not suit ``nodes`` nodes."""


@dataclass
class Fixed(Times):
    """The same time at every step and node.

    Args:
        seconds: The time.
    """

    seconds: float

    def draw(self, u: np.ndarray, nodes: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.full(len(nodes), float(self.seconds))

    def check(self, key: str, nodes: int) -> None:
        require_seconds(f"{key}.seconds", self.seconds)


@dataclass
class LogNormal(Times):
    """A log-normal time, drawn anew for every step and node: most are near the median, a few are much longer.

    Args:
        median: Median in seconds.
        sigma: Standard deviation of the logarithm; 0.5 makes one time in six longer than 1.6 medians.
    """

    median: float
    sigma: float

    def draw(self, u: np.ndarray, nodes: np.ndarray, step: np.ndarray) -> np.ndarray:
        return self.median * np.exp(self.sigma * normal(u))

    def check(self, key: str, nodes: int) -> None:
        require_seconds(f"{key}.median", self.median)
        require_sigma(key, self.sigma)


@dataclass
class PerNode(Times):
    """A log-normal time with a separate median for every node.

    Args:
        seconds: The nodes' medians, a list of graph.nodes times.
        sigma: Standard deviation of the logarithm of a step's time; 0: a node has the same time at every step.
    """

    seconds: list[float]
    sigma: float = 0.0

    def draw(self, u: np.ndarray, nodes: np.ndarray, step: np.ndarray) -> np.ndarray:
        return np.asarray(self.seconds, dtype=float)[nodes] * np.exp(self.sigma * normal(u))

    def check(self, key: str, nodes: int) -> None:
        count, allowed = len(self.seconds), f"{nodes}, one for each node (graph.nodes)"
        require(count == nodes, f"{key}.seconds", f"{count} times", allowed)
        for seconds in self.seconds:
            require_seconds(f"{key}.seconds", seconds)
        require_sigma(key, self.sigma)


@dataclass
class TraceTimes(Times):
    """Recorded times, from a CSV file: the rows of a node are its times at step 0, 1, ..., and after its last row it
    begins again with its first.

    Args:
        file: Path of the file, with rows ``node,seconds``, one or more for every node; its first row may be a header
            with these words.
    """

    file: str

    def draw(self, u: np.ndarray, nodes: np.ndarray, step: np.ndarray) -> np.ndarray:
        return self.rows[self.starts[nodes] + step % self.counts[nodes]]

    def check(self, key: str, nodes: int) -> None:
        of_node: list[list[float]] = [[] for _ in range(nodes)]
        for line, (node, seconds) in self.read(key):
            where = f"line {line} of '{self.file}'"
            known = node.strip().isdecimal() and int(node) < nodes
            require(known, f"{key}.file", f"node {node} in {where}", f"0 to {nodes - 1} (graph.nodes is {nodes})")
            value = parse_number(seconds)
            require(0 <= value < math.inf, f"{key}.file", f"'{seconds}' in {where}", "seconds, 0 or more")
            of_node[int(node)].append(value)
        missing = [str(node) for node, times in enumerate(of_node) if not times]
        require(not missing, f"{key}.file", f"'{self.file}' has no row for node {', '.join(missing[:5])}", "all nodes")
        self.counts = np.array([len(times) for times in of_node])
        self.starts = np.cumsum(self.counts) - self.counts  # of every node's rows
        self.rows = np.concatenate(of_node)

    def read(self, key: str) -> list[tuple[int, list[str]]]:
        """The rows of the file with the numbers of their lines, without the header."""
        try:
            with Path(self.file).open(encoding="utf-8", newline="") as file:
                reader = csv.reader(file)
                rows = [(reader.line_num, row) for row in reader if row]
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            why = getattr(e, "strerror", None) or "it is not a CSV file"
            raise UserError(f"{key}.file: cannot read '{self.file}' ({why})") from e
        for line, row in rows:
            where = f"'{','.join(row)}' in line {line} of '{self.file}'"
            require(len(row) == 2, f"{key}.file", where, "two columns, node and seconds")
        return rows[1:] if rows and [name.strip() for name in rows[0][1]] == ["node", "seconds"] else rows


def parse_number(text: str) -> float:
    """The number in a text; nan if there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def require_seconds(key: str, seconds: float) -> None:
    """Refuse a time that is negative or infinite."""
    require(0 <= seconds < math.inf, key, seconds, "seconds, 0 or more")


def require_sigma(key: str, sigma: float) -> None:
    """Refuse a standard deviation that is negative or infinite."""
    require(0 <= sigma < math.inf, f"{key}.sigma", sigma, "0 or more")


def normal(u: np.ndarray) -> np.ndarray:
    """Standard normal numbers from uniform ones: the quantiles of ``u``."""
    import torch

    return torch.special.ndtri(torch.from_numpy(np.asarray(u, dtype=float))).numpy()


class Clock:
    """The simulated time of every node.

    Args:
        graph: the graph whose edges carry the messages.
        compute: time of a node's own work in a step, including all gradients that its rule takes.
        latency: time from the sending of a message to the arrival of its first byte, by edge and step.
        bandwidth: bytes that each directed edge carries per second; None: no limit.
        slow: factor of the compute times of single nodes.
        seed: seed of the times.

    Raises:
        UserError: times that do not suit the graph.
    """

    time: np.ndarray
    """Seconds, float64 [n], at which every node has finished its last step."""
    began: float = 0.0
    """Seconds at the beginning of the last step."""
    arrivals: np.ndarray
    """Seconds, float64 [k, E], at which the messages of the last k steps arrive, latest step first; :meth:`lag` keeps
    them."""

    def __init__(self, graph: Graph, compute: Times, latency: Times, bandwidth: float | None = None,
                 slow: Mapping[int, float] | None = None, seed: int = 0):  # fmt: skip
        self.graph, self.bandwidth, self.seed = graph, bandwidth, seed
        self.times = {"compute": compute, "latency": latency}
        for name, times in self.times.items():
            times.check(f"clock.{name}", graph.nodes)
        self.factor, self.time = np.ones(graph.nodes), np.zeros(graph.nodes)
        self.arrivals = np.zeros((0, len(graph.mixing(0).edges)))
        for node, factor in (slow or {}).items():
            self.factor[node] = factor

    @property
    def seconds(self) -> float:
        """The largest of the nodes' times."""
        return float(self.time.max())

    # ------------------------------------------------------------------ durations: functions of seed, step and place

    def compute_seconds(self, step: int | np.ndarray, nodes: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds [k] that ``nodes`` [k] compute in a step; ``step`` may be a number for each of them."""
        nodes = np.asarray(nodes)
        return self._draw("compute", nodes, step, nodes) * self.factor[nodes]

    def transfer_seconds(self, step: int | np.ndarray, edges: np.ndarray, nbytes: float | np.ndarray,
                         rounds: int = 1) -> np.ndarray:  # fmt: skip
        """Seconds [e] from the sending to the arrival of messages of ``nbytes`` over ``edges`` [e, 2].

        If a step sends ``rounds`` messages one after the other, ``nbytes`` is their sum, and each has the same latency.
        """
        latency = self._draw("latency", edges[:, 0], step, edges[:, 0], edges[:, 1])
        return rounds * latency + (0.0 if self.bandwidth is None else nbytes / self.bandwidth)

    def all_reduce_seconds(self, step: int, nodes: np.ndarray, nbytes: float, rounds: int = 1) -> float:
        """Seconds of a ring all-reduce of ``nbytes`` over ``nodes`` [m].

        In 2 (m - 1) turns every node sends a part of nbytes / m to the next one. A turn waits for the largest of the
        ring's latencies.
        """
        if len(nodes) < 2:
            return 0.0
        turns = 2 * (len(nodes) - 1)
        ring = np.stack([nodes, np.roll(nodes, -1)], 1)
        return turns * float(self.transfer_seconds(step, ring, nbytes / len(nodes), rounds).max())

    def _draw(self, name: str, nodes: np.ndarray, step: int | np.ndarray, *counters: np.ndarray) -> np.ndarray:
        """Times [k] of a distribution, whose random numbers are a hash of seed, step and ``counters`` [k]."""
        import torch

        from lightning_idkd import randomness

        step = np.broadcast_to(np.asarray(step), nodes.shape)
        where = [torch.from_numpy(np.array(c, dtype=np.int64)) for c in (*counters, step)]
        u = randomness.uniform(self.seed, f"clock: {name}", *where).double().numpy() + 2.0**-25  # never 0, never 1
        seconds = np.asarray(self.times[name].draw(u, nodes, step), dtype=float)
        rule = f"clock.{name}: {type(self.times[name]).__name__}.draw returns"
        if seconds.shape != nodes.shape:
            raise UserError(f"{rule} {list(seconds.shape)}; allowed: an array of shape {list(nodes.shape)}")
        wrong = seconds[~((seconds >= 0) & (seconds < math.inf))]
        if len(wrong):
            raise UserError(f"{rule} {wrong[0]}; allowed: seconds, 0 or more")
        return seconds

    # ------------------------------------------------------------------ the recursion

    def compute(self, step: int, present: np.ndarray | None = None) -> None:
        """Add the compute times of a step. ``present`` [n] says which nodes take part; None: all."""
        seconds = self.compute_seconds(step, np.arange(self.graph.nodes))
        self.time = self.time + (seconds if present is None else np.where(present, seconds, 0.0))

    def deliver(self, traffic: Sequence[Traffic], step: int, present: np.ndarray | None = None) -> None:
        """Let every node wait for its messages, and all nodes for each other in an all-reduce.

        Messages of one step of the graph are sent together, and take :meth:`transfer_seconds`. Messages of another
        step, such as the next hop of labels, are sent when the earlier ones have arrived. An absent node neither sends
        nor receives. It does not wait, but time passes for it, too: when it returns, it has the largest time of its
        in-neighbours, or its own if that is larger.

        Args:
            traffic: what nodes have sent since the last call, in order.
            step: number of the step.
            present: which nodes take part, bool [n]; None: all.
        """
        here = np.ones(self.graph.nodes, dtype=bool) if present is None else np.asarray(present)
        for sent in traffic:
            if sent.step is None:
                took = self.all_reduce_seconds(step, np.flatnonzero(here), sent.nbytes.max(), sent.rounds)
                self.time = np.where(here, self.time.max(where=here, initial=0.0) + took, self.time)
            else:
                edges = sent.edges[here[sent.edges].all(1)]
                took = self.transfer_seconds(sent.step, edges, sent.nbytes[edges[:, 0]], sent.rounds)
                self.time = wait(self.time, edges, took)
        if not here.all():
            edges = self.graph.mixing(step).edges
            self.time = wait(self.time, edges[here[edges[:, 0]] & ~here[edges[:, 1]]], 0.0)

    def lag(self, step: int, max_age: int, nbytes: int) -> np.ndarray:
        """Advance by a step in which nodes wait only for what is more than ``max_age`` steps old.

        Every message has ``nbytes``. A row from before the first step counts as too old.

        Returns:
            For each edge, how many steps ago its last delivered message was sent, int64 [E], 0 to ``max_age``.
        """
        edges = self.graph.mixing(step).edges
        self.compute(step)
        sent = self.time[edges[:, 0]] + self.transfer_seconds(step, edges, nbytes)
        self.arrivals = np.concatenate([sent[None], self.arrivals])[: max_age + 1]
        np.maximum.at(self.time, edges[:, 1], self.arrivals[-1])
        return (self.arrivals <= self.time[edges[:, 1]]).argmax(0)


def wait(time: np.ndarray, edges: np.ndarray, took: np.ndarray | float) -> np.ndarray:
    """Times [n] at which every node has its messages, which leave at the senders' ``time`` [n] and take ``took`` [e]
    over ``edges`` [e, 2]."""
    later = time.copy()
    np.maximum.at(later, edges[:, 1], time[edges[:, 0]] + took)
    return later
