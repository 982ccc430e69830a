"""Robust aggregators, against their papers' formulas in plain loops over one node's rows at a time."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_idkd.callbacks import (
    BALANCE,
    RFA,
    UBAR,
    CoordinateMedian,
    CoordinateTrimmedMean,
    Krum,
    MultiKrum,
    SCClip,
)
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Complete, Graph, Ring

NO_BATCH = SimpleNamespace(targets=None)
RECEIVED = (6, 0, 1, 2, 5, 3, 6)  # messages at each node; 0: a node alone


def draw(seed=0, width=23, dtype=torch.float64):
    """Rows and weights of nodes that received different numbers of messages, some far from the others."""
    rng = np.random.default_rng(seed)
    slots = max(RECEIVED) + 1
    V, w = rng.standard_normal((len(RECEIVED), slots, width)), np.zeros((len(RECEIVED), slots))
    V += 3 * rng.standard_normal((len(RECEIVED), 1, width))
    for i, count in enumerate(RECEIVED):
        V[i, 1 : count + 1] *= rng.choice([1, 1, 1, 5], (count, 1))
        V[i, count + 1 :] = V[i, 0]
        weights = rng.uniform(0.2, 1, count + 1)
        w[i, : count + 1] = weights / weights.sum()
    w[0, 3] = 0  # a lost message in the middle
    V[0, 3] = V[0, 0]
    w[0] /= w[0].sum()
    return torch.tensor(V, dtype=dtype), torch.tensor(w, dtype=dtype)


def split(V, w, i):
    """Own row, what node ``i`` received, own weight and the weights of the others."""
    V, w = V.double().numpy(), w.double().numpy()
    got = [j for j in range(1, V.shape[1]) if w[i, j] > 0]
    return V[i, 0], [V[i, j] for j in got], w[i, 0], [w[i, j] for j in got]


def by_node(aggregate, V, w, **options):
    return np.array([aggregate(*split(V, w, i), **options) for i in range(len(V))])


# ---------------------------------------------------------------------- the papers


def length(v):
    return math.sqrt(sum(x * x for x in v))


def clip_self_centred(x, others, own_weight, weights, tau, share):
    if tau is None:
        total, dropped = 0.0, 0.0
        for d, weight in sorted(((length(v - x), w) for v, w in zip(others, weights, strict=True)), reverse=True):
            if dropped + weight <= share:
                dropped += weight
            else:
                dropped = math.inf
                total += weight * d**2
        tau = math.sqrt(total / share)
    result = x.copy()
    for v, weight in zip(others, weights, strict=True):
        result += weight * (v - x) * min(1, tau / length(v - x))
    return result


def ubar(x, others, own_weight, weights, rho, alpha, loss):
    nearest = sorted(others, key=lambda v: length(v - x))[: max(1, int(rho * len(others)))]
    if not nearest:
        return x
    if loss:
        nearest = [v for v in nearest if loss(v) <= loss(x)] or [min(nearest, key=loss)]
    return alpha * x + (1 - alpha) * sum(nearest) / len(nearest)


def balance(x, others, own_weight, weights, gamma, kappa, alpha, over):
    near = [v for v in others if length(v - x) <= gamma * math.exp(-kappa * over) * length(x)]
    return alpha * x + (1 - alpha) * sum(near) / len(near) if near else x


def multi_krum(x, others, own_weight, weights, liars, keep):
    rows = [x, *others]
    nearest, scores = max(1, len(rows) - liars - 2), []
    for a in range(len(rows)):
        squares = sorted(length(rows[a] - rows[b]) ** 2 for b in range(len(rows)) if b != a)
        scores.append(sum(squares[:nearest]))
    keep = max(1, len(rows) - liars) if keep is None else min(keep, len(rows))
    chosen = sorted(range(len(rows)), key=lambda a: scores[a])[:keep]
    return sum(rows[a] for a in chosen) / keep


def geometric_median(x, others, own_weight, weights, steps, nu):
    rows, weights = [x, *others], [own_weight, *weights]
    z = sum(w * v for w, v in zip(weights, rows, strict=True))
    for _ in range(steps):
        b = [w / max(nu, length(v - z)) for w, v in zip(weights, rows, strict=True)]
        z = sum(c * v for c, v in zip(b, rows, strict=True)) / sum(b)
    return z


def trimmed_mean(x, others, own_weight, weights, trim):
    columns = []
    for values in zip(x, *others, strict=True):
        drop = min(trim, (len(values) - 1) // 2)
        kept = sorted(values)[drop : len(values) - drop]
        columns.append(sum(kept) / len(kept))
    return np.array(columns)


def median(x, others, own_weight, weights):
    return np.median([x, *others], axis=0)


def loss_of(v):
    return np.cos(v).sum()


WITH_LOSS = SimpleNamespace(targets=1, loss=lambda X: X.cos().sum(1))
HALF_WAY = SimpleNamespace(epoch=5, epochs=10)
PAPERS = [
    (SCClip, clip_self_centred, {"tau": 2.0, "share": 0.5}, {}),
    (SCClip, clip_self_centred, {"tau": None, "share": 0.3}, {}),
    (SCClip, clip_self_centred, {"tau": None, "share": 0.6}, {}),
    (UBAR, ubar, {"rho": 0.6, "alpha": 0.3}, {"loss": loss_of}),
    (UBAR, ubar, {"rho": 1.0, "alpha": 0.5}, {"loss": loss_of}),
    (UBAR, ubar, {"rho": 0.5, "alpha": 0.5}, {"loss": None}),
    (BALANCE, balance, {"gamma": 1.2, "kappa": 1.0, "alpha": 0.4}, {"over": 0.5}),
    (MultiKrum, multi_krum, {"liars": 1, "keep": 3}, {}),
    (MultiKrum, multi_krum, {"liars": 2, "keep": None}, {}),
    (Krum, multi_krum, {"liars": 1}, {"keep": 1}),
    (RFA, geometric_median, {"steps": 5, "nu": 0.1}, {}),
    (RFA, geometric_median, {"steps": 1, "nu": 4.0}, {}),
    (CoordinateTrimmedMean, trimmed_mean, {"trim": 2}, {}),
    (CoordinateTrimmedMean, trimmed_mean, {"trim": 1}, {}),
    (CoordinateMedian, median, {}, {}),
]
ALL = [SCClip(), UBAR(), BALANCE(3), MultiKrum(), Krum(), RFA(), CoordinateTrimmedMean(), CoordinateMedian()]


def name(value):
    return type(value).__name__


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("aggregator", "paper", "options", "more"), PAPERS)
def test_an_aggregator_is_its_papers_formula(aggregator, paper, options, more, seed):
    V, w = draw(seed)
    made = aggregator(**options)
    if "over" in more:
        made.on_check(HALF_WAY)
    got = made(V, w, WITH_LOSS if more.get("loss") else NO_BATCH)
    np.testing.assert_allclose(got.numpy(), by_node(paper, V, w, **options, **more), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("losses", "best"), [
    ([3.0, 2, 1, 4], [1, 2]),
    ([2.0, 2, 1, 4], [1, 2]),
    ([1.0, 3, 2, 4], [2]),
    ([1.0, math.nan, 5, 4], [3]),
])  # fmt: skip
def test_ubar_averages_those_with_no_larger_loss_or_takes_the_best(losses, best):
    rows = torch.eye(4, dtype=torch.float64)
    of_row = lambda X: torch.tensor(losses, dtype=X.dtype)[X.argmax(1)]  # noqa: E731
    got = UBAR(1.0, 0.5)(rows[None], torch.full((1, 4), 0.25).double(), SimpleNamespace(targets=1, loss=of_row))
    expected = 0.5 * np.eye(4)[0] + 0.5 * np.eye(4)[best].mean(0)
    np.testing.assert_allclose(got[0].numpy(), expected)


@pytest.mark.parametrize(("epoch", "accepted"), [(0, [1, 2]), (5, [1]), (10, [])])
def test_balance_accepts_less_and_less(epoch, accepted):
    """Relative distances of 0.3 and 0.5 against 0.6 exp(-t / T), which falls from 0.6 over 0.36 to 0.22."""
    V = torch.tensor([[[2.0, 0], [2, 0.6], [3, 0]]], dtype=torch.float64)
    aggregator = BALANCE(0.6, 1.0, 0.5)
    aggregator.on_check(SimpleNamespace(epoch=epoch, epochs=10))
    got = aggregator(V, torch.full((1, 3), 1 / 3), NO_BATCH)
    expected = 0.5 * V[0, 0] + 0.5 * (V[0, accepted].mean(0) if accepted else V[0, 0])
    torch.testing.assert_close(got[0], expected)


# ---------------------------------------------------------------------- limits


def test_clipping_at_an_infinite_radius_is_plain_mixing():
    V, w = draw()
    expected = [sum(w[i, j].item() * V[i, j].numpy() for j in range(V.shape[1])) for i in range(len(V))]
    np.testing.assert_allclose(SCClip(math.inf)(V, w, NO_BATCH).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aggregator", [CoordinateTrimmedMean(0), MultiKrum(1, keep=99), MultiKrum(0)], ids=name)
def test_keeping_all_rows_is_their_mean(aggregator):
    V, w = draw()
    expected = by_node(lambda x, others, *_: np.mean([x, *others], axis=0), V, w)
    np.testing.assert_allclose(aggregator(V, w, NO_BATCH).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("aggregator", ALL, ids=name)
def test_a_node_that_received_nothing_keeps_its_row(aggregator):
    V = draw(dtype=torch.float32)[0][:, :1].expand(-1, 4, -1)
    w = torch.tensor([1.0, 0, 0, 0]).expand(len(V), 4)
    assert torch.equal(aggregator(V, w, NO_BATCH), V[:, 0])
    assert torch.equal(aggregator(V[:, :1], w[:, :1], NO_BATCH), V[:, 0])


@pytest.mark.parametrize("aggregator", ALL, ids=name)
def test_equal_rows_stay(aggregator):
    V = torch.full((2, 4, 9), 0.7)
    torch.testing.assert_close(aggregator(V, torch.full((2, 4), 0.25), NO_BATCH), V[:, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_a_median_of_any_number_of_rows_is_numpys(size):
    V = torch.randn(2, size, 50, generator=torch.Generator().manual_seed(size)).round(decimals=1)  # with ties
    got = CoordinateMedian()(V, torch.full((2, size), 1 / size), NO_BATCH)
    np.testing.assert_allclose(got.numpy(), np.median(V.numpy(), axis=1), rtol=1e-6)


# ---------------------------------------------------------------------- the same bits


def many(width=20_011):
    """float32 rows of 6 nodes, wider than a block of columns."""
    V = torch.randn(6, 5, width, generator=torch.Generator().manual_seed(1))
    w = torch.full((6, 5), 0.2)
    V[0, 3:], w[0] = V[0, 0], torch.tensor([0.4, 0.3, 0.3, 0, 0])
    V[1, 1:] = V[1, :1] + 1e-4 * V[1, 1:]
    return V, w


@pytest.mark.parametrize("aggregator", ALL, ids=name)
def test_a_node_gets_the_same_bits_whichever_nodes_its_process_holds(aggregator):
    V, w = many()
    whole = aggregator(V, w, NO_BATCH)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 5)):
        assert torch.equal(aggregator(V[rows], w[rows], NO_BATCH), whole[rows])


@pytest.mark.parametrize("aggregator", [a for a in ALL if a.columnwise], ids=name)
def test_blocks_of_columns_give_the_same_bits(aggregator):
    V, w = many()
    parts = [aggregator(block, w, NO_BATCH) for block in V.split(777, 2)]
    assert torch.equal(torch.cat(parts, 1), aggregator(V, w, NO_BATCH))


# ---------------------------------------------------------------------- rounding


def nearly_equal(width=5000):
    """Rows whose distances to each other are far below float32's rounding of their distances to the own row."""
    rng = np.random.default_rng(3)
    V = rng.standard_normal((1, 6, width)).astype(np.float32)
    V[0, 1:] = V[0, 1] * 50 + rng.integers(-3, 4, (5, width)).astype(np.float32) * np.float32(1e-4)
    V[0, 1:3] = V[0, 1]  # two equal ones
    return torch.tensor(V), torch.full((1, 6), 1 / 6)


