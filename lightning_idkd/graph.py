"""Who talks to whom, and with which weights: topologies, mixing matrices, spectra, drawings."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Literal

import networkx as nx
import numpy as np

from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

REMEMBERED = 64  # mixing matrices kept of a graph that never repeats


class Topology(ABC):
    """Base of the topologies; a subclass says which graph there is at a step.

    Class attributes: ``directed`` (edges are arrows from sender to receiver) and ``period`` (1: static; T: the graphs
    of steps 0 to T-1 repeat; None: never repeats).
    """

    directed: bool = False
    period: int | None = 1

    @abstractmethod
    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        """The graph on the nodes 0 to ``nodes`` - 1 without self-loops (an ``nx.DiGraph`` where ``directed``).

        ``step`` lies below ``period`` where there is one. Random topologies draw from ``seed`` and ``step`` alone.
        """

    def positions(self, nodes: int) -> np.ndarray | None:
        """Where to draw the nodes, [nodes, 2]; None leaves it to a spring layout."""
        return None


def circle(nodes: int) -> np.ndarray:
    """Positions [nodes, 2] on the unit circle, clockwise from the top."""
    angle = 2 * np.pi * np.arange(nodes) / nodes
    return np.stack([np.sin(angle), np.cos(angle)], axis=1)


def exactly(nodes: int, allowed: int, name: str) -> None:
    if nodes != allowed:
        raise UserError(f"graph.topology: {name} has {allowed} nodes, but graph.nodes is {nodes}; allowed: {allowed}")


@dataclass
class Ring(Topology):
    """Every node has two neighbours; 2 nodes share one edge, 1 node has none."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return nx.cycle_graph(nodes) if nodes > 1 else nx.empty_graph(nodes)

    def positions(self, nodes: int) -> np.ndarray:
        return circle(nodes)


@dataclass
class Chain(Topology):
    """A ring with one edge missing: node i is joined to i - 1 and i + 1."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return nx.path_graph(nodes)

    def positions(self, nodes: int) -> np.ndarray:
        return circle(nodes)


@dataclass
class Complete(Topology):
    """Every node is joined to every other."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        return nx.complete_graph(nodes)

    def positions(self, nodes: int) -> np.ndarray:
        return circle(nodes)


@dataclass
class Torus(Topology):
    """A grid whose opposite sides are joined: four neighbours each. Node r * cols + c lies in row r, column c.

    Args:
        rows: number of rows, at least 3.
        cols: number of columns, at least 3; rows * cols must equal graph.nodes.
    """

    rows: int
    cols: int

    def __post_init__(self):
        if min(self.rows, self.cols) < 3:
            raise UserError(
                f"graph.topology: the sides of a torus must be at least 3, given rows {self.rows} and cols {self.cols} "
                "(with a side of 1 it is a Ring, with a side of 2 edges coincide)"
            )

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        if self.rows * self.cols != nodes:
            pairs = [f"{r} x {nodes // r}" for r in range(3, math.isqrt(max(nodes, 0)) + 1) if nodes % r == 0]
            raise UserError(
                f"graph.topology: a torus of {self.rows} x {self.cols} has {self.rows * self.cols} nodes, but "
                f"graph.nodes is {nodes}; allowed: "
                + (", ".join(pairs) if pairs else f"none, {nodes} has no two factors of at least 3")
            )
        grid = nx.grid_2d_graph(self.rows, self.cols, periodic=True)
        return nx.relabel_nodes(grid, {(r, c): r * self.cols + c for r, c in grid})

    def positions(self, nodes: int) -> np.ndarray:
        row, col = np.divmod(np.arange(nodes), self.cols)
        bow = 0.35  # rows and columns are bent, so that the edge joining their ends passes beside the nodes between
        x = col + bow * np.sin(np.pi * row / (self.rows - 1))
        y = row + bow * np.sin(np.pi * col / (self.cols - 1))
        return np.stack([x, -y], axis=1)


