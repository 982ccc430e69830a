"""Robust aggregators: they combine a node's own row with the rows that it received, some of which may be lies.

All nodes are aggregated at once. Most aggregators weigh whole rows by their distances: they compute a matrix of weights
[r, D], and sum the rows with it once. A node's result has the same bits whichever nodes its process holds: sums over
columns run in blocks of a fixed size, and matrix products have aligned rows, since their bits would vary otherwise.
"""

from __future__ import annotations

import functools
import math

from lightning_idkd.callback import Aggregator, Context, Run
from lightning_idkd.errors import UserError, require
from lightning_idkd.graph import Graph

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 2**12  # of a block of distances and products, which stays in the caches
ALIGNED = 16  # rows of a matrix product have a multiple of this number of values
SLOT = 2**15  # values of one slot (a position among the D rows) that are sorted at once
CANCELS = 1e-3  # a squared distance below this share of the squares that it is computed from is computed in float64
ROUNDING = 1e-6  # rounding error that sums of weights and shares may have


class SCClip(Aggregator):
    """Self-centred clipping (He, Karimireddy and Jaggi, 2022, arXiv 2202.01545): x_i + sum_j w_ij clip(x_j - x_i, tau),
    where clip shortens a vector to length tau. An infinite tau is plain mixing.

    Args:
        tau: The radius. null: the paper's adaptive one, tau_i^2 = sum_j w_ij |x_i - x_j|^2 / ``share``, over all
            neighbours j but the farthest ones, which have a weight of at most ``share`` together. The paper's code
            takes the second largest distance instead.
        share: The paper's delta_max, the largest sum of the weights that a node gives to liars; above 0, below 1.
    """

    def __init__(self, tau: float | None = None, share: float = 0.35):
        require(tau is None or tau > 0, "gossip.aggregator.tau", tau, "above 0, or null for an adaptive radius")
        require(0 < share < 1, "gossip.aggregator.share", share, "above 0, below 1")
        self.tau, self.share = tau, share

    def check(self, graph: Graph) -> None:
        for step in range(graph.period or 1):
            mixing = graph.mixing(step)
            least = 1 - mixing.own.max()
            if self.tau is None and self.share > least - ROUNDING and len(mixing.edges):
                raise UserError(
                    f"gossip.aggregator.share: {self.share} given; some node gives its neighbours a weight of "
                    f"{least:.4g} in all, and would drop them all; allowed: below that"
                )

    def bears(self, received: int) -> int | None:
        """Assumes equal weights 1 / (``received`` + 1); None for a given radius."""
        return None if self.tau is not None else math.floor(self.share * (received + 1) + ROUNDING)

    def __call__(self, V: Tensor, w: Tensor, ctx: Context) -> Tensor:
        d = distances(V)  # 0 for the own row, whose weight thus plays no role
        tau = self.radius(d, w)[:, None] if self.tau is None else self.tau
        return add_to_own(V, w * (tau / d.clamp(min=1e-30)).clamp(max=1))

    def radius(self, d: Tensor, w: Tensor) -> Tensor:
        """The adaptive radius [r], from distances and weights [r, D]."""
        d, order = d.double().sort(descending=True, stable=True)
        w = w.double().gather(1, order)
        kept = w.cumsum(1) > self.share + ROUNDING
        return ((w * d.square() * kept).sum(1) / self.share).sqrt().to(d.dtype)


class UBAR(Aggregator):
    """Uniform Byzantine-resilient aggregation (Guo et al., 2021, arXiv 2002.08569): of the ``rho`` share of neighbours
    that are nearest to the node, it averages those whose loss on the node's batch is not above the node's own, or takes
    the one with the smallest loss if there are none. The result is alpha x_i + (1 - alpha) average.

    The final gossip has no batch, and averages all of the nearest neighbours.

    Args:
        rho: The smallest share of honest nodes among the neighbours of a node; above 0, at most 1.
        alpha: Weight of the node's own row, 0 to 1.
    """

    def __init__(self, rho: float = 0.5, alpha: float = 0.5):
        require(0 < rho <= 1, "gossip.aggregator.rho", rho, "above 0, at most 1")
        require(0 <= alpha <= 1, "gossip.aggregator.alpha", alpha, "0 to 1")
        self.rho, self.alpha = rho, alpha

    def bears(self, received: int) -> int | None:
        return received - max(1, math.floor(self.rho * received + ROUNDING)) if received else 0

    def __call__(self, V: Tensor, w: Tensor, ctx: Context) -> Tensor:
        import torch

        received = mark_received(w)
        count = received.sum(1, keepdim=True)
        near = (self.rho * count + ROUNDING).floor().clamp(min=1).minimum(count)
        order = distances(V).masked_fill(~received, math.inf).argsort(stable=True)
        chosen = torch.arange(V.shape[1], device=V.device) < near  # by distance
        if ctx.targets is not None and chosen.any():
            own, losses = ctx.loss(V[:, 0]), V.new_full(w.shape, math.inf)
            for place in range(int(near.max())):
                losses[:, place] = ctx.loss(take(V, order[:, place])).to(losses).nan_to_num(math.inf)
            losses = losses.masked_fill(~chosen, math.inf)
            good, best = chosen & (losses <= own[:, None]), mark(losses.argmin(1), w)
            chosen = good.where(good.any(1, keepdim=True), best & chosen)
        return average_with_own(V, torch.zeros_like(chosen).scatter(1, order, chosen), self.alpha)


