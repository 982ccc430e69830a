"""CHOCO-SGD and AdaGossip, and what compression keeps and costs."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quadratics import GRAPHS, LOCAL, N, P, Quadratics, driver, same_as_the_paper, sgd, trajectory

from lightning_idkd import randomness
from lightning_idkd.callbacks import DSGD, QSGD, AdaGossip, ChocoSGD, RandomK, Sign, TopK
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Ring, Topology
from lightning_idkd.network import Network

# ---------------------------------------------------------------------- compressions of one node's vector, in numpy


def draws(purpose, node, step, d):
    return [float(randomness.uniform(0, purpose, node, step, k)) for k in range(d)]


def top_k(k, x, node, step):
    kept = sorted(range(len(x)), key=lambda j: -abs(x[j]))[:k]
    return np.array([x[j] if j in kept else 0.0 for j in range(len(x))])


def random_k(k, x, node, step):
    rank = draws("random k", node, step, len(x))
    kept = sorted(range(len(x)), key=lambda j: -rank[j])[:k]
    return np.array([x[j] if j in kept else 0.0 for j in range(len(x))])


def scaled_sign(x, node, step):
    return np.array([math.copysign(np.abs(x).sum() / len(x), v) for v in x])


def quantised(s, x, node, step):
    """Stochastic rounding to one of the two multiples of |x| / s around a value."""
    norm, chance, out = math.sqrt(x @ x), draws("qsgd", node, step, len(x)), []
    for v, u in zip(x, chance, strict=True):
        low = int(s * abs(v) / norm)
        level = low + (u >= 1 - (s * abs(v) / norm - low))
        out.append(math.copysign(norm * level / s, v))
    return np.array(out) / (1 + min(len(x) / s**2, math.sqrt(len(x)) / s))


KINDS = {
    "none": (None, lambda x, node, step: x),
    "top": (TopK(0.4), partial(top_k, 2)),
    "random": (RandomK(0.5), partial(random_k, 3)),  # of 5 values, rounded up
    "sign": (Sign(), scaled_sign),
    "qsgd": (QSGD(4), partial(quantised, 4)),
}


def choco(f, lrs, near, compression=None, gamma=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, beta=None):
    """Koloskova et al. 2019, Algorithm 2, with every neighbour's replica at every node; ``beta``: Aketi et al. 2024."""
    compress = next(plain for kind, plain in KINDS.values() if kind is compression)
    n = len(near)
    x, m, u = list(f.x0), [0.0] * n, [0.0] * n
    replica = [{j: np.zeros_like(f.x0[0]) for j in (*near[i], i)} for i in range(n)]
    yield np.array(x)
    for t, lr in enumerate(lrs):
        half = [sgd(i, x[i], f.A[i] @ (x[i] - f.c[i]), m, lr, momentum, nesterov, weight_decay) for i in range(n)]
        q = [compress(half[i] - replica[i][i], i, t) for i in range(n)]
        replica = [{j: held[j] + q[j] for j in held} for held in replica]
        x = []
        for i in range(n):
            weight = {j: 1 / (1 + max(len(near[i]), len(near[j]))) for j in near[i]}
            e = sum(weight[j] * (replica[i][j] - replica[i][i]) for j in near[i])
            step = gamma
            if beta is not None:
                u[i] = beta * u[i] + (1 - beta) * e * e
                step = np.minimum(gamma / (np.sqrt(u[i] / (1 - beta ** (t + 1))) + 1e-8), 1)
            x.append(half[i] + step * e)
        yield np.array(x)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("options", LOCAL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("graph", ["ring", "joined"])
def test_choco_is_its_papers_algorithm_also_where_the_learning_rate_drops(graph, kind, options, weight_decay):
    options = options | {"compression": KINDS[kind][0], "gamma": 0.5, "weight_decay": weight_decay}
    same_as_the_paper(ChocoSGD, choco, options, GRAPHS[graph])


@pytest.mark.parametrize("options", [*LOCAL, {"weight_decay": 0.05}])
@pytest.mark.parametrize("kind", ["none", "top"])
@pytest.mark.parametrize("graph", ["ring", "joined"])
def test_adagossip_is_its_papers_algorithm(graph, kind, options):
    options = options | {"compression": KINDS[kind][0], "gamma": 0.1, "beta": 0.9}
    same_as_the_paper(AdaGossip, choco, options, GRAPHS[graph])


@pytest.mark.parametrize("options", LOCAL)
@pytest.mark.parametrize("graph", ["ring", "joined"])
def test_choco_without_compression_is_dsgd(graph, options):
    got = trajectory(ChocoSGD(**options), GRAPHS[graph], Quadratics())
    np.testing.assert_allclose(got, trajectory(DSGD(**options), GRAPHS[graph], Quadratics()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_compression_leaves_out_is_made_up_for(kind):
    """Nodes at rest agree on their mean, which no message alone could tell them."""
    stack = Quadratics()
    seen = trajectory(ChocoSGD(KINDS[kind][0], 0.2), GRAPHS["ring"], stack, [0.1] * 1200, gradient=torch.zeros_like)
    np.testing.assert_allclose(seen[-1], np.broadcast_to(stack.x0.mean(0), (N, P)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [ChocoSGD(TopK(0.4), momentum=0.9), AdaGossip(TopK(0.4), momentum=0.9)])
def test_one_node_is_centralised_sgd(rule):
    alone = Graph(Ring(), 1)
    np.testing.assert_allclose(
        trajectory(rule, alone, Quadratics(1)), trajectory(DSGD(0.9), alone, Quadratics(1)), atol=1e-12
    )


# ---------------------------------------------------------------------- compressions


def rows(d=1000, n=3, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


def context(step=0, nodes=(0, 1, 2), seed=0):
    def uniform(purpose, columns):
        return randomness.uniform(seed, purpose, torch.tensor(nodes)[:, None], step, torch.arange(columns))

    return SimpleNamespace(uniform=uniform)


SIZES = [(TopK(0.01), 10 * (4 + 4), 10 * (8 + 4)), (TopK(0.0101), 11 * 8, 11 * 12), (TopK(1e-9), 8, 12),
         (TopK(1), 8000, 12000), (RandomK(0.01), 40, 80), (Sign(), 125 + 4, 125 + 8), (QSGD(1), 250 + 4, 250 + 8),
         (QSGD(15), 625 + 4, 625 + 8), (QSGD(127), 1000 + 4, 1000 + 8)]  # fmt: skip


@pytest.mark.parametrize(("compression", "single", "double"), SIZES)
def test_messages_have_the_size_of_what_they_hold(compression, single, double):
    assert compression.size(rows()) == single
    assert compression.size(rows(dtype=torch.float64)) == double


@pytest.mark.parametrize(
    ("compression", "size"), [(TopK(0.4), 2 * 12), (RandomK(0.5), 3 * 8), (Sign(), 1 + 8), (QSGD(4), 3 + 8)]
)
@pytest.mark.parametrize("graph", ["ring", "joined"])
def test_compressed_bytes_are_counted_exactly(graph, compression, size):
    run, edges = driver(ChocoSGD(compression), GRAPHS[graph], Quadratics()), len(GRAPHS[graph].mixing(0).edges)
    for _ in range(3):
        run.update(0.1, (None, None))
    sent = {"parameter_bytes": 3 * edges * size, "label_bytes": 0, "other_bytes": 0, "messages": 3 * edges}
    assert run.network.counts() == sent


def test_the_error_is_less_than_the_vector():
    """By the share left out (random k: in expectation), |x|_1^2 / (d |x|^2) for the sign, qsgd's own factor."""
    T = rows()
    lost = {c: ((T - c(T, context())) ** 2).sum(1) / (T**2).sum(1) for c in (TopK(0.1), RandomK(0.1), Sign(), QSGD(15))}
    top, drawn, sign, qsgd = lost.values()
    assert (top < 0.9).all()
    many = torch.stack([((T - RandomK(0.1)(T, context(t))) ** 2).sum(1) / (T**2).sum(1) for t in range(200)])
    torch.testing.assert_close(many.mean(0), torch.full((3,), 0.9), rtol=0.01, atol=0)
    torch.testing.assert_close(sign, 1 - T.abs().sum(1) ** 2 / 1000 / (T**2).sum(1))
    assert (qsgd <= 1 - 1 / (1 + math.sqrt(1000) / 15)).all()
    assert 0.85 < drawn.mean() < 0.95


def test_quantised_values_are_right_on_average():
    T, factor = rows(50), 1 + min(50 / 9, math.sqrt(50) / 3)
    mean = torch.stack([QSGD(3)(T, context(t)) for t in range(4000)]).mean(0) * factor
    torch.testing.assert_close(mean, T, rtol=0, atol=0.15)


@pytest.mark.parametrize("compression", [TopK(0.1), RandomK(0.1), Sign(), QSGD(4)])
def test_a_vector_of_zeros_stays_one(compression):
    assert not compression(torch.zeros(3, 20), context()).any()


def test_every_node_and_step_draws_anew_whichever_process_holds_it():
    whole = driver(ChocoSGD(), GRAPHS["ring"], Quadratics())
    parts = []
    for rank in range(3):
        part = driver(ChocoSGD(), GRAPHS["ring"], Quadratics())
        part.network = Network(GRAPHS["ring"], rank, 3)
        parts.append(part.context(7, 0.1).uniform("random k", 40))
    drawn = whole.context(7, 0.1).uniform("random k", 40)
    assert torch.equal(torch.cat(parts), drawn)
    later = whole.context(8, 0.1).uniform("random k", 40)
    assert len({*drawn.flatten().tolist(), *later.flatten().tolist()}) == 2 * 40 * N


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("make", "message"), [
    (lambda: TopK(0), r"gossip.compression.ratio: 0 given; allowed: above 0 to 1"),
    (lambda: RandomK(1.5), r"gossip.compression.ratio: 1.5 given; allowed: above 0 to 1"),
    (lambda: TopK(float("nan")), r"gossip.compression.ratio: nan"),
    (lambda: QSGD(0), r"gossip.compression.levels: 0 given; allowed: 1 or more"),
    (lambda: ChocoSGD(gamma=0), r"gossip.gamma: 0 given; allowed: above 0 to 1"),
    (lambda: AdaGossip(beta=1), r"gossip.beta: 1 given; allowed: 0 to below 1"),
])  # fmt: skip
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


class Changing(Topology):
    period = 2

    def graph(self, nodes, step, seed):
        return Ring().graph(nodes, step, seed)


def test_graphs_that_change_are_refused():
    with pytest.raises(UserError, match=r"ChocoSGD takes static graphs, .* Changing changes"):
        ChocoSGD(Sign()).check(Graph(Changing(), N))
