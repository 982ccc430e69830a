"""Simulated time: distributions, the recursion against a simulation event by event, and closed forms."""

import heapq
import math

import networkx as nx
import numpy as np
import pytest
import torch

from lightning_idkd.clock import Clock, Fixed, LogNormal, PerNode, Times, TraceTimes
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph, Ring, Topology
from lightning_idkd.labels import Labels
from lightning_idkd.network import Network, Traffic
from lightning_idkd.topologies import EpidemicLocal, ErdosRenyi, OnePeerExponential


class Table(Times):
    """Times from an array [steps, nodes]."""

    def __init__(self, rows):
        self.rows = rows

    def draw(self, u, nodes, step):
        return self.rows[step, nodes]


class OneWay(Topology):
    """A directed ring with chords."""

    directed = True

    def graph(self, nodes, step, seed):
        graph = nx.cycle_graph(nodes, create_using=nx.DiGraph)
        graph.add_edges_from([(0, 3), (2, 5), (5, 1)])
        return graph


GRAPHS = {
    "ring": Graph(Ring(), 8),
    "random": Graph(ErdosRenyi(0.4), 8),
    "one-way": Graph(OneWay(), 8, "average"),
    "never the same": Graph(EpidemicLocal(s=2), 8),
    "one peer": Graph(OnePeerExponential(), 8),
}
NONE = np.zeros((0, 2), dtype=np.int64)


def simulate(n, steps, edges, compute, latency, nbytes, bandwidth):
    """Times at which the nodes have finished all steps, by events: the end of a computation, or an arrival.

    Args:
        edges: for every step a list of (sender, receiver), or ``all-reduce``.
        nbytes: [steps, n], of each message of a sender; of an all-reduce, of the vector.
    """
    step, missing, computed = [0] * n, [{} for _ in range(n)], [None] * n
    ends, waiting, number = [0.0] * n, {}, 0
    events = []

    def push(time, *event):
        nonlocal number
        number += 1
        heapq.heappush(events, (time, number, *event))

    def expected(i, t):
        return sum(receiver == i for _, receiver in edges[t]) if edges[t] != "all-reduce" else 0

    def go_on(i, time):
        if computed[i] is None or missing[i].get(step[i], expected(i, step[i])):
            return
        step[i], computed[i] = step[i] + 1, None
        if step[i] == steps:
            ends[i] = time
        else:
            push(time + compute[step[i]][i], "computed", i, step[i])

    for i in range(n):
        push(compute[0][i], "computed", i, 0)
    while events:
        time, _, kind, i, t = heapq.heappop(events)
        if kind == "arrived":
            missing[i][t] = missing[i].get(t, expected(i, t)) - 1
            if t == step[i]:
                go_on(i, time)
        elif edges[t] == "all-reduce" and kind == "computed":
            waiting.setdefault(t, []).append(i)
            if len(waiting[t]) == n:
                turn = max(latency[t]) + nbytes[t][i] / n / bandwidth
                for j in range(n):
                    push(time + 2 * (n - 1) * turn, "reduced", j, t)
        else:
            computed[i] = time
            for sender, receiver in edges[t] if kind == "computed" else ():
                if sender == i:
                    push(time + latency[t][i] + nbytes[t][i] / bandwidth, "arrived", receiver, t)
            go_on(i, time)
    return ends


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("kinds", [("mix",), ("mix", "local", "local"), ("mix", "all-reduce", "mix", "local")])
def test_the_recursion_agrees_with_a_simulation_event_by_event(graph, kinds):
    n, steps, bandwidth, rng = 8, 20, 50.0, np.random.default_rng(3)
    compute, latency = rng.exponential(1.0, (steps, n)), rng.exponential(0.3, (steps, n))
    nbytes = rng.integers(0, 100, (steps, n))
    clock, edges = Clock(graph, Table(compute), Table(latency), bandwidth), []
    for t in range(steps):
        kind = kinds[t % len(kinds)]
        if kind == "all-reduce":
            nbytes[t] = nbytes[t, 0]
        of_step = {"mix": graph.mixing(t).edges, "local": NONE, "all-reduce": NONE}[kind]
        traffic = [] if kind == "local" else [Traffic(t if kind == "mix" else None, of_step, 1, nbytes[t])]
        edges.append("all-reduce" if kind == "all-reduce" else of_step.tolist())
        clock.compute(t)
        clock.deliver(traffic, t)
    assert clock.time == pytest.approx(simulate(n, steps, edges, compute, latency, nbytes, bandwidth), rel=1e-12)


