"""Asynchronous rules against an event simulation node by node, on quadratics; and whole runs of them."""

import heapq
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quadratics import Quadratics

from callbacks import ADPSGD, AsyncGossip, LocalSteps, MessageLoss, SwarmSGD
from lightning_idkd import randomness
from lightning_idkd.callback import check_faults
from lightning_idkd.clock import Clock, Fixed, LogNormal, PerNode
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph
from lightning_idkd.network import Network
from lightning_idkd.topologies import Exponential, Ring
from lightning_idkd.training.async_step import AsyncStep

N, P, LR, SEED = 8, 5, 0.05, 3


class Stack(Quadratics):
    """Quadratics as AsyncStep uses a NodeStack: gradients of the rows in use land in ``G``."""

    n, device = N, torch.device("cpu")
    modules = (SimpleNamespace(has_features=True),)
    calls = 0

    @contextmanager
    def use_parameters(self, X):
        kept = self.X.clone()
        self.X.copy_(X)
        yield
        self.X.copy_(kept)

    def keep_buffers(self, present):
        return nullcontext()

    def step(self, x, y, step):
        self.calls += 1
        self.G.copy_(self.gradient(self.X))
        return self.X[:, 0].clone()


def store():
    return SimpleNamespace(generation=0, next_positions=lambda own: own, batch=lambda positions, calls: (0, 0))


def clock(graph, compute=None, latency=None, bandwidth=None, slow=None):
    return Clock(graph, compute or LogNormal(1.0, 0.5), latency or Fixed(0.3), bandwidth, slow, SEED)


def run(rule, steps, **speed):
    graph, stack = Graph(Ring(), N), Stack()
    times = clock(graph, **speed)
    events = AsyncStep(rule, stack, Network(graph), store(), times, SEED)
    for step in range(steps):
        events.advance(step, LR)
    return events, stack, times


def simulate(kind, steps, momentum=0.0, local_steps=1, **speed):
    """The same, by a heap of events and a dictionary of mailboxes."""
    graph, q = Graph(Ring(), N), Quadratics()
    times, W = clock(graph, **speed), graph.mixing(0).W
    near = [sorted(j for j in range(N) if W[i, j] and i != j) for i in range(N)]
    x, M = q.x0.copy(), np.zeros((N, P))
    heap, begun, at, boxes, flights, busy = [], [0] * N, x.copy(), {}, [], 0.0

    def begin(i, now, busy=0.0):
        at[i] = x[i]
        seconds = times.compute_seconds(begun[i], [i])[0]
        heapq.heappush(heap, (now + max(seconds, busy), i))
        begun[i] += 1

    for i in range(N):
        begin(i, 0.0)
    for number in range(steps * N):
        now, i = heapq.heappop(heap)
        M[i] = momentum * M[i] + q.A[i] @ (at[i] - q.c[i])
        step, busy = LR * M[i], 0.0
        u = float(randomness.uniform(SEED, "peer", number))
        j = near[i][int(u * len(near[i]))]
        both = times.transfer_seconds(number, np.array([[i, j], [j, i]]), P * 8).max()
        if kind == "adpsgd":
            x[i] = x[j] = (x[i] + x[j]) / 2
            x[i] = x[i] - step
            busy = both
        elif kind == "swarm":
            x[i] = x[i] - step
            if begun[i] % local_steps == 0:
                x[i] = x[j] = (x[i] + x[j]) / 2
                busy = both
        else:
            for flight in sorted(f for f in flights if f[0] <= now):
                old = boxes.get(flight[2:4])
                if old is None or old[0] < flight[1]:
                    boxes[flight[2:4]] = flight[1], flight[4]
            flights = [f for f in flights if f[0] > now]
            half = x[i] - step
            x[i] = half + sum(W[i, j] * (boxes[j, i][1] - half) for j in near[i] if (j, i) in boxes)
            for j in near[i]:
                took = times.transfer_seconds(number, np.array([[i, j]]), P * 8)[0]
                flights.append((now + took, number, i, j, tuple(half)))
                flights[-1] = (*flights[-1][:4], half.copy())
        begin(i, now, busy)
    return x, now


