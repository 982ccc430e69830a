"""Graphs that are the same at every step."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import networkx as nx
import numpy as np

from lightning_idkd.errors import UserError, require
from lightning_idkd.topologies.base import (
    OfAnother,
    OnCircle,
    Topology,
    circle,
    dimensions,
    number_nodes,
    require_nodes,
)


@dataclass
class Ring(OnCircle):
    """Every node has two neighbours; 2 nodes share one edge, 1 node has none."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return nx.cycle_graph(nodes) if nodes > 1 else nx.empty_graph(nodes)


@dataclass
class Chain(OnCircle):
    """A ring without one edge: node i is joined to i - 1 and i + 1."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return nx.path_graph(nodes)


@dataclass
class Complete(OnCircle):
    """Every node is joined to every other."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return nx.complete_graph(nodes)


@dataclass
class Star(Topology):
    """Node 0 is joined to every other node, as a server would be."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return nx.star_graph(nodes - 1)

    def positions(self, nodes: int) -> np.ndarray:
        return np.concatenate([np.zeros((1, 2)), circle(nodes - 1)]) if nodes > 1 else circle(nodes)


def require_product(topology, nodes: int, name: str, least: int) -> None:
    """Refuse a number of nodes that is not rows * cols, and name the pairs with sides of at least ``least``."""
    rows, cols = topology.rows, topology.cols
    if rows * cols != nodes:
        pairs = [f"{r} x {nodes // r}" for r in range(least, math.isqrt(max(nodes, 0)) + 1) if nodes % r == 0]
        allowed = ", ".join(pairs) or f"none, {nodes} is not a product of two numbers of at least {least}"
        grid = f"a {name} of {rows} x {cols} has {rows * cols} nodes"
        raise UserError(f"graph.topology: {grid}, but graph.nodes is {nodes}; allowed: {allowed}")


@dataclass
class Torus(Topology):
    """A grid whose opposite sides are joined: every node has four neighbours. Node r * cols + c is in row r, column c.

    Args:
        rows: number of rows, at least 3.
        cols: number of columns, at least 3; rows * cols must equal graph.nodes.
    """

    rows: int
    cols: int

    def __post_init__(self):
        if min(self.rows, self.cols) < 3:
            given = f"rows {self.rows} and cols {self.cols}"
            advice = "with a side of 1 it is a Ring, with a side of 2 edges coincide"
            raise UserError(f"graph.topology.rows: the sides of a torus must be at least 3, given {given} ({advice})")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_product(self, nodes, "torus", 3)
        return number_nodes(nx.grid_2d_graph(self.rows, self.cols, periodic=True))

    def positions(self, nodes: int) -> np.ndarray:
        row, col = np.divmod(np.arange(nodes), self.cols)
        bow = 0.35  # rows and columns are drawn bent, so that the edge between their ends does not cross other nodes
        x = col + bow * np.sin(np.pi * row / (self.rows - 1))
        y = row + bow * np.sin(np.pi * col / (self.cols - 1))
        return np.stack([x, -y], axis=1)


@dataclass
class Grid(Topology):
    """A grid: nodes have two neighbours at the corners, three at the sides, four inside. Node r * cols + c is in row r,
    column c.

    Args:
        rows: number of rows, at least 2.
        cols: number of columns, at least 2; rows * cols must equal graph.nodes.
    """

    rows: int
    cols: int

    def __post_init__(self):
        if min(self.rows, self.cols) < 2:
            given = f"rows {self.rows} and cols {self.cols}"
            advice = "with a side of 1 it is a Chain"
            raise UserError(f"graph.topology.rows: the sides of a grid must be at least 2, given {given} ({advice})")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_product(self, nodes, "grid", 2)
        return number_nodes(nx.grid_2d_graph(self.rows, self.cols))

    def positions(self, nodes: int) -> np.ndarray:
        row, col = np.divmod(np.arange(nodes), self.cols)
        return np.stack([col, -row], axis=1)


def cube(nodes: int) -> np.ndarray:
    """Positions [nodes, 2] of a hypercube, in a projection in which no two nodes coincide."""
    d = np.arange(nodes.bit_length() - 1)
    length, turn = (1.0, 0.25) if len(d) <= 4 else (0.85, 0.8)
    axes = length ** d[:, None] * np.stack([np.cos(np.pi * turn * d), np.sin(np.pi * turn * d)], axis=1)
    return (np.arange(nodes)[:, None] >> d & 1) @ axes


@dataclass
class Hypercube(Topology):
    """Nodes whose numbers differ in one binary digit are joined; graph.nodes is a power of two."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        d = dimensions(nodes, "Hypercube")
        return number_nodes(nx.hypercube_graph(d)) if d else nx.empty_graph(1)

    def positions(self, nodes: int) -> np.ndarray:
        return cube(nodes)


