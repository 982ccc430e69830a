"""W, the mixing matrix of one step: the weights that go with the edges of a graph, and its eigenvalues.

Weights lie with the edges, so that a graph of many nodes and few edges takes little memory.
"""

import contextlib
import functools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse import csr_array

SPARSE = 16  # most nodes for which every W is treated as sparse

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
