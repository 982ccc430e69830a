"""Graphs that change from step to step, so that few edges at a time add up to many."""

from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain, combinations, zip_longest

import networkx as nx
import numpy as np

from lightning_idkd.errors import require
from lightning_idkd.topologies.base import OfAnother, OnCircle, Topology, dimensions, generator
from lightning_idkd.topologies.drawn import require_regular
from lightning_idkd.topologies.static import Ring, cube, hops

Step = list[tuple[int, int, float]]
"""The edges of a step: two nodes and their weight in W."""

CUTS = 1000  # largest number of rounds of cutting planes; regular graphs need 1 round, the karate club about 110


@dataclass
class OnePeerExponential(OnCircle):
    """Directed: at step t every node i sends to node i + 2^t modulo n only, with t taken modulo ceil(log2 n). If n is a
    power of two, one period gives the exact mean (Ying et al., NeurIPS 2021, Lemma 1)."""

    directed = True
    period = None

    def period_on(self, nodes: int) -> int:
        return max(1, len(hops(nodes)))

    def graph(self, nodes: int, step: int, seed: int) -> nx.DiGraph:
        graph = nx.empty_graph(nodes, nx.DiGraph)
        for hop in hops(nodes)[step : step + 1]:  # a single node has no hops
            graph.add_edges_from((i, (i + hop) % nodes) for i in range(nodes))
        return graph


@dataclass
class HypercubeOnePeer(Topology):
    """At step t every node has one neighbour, whose number differs in binary digit t only; after log2 n steps all nodes
    have the exact mean. graph.nodes is a power of two."""

    period = None

    def period_on(self, nodes: int) -> int:
        return max(1, dimensions(nodes, "HypercubeOnePeer"))

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        graph = nx.empty_graph(nodes)
        graph.add_edges_from((i, i ^ 2**step) for i in range(nodes) if nodes > 1)
        return graph

    def positions(self, nodes: int) -> np.ndarray:
        return cube(nodes)


