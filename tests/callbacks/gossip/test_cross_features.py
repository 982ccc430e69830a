"""Cross-feature contrastive loss, against the authors' steps, node by node in numpy, on a network of one tanh layer."""

import networkx as nx
import numpy as np
import pytest
import torch
from quadratics import GRAPHS, LR, N, driver, neighbours, sgd
from quadratics import average as mixed
from torch import nn

from lightning_idkd.callbacks import CCL, DSGD, QGDSGDm
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Ring, Topology
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.training.gossip_step import GossipStep

B, D, F, K = 6, 4, 3, 5
RULES = {
    "DSGD": {"quasi_global": False, "momentum": 0.0, "nesterov": False},
    "DSGDm": {"quasi_global": False, "momentum": 0.9, "nesterov": False},
    "DSGDm-N": {"quasi_global": False, "momentum": 0.9, "nesterov": True},
    "QG-DSGDm": {"quasi_global": True, "momentum": 0.9, "nesterov": False},
    "QG-DSGDm-N": {"quasi_global": True, "momentum": 0.9, "nesterov": True},
}


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(D, F, bias=False), nn.Linear(F, K)

    def features(self, x):
        return self.layer(x.flatten(1)).tanh()

    def forward(self, x):
        return self.head(self.features(x))


class Bare(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1))


def nodes(n=N, engine="loop", network=Tiny):
    """A stack whose nodes start apart."""
    stack = NodeStack(lambda: NodeModule(network()), range(n), dtype=torch.float64, engine=engine)
    stack.X.add_(torch.tensor(0.3 * np.random.default_rng(1).standard_normal(stack.X.shape)))
    return stack


def batch(step, n=N):
    """Images [n, B, 1, 1, D] and soft labels [n, B, K]: of class 4 at no node, of class 0 at node 0 alone."""
    rng = np.random.default_rng([step, 2])
    x, y = rng.standard_normal((n, B, 1, 1, D)), rng.random((n, B, K))
    top = rng.integers(1, 4, (n, B))
    top[0, :2] = 0
    y[np.arange(n)[:, None], np.arange(B), top] += 1.0
    return x, y / y.sum(2, keepdims=True)


def trajectory(rule, graph, stack, lrs=LR, batch=batch):
    """The rows [steps + 1, n, P] before and after every step, and the run."""
    run, seen = driver(rule, graph, stack), [stack.X.clone()]
    for lr in lrs:
        x, y = (torch.tensor(part) for part in batch(run.step, stack.n))
        stack.step(x, y, run.step)
        run.update(lr, (x, y))
        run.step += 1
        seen.append(stack.X.clone())
    return torch.stack(seen).numpy(), run


def split(p):
    return p[: F * D].reshape(F, D), p[F * D : F * D + K * F].reshape(K, F), p[F * D + K * F :]


def features(p, x):
    return np.array([np.tanh(split(p)[0] @ sample.ravel()) for sample in x])


def gradient(p, x, y, wanted):
    """Of mean cross-entropy + sum over (weight, targets [B, F]) of weight * mean squared distance of the features."""
    layer, head, bias = split(p)
    by_layer, by_head, by_bias = np.zeros_like(layer), np.zeros_like(head), np.zeros_like(bias)
    for b, f in enumerate(features(p, x)):
        e = np.exp(head @ f + bias)
        by_logits = (e / e.sum() * y[b].sum() - y[b]) / B
        by_f = head.T @ by_logits + sum(2 * weight * (f - target[b]) / (B * F) for weight, target in wanted)
        by_layer += np.outer(by_f * (1 - f**2), x[b].ravel())
        by_head += np.outer(by_logits, f)
        by_bias += by_logits
    return np.concatenate([by_layer.ravel(), by_head.ravel(), by_bias])


def contrastive(x0, near, lrs, lambda_m, lambda_d, quasi_global, momentum, nesterov, weight_decay):
    """``heard[i][j]`` is the model that j sent to i last; that which is averaged is one's own."""
    n, p, m = len(near), list(x0), [np.zeros_like(x0[0])] * len(near)
    heard = [{j: p[j] for j in near[i]} for i in range(n)]
    yield np.array(p)
    for step, lr in enumerate(lrs):
        x, y = batch(step, n)
        crossed = {(i, j): features(heard[i][j], x[i]) for i in range(n) for j in near[i]}  # of j's model on i's data
        half = []
        for i in range(n):
            own, means = features(p[i], x[i]), np.zeros((B, F))
            for b in range(B):
                alike = [own[a] for a in range(B) if y[i, a].argmax() == y[i, b].argmax()]
                for j in near[i]:
                    alike += [crossed[j, i][a] for a in range(B) if y[j, a].argmax() == y[i, b].argmax()]
                means[b] = np.mean(alike, 0)
            g = gradient(p[i], x[i], y[i], [(lambda_m, crossed[i, j]) for j in near[i]] + [(lambda_d, means)])
            if quasi_global:
                d = g + weight_decay * p[i]
                local = momentum * m[i] + d
                half.append(p[i] - lr * (d + momentum * local if nesterov else local))
            else:
                half.append(sgd(i, p[i], g, m, lr, momentum, nesterov, weight_decay))
        heard = [{j: half[j] for j in near[i]} for i in range(n)]
        old, p = p, [mixed(half, near, i) for i in range(n)]
        if quasi_global:
            m = [momentum * m[i] + (1 - momentum) * (old[i] - p[i]) / lr for i in range(n)]
        yield np.array(p)