def hops(nodes: int) -> list[int]:
    """The powers of two below the number of nodes: 1, 2, 4, ..."""
    return [2**k for k in range((nodes - 1).bit_length())]


@dataclass
class Exponential(OnCircle):
    """Directed: node i sends to i + 1, i + 2, i + 4, ... modulo n (Ying et al., NeurIPS 2021)."""

    directed = True

    def graph(self, nodes: int, step: int, seed: int) -> nx.DiGraph:
        graph = nx.empty_graph(nodes, nx.DiGraph)
        for hop in hops(nodes):
            graph.add_edges_from((i, (i + hop) % nodes) for i in range(nodes))
        return graph


@dataclass
class Margulis(OnCircle):
    """The Margulis-Gabber-Galil expander on m x m nodes: the degree is at most 8, and the spectral gap is bounded from
    below for all m.

    Double edges count once and self-loops are left out, so degrees differ. Node x * m + y is the pair (x, y);
    graph.nodes is a square number. Source: Gabber and Galil, JCSS 1981, in networkx's form.
    """

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        m = math.isqrt(nodes)
        if m * m != nodes:
            raise UserError(
                f"graph.topology: the number of nodes of Margulis is a square, but graph.nodes is {nodes}; "
                f"nearest: {m * m}, {(m + 1) ** 2}"
            )
        graph = number_nodes(nx.Graph(nx.margulis_gabber_galil_graph(m)))
        graph.remove_edges_from(list(nx.selfloop_edges(graph)))
        return graph


Numbering = Literal["relaysgd"]


