"""Gossip rules on quadratics f_i(x) = (x - c_i)' A_i (x - c_i) / 2, against the papers' algorithms, node by node."""

from functools import partial

import networkx as nx
import numpy as np
import pytest
import torch
from quadratics import (
    GRAPHS,
    LOCAL,
    LR,
    N,
    P,
    Quadratics,
    average,
    driver,
    reference,
    same_as_the_paper,
    same_in_blocks,
    sgd,
    trajectory,
)

from lightning_idkd.callbacks import (
    CCL,
    D2,
    DSGD,
    EDM,
    GUT,
    NGC,
    SGP,
    AdaGossip,
    AllReduce,
    ChocoSGD,
    CombineThenAdapt,
    DecentLaM,
    GradientTracking,
    Isolated,
    MomentumTracking,
    QGDSGDm,
    RelaySGD,
    SharpnessAwareDSGD,
)
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Complete, Graph, Ring, Topology
from lightning_idkd.network import Network
from lightning_idkd.topologies import EpidemicLocal


class Flipping(Topology):
    """Two trees that take turns."""

    period = 2

    def graph(self, nodes, step, seed):
        return nx.path_graph(nodes) if step else nx.star_graph(nodes - 1)


def combine_first(f, lrs, near, momentum=0.0, nesterov=False, weight_decay=0.0):
    """Lian et al. 2017, Algorithm 1: gradients before, steps after the average."""
    x, m = list(f.x0), [0.0] * len(near)
    yield np.array(x)
    for lr in lrs:
        step = [
            x[i] - sgd(i, x[i], f.A[i] @ (x[i] - f.c[i]), m, lr, momentum, nesterov, weight_decay)
            for i in range(len(near))
        ]
        x = [average(x, near, i) - step[i] for i in range(len(near))]
        yield np.array(x)


def quasi_global(f, lrs, near, momentum=0.9, nesterov=True, weight_decay=0.0):
    """Lin et al. 2021, Algorithm 1, beta = mu; N: a Nesterov step with the same buffer."""
    n = len(near)
    x, m_hat = list(f.x0), [np.zeros(P)] * n
    yield np.array(x)
    for lr in lrs:
        half, old = [], list(x)
        for i in range(n):
            g = f.A[i] @ (x[i] - f.c[i]) + weight_decay * x[i]
            m = momentum * m_hat[i] + g
            half.append(x[i] - lr * (g + momentum * m) if nesterov else x[i] - lr * m)
        x = [average(half, near, i) for i in range(n)]
        m_hat = [momentum * m_hat[i] + (1 - momentum) * (old[i] - x[i]) / lr for i in range(n)]
        yield np.array(x)


def relay(f, lrs, near, momentum=0.0, nesterov=False, weight_decay=0.0):
    """Vogels et al. 2021, Algorithm 1: messages and counters from i to j, the sum without what j itself has sent."""
    n = len(near)
    x, velocity = list(f.x0), [0.0] * n
    m, c = {(i, j): 0.0 for i in range(n) for j in near[i]}, {(i, j): 0 for i in range(n) for j in near[i]}
    yield np.array(x)
    for lr in lrs:
        half = [
            sgd(i, x[i], f.A[i] @ (x[i] - f.c[i]), velocity, lr, momentum, nesterov, weight_decay) for i in range(n)
        ]
        m, c = ({(i, j): half[i] + sum(m[k, i] for k in near[i] if k != j) for i, j in m},
                {(i, j): 1 + sum(c[k, i] for k in near[i] if k != j) for i, j in c})  # fmt: skip
        x = [(half[i] + sum(m[j, i] for j in near[i])) / (1 + sum(c[j, i] for j in near[i])) for i in range(n)]
        yield np.array(x)


