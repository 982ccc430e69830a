"""What a topology is, and what several families share."""

from abc import ABC, abstractmethod

import networkx as nx
import numpy as np

from lightning_idkd.errors import UserError

STREAM = 0x6A9B1  # separates these draws from others made with the same seed


class Topology(ABC):
    """Base of the topologies; a subclass says which graph there is at a step.

    Class attributes: ``directed`` (edges are arrows from sender to receiver), ``period`` (1: static; T: the graphs of steps
    0 to T-1 repeat; None: never repeats) and ``own_weights`` (what ``graph.weights: metropolis``, the default, stands for on
    this topology: a name of :data:`~lightning_idkd.graph.WEIGHTS`, or ``edges``: its edges carry their ``weight`` in W).
    """

    directed: bool = False
    period: int | None = 1
    own_weights: str | None = None

    @abstractmethod
    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        """The graph on the nodes 0 to ``nodes`` - 1 without self-loops (an ``nx.DiGraph`` where ``directed``).

        ``step`` lies below the period where there is one. Random topologies draw from ``seed`` and ``step`` alone.
        """

    def period_on(self, nodes: int) -> int | None:
        """The period on so many nodes; overridden where it depends on them, with ``period`` None."""
        return self.period

    def positions(self, nodes: int) -> np.ndarray | None:
        """Where to draw the nodes, [nodes, 2]; None leaves it to networkx."""
        return None


class OfAnother(Topology):
    """A topology that is made of another one, its ``base``, static and undirected."""

    base: Topology

    def __post_init__(self):
        if self.base.directed or self.base.period != 1:
            raise UserError(f"graph.topology.base: {type(self.base).__name__} is not static and undirected, as Ring or Torus are")

    def connected(self, nodes: int, seed: int) -> nx.Graph:
        """The base's graph."""
        graph = self.base.graph(nodes, 0, seed)
        if not nx.is_connected(graph):
            raise UserError(f"graph.topology.base: {type(self.base).__name__} on {nodes} nodes is not connected")
        return graph

    def positions(self, nodes: int) -> np.ndarray | None:
        return self.base.positions(nodes)


def circle(nodes: int) -> np.ndarray:
    """Positions [nodes, 2] on the unit circle, clockwise from the top."""
    angle = 2 * np.pi * np.arange(nodes) / nodes
    return np.stack([np.sin(angle), np.cos(angle)], axis=1)


class OnCircle(Topology):
    """A topology that is drawn on a circle."""

    def positions(self, nodes: int) -> np.ndarray:
        return circle(nodes)


def exactly(nodes: int, allowed: int, name: str) -> None:
    """Refuse another number of nodes."""
    if nodes != allowed:
        raise UserError(f"graph.topology: {name} has {allowed} nodes, but graph.nodes is {nodes}; allowed: {allowed}")


def dimensions(nodes: int, name: str) -> int:
    """log2 of the number of nodes, which must be a power of two."""
    d = nodes.bit_length() - 1
    if nodes != 2**d:
        raise UserError(
            f"graph.topology: {name} has a power of two nodes, but graph.nodes is {nodes}; nearest: {2**d}, {2 ** (d + 1)}"
        )
    return d


def generator(seed: int, step: int) -> np.random.Generator:
    """What a topology draws from at a step."""
    return np.random.default_rng([seed, STREAM, step])


def numbered(graph: nx.Graph) -> nx.Graph:
    """Its nodes as 0 to n - 1 in ascending order of their names."""
    return nx.convert_node_labels_to_integers(graph, ordering="sorted")