def run_ring(n, steps, **given):
    """The times after each step of a ring whose messages have 100 bytes."""
    graph = Graph(Ring(), n)
    clock, times = Clock(graph, given.pop("compute", Fixed(1.0)), given.pop("latency", Fixed(0.0)), **given), []
    for t in range(steps):
        clock.compute(t)
        clock.deliver([Traffic(t, graph.mixing(t).edges, 1, np.full(n, 100))], t)
        times.append(clock.time)
    return times


def test_equal_nodes_finish_step_t_at_t_times_compute_plus_transfer():
    times = run_ring(6, 5, compute=Fixed(0.5), latency=Fixed(0.25), bandwidth=400.0)
    assert times == [pytest.approx([(t + 1) * (0.5 + 0.25 + 100 / 400)] * 6) for t in range(5)]


def test_a_slow_node_delays_one_hop_more_in_each_step():
    n = 16
    for t, times in enumerate(run_ring(n, 20, slow={0: 10}), 1):
        for node in range(n):
            d = min(node, n - node)
            if d == 0:
                assert times[node] == 10 * t
            else:  # the slow node's step t - d + 1 holds up a chain of d - 1 steps of the others
                assert times[node] == (10 * (t - d + 1) + d - 1 if d <= t else t)


def test_rounds_of_a_step_add_latency_and_their_bytes():
    graph = Graph(Ring(), 4)
    clock = Clock(graph, Fixed(1.0), Fixed(0.5), bandwidth=10.0)
    clock.deliver([Traffic(0, graph.mixing(0).edges, 3, np.full(4, 60))], 0)
    assert clock.seconds == 3 * 0.5 + 6


def test_messages_of_another_step_follow_those_before():
    """Two hops of labels on a chain 0 - 1 - 2: node 2 waits for 1, which waits for the slow node 0."""
    graph = Graph(Chain(), 3)
    clock, edges = Clock(graph, PerNode([5.0, 1.0, 1.0]), Fixed(0.0)), graph.mixing(0).edges
    clock.compute(0)
    clock.deliver([Traffic(0, edges, 1, np.zeros(3, int))], 0)
    assert clock.time.tolist() == [5, 5, 1]
    clock.deliver([Traffic(1, edges, 1, np.zeros(3, int))], 0)
    assert clock.time.tolist() == [5, 5, 5]


def test_an_all_reduce_waits_for_the_slowest_and_takes_2_n_minus_1_turns():
    n, nbytes = 5, 400
    clock = Clock(Graph(Ring(), n), PerNode([1, 2, 3, 4, 7]), Fixed(0.1), bandwidth=1000.0)
    clock.compute(0)
    clock.deliver([Traffic(None, NONE, 1, np.full(n, nbytes))], 0)
    wanted = 7 + 2 * (n - 1) * 0.1 + 2 * (n - 1) / n * nbytes / 1000
    assert clock.time == pytest.approx([wanted] * n)


def test_a_single_node_waits_for_nobody():
    clock = Clock(Graph(Chain(), 1), Fixed(2.0), Fixed(9.0), bandwidth=1.0)
    clock.compute(0)
    clock.deliver([Traffic(None, NONE, 1, np.array([100])), Traffic(0, NONE, 1, np.array([100]))], 0)
    assert clock.seconds == 2


def test_an_absent_node_neither_computes_nor_sends_and_returns_with_its_neighbours_time():
    graph = Graph(Chain(), 4)
    clock, edges = Clock(graph, PerNode([1.0, 100.0, 2.0, 1.0]), Fixed(0.5)), graph.mixing(0).edges
    traffic, present = [Traffic(0, edges, 1, np.zeros(4, int))], np.array([True, False, True, True])
    clock.compute(0, present)
    clock.deliver(traffic, 0, present)
    assert clock.time.tolist() == [1, 2, 2, 2.5]  # node 1 has the later of nodes 0 and 2
    clock.compute(1)
    assert clock.time[1] == 102


def test_an_all_reduce_of_the_present_nodes_leaves_out_the_absent():
    clock = Clock(Graph(Ring(), 4), PerNode([1, 50, 2, 3]), Fixed(0.5))
    present = np.array([True, False, True, True])
    clock.compute(0, present)
    clock.deliver([Traffic(None, NONE, 1, np.zeros(4, int))], 0, present)
    assert clock.time.tolist() == [5, 5, 5, 5]  # the third of the three took 3, and 4 turns 0.5 each


# ---------------------------------------------------------------------- distributions


NODES, STEP = np.arange(4), np.zeros(4, dtype=np.int64)