@pytest.mark.parametrize("far", [0.0, 1e3])
def test_krum_finds_the_nearest_of_nearly_equal_rows(far):
    V, w = nearly_equal()
    V = V + far
    expected = by_node(multi_krum, V, w, liars=1, keep=1)
    np.testing.assert_array_equal(Krum(1)(V, w, NO_BATCH).numpy(), expected.astype(np.float32))


def test_the_geometric_median_of_nearly_equal_rows_is_exact():
    V, w = nearly_equal()
    expected = by_node(geometric_median, V, w, steps=8, nu=1e-6)
    got = RFA(8, 1e-6)(V, w, NO_BATCH).numpy()
    assert np.abs(got - expected).max() <= 2 * np.spacing(np.abs(expected).astype(np.float32)).max()


# ---------------------------------------------------------------------- how many liars, and mistakes


@pytest.mark.parametrize(("aggregator", "bound"), [
    (SCClip(share=0.35), [0, 0, 1, 1, 1, 2]),  # floor(0.35 (m + 1))
    (SCClip(1.0), [None] * 6),
    (UBAR(0.5), [0, 0, 1, 2, 2, 3]),
    (BALANCE(), [None] * 6),
    (Krum(1), [0, 0, 0, 0, 1, 1]),  # 2 f + 2 < m + 1
    (MultiKrum(9), [0, 0, 0, 0, 1, 1]),
    (RFA(), [0, 0, 1, 1, 2, 2]),
    (CoordinateTrimmedMean(1), [0, 0, 1, 1, 1, 1]),
    (CoordinateMedian(), [0, 0, 1, 1, 2, 2]),
], ids=lambda value: name(value) if not isinstance(value, list) else "")  # fmt: skip
def test_an_aggregator_says_how_many_liars_it_bears(aggregator, bound):
    assert [aggregator.bears(received) for received in range(6)] == bound


