"""Static graphs that are drawn at random from the seed, made by any generator of networkx, or read from a file."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.topologies.base import Topology, circle, generator

DRAWS = 100


def draw_connected(name: str, nodes: int, seed: int, draw: Callable[[int], nx.Graph]) -> nx.Graph:
    """Draw graphs until one is connected; ``draw`` gets the seed of each attempt.

    Raises:
        UserError: no connected graph in 100 draws; ``name`` is the topology's, for the message.
    """
    for attempt in range(DRAWS):
        graph = draw(int(generator(seed, attempt).integers(2**31)))
        if nx.is_connected(graph):
            return graph
    where = f"{name} on {nodes} nodes"
    raise UserError(f"graph.topology: {where} is not connected in any of {DRAWS} draws; more edges would help")


@dataclass
class ErdosRenyi(Topology):
    """Each pair of nodes is joined with the same probability; the graph is redrawn until it is connected.

    Args:
        p: probability of an edge, above 0 to 1; well above log(n) / n, else most draws are not connected.
    """

    p: float

    def __post_init__(self):
        require(0 < self.p <= 1, "graph.topology.p", self.p, "a probability, above 0 to 1")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return draw_connected(f"ErdosRenyi({self.p:g})", nodes, seed, lambda s: nx.gnp_random_graph(nodes, self.p, s))


@dataclass
class WattsStrogatz(Topology):
    """A small world: every node is joined to its k nearest neighbours on a ring, and one end of each edge is moved to a
    random node with probability p; the graph is redrawn until it is connected (Watts and Strogatz, Nature 1998).

    Args:
        k: neighbours on the ring, an even number below graph.nodes.
        p: probability of moving an edge, 0 to 1.
    """

    k: int = 4
    p: float = 0.1

    def __post_init__(self):
        require(self.k >= 2 and self.k % 2 == 0, "graph.topology.k", self.k, "an even number, half of it on each side")
        require(0 <= self.p <= 1, "graph.topology.p", self.p, "a probability, 0 to 1")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require(self.k < nodes, "graph.topology.k", self.k, f"an even number up to {nodes - 1}, graph.nodes - 1")
        name = f"WattsStrogatz({self.k}, {self.p:g})"
        return draw_connected(name, nodes, seed, lambda s: nx.watts_strogatz_graph(nodes, self.k, self.p, s))

    def positions(self, nodes: int) -> np.ndarray:
        return circle(nodes)


@dataclass
class BarabasiAlbert(Topology):
    """A graph with hubs: each new node is joined to m others, chosen with probabilities in proportion to their degrees
    (Barabási and Albert, Science 1999).

    Args:
        m: edges of every new node, 1 to graph.nodes - 1.
    """

    m: int = 2

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require(1 <= self.m < nodes, "graph.topology.m", self.m, f"1 to {nodes - 1}, graph.nodes - 1")
        name = f"BarabasiAlbert({self.m})"
        return draw_connected(name, nodes, seed, lambda s: nx.barabasi_albert_graph(nodes, self.m, s))


def require_regular(degree: int, nodes: int, key: str) -> None:
    """Refuse a degree that not all nodes of a graph can have; ``key`` is the config key of the degree."""
    require(1 <= degree < nodes, key, degree, f"1 to {nodes - 1}, graph.nodes - 1")
    require(degree * nodes % 2 == 0, key, degree, f"an even number, since graph.nodes, {nodes}, is odd")


@dataclass
class RandomRegular(Topology):
    """A graph drawn uniformly from those in which all nodes have the same degree, redrawn until it is connected; with
    high probability it is an expander.

    Args:
        degree: neighbours of every node, below graph.nodes; an even number where graph.nodes is odd.
    """

    degree: int = 4

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_regular(self.degree, nodes, "graph.topology.degree")
        name = f"RandomRegular({self.degree})"
        return draw_connected(name, nodes, seed, lambda s: nx.random_regular_graph(self.degree, nodes, s))


def generators() -> dict[str, Callable]:
    """The graph generators of networkx by name."""
    return {
        name: value
        for name, value in vars(nx).items()
        if callable(value) and getattr(value, "__module__", "").startswith("networkx.generators")
    }


OTHER_N = ("binomial_tree", "dorogovtsev_goltsev_mendes_graph", "hypercube_graph", "margulis_gabber_galil_graph",
           "mycielski_graph", "sudoku_graph")  # fmt: skip
"""Generators of networkx whose ``n`` is not the number of nodes."""


@dataclass
class NetworkX(Topology):
    """Any graph that networkx generates, made undirected; double edges count once, self-loops and weights are left out.

    Where the generator has an argument ``n`` for the number of nodes, or ``seed``, it is filled in. A random graph is
    redrawn until it is connected. Nodes are numbered in networkx's order.

    Args:
        generator: name of the function in networkx, such as watts_strogatz_graph.
        arguments: its arguments by name, such as {k: 4, p: 0.1}.
    """

    generator: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        known = generators()
        if self.generator not in known:
            hint = did_you_mean(self.generator, known) or " Its reference lists them under 'Graph generators'"
            raise UserError(f"graph.topology.generator: networkx has no generator '{self.generator}'.{hint}")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        make = generators()[self.generator]
        takes = inspect.signature(make).parameters
        filled = {"n": nodes} if "n" in takes and self.generator not in OTHER_N else {}

        def draw(seed: int) -> nx.Graph:
            try:
                graph = make(**(filled | ({"seed": seed} if "seed" in takes else {}) | self.arguments))
            except (TypeError, ValueError, AttributeError, nx.NetworkXException) as e:
                raise UserError(f"graph.topology.arguments: {self.generator} refuses {self.arguments} ({e})") from e
            if not isinstance(graph, nx.Graph) or len(graph) != nodes:
                kind = f"a graph of {len(graph)} nodes" if isinstance(graph, nx.Graph) else f"a {type(graph).__name__}"
                given = f"{self.generator} with {self.arguments}"
                raise UserError(f"graph.topology.arguments: {given} makes {kind}, but graph.nodes is {nodes}")
            graph = nx.convert_node_labels_to_integers(nx.Graph(graph))
            graph.remove_edges_from(list(nx.selfloop_edges(graph)))
            return graph

        return draw_connected(self.generator, nodes, seed, draw)


@dataclass
class EdgeList(Topology):
    """A graph from a text file with a line "i j" for every edge; nodes are numbered from 0, and # begins a comment.

    Args:
        file: path of the file.
        directed: whether i sends to j only; graph.weights must then be push_sum or average, unless all degrees are
            equal.
    """

    file: str
    directed: bool = False

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        try:
            lines = Path(self.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "it is not UTF-8 text"
            raise UserError(f"graph.topology.file: cannot read '{self.file}' ({why})") from e
        graph = nx.empty_graph(nodes, nx.DiGraph if self.directed else nx.Graph)
        for number, line in enumerate(lines, 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            valid = len(words) == 2 and all(word.isdecimal() and int(word) < nodes for word in words)
            if not valid or int(words[0]) == int(words[1]):
                where = f"'{line.strip()}' in line {number} of '{self.file}'"
                allowed = f"two different nodes from 0 to {nodes - 1}, graph.nodes - 1"
                raise UserError(f"graph.topology.file: {where}; allowed: {allowed}")
            graph.add_edge(*map(int, words))
        return graph
