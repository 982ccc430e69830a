"""A graph on a number of nodes with its mixing weights: mixing matrices, spectra, drawings.

Weights lie with the edges, so that a graph of many nodes and few edges takes little memory.
"""

import contextlib
import functools
import math
import operator
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Literal, get_args

import networkx as nx
import numpy as np

from lightning_idkd import colours
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.topologies import Chain, Complete, Ring, Social15, Social32, Topology, Torus
from lightning_idkd.topologies.base import circle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from scipy.sparse import csr_array

__all__ = ["Chain", "Complete", "Graph", "Mixing", "Ring", "Social15", "Social32", "Topology", "Torus"]

REMEMBERED = 64  # mixing matrices that are kept where a graph never repeats
WATCHED = 64  # first steps that are measured where a graph never repeats
SMALL = 100  # most nodes for which the better of networkx's layouts takes seconds at most
SPARSE = 16  # most nodes for which every W is treated as sparse
LARGE = 2000  # nodes from which on spectra are those of sparse matrices, or are estimated
EXACT = 1e-12  # smaller eigenvalues are 0 up to rounding

Weights = Literal["metropolis", "uniform", "max_degree", "lazy", "push_sum", "average"]
Kind = Literal["doubly", "column", "row"]
"""What sums to 1 in W, whose entries are all 0 or more: rows and columns, columns only, or rows only."""


# A function of weights takes the directed edges [E, 2] (sender, receiver) and the number of nodes n. It returns the
# weight of every edge [E], which is what the receiver puts on it, and those of the nodes for their own rows [n].


