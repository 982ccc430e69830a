"""Neighbourhood gradient clustering, against its paper node by node."""

import numpy as np
import pytest
from quadratics import GRAPHS, LOCAL, N, P, Quadratics, driver, same_as_the_paper, trajectory

from lightning_idkd.callbacks import DSGD, NGC, AllReduce, CombineThenAdapt
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Complete, Graph, Ring, Topology


def clustered(f, lrs, near, alpha=1.0, momentum=0.0, nesterov=False, weight_decay=0.0):
    """Aketi et al. 2022, Algorithm 1: g[i, j] is the gradient of node j's model on node i's data."""
    n = len(near)
    x, v = list(f.x0), [0.0] * n
    yield np.array(x)
    for lr in lrs:
        g = {(i, j): f.A[i] @ (x[j] - f.c[i]) for i in range(n) for j in (i, *near[i])}
        new = []
        for i in range(n):
            w = {j: 1 / (1 + max(len(near[i]), len(near[j]))) for j in near[i]}
            w[i] = 1 - sum(w.values())
            d = sum(w[j] * ((1 - alpha) * g[i, j] + alpha * g[j, i]) for j in w) + weight_decay * x[i]
            v[i] = momentum * v[i] + d
            new.append(sum(w[j] * x[j] for j in w) - lr * (d + momentum * v[i] if nesterov else v[i]))
        x = new
        yield np.array(x)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", LOCAL)
@pytest.mark.parametrize("graph", ["ring", "joined"])
def test_it_is_its_papers_algorithm_also_where_the_learning_rate_drops(graph, options, alpha, weight_decay):
    same_as_the_paper(NGC, clustered, options | {"alpha": alpha, "weight_decay": weight_decay}, GRAPHS[graph])


def test_one_node_is_centralised_sgd():
    alone = Graph(Ring(), 1)
    np.testing.assert_allclose(
        trajectory(NGC(momentum=0.9), alone, Quadratics(1)), trajectory(DSGD(0.9), alone, Quadratics(1))
    )


def test_from_one_row_on_the_complete_graph_it_is_all_reduce():
    """All data are a neighbour's there."""
    graph, stacks = Graph(Complete(), N), (Quadratics(), Quadratics())
    for stack in stacks:
        stack.X.copy_(stack.X[:1].expand_as(stack.X))
    got = trajectory(NGC(momentum=0.9), graph, stacks[0])
    np.testing.assert_allclose(got, trajectory(AllReduce(0.9), graph, stacks[1]), rtol=0, atol=1e-12)


def test_it_stalls_nearer_to_the_optimum_than_dsgd():
    def distance(rule):
        stack = Quadratics()
        optimum = np.linalg.solve(stack.A.sum(0), np.einsum("ipq,iq->p", stack.A, stack.c))
        return np.abs(trajectory(rule, GRAPHS["joined"], stack, [0.02] * 1500)[-1] - optimum).max()

    assert distance(NGC()) < 0.9 * distance(CombineThenAdapt())


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_gradients_are_counted_as_other_bytes_and_said_to_be_shared(alpha):
    rule = NGC(alpha)
    run, edges = driver(rule, GRAPHS["joined"], Quadratics()), len(GRAPHS["joined"].mixing(0).edges)
    run.update(0.1, (None, None))
    gradients = edges * 8 * P * (alpha > 0)
    sent = {"parameter_bytes": edges * 8 * P, "other_bytes": gradients, "label_bytes": 0}
    assert run.network.counts() == sent | {"messages": edges * (1 + (alpha > 0))}
    assert rule.shares == ("gradients of neighbours' models" if alpha else "")


class Arrows(Topology):
    directed = True

    def graph(self, nodes, step, seed):
        return Ring().graph(nodes, step, seed).to_directed()


def test_directed_graphs_and_impossible_shares_are_refused():
    with pytest.raises(UserError, match="NGC takes undirected graphs"):
        NGC().check(Graph(Arrows(), N))
    with pytest.raises(UserError, match=r"gossip.alpha: 2 given; allowed: 0 to 1"):
        NGC(2)
