"""Gossip rules on quadratics f_i(x) = (x - c_i)' A_i (x - c_i) / 2, against the papers' algorithms written node by node."""

from functools import partial
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch

from callbacks import DSGD, AllReduce, Isolated, QGDSGDm, RelaySGD, SharpnessAwareDSGD
from lightning_idkd import orchestrator
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Complete, Graph, Ring, Topology
from lightning_idkd.network import Network

N, P, STEPS = 8, 5, 20
LR = [0.1] * 10 + [0.01] * 10


class Joined(Topology):
    """A random connected graph: a random tree and ``extra`` further edges."""

    def __init__(self, extra=4):
        self.extra = extra

    def graph(self, nodes, step, seed):
        rng = np.random.default_rng([seed, 77])
        graph = nx.Graph((i, int(rng.integers(i))) for i in range(1, nodes))
        absent = sorted(nx.non_edges(graph))
        graph.add_edges_from(absent[i] for i in rng.choice(len(absent), self.extra, replace=False))
        return graph


class Flipping(Topology):
    """Two trees that take turns."""

    period = 2

    def graph(self, nodes, step, seed):
        return nx.path_graph(nodes) if step else nx.star_graph(nodes - 1)


# ---------------------------------------------------------------------- the rules, through the core's own update


class Quadratics:
    """Stands in for the NodeStack."""

    def __init__(self, n=N, dimension=P, seed=0):
        rng = np.random.default_rng([seed, n, dimension])
        B = rng.standard_normal((n, dimension, dimension))
        self.A = B @ B.transpose(0, 2, 1) / dimension + 0.3 * np.eye(dimension)
        self.c, self.x0 = rng.standard_normal((2, n, dimension))
        self.X, self.parameters = torch.tensor(self.x0), dimension
        self.G = torch.zeros_like(self.X)

    def gradient(self, X, x=None, y=None, step=0):
        return torch.einsum("ipq,iq->ip", torch.tensor(self.A), X - torch.tensor(self.c))


def driver(rule, graph, stack):
    """A run that has only what an update needs."""
    run = orchestrator.Orchestrator.__new__(orchestrator.Orchestrator)
    run.network, run.stack, run.rule, run.step = Network(graph), stack, rule, 0
    run.buffers = {k: torch.zeros_like(stack.X) for k in rule.buffers}
    edges = len(graph.mixing(0).edges)
    run.edge_buffers = {k: stack.X.new_zeros(edges, width or stack.parameters) for k, width in rule.edge_buffers.items()}
    return run


def trajectory(rule, graph, stack, lrs=LR, gradient=None):
    """The rows [steps + 1, n, P] before and after every step."""
    run, seen = driver(rule, graph, stack), [stack.X.clone()]
    for lr in lrs:
        stack.G.copy_((gradient or stack.gradient)(stack.X))
        run.update(lr, (None, None))
        run.step += 1
        seen.append(stack.X.clone())
    return torch.stack(seen).numpy()


# ---------------------------------------------------------------------- the papers, node by node


def neighbours(graph):
    edges = graph.topology.graph(graph.nodes, 0, graph.seed).edges
    return [sorted({b for a, b in edges if a == i} | {a for a, b in edges if b == i}) for i in range(graph.nodes)]


def average(x, near, i):
    """Metropolis-Hastings average at node i."""
    weight = {j: 1 / (1 + max(len(near[i]), len(near[j]))) for j in near[i]}
    return (1 - sum(weight.values())) * x[i] + sum(w * x[j] for j, w in weight.items())


def sgd(i, x, g, m, lr, momentum, nesterov, wd):
    """The heavy-ball or Nesterov step of one node, in place of its momentum ``m[i]``."""
    g = g + wd * x
    m[i] = momentum * m[i] + g
    return x - lr * (g + momentum * m[i] if nesterov else m[i])