def binary_tree(nodes: int, numbering: Numbering | None) -> nx.Graph:
    """A binary tree in which node i is a child of node (i - 1) // 2, or of node i // 2 as in RelaySGD's code."""
    allowed = (None, *get_args(Numbering))
    require(numbering in allowed, "graph.topology.numbering", f"'{numbering}'", "relaysgd, or null")
    graph, first = nx.empty_graph(nodes), numbering is None
    graph.add_edges_from(((i - first) // 2, i) for i in range(1, nodes))
    return graph


def levels(nodes: int) -> np.ndarray:
    """Positions [nodes, 2] of a binary tree with its root at the top."""
    depth = np.array([(i + 1).bit_length() - 1 for i in range(nodes)])
    place = np.arange(nodes) + 1 - 2**depth
    return np.stack([(place + 0.5) / 2**depth, -depth / max(1, depth[-1])], axis=1)


@dataclass
class BinaryTree(Topology):
    """A binary tree, on which RelaySGD can run.

    Args:
        numbering: null: node 0 is the root, and node i is joined to 2i + 1 and 2i + 2. relaysgd, as in that rule's
            code: node 1 is the root, node i is joined to 2i and 2i + 1, and node 0 to the root only; on 16 nodes the
            diameter is then 6 instead of 7.
    """

    numbering: Numbering | None = None

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return binary_tree(nodes, self.numbering)

    def positions(self, nodes: int) -> np.ndarray:
        if self.numbering is None or nodes < 2:
            return levels(nodes)
        return np.concatenate([[[0.5, 0.5]], levels(nodes - 1)])


@dataclass
class SpanningTree(OfAnother):
    """A spanning tree of another graph, found by breadth-first search from its centre; RelaySGD can run on it.

    Args:
        base: the graph, which is static and undirected.
    """

    base: Topology = field(default_factory=Ring)

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        graph = self.base_of(nodes, seed)
        return nx.Graph(nx.bfs_edges(graph, min(nx.center(graph)), sort_neighbors=sorted)) if nodes > 1 else graph


@dataclass
class DoubleBinaryTrees(OnCircle):
    """A binary tree and its mirror image (node i becomes n - 1 - i) together; inner nodes of one are leaves of the
    other.

    The union is not a tree, so RelaySGD needs `BinaryTree` instead. RelaySGD's code sends every second parameter over
    one tree and the rest over the other; in this project all parameters go over all edges. Source: Sanders, Speck and
    Träff, Parallel Computing 2009.

    Args:
        numbering: numbering of the tree, as for `BinaryTree`.
    """

    numbering: Numbering | None = None

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        tree = binary_tree(nodes, self.numbering)
        return nx.compose(tree, nx.relabel_nodes(tree, {i: nodes - 1 - i for i in tree}))


@dataclass
class Corona(Topology):
    """A ring with leaves: the first ``core`` nodes form a ring, and every other node k hangs at node k mod ``core``.

    With liars as leaves, most neighbours of every honest node lie (the malicious ring of He, Karimireddy and Jaggi,
    arXiv 2202.01545, has 16 nodes, 5 of them in the core).

    Args:
        core: number of nodes in the ring, 3 or more.
    """

    core: int = 5

    def __post_init__(self):
        require(self.core >= 3, "graph.topology.core", self.core, "3 or more")

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require(self.core <= nodes, "graph.topology.core", self.core, f"3 to graph.nodes, {nodes}")
        graph = nx.cycle_graph(self.core)
        graph.add_edges_from((k, k % self.core) for k in range(self.core, nodes))
        return graph

    def positions(self, nodes: int) -> np.ndarray:
        core, leaves = circle(self.core), np.arange(self.core, nodes)
        of, turn = leaves % self.core, leaves // self.core  # the leaves of a node lie side by side, further out
        most = max(1, -(-(nodes - self.core) // self.core))
        angle = 2 * np.pi / self.core * (of + 0.7 * ((turn - 0.5) / most - 0.5))
        return np.concatenate([core, 1.7 * np.stack([np.sin(angle), np.cos(angle)], axis=1)])


@dataclass
class Social15(Topology):
    """Marriages between 15 Florentine families, in alphabetical order (Breiger and Pattison, 1986)."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_nodes(nodes, 15, "Social15")
        return number_nodes(nx.florentine_families_graph())


@dataclass
class Social32(Topology):
    """Women and the events that they came to (Davis, 1941): nodes 0-17 are the women in networkx's order, nodes 18-31
    the events 1-14."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_nodes(nodes, 32, "Social32")
        davis = nx.davis_southern_women_graph()
        names = davis.graph["top"] + davis.graph["bottom"]
        return nx.relabel_nodes(davis, {name: i for i, name in enumerate(names)})


@dataclass
class Karate34(Topology):
    """The 34 members of a karate club, joined where two met outside it (Zachary, 1977), without weights; node 0 is the
    teacher, and node 33 the president."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_nodes(nodes, 34, "Karate34")
        return nx.karate_club_graph()


@dataclass
class Petersen10(Topology):
    """The Petersen graph: 10 nodes of degree 3, diameter 2."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_nodes(nodes, 10, "Petersen10")
        return nx.petersen_graph()

    def positions(self, nodes: int) -> np.ndarray:
        return np.concatenate([circle(5), 0.5 * circle(5)])


@dataclass
class Dyck32(OnCircle):
    """The Dyck graph: 32 nodes of degree 3, bipartite, diameter 5."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_nodes(nodes, 32, "Dyck32")
        return nx.LCF_graph(32, [5, -5, 13, -13], 8)
