"""Static graphs drawn at random from the seed, made by any of networkx's generators, or read from a file."""

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


def connected(name: str, nodes: int, seed: int, draw: Callable[[int], nx.Graph]) -> nx.Graph:
    """The first of many draws that is connected; ``draw`` gets the seed of each."""
    for attempt in range(DRAWS):
        graph = draw(int(generator(seed, attempt).integers(2**31)))
        if nx.is_connected(graph):
            return graph
    raise UserError(f"graph.topology: {name} on {nodes} nodes is not connected in any of {DRAWS} draws; more edges would help")


@dataclass
class ErdosRenyi(Topology):
    """Each pair of nodes is joined with the same probability; redrawn until connected.

    Args:
        p: probability of an edge, above 0 to 1; well above log(n) / n, or most draws fall apart.
    """

    p: float

    def __post_init__(self):
        require(0 < self.p <= 1, "graph.topology.p", self.p, "a probability, above 0 to 1")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return connected(f"ErdosRenyi({self.p:g})", nodes, seed, lambda s: nx.gnp_random_graph(nodes, self.p, s))


@dataclass
class WattsStrogatz(Topology):
    """A small world: a ring of k nearest neighbours, each edge moved to a random node with probability p; redrawn until
    connected (Watts and Strogatz, Nature 1998).

    Args:
        k: neighbours on the ring, even, below graph.nodes.
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
        return connected(name, nodes, seed, lambda s: nx.watts_strogatz_graph(nodes, self.k, self.p, s))

    def positions(self, nodes: int) -> np.ndarray:
        return circle(nodes)


@dataclass
class BarabasiAlbert(Topology):
    """A graph with hubs: node after node is joined to m others, chosen in proportion to their degrees (Barabási and Albert,
    Science 1999).

    Args:
        m: edges of every new node, 1 to graph.nodes - 1.
    """

    m: int = 2

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require(1 <= self.m < nodes, "graph.topology.m", self.m, f"1 to {nodes - 1}, graph.nodes - 1")
        return connected(f"BarabasiAlbert({self.m})", nodes, seed, lambda s: nx.barabasi_albert_graph(nodes, self.m, s))


def regular(degree: int, nodes: int, key: str) -> None:
    """Refuse a degree that no graph on so many nodes has at all of them."""
    require(1 <= degree < nodes, key, degree, f"1 to {nodes - 1}, graph.nodes - 1")
    require(degree * nodes % 2 == 0, key, degree, f"an even number, since graph.nodes, {nodes}, is odd")


@dataclass
class RandomRegular(Topology):
    """Drawn uniformly among the graphs in which all nodes have the same degree; redrawn until connected. An expander with
    high probability.

    Args:
        degree: neighbours of every node, below graph.nodes; even where graph.nodes is odd.
    """

    degree: int = 4

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        regular(self.degree, nodes, "graph.topology.degree")
        name = f"RandomRegular({self.degree})"
        return connected(name, nodes, seed, lambda s: nx.random_regular_graph(self.degree, nodes, s))


def generators() -> dict[str, Callable]:
    """networkx's graph generators by name."""
    return {
        name: made
        for name, made in vars(nx).items()
        if callable(made) and getattr(made, "__module__", "").startswith("networkx.generators")
    }


OTHER_N = ("binomial_tree", "dorogovtsev_goltsev_mendes_graph", "hypercube_graph", "margulis_gabber_galil_graph",
           "mycielski_graph", "sudoku_graph")  # fmt: skip
"""Generators of networkx whose ``n`` is no number of nodes."""


@dataclass
class NetworkX(Topology):
    """Any graph that networkx generates, undirected; double edges are taken once, self-loops and weights left out.

    ``n``, where that is the number of nodes, and ``seed`` are filled in where the generator takes them; random ones are redrawn
    until connected. Nodes are numbered in networkx's order.

    Args:
        generator: name of the function in networkx, such as watts_strogatz_graph.
        arguments: its arguments by name, such as {k: 4, p: 0.1}.
    """

    generator: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        there = generators()
        if self.generator not in there:
            hint = did_you_mean(self.generator, there) or " Its reference lists them under 'Graph generators'"
            raise UserError(f"graph.topology.generator: networkx has no generator '{self.generator}'.{hint}")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        make = generators()[self.generator]
        takes = inspect.signature(make).parameters
        filled = {"n": nodes} if "n" in takes and self.generator not in OTHER_N else {}

        def draw(seed: int) -> nx.Graph:
            try:
                made = make(**(filled | ({"seed": seed} if "seed" in takes else {}) | self.arguments))
            except (TypeError, ValueError, AttributeError, nx.NetworkXException) as e:
                raise UserError(f"graph.topology.arguments: {self.generator} refuses {self.arguments} ({e})") from e
            if not isinstance(made, nx.Graph) or len(made) != nodes:
                made = f"a graph of {len(made)} nodes" if isinstance(made, nx.Graph) else f"a {type(made).__name__}"
                given = f"{self.generator} with {self.arguments}"
                raise UserError(f"graph.topology.arguments: {given} makes {made}, but graph.nodes is {nodes}")
            graph = nx.convert_node_labels_to_integers(nx.Graph(made))
            graph.remove_edges_from(list(nx.selfloop_edges(graph)))
            return graph

        return connected(self.generator, nodes, seed, draw)


@dataclass
class EdgeList(Topology):
    """A graph from a text file: a line "i j" for every edge, nodes numbered from 0; # begins a comment.

    Args:
        file: path of the file.
        directed: whether i sends to j only. Its weights must then be push_sum or average unless all degrees are equal.
    """

    file: str
    directed: bool = False

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        try:
            lines = Path(self.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or "no UTF-8 text"
            raise UserError(f"graph.topology.file: cannot read '{self.file}' ({why})") from e
        graph = nx.empty_graph(nodes, nx.DiGraph if self.directed else nx.Graph)
        for number, line in enumerate(lines, 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            sound = len(words) == 2 and all(word.isdecimal() and int(word) < nodes for word in words)
            if not sound or int(words[0]) == int(words[1]):
                raise UserError(
                    f"graph.topology.file: '{line.strip()}' in line {number} of '{self.file}'; allowed: two different nodes from "
                    f"0 to {nodes - 1}, graph.nodes - 1"
                )
            graph.add_edge(*map(int, words))
        return graph