class BALANCE(Aggregator):
    """Byzantine-robust averaging through local similarity (Fang et al., CCS 2024): a node averages the neighbours with
    |x_i - x_j| <= gamma exp(-kappa t / T) |x_i|, and takes alpha x_i + (1 - alpha) average, or x_i if there are none.
    t / T is the share of the epochs that are over.

    Args:
        gamma: Largest relative distance at the start, above 0.
        kappa: How fast the accepted distance shrinks, 0 or more.
        alpha: Weight of the node's own row, 0 to 1.
    """

    def __init__(self, gamma: float = 0.3, kappa: float = 1.0, alpha: float = 0.5):
        require(0 < gamma < math.inf, "gossip.aggregator.gamma", gamma, "above 0")
        require(0 <= kappa < math.inf, "gossip.aggregator.kappa", kappa, "0 or more")
        require(0 <= alpha <= 1, "gossip.aggregator.alpha", alpha, "0 to 1")
        self.gamma, self.kappa, self.alpha = gamma, kappa, alpha
        self.run: Run | None = None

    def on_check(self, run: Run) -> None:
        self.run = run

    def __call__(self, V: Tensor, w: Tensor, ctx: Context) -> Tensor:
        over = 0.0 if self.run is None else self.run.epoch / self.run.epochs
        most = self.gamma * math.exp(-self.kappa * over) * V[:, :1].norm(dim=2)
        return average_with_own(V, mark_received(w) & (distances(V) <= most), self.alpha)


