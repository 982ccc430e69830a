"""Rows that are late: their ages against a simulation node by node, and what mixing makes of them."""

import numpy as np
import pytest
import torch

from callbacks import DSGD, AllReduce, LocalSteps, MessageLoss, QGDSGDm, RelaySGD, Stragglers
from lightning_idkd.callback import check_faults
from lightning_idkd.clock import Clock, Fixed, LogNormal
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph, Ring
from lightning_idkd.links import Links
from lightning_idkd.network import Network
from lightning_idkd.topologies import OnePeerExponential, Social15

SEED, P = 5, 3


def clock(graph, **given):
    speed = {"compute": LogNormal(1.0, 0.7), "latency": LogNormal(0.4, 0.5)} | given
    return Clock(graph, speed.pop("compute"), speed.pop("latency"), seed=SEED, **speed)


def simulate(graph, times, steps, max_age):
    """Per step: every node's time, and the age of what each edge has delivered."""
    n, edges = graph.nodes, [tuple(e) for e in graph.mixing(0).edges.tolist()]
    now, arrival, history = [0.0] * n, {}, []
    for t in range(steps):
        computed = [now[i] + times.compute_seconds(t, [i])[0] for i in range(n)]
        for j, i in edges:
            arrival[j, i, t] = computed[j] + times.transfer_seconds(t, np.array([[j, i]]), P * 8)[0]
        for i in range(n):
            needed = [arrival[j, k, max(t - max_age, 0)] for j, k in edges if k == i]
            now[i] = max([computed[i], *needed])
        ages = []
        for j, i in edges:
            ages.append(next(a for a in range(max_age + 1) if a <= t and arrival[j, i, t - a] <= now[i]))
        history.append((list(now), ages))
    return history


@pytest.mark.parametrize("max_age", [1, 2, 5])
@pytest.mark.parametrize(("topology", "nodes"), [(Ring(), 8), (Social15(), 15)], ids=["ring", "social"])
def test_ages_and_times_are_those_of_a_simulation(topology, nodes, max_age):
    graph = Graph(topology, nodes)
    times, slow = clock(graph), {2: 4.0}
    times.factor[2] = slow[2]
    expected, seen = simulate(graph, times, 25, max_age), set()
    for step in range(25):
        ages = times.lag(step, max_age, P * 8)
        assert times.time == pytest.approx(expected[step][0], rel=1e-12)
        assert ages.tolist() == expected[step][1]
        seen |= set(ages.tolist())
    assert seen == set(range(max_age + 1))


def test_neighbours_of_a_slow_node_run_ahead_of_it_by_the_largest_age():
    """Node 0 of a chain takes 10 s a step, the others 1 s, and messages none: node 1 waits for step t - 2 only."""
    graph = Graph(Chain(), 4)
    times = clock(graph, compute=Fixed(1.0), latency=Fixed(0.0), slow={0: 10.0})
    ends = []
    for step in range(6):
        times.lag(step, 2, 8)
        ends.append(times.time.tolist())
    assert [end[0] for end in ends] == [10, 20, 30, 40, 50, 60]
    assert [end[1] for end in ends] == [10, 11, 12, 20, 30, 40]
    assert [end[3] for end in ends[:3]] == [1, 2, 3], "two hops away nobody has noticed yet"


@pytest.mark.parametrize("mixings", [1, 2])
def test_mixing_takes_the_last_rows_that_have_arrived(mixings):
    graph = Graph(Ring(), 6)
    net, rng = Network(graph, links=Links(graph, [Stragglers(3)])), np.random.default_rng(0)
    W, edges, sent = graph.mixing(0).W, graph.mixing(0).edges.tolist(), []
    for step in range(8):
        ages = rng.integers(0, min(step, 3) + 1, len(edges))
        rows = torch.randn(mixings, 6, P, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        sent.append(rows.numpy())
        with net.late(ages, 3):
            mixed = [net.mix(T, step).numpy() for T in rows]
        for k in range(mixings):
            expected = np.diag(W)[:, None] * sent[step][k]
            for (j, i), age in zip(edges, ages, strict=True):
                expected[i] += W[i, j] * sent[step - age][k][j]
            np.testing.assert_allclose(mixed[k], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        net.mix(rows[0]), torch.tensor(W) @ rows[0], rtol=0, atol=1e-12
    )  # outside: nobody is late


def test_what_does_not_go_together_is_refused():
    graph = Graph(Ring(), 6)
    for rule in (AllReduce(), RelaySGD(), LocalSteps(DSGD())):
        with pytest.raises(UserError, match="Stragglers takes rules that mix in every step and do no more"):
            check_faults([Stragglers()], rule, graph)
    with pytest.raises(UserError, match="Stragglers does not go together with MessageLoss"):
        check_faults([Stragglers(), MessageLoss()], DSGD(), graph)
    with pytest.raises(UserError, match="Stragglers takes static graphs, but graph"):
        check_faults([Stragglers()], DSGD(), Graph(OnePeerExponential(), 8))
    with pytest.raises(UserError, match=r"faults\.max_age: 0 given; allowed: 1 or more"):
        Stragglers(0)
    check_faults([Stragglers()], QGDSGDm(), graph)