CASES = [
    *[(DSGD, partial(reference, average), options) for options in LOCAL],
    *[(CombineThenAdapt, combine_first, options) for options in LOCAL],
    *[(AllReduce, partial(reference, lambda x, near, i: sum(x) / len(x)), options) for options in LOCAL],
    *[(Isolated, partial(reference, lambda x, near, i: x[i]), options) for options in LOCAL],
    *[(SharpnessAwareDSGD, partial(reference, average), options | {"rho": 0.3}) for options in LOCAL],
    *[(QGDSGDm, quasi_global, {"momentum": 0.8, "nesterov": nesterov}) for nesterov in (False, True)],
]
ALL = [(*case, graph) for case in CASES for graph in ("ring", "joined")]
ALL += [(RelaySGD, relay, options, graph) for options in LOCAL for graph in ("chain", "tree")]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize(("rule", "paper", "options", "graph"), ALL)
def test_a_rule_is_its_papers_algorithm_also_where_the_learning_rate_drops(rule, paper, options, graph, weight_decay):
    same_as_the_paper(rule, paper, options | {"weight_decay": weight_decay}, GRAPHS[graph])


# ---------------------------------------------------------------------- blocks of columns


EVERY = [DSGD(0.9, True, 1e-3), CombineThenAdapt(0.9), AllReduce(0.9), Isolated(0.9), QGDSGDm(), RelaySGD(0.9),
         SharpnessAwareDSGD(momentum=0.9)]  # fmt: skip


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: type(rule).__name__)
def test_blocks_of_columns_give_the_same_bits_as_the_whole(rule, monkeypatch):
    same_in_blocks(rule, monkeypatch)


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_mixing_keeps_the_mean(graph):
    T = torch.tensor(Quadratics().x0)
    mixed = Network(graph).mix(T)
    assert (mixed - T).abs().max() > 0.1
    torch.testing.assert_close(mixed.mean(0), T.mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", LOCAL)
@pytest.mark.parametrize("weights", ["metropolis", "uniform"])
def test_dsgd_on_the_complete_graph_is_all_reduce(options, weights):
    graph = Graph(Complete(), N, weights)
    mean = trajectory(AllReduce(**options), GRAPHS["ring"], Quadratics())
    np.testing.assert_allclose(trajectory(DSGD(**options), graph, Quadratics()), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("options", LOCAL)
def test_dsgd_of_one_node_is_torchs_sgd(options, weight_decay):
    options = options | {"weight_decay": weight_decay}
    stack = Quadratics(1)
    x = torch.nn.Parameter(torch.tensor(stack.x0))
    optimizer, expected = torch.optim.SGD([x], lr=1.0, **options), [stack.x0]
    for lr in LR:
        optimizer.param_groups[0]["lr"] = lr
        x.grad = stack.gradient(x.detach())
        optimizer.step()
        expected.append(x.detach().numpy().copy())
    np.testing.assert_allclose(trajectory(DSGD(**options), Graph(Ring(), 1), stack), expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- relayed sums


def distances(graph):
    far = dict(nx.all_pairs_shortest_path_length(graph.topology.graph(graph.nodes, 0, graph.seed)))
    return np.array([[far[i][j] for j in range(graph.nodes)] for i in range(graph.nodes)])


@pytest.mark.parametrize("graph", ["chain", "tree"])
def test_relayed_sums_of_resting_models_are_the_exact_mean_after_diameter_steps(graph):
    """Where each local step leads back to x0_i, node i holds the mean over those at most t edges away after t steps."""
    graph, stack = GRAPHS[graph], Quadratics()
    start, d = torch.tensor(stack.x0), distances(graph)
    seen = trajectory(RelaySGD(), graph, stack, [0.5] * (d.max() + 2), gradient=lambda X: (X - start) / 0.5)
    for t, X in enumerate(seen[1:], 1):
        np.testing.assert_allclose(X, [stack.x0[d[i] <= t].mean(0) for i in range(N)], rtol=0, atol=1e-12)
    np.testing.assert_allclose(seen[d.max()], np.broadcast_to(stack.x0.mean(0), (N, P)), rtol=0, atol=1e-12)
    assert np.abs(seen[d.max() - 1] - stack.x0.mean(0)).max() > 1e-3


@pytest.mark.parametrize("graph", ["chain", "tree"])
def test_relayed_models_are_averages_as_old_as_their_way_is_long(graph):
    """Without gradients x_i(t + 1) is the mean of x_j(t + 1 - max(d_ij, 1)) over those whose models have arrived.

    With tau = max(d - 1, 0), sum_ij sum_{s <= tau_ij} x_j(t - s) stays once all have arrived, which gives the limit.
    """
    graph = GRAPHS[graph]
    d = distances(graph)
    far = d.max()
    seen = trajectory(RelaySGD(), graph, Quadratics(), [0.1] * 400, gradient=torch.zeros_like)
    for t in range(1, 3 * far):
        expected = [np.mean([seen[t - max(d[i, j], 1), j] for j in range(N) if d[i, j] <= t], axis=0) for i in range(N)]
        np.testing.assert_allclose(seen[t], expected, rtol=0, atol=1e-12)
    tau = np.maximum(d - 1, 0)
    kept = sum(seen[far - s, j] for i in range(N) for j in range(N) for s in range(tau[i, j] + 1))
    np.testing.assert_allclose(seen[-1], np.broadcast_to(kept / (tau + 1).sum(), (N, P)), rtol=0, atol=1e-10)


def test_relayed_counts_are_the_nodes_behind_each_edge():
    graph = GRAPHS["tree"]
    stack = Quadratics()
    run = driver(RelaySGD(), graph, stack)
    for _ in range(graph.diameter):
        run.update(0.1, (None, None))
    tree = graph.topology.graph(N, 0, graph.seed)
    for (receiver, sender), count in zip(
        graph.mixing(0).edges.tolist(), run.edge_buffers["C"][:, 0].tolist(), strict=True
    ):
        cut = nx.restricted_view(tree, [], [(receiver, sender)])
        assert count == len(nx.node_connected_component(cut, sender))


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: type(rule).__name__)
def test_equal_rows_stay_where_nothing_moves_them(rule, monkeypatch):
    monkeypatch.setattr(rule, "weight_decay", 0.0)
    stack = Quadratics()
    stack.X.copy_(stack.X[:1].expand_as(stack.X))
    stack.gradient = lambda X, *_: torch.zeros_like(X)
    seen = trajectory(rule, GRAPHS["chain"], stack)
    np.testing.assert_allclose(seen, np.broadcast_to(seen[0], seen.shape), rtol=0, atol=1e-13)


@pytest.mark.parametrize("topology", [Ring(), Complete(), Flipping()])
def test_relaysgd_refuses_graphs_other_than_static_trees(topology):
    with pytest.raises(UserError, match=rf"Chain.*{type(topology).__name__}"):
        RelaySGD().check(Graph(topology, N))


def test_rules_take_weights_of_their_kinds_only():
    strict = (QGDSGDm(), D2(), EDM(), GradientTracking(), MomentumTracking(), DecentLaM(),
              GUT(), ChocoSGD(), AdaGossip(), NGC(), CCL())  # fmt: skip
    for weights, rules in {"push_sum": (DSGD(), *strict), "average": (*strict, SGP())}.items():
        for rule in rules:
            with pytest.raises(UserError, match=rf"{type(rule).__name__} .*Chain with graph.weights {weights}"):
                rule.check(Graph(Chain(), N, weights))
    DSGD().check(Graph(Chain(), N, "average"))
    with pytest.raises(UserError) as error:
        QGDSGDm().check(Graph(EpidemicLocal(), N))
    assert str(error.value) == (
        "gossip: QGDSGDm needs weights whose rows and columns sum to 1; those of graph.topology EpidemicLocal "
        "with graph.weights average do so in rows only"
    )


def test_the_command_line_refuses_relaysgd_on_a_ring(configs, capsys):
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), "--gossip", "RelaySGD"]) == 2
    said = capsys.readouterr().err
    assert "Chain" in said
    assert "Ring" in said
    assert len(said.splitlines()) <= 2