@pytest.mark.parametrize(("make", "message"), [
    (lambda: SCClip(0), "tau: 0 given; allowed: above 0, or null for an adaptive radius"),
    (lambda: SCClip(share=1), "share: 1 given; allowed: above 0, below 1"),
    (lambda: UBAR(0), "rho: 0 given; allowed: above 0, at most 1"),
    (lambda: UBAR(alpha=2), "alpha: 2 given; allowed: 0 to 1"),
    (lambda: BALANCE(0), "gamma: 0 given; allowed: above 0"),
    (lambda: BALANCE(kappa=-1), "kappa: -1 given; allowed: 0 or more"),
    (lambda: BALANCE(alpha=-1), "alpha: -1 given; allowed: 0 to 1"),
    (lambda: Krum(-1), "liars: -1 given; allowed: 0 or more"),
    (lambda: MultiKrum(1, 0), "keep: 0 given; allowed: 1 or more, or null"),
    (lambda: RFA(0), "steps: 0 given; allowed: 1 or more"),
    (lambda: RFA(nu=0), "nu: 0 given; allowed: above 0"),
    (lambda: CoordinateTrimmedMean(-1), "trim: -1 given; allowed: 0 or more"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=f"gossip.aggregator.{message}"):
        make()


@pytest.mark.parametrize(("aggregator", "graph", "message"), [
    (CoordinateTrimmedMean(2), Graph(Ring(), 8), "trim: 2 given; allowed: 0 to 1, as no node has more than 3 rows"),
    (CoordinateTrimmedMean(2), Graph(Chain(), 8), "trim: 2 given; allowed: 0 to 1, as no node has more than 3 rows"),
    (Krum(1), Graph(Complete(), 4), "liars: 1 given; some node has 4 rows with its own; allowed: 0 to 0"),
    (Krum(0), Graph(Chain(), 4), "liars: 0 given; some node has 2 rows .* allowed: none, as Krum needs 3 rows or more"),
    (MultiKrum(0, 4), Graph(Ring(), 8), "keep: 4 given; some node has 3 rows with its own; allowed: 1 to 3"),
    (SCClip(share=0.7), Graph(Ring(), 8), "share: 0.7 given; some node gives its neighbours a weight of 0.6667 in all"),
])  # fmt: skip
def test_graphs_with_too_few_neighbours_are_refused(aggregator, graph, message):
    with pytest.raises(UserError, match=f"gossip.aggregator.{message}"):
        aggregator.check(graph)


@pytest.mark.parametrize("aggregator", [CoordinateTrimmedMean(1), Krum(0), MultiKrum(0, 3), SCClip(share=0.66)])
def test_graphs_with_just_enough_neighbours_are_taken(aggregator):
    aggregator.check(Graph(Ring(), 8))


def test_a_node_with_few_neighbours_trims_as_much_as_it_can():
    CoordinateTrimmedMean(1).check(Graph(Chain(), 8))
    V, w = torch.tensor([[[1.0], [5.0]]]), torch.tensor([[0.5, 0.5]])  # the end of a chain: its own row and another
    assert CoordinateTrimmedMean(1)(V, w, None).item() == 3.0