class MultiKrum(Aggregator):
    """Multi-Krum (Blanchard et al., NeurIPS 2017): the mean of the ``keep`` rows with the smallest scores. The score of
    a row is the sum of its squared distances to the R - liars - 2 nearest of the R rows that the node has with its own.

    Args:
        liars: The paper's f, the number of liars that a node bears; every node needs more than 2 liars + 2 rows.
        keep: The paper's m, the number of rows to average, at most all rows of a node; null: all rows but ``liars``.
    """

    def __init__(self, liars: int = 1, keep: int | None = None):
        require(liars >= 0, "gossip.aggregator.liars", liars, "0 or more")
        require(keep is None or keep >= 1, "gossip.aggregator.keep", keep, "1 or more, or null")
        self.liars, self.keep = liars, keep

    def check(self, graph: Graph) -> None:
        rows = min(count_rows(graph))
        allowed = f"0 to {(rows - 3) // 2}" if rows > 2 else "none, as Krum needs 3 rows or more"
        require_rows(2 * self.liars + 2 < rows, "liars", self.liars, rows, allowed)
        require_rows(self.keep is None or self.keep <= rows, "keep", self.keep, rows, f"1 to {rows}")

    def bears(self, received: int) -> int | None:
        return max(0, min(self.liars, (received - 2) // 2))

    def __call__(self, V: Tensor, w: Tensor, ctx: Context) -> Tensor:
        import torch

        valid, place = mark_own(w) | mark_received(w), torch.arange(V.shape[1], device=V.device)
        rows = valid.sum(1, keepdim=True)  # [r, 1]
        S = square_distances(inner_products(V))
        S = S.masked_fill(~valid[:, None] | (place == place[:, None]), math.inf).sort(2).values
        nearest = (rows - self.liars - 2).clamp(min=1)[..., None]
        scores = S.masked_fill(place >= nearest, 0).sum(2).masked_fill(~valid, math.inf)
        kept = (rows - self.liars if self.keep is None else rows.clamp(max=self.keep)).clamp(min=1)
        chosen = torch.zeros_like(valid).scatter(1, scores.argsort(stable=True), place < kept)
        return combine(V, chosen.double() / kept)


class Krum(MultiKrum):
    """Krum (Blanchard et al., NeurIPS 2017): the row with the smallest score, see MultiKrum.

    Args:
        liars: The paper's f, the number of liars that a node bears; every node needs more than 2 liars + 2 rows.
    """

    def __init__(self, liars: int = 1):
        super().__init__(liars, keep=1)


class RFA(Aggregator):
    """Robust federated aggregation (Pillutla, Kakade and Harchaoui, 2022): the geometric median of the rows with the
    weights of W, by steps of the smoothed Weiszfeld algorithm from their mean: z <- sum_j b_j v_j / sum_j b_j with
    b_j = w_j / max(nu, |z - v_j|).

    Args:
        steps: Number of steps, 1 or more.
        nu: Smallest distance, which keeps the weights finite; above 0.
    """

    def __init__(self, steps: int = 8, nu: float = 1e-6):
        require(steps >= 1, "gossip.aggregator.steps", steps, "1 or more")
        require(0 < nu < math.inf, "gossip.aggregator.nu", nu, "above 0")
        self.steps, self.nu = steps, nu

    def bears(self, received: int) -> int | None:
        """Assumes equal weights."""
        return received // 2

    def __call__(self, V: Tensor, w: Tensor, ctx: Context) -> Tensor:
        K, w = inner_products(V), w.double()
        b = w / w.sum(1, keepdim=True)
        for _ in range(self.steps):
            Kb = (K * b[:, None]).sum(2)
            square = K.diagonal(dim1=1, dim2=2) - 2 * Kb + (b * Kb).sum(1, keepdim=True)
            b = w / square.clamp(min=0).sqrt().clamp(min=self.nu)
            b = b / b.sum(1, keepdim=True)
        return combine(V, b)


class CoordinateTrimmedMean(Aggregator):
    """Coordinate-wise trimmed mean (Yin et al., ICML 2018): the mean of each parameter over a node's rows without the
    ``trim`` largest and the ``trim`` smallest values. All rows count alike, whatever W.

    A node with 2 ``trim`` rows or fewer, because of the graph or of lost messages, keeps the middle one or two values.

    Args:
        trim: Number of values to drop at either end, less than half of the rows that some node has with its own.
    """

    columnwise = True

    def __init__(self, trim: int = 1):
        require(trim >= 0, "gossip.aggregator.trim", trim, "0 or more")
        self.trim = trim

    def check(self, graph: Graph) -> None:
        rows = max(count_rows(graph))
        allowed = f"0 to {(rows - 1) // 2}, as no node has more than {rows} rows with its own"
        require(2 * self.trim < rows, "gossip.aggregator.trim", self.trim, allowed)

    def bears(self, received: int) -> int | None:
        return min(self.trim, received // 2)

    def __call__(self, V: Tensor, w: Tensor, ctx: Context) -> Tensor:
        return trim_and_average(V, w, self.trim)


class CoordinateMedian(Aggregator):
    """Coordinate-wise median (Yin et al., ICML 2018): the median of each parameter over a node's rows, which count
    alike whatever W. The median of an even number of values is the mean of the middle two."""

    columnwise = True

    def bears(self, received: int) -> int | None:
        return received // 2

    def __call__(self, V: Tensor, w: Tensor, ctx: Context) -> Tensor:
        return trim_and_average(V, w, V.shape[1])


# ---------------------------------------------------------------------- sorting


def trim_and_average(V: Tensor, w: Tensor, trim: int) -> Tensor:
    """Mean [r, C] of each column of a node's rows without ``trim`` values at either end, or as many as leave 1 or 2."""
    import torch

    valid = mark_own(w) | mark_received(w)
    rows = valid.sum(1, keepdim=True)
    dropped = ((rows - 1) // 2).clamp(max=trim)
    place = torch.arange(V.shape[1], device=V.device)
    kept = ((place >= dropped) & (place < rows - dropped)).unbind(1)
    means = []
    for block in V.split(max(1, SLOT // len(V)), 2):
        ascending = sort_slots(block.masked_fill(~valid[..., None], math.inf).unbind(1))
        total = sum(values.where(keep[:, None], 0) for keep, values in zip(kept, ascending, strict=True))
        means.append(total / (rows - 2 * dropped))
    return torch.cat(means, 1)


def sort_slots(values: tuple[Tensor, ...]) -> list[Tensor]:
    """Sorts tensors of one shape elementwise, ascending: many times faster than sorting along a short dimension."""
    import torch

    sorted_values = list(values)
    for i, j in plan_comparisons(len(sorted_values)):
        a, b = sorted_values[i], sorted_values[j]
        sorted_values[i], sorted_values[j] = torch.minimum(a, b), torch.maximum(a, b)
    return sorted_values


@functools.cache
def plan_comparisons(count: int) -> list[tuple[int, int]]:
    """The pairs that Batcher's odd-even merge sort compares (Batcher, AFIPS 1968)."""
    pairs, half = [], 1
    while half < count:
        gap = half
        while gap:
            for start in range(gap % half, count - gap, 2 * gap):
                for i in range(start, min(start + gap, count - gap)):
                    if i // (2 * half) == (i + gap) // (2 * half):
                        pairs.append((i, i + gap))
            gap //= 2
        half *= 2
    return pairs


# ---------------------------------------------------------------------- distances


def distances(V: Tensor) -> Tensor:
    """Distances [r, D] of a node's rows to its own."""
    import torch

    return torch.stack([(block - block[:, :1]).norm(dim=2) for block in V.split(COLUMNS, 2)]).norm(dim=0)


def inner_products(V: Tensor) -> Tensor:
    """Inner products [r, D, D] of the differences between a node's rows and its own, in float64.

    Rows so near to each other that their distance would cancel in float32 are multiplied in float64.
    """
    K = multiply(V)
    squares = K.diagonal(dim1=1, dim2=2)
    least = CANCELS * (squares[:, None] + squares[..., None])
    least.diagonal(dim1=1, dim2=2).zero_()
    cancelled = (square_distances(K) < least).any(2)  # [r, D]
    cancelled[:, 0] = cancelled.any(1)  # differences are to the own row
    for i in cancelled[:, 0].nonzero()[:, 0].tolist():
        rows = cancelled[i].nonzero()[:, 0]
        K[i, rows[:, None], rows] = multiply(V[i, rows][None].double())[0]
    return K


def multiply(V: Tensor) -> Tensor:
    """:func:`inner_products` in the precision of ``V``, summed over blocks in float64."""
    import torch

    K = V.new_zeros(len(V), V.shape[1], V.shape[1], dtype=torch.float64)
    for block in V.split(COLUMNS, 2):
        U = block - block[:, :1]
        if missing := -U.shape[2] % ALIGNED:
            U = torch.nn.functional.pad(U, (0, missing))
        K += U @ U.mT
    return K


def square_distances(K: Tensor) -> Tensor:
    """Squared distances [r, D, D] of vectors with inner products ``K``."""
    squares = K.diagonal(dim1=1, dim2=2)
    return (squares[:, None] + squares[..., None] - 2 * K).clamp(min=0)


# ---------------------------------------------------------------------- rows, and which a node has


def combine(V: Tensor, weights: Tensor) -> Tensor:
    """Sum [r, C] of a node's rows times ``weights`` [r, D]."""
    weights = weights.to(V.dtype)[..., None]
    total = weights[:, 0] * V[:, 0]
    for place in range(1, V.shape[1]):
        total.addcmul_(weights[:, place], V[:, place])
    return total


def add_to_own(V: Tensor, weights: Tensor) -> Tensor:
    """x_i + sum_j ``weights``_ij (x_j - x_i)."""
    return combine(V, weights + mark_own(weights) * (1 - weights.sum(1, keepdim=True)))


def average_with_own(V: Tensor, chosen: Tensor, alpha: float) -> Tensor:
    """``alpha`` times a node's own row and 1 - ``alpha`` times the mean of the ``chosen`` [r, D] others; the own
    row if none is chosen."""
    return add_to_own(V, (1 - alpha) * chosen.to(V.dtype) / chosen.sum(1, keepdim=True).clamp(min=1))


def take(V: Tensor, place: Tensor) -> Tensor:
    """The row of every node at its ``place`` [r], as [r, C]."""
    import torch

    return V[torch.arange(len(V), device=V.device), place]


def mark(place: Tensor, w: Tensor) -> Tensor:
    """bool [r, D]: true at the ``place`` [r] of every node."""
    import torch

    return torch.arange(w.shape[1], device=w.device) == place[:, None]


def mark_own(w: Tensor) -> Tensor:
    """bool [r, D]: a node's own row, which counts even if its weight is 0."""
    return mark(w.new_zeros(len(w)), w)


def mark_received(w: Tensor) -> Tensor:
    """bool [r, D]: the rows that a node received."""
    return (w > 0) & ~mark_own(w)


def count_rows(graph: Graph) -> list[int]:
    """The number of rows that each node has after a gossip step of a period, its own included."""
    return [len(senders) for step in range(graph.period or 1) for senders, _weights in graph.mixing(step).terms]


def require_rows(right: bool, key: str, value: int | None, rows: int, allowed: str) -> None:
    """Raises a UserError that names the node with the fewest rows, unless ``right``."""
    if not right:
        raise UserError(
            f"gossip.aggregator.{key}: {value} given; some node has {rows} rows with its own; allowed: {allowed}"
        )