def metropolis(edges: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Metropolis-Hastings weights w_ij = 1 / (1 + max(d_i, d_j)): symmetric and doubly stochastic on every undirected
    graph.

    Source: Xiao, Boyd and Kim, JPDC 2007, eq. 5.
    """
    degree = np.bincount(edges[:, 0], minlength=n)
    return fill_rows(edges, 1 / (1 + degree[edges].max(1)), n)


def uniform(edges: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights 1 / (d + 1) for a node and each of its d in-neighbours.

    Raises:
        UserError: unless every node has d edges in and d edges out; only then do rows and columns sum to 1.
    """
    degrees = sorted({d for ends in edges.T for d in np.bincount(ends, minlength=n).tolist()})
    if len(degrees) > 1:
        raise UserError(
            f"graph.weights: uniform weights 1/(d+1) are symmetric on regular graphs only, and this graph has degrees "
            f"{', '.join(map(str, degrees))}; use metropolis (undirected graphs), push_sum or average"
        )
    return average(edges, n)


def max_degree(edges: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """W = I - L / (d_max + 1): every edge weighs 1 / (d_max + 1).

    Source: Xiao and Boyd, Systems & Control Letters 2004, sec. 4.
    """
    largest = np.bincount(edges[:, 0], minlength=n).max()
    return fill_rows(edges, np.full(len(edges), 1 / (largest + 1)), n)


def lazy(edges: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(I + W) / 2 with Metropolis-Hastings weights W: no eigenvalue is negative, and mixing is half as fast."""
    weights, own = metropolis(edges, n)
    return weights / 2, (1 + own) / 2


def push_sum(edges: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns sum to 1: a node keeps 1 / (d + 1) of its mass and sends as much to each of its d out-neighbours.

    Source: Kempe, Dobra and Gehrke, FOCS 2003.
    """
    share = 1 / (np.bincount(edges[:, 0], minlength=n) + 1)
    return share[edges[:, 0]], share


def average(edges: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows sum to 1: a node takes the plain mean of its own value and those of its d in-neighbours."""
    share = 1 / (np.bincount(edges[:, 1], minlength=n) + 1)
    return share[edges[:, 1]], share


def fill_rows(edges: np.ndarray, weights: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights of edges, and own weights that fill each row up to 1."""
    return weights, 1 - np.bincount(edges[:, 1], weights, n)


WEIGHTS: dict[str, "Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]"] = {
    "metropolis": metropolis,
    "uniform": uniform,
    "max_degree": max_degree,
    "lazy": lazy,
    "push_sum": push_sum,
    "average": average,
}
"""The functions of weights by name. Besides, topologies may give the weights of their ``edges``."""
KINDS: dict[str, Kind] = {"push_sum": "column", "average": "row"}
"""The kind of W by name of weights; it is doubly stochastic for all others."""
DIRECTED = ("uniform", "push_sum", "average")


@dataclass(frozen=True, eq=False)
class Mixing:
    """Weights and edges at one step."""

    edges: np.ndarray
    """int64 [E, 2], (sender, receiver) in lexicographic order without self edges; an undirected edge gives two."""
    weights: np.ndarray
    """float64 [E], what the receiver of an edge puts on its sender."""
    own: np.ndarray
    """float64 [n], what each node puts on its own row."""
    kind: Kind = "doubly"
    """What sums to 1 in W."""

    @cached_property
    def sparse(self) -> "csr_array":
        """W in the sparse format of scipy: row i holds the weights that node i puts on what it receives."""
        from scipy.sparse import csr_array

        n, nodes = len(self.own), np.arange(len(self.own))
        senders, receivers = (np.concatenate([ends, nodes]) for ends in self.edges.T)
        return csr_array((np.concatenate([self.weights, self.own]), (receivers, senders)), (n, n))

    @cached_property
    def W(self) -> np.ndarray:
        """W with its zeros, float64 [n, n]: for graphs of few nodes or many edges."""
        return self.sparse.toarray()

    def entries(self, receivers: np.ndarray, senders: np.ndarray) -> np.ndarray:
        """Entries of W [k] in the rows ``receivers`` [k] and columns ``senders`` [k]; 0 where there is no edge."""
        n = len(self.own)
        keys, wanted = self.edges @ [n, 1], senders * n + receivers
        place = np.searchsorted(keys, wanted)
        found = np.append(keys, -1)[place] == wanted
        return np.where(receivers == senders, self.own[receivers], np.append(self.weights, 0)[place] * found)

    def neighbours(self, node: int) -> list[int]:
        """The nodes that ``node`` receives from, ascending, without itself."""
        return [j for j in self.terms[node][0] if j != node]

    @property
    def dense(self) -> bool:
        """Whether W has so few zeros that a product with the whole matrix is faster than sums of its nonzero terms."""
        n = len(self.own)
        return n > SPARSE and 4 * (len(self.edges) + n) > n * n

    @cached_property
    def terms(self) -> list[tuple[list[int], list[float]]]:
        """Per node: the senders (itself included, ascending) and their weights in its sum."""
        nodes = np.arange(len(self.own))
        pairs = np.concatenate([self.edges, np.stack([nodes, nodes], 1)])
        order = np.lexsort(pairs.T)  # by receiver, then by sender
        ends = np.searchsorted(pairs[order, 1], nodes[1:])
        columns = pairs[order, 0], np.concatenate([self.weights, self.own])[order]
        senders, weights = (np.split(column, ends) for column in columns)
        return [(j.tolist(), w.tolist()) for j, w in zip(senders, weights, strict=True)]

    @cached_property
    def received(self) -> tuple[np.ndarray, np.ndarray]:
        """What each node has after every node has sent a message: its own, and the others by ascending sender.

        Returns:
            senders int64 [n, D]: itself, those it receives from, and itself again up to D, the largest such number.
            weights [n, D]: their weights in W; 0 for the repetitions.
        """
        most, n = max(len(senders) for senders, _weights in self.terms), len(self.own)
        senders, weights = np.arange(n)[:, None].repeat(most, 1), np.zeros((n, most))
        weights[:, 0] = self.own
        for i, terms in enumerate(self.terms):
            others = [(j, w) for j, w in zip(*terms, strict=True) if j != i]
            for k, (j, w) in enumerate(others, start=1):
                senders[i, k], weights[i, k] = j, w
        return senders, weights


def eigenvalues(W: np.ndarray) -> np.ndarray:
    """All eigenvalues of a matrix [n, n]."""
    return np.linalg.eigvalsh(W) if np.array_equal(W, W.T) else np.linalg.eigvals(W)


def find_second_eigenvalue(W: "csr_array") -> float:
    """The second largest eigenvalue of a symmetric, doubly stochastic matrix; 1 minus it has four right digits.

    Lanczos' method finds that of a graph that mixes fast. For the others it is found from a decomposition of W - I,
    which is sparse for such graphs.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    start = np.random.default_rng(0).standard_normal(W.shape[0])
    find = functools.partial(eigsh, k=2, v0=start, tol=1e-6, return_eigenvectors=False)
    with contextlib.suppress(ArpackNoConvergence):
        second = find(W, which="LA", maxiter=50).min()
        if second < 1 - 1e-3:
            return float(second)
    return float(find(W.tocsc(), sigma=1 + 1e-6).min())


def find_smallest_eigenvalue(W: "csr_array") -> float:
    """The smallest eigenvalue of a symmetric matrix whose rows sum to 1, exact to 1e-4; or a lower bound, if many
    others lie near to it."""
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    start = np.random.default_rng(0).standard_normal(W.shape[0])
    try:
        return float(eigsh(W, 1, which="SA", v0=start, tol=1e-4, ncv=60, maxiter=50, return_eigenvectors=False)[0])
    except ArpackNoConvergence:
        return float((2 * W.diagonal() - 1).min())  # Gershgorin's


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