def reference(combine, f, lrs, near, momentum=0.0, nesterov=False, weight_decay=0.0, rho=None):
    """SGD at every node followed by ``combine(x, near, i)``; with ``rho`` its gradient is Foret's, Algorithm 1."""
    n = len(near)
    x, m = list(f.x0), [0.0] * n
    yield np.array(x)
    for lr in lrs:
        half = []
        for i in range(n):
            g = f.A[i] @ (x[i] - f.c[i])
            if rho is not None:
                g = f.A[i] @ (x[i] + rho * g / np.sqrt(g @ g) - f.c[i])
            half.append(sgd(i, x[i], g, m, lr, momentum, nesterov, weight_decay))
        x = [combine(half, near, i) for i in range(n)]
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
        half = [sgd(i, x[i], f.A[i] @ (x[i] - f.c[i]), velocity, lr, momentum, nesterov, weight_decay) for i in range(n)]
        m, c = ({(i, j): half[i] + sum(m[k, i] for k in near[i] if k != j) for i, j in m},
                {(i, j): 1 + sum(c[k, i] for k in near[i] if k != j) for i, j in c})  # fmt: skip
        x = [(half[i] + sum(m[j, i] for j in near[i])) / (1 + sum(c[j, i] for j in near[i])) for i in range(n)]
        yield np.array(x)


LOCAL = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]
CASES = [
    *[(DSGD, partial(reference, average), options) for options in LOCAL],
    *[(AllReduce, partial(reference, lambda x, near, i: sum(x) / len(x)), options) for options in LOCAL],
    *[(Isolated, partial(reference, lambda x, near, i: x[i]), options) for options in LOCAL],
    *[(SharpnessAwareDSGD, partial(reference, average), options | {"rho": 0.3}) for options in LOCAL],
    *[(QGDSGDm, quasi_global, {"momentum": 0.8, "nesterov": nesterov}) for nesterov in (False, True)],
]
GRAPHS = {"ring": Graph(Ring(), N), "joined": Graph(Joined(), N, seed=3), "chain": Graph(Chain(), N),
          "tree": Graph(Joined(0), N, seed=5)}  # fmt: skip
ALL = [(*case, graph) for case in CASES for graph in ("ring", "joined")]
ALL += [(RelaySGD, relay, options, graph) for options in LOCAL for graph in ("chain", "tree")]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize(("rule", "paper", "options", "graph"), ALL)
def test_a_rule_is_its_papers_algorithm_also_where_the_learning_rate_drops(rule, paper, options, graph, weight_decay):
    options = options | {"weight_decay": weight_decay}
    rule = rule(**options)
    rule.check(GRAPHS[graph])
    expected = np.array(list(paper(f=Quadratics(), lrs=LR, near=neighbours(GRAPHS[graph]), **options)))
    got = trajectory(rule, GRAPHS[graph], Quadratics())
    assert np.abs(expected[-1] - expected[10]).max() > 1e-3  # it still moves after the drop
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------- blocks of columns


EVERY = [DSGD(0.9, True, 1e-3), AllReduce(0.9), Isolated(0.9), QGDSGDm(), RelaySGD(0.9), SharpnessAwareDSGD(momentum=0.9)]


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: type(rule).__name__)
def test_blocks_of_columns_give_the_same_bits_as_the_whole(rule, monkeypatch):
    width = orchestrator.BLOCK + 1000
    scale, start = torch.rand(2, 4, width, generator=torch.Generator().manual_seed(0))

    def rows():
        gradient = lambda X, *_: scale * (X - 0.5)  # noqa: E731
        stack = SimpleNamespace(X=start.clone(), G=torch.zeros(4, width), parameters=width, gradient=gradient)
        return trajectory(rule, Graph(Chain(), 4), stack, [0.1, 0.1, 0.01, 0.01])

    in_blocks = rows()
    monkeypatch.setattr(orchestrator, "BLOCK", width)
    whole = rows()
    assert np.array_equal(in_blocks, whole)
    assert np.abs(np.diff(whole, axis=0)).max() > 0.01


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
    np.testing.assert_allclose(trajectory(DSGD(**options), graph, Quadratics()),
                               trajectory(AllReduce(**options), GRAPHS["ring"], Quadratics()), rtol=0, atol=1e-12)  # fmt: skip


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
    """Where every local step leads back to x0_i, node i holds the mean over those at most t edges away after t steps."""
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
    for (receiver, sender), count in zip(graph.mixing(0).edges.tolist(), run.edge_buffers["C"][:, 0].tolist(), strict=True):
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
def test_relaysgd_refuses_what_is_no_static_tree(topology):
    with pytest.raises(UserError, match=rf"Chain.*{type(topology).__name__}"):
        RelaySGD().check(Graph(topology, N))


def test_the_command_line_refuses_relaysgd_on_a_ring(configs, capsys):
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), "--gossip", "RelaySGD"]) == 2
    said = capsys.readouterr().err
    assert "Chain" in said
    assert "Ring" in said
    assert len(said.splitlines()) <= 2