@dataclass
class Social15(Topology):
    """Marriages of 15 Florentine families (Breiger and Pattison, 1986); nodes in alphabetical order of the families."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        exactly(nodes, 15, "Social15")
        return nx.convert_node_labels_to_integers(nx.florentine_families_graph(), ordering="sorted")


@dataclass
class Social32(Topology):
    """Who came to which event (Davis, 1941): nodes 0-17 are the women, in networkx's order, 18-31 the events 1-14."""

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        exactly(nodes, 32, "Social32")
        davis = nx.davis_southern_women_graph()
        names = davis.graph["top"] + davis.graph["bottom"]
        return nx.relabel_nodes(davis, {name: i for i, name in enumerate(names)})


def metropolis(A: np.ndarray) -> np.ndarray:
    """Metropolis-Hastings weights w_ij = 1 / (1 + max(d_i, d_j)): symmetric and doubly stochastic on every graph.

    ``A`` [n, n] is the symmetric 0/1 adjacency (Xiao, Boyd and Kim, JPDC 2007, eq. 5).
    """
    degree = A.sum(1)
    W = A / (1 + np.maximum.outer(degree, degree))
    return W + np.diag(1 - W.sum(1))


def uniform(A: np.ndarray) -> np.ndarray:
    """Weights 1 / (d + 1) for a node and each of its d in-neighbours; ``A[i, j]`` is 1 where j sends to i.

    Raises:
        UserError: unless every node has d edges in and d out; only then are rows and columns sums 1.
    """
    degrees = sorted({int(d) for d in (*A.sum(0), *A.sum(1))})
    if len(degrees) > 1:
        raise UserError(
            f"graph.weights: uniform weights 1/(d+1) are symmetric on regular graphs only, and this graph has degrees "
            f"{', '.join(map(str, degrees))}; use metropolis (undirected graphs)"
        )
    return (A + np.eye(len(A))) / (degrees[0] + 1)


@dataclass(frozen=True, eq=False)
class Mixing:
    """Weights and edges at one step."""

    W: np.ndarray
    """float64 [n, n]; row i holds the weights node i puts on what it receives."""
    edges: np.ndarray
    """int64 [E, 2], (sender, receiver) in lexicographic order without self edges; an undirected edge gives two."""

    def neighbours(self, node: int) -> list[int]:
        """Those ``node`` receives from, ascending, itself excluded."""
        return self.edges[self.edges[:, 1] == node, 0].tolist()


