"""Quadratics f_i(x) = (x - c_i)' A_i (x - c_i) / 2 at every node, to compare gossip rules with their papers."""

from types import SimpleNamespace

import networkx as nx
import numpy as np
import torch

from lightning_idkd.graph import Chain, Graph, Ring, Topology
from lightning_idkd.network import Network
from lightning_idkd.training import gossip_step
from lightning_idkd.training.gossip_step import GossipStep

N, P = 8, 5
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


class Driver(GossipStep):
    """A rule at work, step by step."""

    step = 0

    def update(self, lr, batch):
        super().update(self.step, lr, batch)


def driver(rule, graph, stack):
    return Driver(rule, stack, Network(graph))


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


LOCAL = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}]
GRAPHS = {"ring": Graph(Ring(), N), "joined": Graph(Joined(), N, seed=3), "chain": Graph(Chain(), N),
          "tree": Graph(Joined(0), N, seed=5)}  # fmt: skip


def same_as_the_paper(rule, paper, options, graph):
    """A rule's rows are those of ``paper`` over 20 steps, also where the learning rate drops."""
    made = rule(**options)
    made.check(graph)
    expected = np.array(list(paper(f=Quadratics(graph.nodes), lrs=LR, near=neighbours(graph), **options)))
    got = trajectory(made, graph, Quadratics(graph.nodes))
    assert np.abs(expected[-1] - expected[10]).max() > 1e-3  # it still moves after the drop
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def same_in_blocks(rule, monkeypatch, graph=None):
    """A rule gives the same bits on blocks of columns as on all at once."""
    graph, width = graph or Graph(Chain(), 4), 2500
    scale, start = torch.rand(2, graph.nodes, width, generator=torch.Generator().manual_seed(0))

    def rows():
        gradient = lambda X, *_: scale * (X - 0.5)  # noqa: E731
        stack = SimpleNamespace(
            modules=[SimpleNamespace(has_features=False)],
            X=start.clone(),
            G=torch.zeros_like(start),
            parameters=width,
            gradient=gradient,
        )
        return trajectory(rule, graph, stack, [0.1, 0.1, 0.01, 0.01])

    monkeypatch.setattr(gossip_step, "block_columns", lambda nodes, device: 1000)
    in_blocks = rows()
    monkeypatch.setattr(gossip_step, "block_columns", lambda nodes, device: width)
    whole = rows()
    assert np.array_equal(in_blocks, whole)
    assert np.abs(np.diff(whole, axis=0)).max() > 0.01