@pytest.mark.parametrize(("lambda_m", "lambda_d"), [(0.7, 0.0), (0.0, 1.5), (0.7, 1.5)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("graph", ["ring", "joined"])
def test_it_is_the_authors_algorithm_also_where_the_learning_rate_drops(graph, rule, lambda_m, lambda_d):
    options = RULES[rule] | {"lambda_m": lambda_m, "lambda_d": lambda_d, "weight_decay": 0.05}
    made, stack = CCL(**options), nodes()
    made.check(GRAPHS[graph])
    expected = np.array(list(contrastive(stack.X.numpy().copy(), neighbours(GRAPHS[graph]), LR, **options)))
    assert np.abs(expected[-1] - expected[10]).max() > 1e-3  # it still moves after the drop
    np.testing.assert_allclose(trajectory(made, GRAPHS[graph], stack)[0], expected, rtol=1e-9, atol=1e-9)


def test_engines_agree():
    loop, vmap = (trajectory(CCL(0.7, 1.5), GRAPHS["joined"], nodes(engine=engine))[0] for engine in ("loop", "vmap"))
    np.testing.assert_allclose(vmap, loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("quasi_global", "below"), [(True, QGDSGDm), (False, DSGD)])
def test_without_either_loss_it_is_the_rule_below(quasi_global, below):
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}
    got, run = trajectory(CCL(0.0, 0.0, quasi_global, **options), GRAPHS["joined"], nodes())
    expected, alike = trajectory(below(**options), GRAPHS["joined"], nodes())
    assert np.array_equal(got, expected)
    assert run.network.counts() == alike.network.counts()


def distinct(step, n):
    x, _ = batch(step, n)
    return x[:, :K], np.eye(K)[None].repeat(n, 0)


@pytest.mark.parametrize(("rule", "batch"), [(CCL(0.7, 0.0), batch), (CCL(0.7, 1.5), distinct)])
def test_one_node_is_sgd_unless_its_samples_share_a_class(rule, batch):
    alone = Graph(Ring(), 1)
    expected = trajectory(QGDSGDm(), alone, nodes(1), batch=batch)[0]
    np.testing.assert_allclose(trajectory(rule, alone, nodes(1), batch=batch)[0], expected, rtol=0, atol=1e-12)
    assert (
        np.abs(trajectory(CCL(0.7, 1.5), alone, nodes(1))[0] - trajectory(QGDSGDm(), alone, nodes(1))[0]).max() > 1e-3
    )


def test_equal_nodes_with_equal_samples_are_drawn_nowhere_by_each_other():
    def same(step, n):
        return tuple(part[:1].repeat(n, 0) for part in batch(step, 1))

    found = []
    for rule in (CCL(5.0, 0.0), QGDSGDm()):
        stack = nodes()
        stack.X.copy_(stack.X[:1].expand_as(stack.X))
        found.append(trajectory(rule, GRAPHS["joined"], stack, batch=same)[0])
    np.testing.assert_allclose(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lambda_d", [0.0, 0.1])
def test_class_sums_are_counted_as_other_bytes_and_said_to_be_shared(lambda_d):
    rule, graph, stack = CCL(0.1, lambda_d), GRAPHS["joined"], nodes()
    run, edges = trajectory(rule, graph, stack, LR[:3])[1], len(graph.mixing(0).edges)
    models, sums = edges * (1 + 3), edges * 3 * (lambda_d > 0)  # the models cross before the first step too
    assert run.network.counts() == {
        "parameter_bytes": models * 8 * stack.parameters,
        "other_bytes": sums * 8 * K * (F + 1),
        "label_bytes": 0,
        "messages": models + sums,
    }
    assert rule.shares == ("class sums of features" if lambda_d else "")


class Arrows(Topology):
    directed = True

    def graph(self, nodes, step, seed):
        return Ring().graph(nodes, step, seed).to_directed()


class Flipping(Topology):
    period = 2

    def graph(self, nodes, step, seed):
        return nx.path_graph(nodes) if step else nx.star_graph(nodes - 1)


@pytest.mark.parametrize(("topology", "kind"), [(Arrows(), "undirected"), (Flipping(), "static")])
def test_directed_and_changing_graphs_are_refused(topology, kind):
    with pytest.raises(UserError, match=f"CCL takes {kind} graphs"):
        CCL().check(Graph(topology, N))


@pytest.mark.parametrize("key", ["lambda_m", "lambda_d"])
def test_weights_below_zero_are_refused(key):
    with pytest.raises(UserError, match=rf"gossip\.{key}: -1 given; allowed: 0 or more"):
        CCL(**{key: -1})


def test_a_network_without_features_is_refused_before_the_start():
    stack = nodes(network=lambda: Bare(D, K))
    with pytest.raises(UserError) as error:
        GossipStep(CCL(), stack, None)
    assert str(error.value) == "gossip: CCL needs features(x) [B, F], which this network does not offer"