class Graph:
    """A topology on a number of nodes, with its mixing weights.

    Directed topologies get weights 1/(d+1) under either name and must be regular (d edges in and out at every node).

    Args:
        topology: the graph at each step.
        nodes: number of nodes, at least 1.
        weights: metropolis (any undirected graph) or uniform, 1/(d+1) (regular graphs only).
        seed: for topologies that draw at random.

    Raises:
        UserError: a topology that has no such number of nodes, weights that do not suit it, or a graph whose nodes can
            never all reach each other (a static one, or all steps of a period together).
    """

    def __init__(self, topology: Topology, nodes: int, weights: Literal["metropolis", "uniform"] = "metropolis", seed: int = 0):
        if nodes < 1:
            raise UserError(f"graph.nodes: {nodes} given; allowed: 1 or more")
        if weights not in ("metropolis", "uniform"):
            raise UserError(
                f"graph.weights: '{weights}' given; allowed: metropolis, uniform."
                + did_you_mean(weights, ["metropolis", "uniform"])
            )
        if topology.period is not None and topology.period < 1:
            raise UserError(f"graph.topology: period {topology.period} given; allowed: 1 or more, or None")
        self.topology, self.nodes, self.weights, self.seed = topology, nodes, weights, seed
        self._cache: dict[int, Mixing] = {}
        self.mixing(0)  # refuses weights that do not suit; the diameter below asks for the other steps of a period
        if topology.period is not None and self.diameter is None:
            steps = "" if topology.period == 1 else f", even over all {topology.period} steps of its period"
            raise UserError(f"graph.topology: {self.name} on {nodes} nodes is not connected{steps}")

    @property
    def name(self) -> str:
        return type(self.topology).__name__

    def mixing(self, step: int) -> Mixing:
        """Weights and edges at ``step``; a static graph returns the same object each time."""
        period = self.topology.period
        key = step % period if period else step
        found = self._cache.pop(key, None) or self._build(key)
        self._cache[key] = found  # last used comes last, so the first is the one to forget
        if len(self._cache) > (period or REMEMBERED):
            del self._cache[next(iter(self._cache))]
        return found

    def _build(self, step: int) -> Mixing:
        graph = self.topology.graph(self.nodes, step, self.seed)
        if graph.is_directed() != self.topology.directed or graph.is_multigraph() or nx.number_of_selfloops(graph):
            kind = "directed" if self.topology.directed else "undirected"
            raise UserError(f"graph.topology: {self.name} must return {kind} graphs without self-loops or double edges")
        if set(graph) != set(range(self.nodes)):
            raise UserError(f"graph.topology: {self.name} must label its nodes 0 to {self.nodes - 1}, graph.nodes - 1")
        A = nx.to_numpy_array(graph, nodelist=range(self.nodes), weight=None)  # A[sender, receiver]
        edges = np.argwhere(A)
        W = uniform(A.T) if self.topology.directed or self.weights == "uniform" else metropolis(A)
        return Mixing(W, edges.astype(np.int64))

    def _eigenvalues(self, step: int) -> np.ndarray:
        W = self.mixing(step).W
        return np.linalg.eigvals(W) if self.topology.directed else np.linalg.eigvalsh(W)

    def spectral_gap(self, step: int = 0) -> float:
        """1 minus the second largest absolute eigenvalue of W at ``step``; 1 for a single node, 0 if disconnected."""
        moduli = np.sort(np.abs(self._eigenvalues(step)))
        return float(1 - moduli[-2]) if self.nodes > 1 else 1.0

    def smallest_eigenvalue(self, step: int = 0) -> float:
        """Smallest eigenvalue of W at ``step`` (its real part on directed graphs); bias-correcting rules bound it."""
        return float(self._eigenvalues(step).real.min())

    @property
    def diameter(self) -> int | None:
        """Most edges between two nodes, all steps of a period taken together (step 0 where nothing repeats).

        None where some node cannot reach another.
        """
        union = self._union()
        connected = nx.is_strongly_connected if self.topology.directed else nx.is_connected
        return nx.diameter(union) if connected(union) else None

    def _union(self) -> nx.Graph:
        union = nx.DiGraph() if self.topology.directed else nx.Graph()
        union.add_nodes_from(range(self.nodes))
        for step in range(self.topology.period or 1):
            union.add_edges_from(self.mixing(step).edges.tolist())
        return union

    def draw(
        self,
        target: "Axes | str | PathLike",
        values: "Sequence[float] | None" = None,
        labels: "Sequence[str] | None" = None,
    ) -> None:
        """Draw the graph, all steps of a period together, on an axes or into an image file.

        ``values`` [nodes] colours the nodes and adds a colour bar; ``labels`` [nodes] replaces the node numbers.
        """
        if isinstance(target, (str, PathLike)):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6 if values is not None else 5, 5), layout="constrained")
            self.draw(figure.add_subplot(), values, labels)
            figure.savefig(target, dpi=150)
            return
        union, size = self._union(), min(420, 9000 / self.nodes)
        positions = self.topology.positions(self.nodes)
        if positions is None:
            # without a seed networkx would draw from the global generator
            positions = nx.spring_layout(union, pos=dict(enumerate(circle(self.nodes))), iterations=300, seed=0)
        else:
            positions = dict(enumerate(positions))
        nx.draw_networkx_edges(union, positions, ax=target, edge_color="0.6", node_size=size)
        style = {"ax": target, "node_size": size, "edgecolors": "0.3", "linewidths": 0.8}
        dark = np.zeros(self.nodes, bool)
        if values is None:
            nx.draw_networkx_nodes(union, positions, node_color="#c6dbef", **style)
        else:
            colour = np.asarray(values, dtype=float)
            drawn = nx.draw_networkx_nodes(
                union, positions, nodelist=range(self.nodes), node_color=colour, cmap="YlGnBu", **style
            )
            target.figure.colorbar(drawn, ax=target, shrink=0.8, label="test accuracy (%)")
            dark = drawn.norm(colour) > 0.55  # the colour map runs from pale yellow to dark blue
        for node in range(self.nodes):
            target.annotate(
                str(node if labels is None else labels[node]),
                positions[node],
                ha="center",
                va="center",
                fontsize=max(5, 0.42 * math.sqrt(size)),
                color="white" if dark[node] else "black",
            )
        target.set_aspect("equal")
        target.set_axis_off()
