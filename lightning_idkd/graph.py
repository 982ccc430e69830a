"""A graph on a number of nodes with its mixing weights: W at each step, spectra, drawings."""

import functools
import math
import operator
from os import PathLike
from typing import TYPE_CHECKING, get_args

import networkx as nx
import numpy as np

from lightning_idkd import colours
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.mixing import (
    DIRECTED,
    KINDS,
    WEIGHTS,
    Kind,
    Mixing,
    Weights,
    eigenvalues,
    fill_rows,
    find_second_eigenvalue,
    find_smallest_eigenvalue,
)
from lightning_idkd.topologies import Chain, Complete, Ring, Social15, Social32, Topology, Torus
from lightning_idkd.topologies.base import circle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

__all__ = ["Chain", "Complete", "Graph", "Ring", "Social15", "Social32", "Topology", "Torus"]

REMEMBERED = 64  # mixing matrices that are kept where a graph never repeats
WATCHED = 64  # first steps that are measured where a graph never repeats
SMALL = 100  # most nodes for which the better of networkx's layouts takes seconds at most
LARGE = 2000  # nodes from which on spectra are those of sparse matrices, or are estimated
EXACT = 1e-12  # smaller eigenvalues are 0 up to rounding


class Graph:
    """A topology on a number of nodes, with its mixing weights.

    Args:
        topology: the graph at each step.
        nodes: number of nodes, at least 1.
        weights: metropolis, which is replaced by the topology's own weights where it has some, and by uniform on other
            directed graphs; uniform, 1/(d+1) (regular graphs only); max_degree, 1/(d_max+1); lazy, (I + W) / 2 of
            metropolis; push_sum (columns sum to 1) or average (rows sum to 1), for the rules that take such weights.
        seed: seed of the topologies that draw at random.

    Raises:
        UserError: a topology that cannot have this number of nodes, weights that do not suit it, or a graph whose nodes
            cannot all reach each other (over all steps of a period together).
    """

    def __init__(self, topology: Topology, nodes: int, weights: Weights = "metropolis", seed: int = 0):
        if nodes < 1:
            raise UserError(f"graph.nodes: {nodes} given; allowed: 1 or more")
        allowed = get_args(Weights)
        if weights not in allowed:
            hint = did_you_mean(weights, allowed)
            raise UserError(f"graph.weights: '{weights}' given; allowed: {', '.join(allowed)}.{hint}")
        self.topology, self.nodes, self.seed = topology, nodes, seed
        self.weights = (topology.own_weights if weights == "metropolis" else None) or weights
        if topology.directed and self.weights == "metropolis":
            self.weights = "uniform"
        if topology.directed and self.weights not in DIRECTED:
            raise UserError(
                f"graph.weights: {self.weights} needs an undirected graph, and {self.name} is directed; allowed: "
                f"{', '.join(DIRECTED)}"
            )
        self.period = topology.period_on(nodes)
        if self.period is not None and self.period < 1:
            raise UserError(f"graph.topology: period {self.period} given; allowed: 1 or more, or None")
        self._cache: dict[int, Mixing] = {}
        self._layouts: dict[int | None, tuple[nx.Graph, dict[int, np.ndarray]]] = {}
        self.mixing(0)  # refuses weights that do not suit the graph; `connected` needs the other steps of a period
        if self.period is not None and not self.connected:
            steps = "" if self.period == 1 else f", even over all {self.period} steps of its period"
            raise UserError(f"graph.topology: {self.name} on {nodes} nodes is not connected{steps}")

    @property
    def name(self) -> str:
        return type(self.topology).__name__

    @property
    def kind(self) -> Kind:
        """What sums to 1 in W."""
        return KINDS.get(self.weights, "doubly")

    def mixing(self, step: int) -> Mixing:
        """Weights and edges at ``step``; a static graph returns the same object each time."""
        key = step % self.period if self.period else step
        mixing = self._cache.pop(key, None) or self._build(key)
        self._cache[key] = mixing  # the last used one is last, so the first one is dropped
        if len(self._cache) > (self.period or REMEMBERED):
            del self._cache[next(iter(self._cache))]
        return mixing

    def _build(self, step: int) -> Mixing:
        graph = self.topology.graph(self.nodes, step, self.seed)
        if not isinstance(graph, nx.Graph):
            given = type(graph).__name__
            raise UserError(f"graph.topology: {self.name}.graph returns {given}; allowed: a networkx graph")
        if graph.is_directed() != self.topology.directed or graph.is_multigraph() or nx.number_of_selfloops(graph):
            kind = "directed" if self.topology.directed else "undirected"
            raise UserError(f"graph.topology: {self.name} must return {kind} graphs without self-loops or double edges")
        if set(graph) != set(range(self.nodes)):
            raise UserError(f"graph.topology: {self.name} must label its nodes 0 to {self.nodes - 1}, graph.nodes - 1")
        n, given = self.nodes, graph.edges(data="weight", default=1.0)
        edges = np.array([(i, j) for i, j, _ in given], dtype=np.int64).reshape(-1, 2)  # (sender, receiver)
        weights = np.array([w for *_, w in given] if self.weights == "edges" else np.ones(len(edges)), dtype=float)
        if not self.topology.directed:
            edges, weights = np.concatenate([edges, edges[:, ::-1]]), np.tile(weights, 2)
        order = np.lexsort(edges.T[::-1])
        edges, weights = edges[order], weights[order]
        if self.weights == "edges":
            used = weights != 0
            edges, (weights, own) = edges[used], fill_rows(edges[used], weights[used], n)
        else:
            weights, own = WEIGHTS[self.weights](edges, n)
        if min(weights.min(initial=0), own.min()) < -EXACT:
            which = f"the edge weights of {self.name} at a node"
            raise UserError(f"graph.topology: {which} sum to more than 1, or are negative")
        return Mixing(edges, weights, own, self.kind)

    @property
    def _symmetric(self) -> bool:
        """Whether every W is symmetric."""
        return not self.topology.directed and self.kind == "doubly"

    @property
    def _large(self) -> bool:
        """Whether W is too large for all eigenvalues, and sparse."""
        return self.nodes > LARGE and not self.mixing(0).dense

    def spectral_gap(self) -> float:
        """1 minus the second largest absolute eigenvalue of W.

        It is 0 for a graph that is not connected, and 1 for a single node and for graphs that reach the exact mean.
        With a period it is taken from the product of the period's matrices, per step (geometric mean). For a graph
        that never repeats, and for one of over 2,000 nodes that is directed or changes, it is 1 minus the factor by
        which the distance of random rows to their mean shrinks in a step (geometric mean over the first 64 steps).
        """
        if self.nodes == 1:
            return 1.0
        if self._large and self.period == 1 and self._symmetric:
            W = self.mixing(0).sparse
            return 1 - max(find_second_eigenvalue(W), -find_smallest_eigenvalue(W))
        if self.period is None or self._large:
            return self._contraction()
        product = np.eye(self.nodes)
        for step in range(self.period):
            product = self.mixing(step).W @ product
        second = np.sort(np.abs(eigenvalues(product)))[-2]
        return float(1 - second ** (1 / self.period)) if second > EXACT else 1.0

    def _contraction(self) -> float:
        X, norms = np.random.default_rng(0).standard_normal((self.nodes, 64)), []
        for step in range(WATCHED):
            X = X - X.mean(0)
            X = self.mixing(step).sparse @ (X / np.linalg.norm(X))
            norms.append(np.linalg.norm(X - X.mean(0)))
            if norms[-1] < EXACT:
                return 1.0
        return float(1 - np.exp(np.mean(np.log(norms))))

    def smallest_eigenvalue(self) -> float:
        """Smallest eigenvalue of W over a period, or over the first 64 steps of a graph that never repeats.

        On directed graphs it is the smallest real part. With over 2,000 nodes it is exact to 1e-4, and nan on directed
        graphs. Bias-correcting rules bound it.
        """
        every = [self.mixing(step) for step in range(self.period or WATCHED)]
        if not self._large:
            return min(float(eigenvalues(mixing.W).real.min()) for mixing in every)
        if not self._symmetric:
            return math.nan
        return min(find_smallest_eigenvalue(mixing.sparse) for mixing in every)

    def consensus_steps(self, most: int, within: float = 1e-3) -> int | None:
        """Steps of mixing until random rows are nearer to their mean than ``within`` times their first distance to it.

        None where it takes more than ``most`` steps. Where only columns sum to 1, rows are divided by their mass, as
        push-sum does.
        """
        X = np.random.default_rng(0).standard_normal((self.nodes, 64 if self.nodes <= LARGE else 4))
        T, first = np.column_stack([X, np.ones(self.nodes)]), np.linalg.norm(X - X.mean(0))
        for step in range(most + 1):
            X = T[:, :-1] / T[:, -1:]
            if np.linalg.norm(X - X.mean(0)) <= within * first:
                return step
            T = self.mixing(step).sparse @ T
        return None

    @property
    def connected(self) -> bool:
        """Whether every node can reach every other, over the edges that :attr:`diameter` takes."""
        from scipy.sparse.csgraph import connected_components

        every = [self.mixing(step).sparse for step in range(self.period or 1)]
        return connected_components(functools.reduce(operator.add, every), connection="strong")[0] == 1

    @property
    def diameter(self) -> int | None:
        """Largest distance between two nodes, in edges; None where some node cannot reach another.

        The graph has the edges of all steps of a period, or those of step 0 where it never repeats.
        """
        return nx.diameter(self._union()) if self.connected else None

    @property
    def diameter_bound(self) -> int:
        """A lower bound of the :attr:`diameter`, from a few searches."""
        return nx.approximation.diameter(self._union(), seed=0)

    def _union(self, step: int | None = None) -> nx.Graph:
        """The edges of a step; None: of all steps of a period together, or of step 0 where the graph never repeats."""
        union = nx.DiGraph() if self.topology.directed else nx.Graph()
        union.add_nodes_from(range(self.nodes))
        for each in range(self.period or 1) if step is None else (step,):
            union.add_edges_from(self.mixing(each).edges.tolist())
        return union

    def draw(
        self,
        target: "Axes | str | PathLike",
        values: "Sequence[float] | None" = None,
        meaning: str = "",
        labels: "Sequence[str] | None" = None,
        scale: tuple[float, float] | None = None,
        step: int | None = None,
        outlined: "Sequence[bool] | None" = None,
    ) -> None:
        """Draw the graph on an axes or into an image file; the title of a changing graph says which steps are drawn.

        Over 2,000 nodes are drawn without numbers and arrows, on a circle unless the topology places them.

        Args:
            target: axes, or the file.
            values: [nodes]; they colour the nodes and add a colour bar.
            meaning: what the values are, for the colour bar.
            labels: [nodes]; they replace the node numbers.
            scale: values of the first and the last colour; None: 0 (or a smaller smallest value) and the largest value.
            step: draw the edges of this step; None: those of all steps of a period together, or of step 0 where the
                graph never repeats.
            outlined: [nodes]; the nodes with a thick outline.
        """
        for key, given in (("values", values), ("labels", labels), ("outlined", outlined)):
            if given is not None:
                allowed = f"one for each of the {self.nodes} nodes"
                require(len(given) == self.nodes, key, f"{len(given)} of them", allowed)
        if isinstance(target, (str, PathLike)):
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6 if values is not None else 5, 5), layout="constrained")
            self.draw(figure.add_subplot(), values, meaning, labels, scale, step, outlined)
            figure.savefig(target, dpi=150)
            return
        union, positions = self.layout(step)
        size, arrows = min(420, 9000 / self.nodes), None
        if self.nodes > LARGE:
            arrows = False  # each is a patch, and thousands take seconds
        nx.draw_networkx_edges(union, positions, ax=target, edge_color="0.6", node_size=size, arrows=arrows)
        thick = np.zeros(self.nodes, bool) if outlined is None else np.asarray(outlined)
        style = {"ax": target, "node_size": size, "nodelist": range(self.nodes),
                 "edgecolors": np.where(thick, colours.RED, "0.3").tolist(),
                 "linewidths": np.where(thick, 3.0, 0.8).tolist()}  # fmt: skip
        ink = ["black"] * self.nodes
        if values is None:
            nx.draw_networkx_nodes(union, positions, node_color="#c6dbef", **style)
        else:
            colour = np.asarray(values, dtype=float)
            low, high = scale or (min(0.0, np.nanmin(colour)), np.nanmax(colour))
            drawn = nx.draw_networkx_nodes(
                union, positions, node_color=colour, cmap=colours.shades(), vmin=low,
                vmax=high if high > low else low + 1, **style
            )  # fmt: skip
            target.figure.colorbar(drawn, ax=target, shrink=0.8, label=meaning)
            ink = [colours.choose_text_colour(rgb) for rgb in drawn.cmap(drawn.norm(colour))]
        for node in range(self.nodes) if self.nodes <= LARGE else ():
            x, y = positions[node]
            target.annotate(
                str(node if labels is None else labels[node]),
                (x, y),
                ha="center",
                va="center",
                fontsize=max(5, 0.42 * math.sqrt(size)),
                color=ink[node],
            )
        target.set_aspect("equal")
        target.set_axis_off()
        if steps := self.describe_steps(step):
            target.set_title(steps, fontsize="medium")

    def describe_steps(self, step: int | None = None) -> str:
        """Which steps :meth:`draw` draws of a graph that changes; empty for a static graph."""
        if self.period == 1:
            return ""
        repeats = "never repeats" if self.period is None else f"repeats after {self.period} steps"
        which = f"step {step or 0}" if self.period is None or step is not None else f"all {self.period} steps"
        return f"{which} of a graph that {repeats}"

    def layout(self, step: int | None = None) -> tuple[nx.Graph, dict[int, np.ndarray]]:
        """The edges that :meth:`draw` draws, as a graph, and the place of every node, [2]."""
        if step not in self._layouts:
            union = self._union(step)
            self._layouts[step] = union, self._positions(union)
        return self._layouts[step]

    def _positions(self, union: nx.Graph) -> dict[int, np.ndarray]:
        """Where to draw each node, [2]: as the topology says, else by a layout of networkx, or on a circle."""
        given, start = self.topology.positions(self.nodes), dict(enumerate(circle(self.nodes)))
        if given is not None:
            return dict(enumerate(given))
        if self.nodes > LARGE:
            return start
        if self.nodes <= SMALL and nx.is_connected(nx.Graph(union)):
            return nx.kamada_kawai_layout(nx.Graph(union), pos=start)
        return nx.spring_layout(union, pos=start, iterations=300, seed=0)  # without a seed it draws from the global one