SPEEDS = {
    "equal": {"compute": Fixed(1.0), "latency": Fixed(0.0)},
    "drawn": {},
    "far": {"latency": LogNormal(2.0, 0.8)},
    "narrow": {"bandwidth": 30.0},
    "slow": {"compute": PerNode([1.0 + 0.1 * i for i in range(N)]), "slow": {2: 10.0}},
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["adpsgd", "swarm", "gossip"])
def test_rules_equal_a_simulation_of_single_events(kind, momentum, speed):
    rule = {"adpsgd": ADPSGD(momentum), "swarm": SwarmSGD(2, momentum), "gossip": AsyncGossip(momentum)}[kind]
    _events, stack, times = run(rule, 12, **SPEEDS[speed])
    expected, now = simulate(kind, 12, momentum, 2, **SPEEDS[speed])
    np.testing.assert_allclose(stack.X, expected, rtol=0, atol=1e-10)
    assert times.seconds == pytest.approx(now, abs=1e-12)


def test_nodes_that_are_ready_together_run_in_one_call():
    _events, stack, _times = run(ADPSGD(), 10, **SPEEDS["equal"])
    assert stack.calls == 10


def test_a_slow_node_does_not_hold_the_others_up():
    events, _stack, times = run(ADPSGD(), 20, compute=Fixed(1.0), latency=Fixed(0.0), slow={0: 10.0})
    assert events.begun.sum() == 20 * N + N
    assert events.begun[0] == 3  # seven others act every second: 7 * 22 + 2 actions in 22 seconds, 160 in the next
    assert times.seconds == pytest.approx(23.0)


@pytest.mark.parametrize("rule", [ADPSGD(), SwarmSGD(1)])
def test_averaging_in_pairs_keeps_the_mean_and_brings_the_nodes_together(rule):
    graph, stack = Graph(Ring(), N), Stack()
    stack.gradient = lambda X: torch.zeros_like(X)
    events, mean, spread = AsyncStep(rule, stack, Network(graph), store(), clock(graph), SEED), stack.X.mean(0), []
    for step in range(40):
        events.advance(step, LR)
        spread.append((stack.X - mean).norm().item())
    torch.testing.assert_close(stack.X.mean(0), mean, rtol=0, atol=1e-12)
    assert spread[-1] < 0.01 * spread[0]


def test_bytes_are_those_of_the_rows_that_were_sent():
    for rule, messages in ((ADPSGD(), 2 * 3 * N), (SwarmSGD(1), 2 * 3 * N), (AsyncGossip(), 2 * 3 * N)):
        events, _stack, _times = run(rule, 3)
        assert events.network.counts() == {"parameter_bytes": messages * P * 8, "label_bytes": 0, "other_bytes": 0,
                                           "messages": messages}  # fmt: skip


@pytest.mark.parametrize("rule", [ADPSGD(0.9), SwarmSGD(2, 0.9), AsyncGossip(0.9)])
def test_a_restored_state_goes_on_with_the_same_bits(rule):
    whole, _stack, _times = run(rule, 9, **SPEEDS["far"])
    half, stack, times = run(rule, 4, **SPEEDS["far"])
    other = Stack()
    graph = Graph(Ring(), N)
    later = clock(graph, **SPEEDS["far"])
    events = AsyncStep(rule, other, Network(graph), store(), later, SEED)
    other.X.copy_(stack.X)
    for mine, saved in ((events.buffers, half.buffers), (events.edge_buffers, half.edge_buffers)):
        for name in mine:
            mine[name].copy_(saved[name])
    events.load_state_dict(half.state_dict())
    later.time = times.time.copy()
    for step in range(4, 9):
        events.advance(step, LR)
    assert torch.equal(other.X, whole.stack.X)
    assert np.array_equal(later.time, whole.clock.time)


def test_what_asynchronous_rules_do_not_take_is_refused():
    with pytest.raises(UserError, match="gossip ADPSGD is asynchronous, and takes no faults"):
        check_faults([MessageLoss()], ADPSGD(), Graph(Ring(), N))
    with pytest.raises(UserError, match="ADPSGD takes undirected graphs, since two nodes average with each other"):
        ADPSGD().check(Graph(Exponential(), N))
    with pytest.raises(UserError, match="LocalSteps takes rules that may skip a mixing, but SwarmSGD needs every one"):
        LocalSteps(SwarmSGD())
    with pytest.raises(UserError, match=r"gossip\.local_steps: 0 given; allowed: 1 or more"):
        SwarmSGD(0)