def test_a_log_normal_time_has_this_median_and_this_deviation_of_its_logarithm():
    u = np.array([0.5, 0.8413447460685429, 0.15865525393145707, 0.9772498680518208])  # 0, 1, -1, 2 deviations
    wanted = [3, 3 * math.exp(0.2), 3 * math.exp(-0.2), 3 * math.exp(0.4)]
    assert LogNormal(3.0, 0.2).draw(u, NODES, STEP) == pytest.approx(wanted)
    assert PerNode([1, 2, 3, 4], 0.2).draw(u, NODES, STEP) == pytest.approx(
        [1, 2 * math.exp(0.2), 3 * math.exp(-0.2), 4 * math.exp(0.4)]
    )


def test_log_normal_times_of_a_clock_are_distributed_so():
    clock = Clock(Graph(Ring(), 50), LogNormal(2.0, 0.5), Fixed(0.0))
    logs = np.log([clock.compute_seconds(t, np.arange(50)) for t in range(200)])
    assert logs.mean() == pytest.approx(math.log(2), abs=4 * 0.5 / 100)
    assert logs.std() == pytest.approx(0.5, rel=0.03)
    assert abs(np.corrcoef(logs[1:].ravel(), logs[:-1].ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(logs[:, 1:].ravel(), logs[:, :-1].ravel())[0, 1]) < 0.04


def test_times_depend_on_seed_step_and_place_and_not_on_what_else_is_drawn():
    graph = Graph(Ring(), 8)
    clock, other = (Clock(graph, LogNormal(1.0, 1.0), LogNormal(1.0, 1.0), seed=seed) for seed in (0, 1))
    whole = clock.compute_seconds(5, np.arange(8))
    assert clock.compute_seconds(5, [6, 2]).tolist() == whole[[6, 2]].tolist()
    assert clock.compute_seconds(np.array([4, 5]), [2, 2])[1] == whole[2]
    assert (whole != clock.compute_seconds(6, np.arange(8))).all()
    assert (whole != other.compute_seconds(5, np.arange(8))).all()
    edges = graph.mixing(0).edges
    there = clock.transfer_seconds(5, edges, 0)
    assert clock.transfer_seconds(5, edges[3:5], 0).tolist() == there[3:5].tolist()
    assert len(set(there)) == len(edges)  # the two directions of an edge, too


def test_a_trace_gives_each_node_its_rows_in_order_and_begins_again(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("node,seconds\n0,1.5\n1,10\n0,2.5\n0,3.5\n1,20\n")
    clock = Clock(Graph(Chain(), 2), TraceTimes(str(file)), Fixed(0.0))
    times = [clock.compute_seconds(t, [0, 1]).tolist() for t in range(4)]
    assert times == [[1.5, 10], [2.5, 20], [3.5, 10], [1.5, 20]]


@pytest.mark.parametrize("returned", [[1.0, 2.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0], [1.0, math.inf, 1.0]])
def test_times_of_a_users_class_that_are_no_times_are_refused(returned):
    class Mine(Times):
        def draw(self, u, nodes, step):
            return np.array(returned)

    clock = Clock(Graph(Ring(), 3), Mine(), Fixed(0.0))
    with pytest.raises(UserError, match=r"clock\.compute: Mine\.draw returns"):
        clock.compute(0)


# ---------------------------------------------------------------------- what the network notes


def labels(n):
    return [Labels(torch.arange(i + 1), torch.full((i + 1, 2), 0.5)) for i in range(n)]


def test_the_network_notes_rounds_and_bytes_by_step_in_order():
    network = Network(Graph(Ring(), 4))
    network.timed = True
    T, M = torch.ones(4, 6), torch.ones(8, 3, dtype=torch.float64)
    network.mix(T, 7)
    network.mix(T, 7, messages=False)  # a further block of the same message
    network.swap(M, 7)
    network.all_reduce(T)
    sent = labels(4)
    network.exchange(sent, 8)
    network.share(T, 9)
    network.mix(T, 9, size=5)
    network.receive(T, 10)
    noted = [(t.step, t.rounds, t.nbytes.tolist(), len(t.edges)) for t in network.take_traffic()]
    assert noted == [
        (7, 2, [24 + 24 + 24] * 4, 8), (None, 1, [24] * 4, 0), (8, 1, [message.nbytes for message in sent], 8),
        (9, 2, [24 + 5] * 4, 8), (10, 1, [24] * 4, 8),
    ]  # fmt: skip
    assert network.take_traffic() == []


def test_without_a_clock_the_network_notes_nothing():
    network = Network(Graph(Ring(), 4))
    network.mix(torch.ones(4, 6))
    assert network.take_traffic() == []
