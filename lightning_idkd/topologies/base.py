"""The base of all topologies, and what several of them share."""

from abc import ABC, abstractmethod

import networkx as nx
import numpy as np

from lightning_idkd.errors import UserError

STREAM = 0x6A9B1  # separates these draws from others made with the same seed


class Topology(ABC):
    """Base of the topologies; a subclass defines the graph at each step."""

    directed: bool = False
    """Whether edges are arrows from sender to receiver."""
    period: int | None = 1
    """1: the graph is static; T: the graphs of steps 0 to T-1 repeat; None: it never repeats."""
    own_weights: str | None = None
    """What replaces ``graph.weights: metropolis``, the default, on this topology: a name of
    :data:`~lightning_idkd.mixing.WEIGHTS`, where ``edges`` means that every edge has its ``weight`` in W."""

    @abstractmethod
    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        """The graph on the nodes 0 to ``nodes`` - 1, without self-loops (an ``nx.DiGraph`` where ``directed``).

        ``step`` is below the period where there is one. A random topology draws from ``seed`` and ``step`` only.
        """

    def period_on(self, nodes: int) -> int | None:
        """The period for this number of nodes; a topology whose period depends on it overrides this
        method and has ``period`` None."""
        return self.period

    def positions(self, nodes: int) -> np.ndarray | None:
        """Where to draw the nodes, [nodes, 2]; None: networkx lays them out."""
        return None


class OfAnother(Topology):
    """A topology that is derived from another one, its ``base``, which is static and undirected."""

    base: Topology

    def __post_init__(self) -> None:
        if self.base.directed or self.base.period != 1:
            name = type(self.base).__name__
            raise UserError(f"graph.topology.base: {name} is not static and undirected, as Ring or Torus are")

    def base_of(self, nodes: int, seed: int) -> nx.Graph:
        """The graph of the base, which must be connected."""
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


def require_nodes(nodes: int, allowed: int, name: str) -> None:
    """Refuse any number of nodes but the allowed one."""
    if nodes != allowed:
        raise UserError(f"graph.topology: {name} has {allowed} nodes, but graph.nodes is {nodes}; allowed: {allowed}")


def dimensions(nodes: int, name: str) -> int:
    """log2 of the number of nodes; refuses a number that is not a power of two."""
    d = nodes.bit_length() - 1
    if nodes != 2**d:
        rule = f"the number of nodes of {name} is a power of two"
        raise UserError(f"graph.topology: {rule}, but graph.nodes is {nodes}; nearest: {2**d}, {2 ** (d + 1)}")
    return d


def generator(seed: int, step: int) -> np.random.Generator:
    """The random generator of a topology at a step."""
    return np.random.default_rng([seed, STREAM, step])


def number_nodes(graph: nx.Graph) -> nx.Graph:
    """The graph with its nodes named 0 to n - 1, in the order of their sorted names."""
    return nx.convert_node_labels_to_integers(graph, ordering="sorted")