@cache
def factors(n: int, most: int) -> tuple[int, ...] | None:
    """The shortest list of factors of ``n`` that are at most ``most``; None where a prime factor is larger."""
    if n == 1:
        return ()
    rest = {f: factors(n // f, most) for f in range(min(n, most), 1, -1) if n % f == 0}
    return min(((f, *r) for f, r in rest.items() if r is not None), key=len, default=None)


def merge(*sequences: list[Step]) -> list[Step]:
    """One sequence in which several sequences on different nodes run at the same time; shorter ones end earlier."""
    return [list(chain(*steps)) for steps in zip_longest(*sequences, fillvalue=[])]


def hyper_hypercube(V: list[int], base: int) -> list[Step]:
    """Alg. 1: at each step the nodes that differ in one digit of their mixed-radix number form complete graphs."""
    sequence, stride = [], 1
    for f in factors(len(V), base):
        step: Step = []
        for first in range(len(V)):
            if first // stride % f == 0:
                group = [V[first + stride * digit] for digit in range(f)]
                step += [(i, j, 1 / f) for i, j in combinations(group, 2)]
        sequence.append(step)
        stride *= f
    return sequence


def simple_base(V: list[int], base: int) -> list[Step]:
    """Alg. 2: the nodes are divided into parts of a * base^p nodes, one for every digit a of their number."""
    if factors(len(V), base) is not None:
        return hyper_hypercube(V, base)
    parts, rest, size = [], V, 1
    while size * base <= len(V):
        size *= base
    while rest:
        cut = len(rest) // size * size
        parts += [(rest[:cut], size)] if cut else []
        rest, size = rest[cut:], size // base
    return merge(*(hyper_hypercube(part, base) for part, _ in parts)) + spread_mean(parts, base)


def spread_mean(parts: list[tuple[list[int], int]], base: int) -> list[Step]:
    """The steps that bring parts, within which all nodes agree, to the mean of all nodes.

    Each node of a later part exchanges with one node of every block of the first part, so that the mean of each block,
    and of the later parts together, becomes the mean of all nodes.
    """
    (first, size), *others = parts
    if not others:
        return []
    later = list(chain.from_iterable(part for part, _ in others))
    blocks = [first[start : start + size] for start in range(0, len(first), size)]
    weight = size / (len(first) + len(later))
    exchange: Step = []
    for block in blocks:
        exchange += [(u, block[i], weight) for i, u in enumerate(later)]
    return [exchange, *merge(*(hyper_hypercube(block, base) for block in blocks), spread_mean(others, base))]


@lru_cache(maxsize=32)
def base_graph(nodes: int, base: int, simple: bool) -> list[Step]:
    """Alg. 3: n = p q, where no number up to ``base`` divides q; first each of p blocks of q nodes mixes on its own,
    then nodes mix across the blocks. Alg. 2 on all nodes instead if ``simple``, or where it takes no more steps."""
    V, q = list(range(nodes)), nodes
    shorter = simple_base(V, base)
    if simple:
        return shorter
    for f in range(2, base + 1):
        while q % f == 0:
            q //= f
    within = merge(*(simple_base(V[start : start + q], base) for start in range(0, nodes, q)))
    across = merge(*(hyper_hypercube(V[start::q], base) for start in range(q)))
    return min(shorter, within + across, key=len)


@dataclass
class BaseGraph(OnCircle):
    """The Base-(k+1) graph: a node has at most k neighbours at a step, and any number of nodes reaches the exact mean
    after at most 2 log_(k+1) n + 2 steps. It has its own weights (Takezawa et al., NeurIPS 2023, arXiv 2305.11420,
    Alg. 3).

    Args:
        k: largest number of neighbours at a step, 1 to graph.nodes - 1.
        simple: use the Simple Base-(k+1) graph (Alg. 2), which may need more steps.
    """

    k: int = 1
    simple: bool = False

    period = None
    own_weights = "edges"

    def sequence(self, nodes: int) -> list[Step]:
        """Edges and weights of every step of a period."""
        most = max(1, nodes - 1)
        require(1 <= self.k <= most, "graph.topology.k", self.k, f"1 to {most}, graph.nodes - 1")
        return base_graph(nodes, self.k + 1, self.simple)

    def period_on(self, nodes: int) -> int:
        return max(1, len(self.sequence(nodes)))

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        graph = nx.empty_graph(nodes)
        for edges in self.sequence(nodes)[step : step + 1]:  # a single node has no steps
            graph.add_weighted_edges_from(edges)
        return graph


def laplacian(nodes: int, edges: list[tuple[int, int]]) -> np.ndarray:
    """The Laplacian [nodes, nodes] of the graph with these edges."""
    L = np.zeros((nodes, nodes))
    for i, j in edges:
        L[[i, j], [i, j]] += 1
        L[[i, j], [j, i]] -= 1
    return L


def matchings(edges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The edges divided into matchings, one for each colour of a greedy edge colouring (DSATUR)."""
    adjacent = nx.Graph()
    adjacent.add_nodes_from(edges)
    adjacent.add_edges_from((a, b) for a, b in combinations(edges, 2) if set(a) & set(b))
    colour = nx.greedy_color(adjacent, "DSATUR")
    parts: list[list[tuple[int, int]]] = [[] for _ in range(max(colour.values(), default=-1) + 1)]
    for edge in edges:
        parts[colour[edge]].append(edge)
    return parts


def probabilities(laplacians: np.ndarray, budget: float) -> np.ndarray:
    """The probabilities p with mean ``budget`` that connect the expected graph best: max lambda_2(sum_j p_j L_j)
    (MATCHA, step 2).

    Cutting planes find the maximum to 1 %, since lambda_2 is the smallest v' L v of all unit vectors v with mean 0. The
    Laplacians are restricted to these vectors: where p leaves the graph in several components, the eigenvalue 0 is
    multiple, and an eigenvector of the whole matrix may have another mean.
    """
    from scipy.linalg import null_space
    from scipy.optimize import linprog

    count, centred = len(laplacians), null_space(np.ones((1, laplacians.shape[1])))
    laplacians = centred.T @ laplacians @ centred
    p = best = np.full(count, budget)
    most, cuts = 0.0, []
    total = {"A_eq": [[1] * count + [0]], "b_eq": [budget * count], "bounds": [(0, 1)] * count + [(0, None)]}
    for _ in range(CUTS):
        values, vectors = np.linalg.eigh(np.tensordot(p, laplacians, 1))
        if values[0] > most:
            best, most = p, values[0]
        v = vectors[:, :8]
        quadratic = np.einsum("ik,mij,jk->km", v, laplacians, v, optimize=True)
        cuts.append(np.column_stack([-quadratic, np.ones(v.shape[1])]))
        A = np.concatenate(cuts)
        x = linprog([0] * count + [-1], A, np.zeros(len(A)), **total).x
        p, bound = x[:-1], x[-1]
        if bound - most < 0.01 * bound:
            break
    return best


def step_size(laplacians: np.ndarray, p: np.ndarray) -> float:
    """The alpha for which the spectral norm of E[W'W] - 11'/n is smallest, where W = I - alpha L(t) (MATCHA, step 3),
    among those for which no weight is negative."""
    from scipy.optimize import minimize_scalar

    n = laplacians.shape[1]
    mean, spread = np.tensordot(p, laplacians, 1), np.tensordot(p * (1 - p), laplacians, 1)

    def norm(alpha: float) -> float:
        return np.linalg.eigvalsh(np.eye(n) - 1 / n - 2 * alpha * mean + alpha**2 * (mean @ mean + 2 * spread))[-1]

    return float(minimize_scalar(norm, bounds=(0, 1 / laplacians.sum(0).max()), method="bounded").x)


@dataclass
class RandomMatchings(OfAnother):
    """The edges of a static graph, divided into matchings, each of which is active at a step with its own probability;
    matchings that connect the graph better are active more often, and W = I - alpha L (MATCHA, Wang et al., ICC 2019,
    arXiv 1905.09435).

    The probabilities and alpha solve the paper's two convex problems; alpha is at most 1 / maximal degree.

    Args:
        base: the graph, which is static and undirected.
        budget: mean share of the matchings that are active, above 0 to 1 (all at every step).
    """

    base: Topology = field(default_factory=Ring)
    budget: float = 0.5

    period = None
    own_weights = "edges"

    def __post_init__(self):
        require(0 < self.budget <= 1, "graph.topology.budget", self.budget, "a share, above 0 to 1")
        super().__post_init__()
        self._plans: dict[tuple[int, int], tuple] = {}

    def plan(self, nodes: int, seed: int) -> tuple[list[list[tuple[int, int]]], np.ndarray, float]:
        """Matchings, their probabilities, and alpha."""
        if (nodes, seed) not in self._plans:
            parts = matchings(sorted(tuple(sorted(edge)) for edge in self.base_of(nodes, seed).edges))
            laplacians = np.array([laplacian(nodes, part) for part in parts])
            p = probabilities(laplacians, self.budget) if parts else np.zeros(0)
            self._plans[nodes, seed] = parts, p, step_size(laplacians, p) if parts else 0.0
        return self._plans[nodes, seed]

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        parts, p, alpha = self.plan(nodes, seed)
        graph = nx.empty_graph(nodes)
        for part, active in zip(parts, generator(seed, step).random(len(parts)) < p, strict=True):
            graph.add_edges_from(part if active else [], weight=alpha)
        return graph


@dataclass
class EpidemicLocal(OnCircle):
    """Directed: at every step each node sends to s others drawn at random, and averages what it receives with its own
    parameters. Rows of W sum to 1, columns only on average (Epidemic Learning, de Vos et al., NeurIPS 2023, EL-Local).

    Args:
        s: number of receivers of every node, 1 to graph.nodes - 1.
    """

    s: int = 2

    directed = True
    period = None
    own_weights = "average"

    def graph(self, nodes: int, step: int, seed: int) -> nx.DiGraph:
        require(1 <= self.s < nodes, "graph.topology.s", self.s, f"1 to {nodes - 1}, graph.nodes - 1")
        rng, graph = generator(seed, step), nx.empty_graph(nodes, nx.DiGraph)
        for i in range(nodes):
            graph.add_edges_from((i, j + (j >= i)) for j in rng.choice(nodes - 1, self.s, replace=False).tolist())
        return graph


@dataclass
class EpidemicOracle(OnCircle):
    """A random graph in which every node has s neighbours, drawn anew at every step (Epidemic Learning, de Vos et al.,
    NeurIPS 2023, EL-Oracle).

    Args:
        s: number of neighbours of every node, 1 to graph.nodes - 1; an even number where graph.nodes is odd.
    """

    s: int = 2

    period = None

    def graph(self, nodes: int, step: int, seed: int) -> nx.Graph:
        require_regular(self.s, nodes, "graph.topology.s")
        return nx.random_regular_graph(self.s, nodes, int(generator(seed, step).integers(2**31)))
