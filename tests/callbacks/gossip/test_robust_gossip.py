"""Robust: an aggregator in place of the mixing of another rule."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quadratics import GRAPHS, LOCAL, LR, N, P, Quadratics, driver, reference, same_in_blocks, trajectory

from lightning_idkd.callback import Aggregator, Gossip
from lightning_idkd.callbacks import (
    ADPSGD,
    BALANCE,
    CCL,
    D2,
    DSGD,
    EDM,
    GUT,
    NGC,
    SGP,
    UBAR,
    AdaGossip,
    AllReduce,
    AsyncGossip,
    ChocoSGD,
    CombineThenAdapt,
    CoordinateMedian,
    CoordinateTrimmedMean,
    DecentLaM,
    GossipPGA,
    GradientTracking,
    Isolated,
    Krum,
    LocalOptimizer,
    LocalSteps,
    MomentumTracking,
    QGDSGDm,
    RelaySGD,
    Robust,
    SCClip,
    SharpnessAwareDSGD,
    SwarmSGD,
)
from lightning_idkd.callbacks.gossip.robust import discard
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph, Ring

RING, JOINED = GRAPHS["ring"], GRAPHS["joined"]
MIXING = [DSGD(0.9), CombineThenAdapt(0.9), QGDSGDm(), SharpnessAwareDSGD(), LocalOptimizer("torch.optim.Adam"),
          LocalSteps(DSGD(), 2)]  # fmt: skip


def name(value):
    return type(value).__name__


def median(x, near, i):
    return np.median([x[j] for j in (i, *near[i])], axis=0)


@pytest.mark.parametrize("options", LOCAL)
@pytest.mark.parametrize("graph", [RING, JOINED], ids=["ring", "joined"])
def test_the_aggregator_replaces_the_mixing(options, graph):
    near = [graph.mixing(0).neighbours(i) for i in range(N)]
    expected = np.array(list(reference(median, Quadratics(), LR, near, **options)))
    got = trajectory(Robust(DSGD(**options), CoordinateMedian()), graph, Quadratics())
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", MIXING, ids=name)
def test_around_plain_mixing_a_rule_is_itself(rule):
    expected = trajectory(rule, JOINED, Quadratics())
    got = trajectory(Robust(rule, SCClip(math.inf)), JOINED, Quadratics())
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_local_steps_may_be_around_it_or_within():
    inside = trajectory(Robust(LocalSteps(DSGD(0.9), 3), CoordinateMedian()), JOINED, Quadratics())
    outside = trajectory(LocalSteps(Robust(DSGD(0.9), CoordinateMedian()), 3), JOINED, Quadratics())
    np.testing.assert_array_equal(inside, outside)
    assert not np.array_equal(inside, trajectory(Robust(DSGD(0.9), CoordinateMedian()), JOINED, Quadratics()))


@pytest.mark.parametrize("aggregator", [CoordinateTrimmedMean(0), SCClip(1.0)], ids=name)
@pytest.mark.parametrize(("rule", "sending"), [(DSGD(), 6), (LocalSteps(DSGD(), 3), 2)], ids=["every step", "some"])
def test_as_much_is_counted_as_by_mixing(rule, sending, aggregator):
    run = driver(Robust(rule, aggregator), RING, Quadratics())
    for run.step in range(6):
        run.update(0.1, (None, None))
    messages = sending * 2 * N
    assert run.network.counts() == {"parameter_bytes": messages * 8 * P, "label_bytes": 0, "other_bytes": 0,
                                    "messages": messages}  # fmt: skip


def test_the_final_gossip_aggregates_too():
    run = driver(Robust(DSGD(), CoordinateMedian()), RING, Quadratics())
    before = run.stack.X.numpy().copy()
    run.combine(0, 0.1)
    near = [RING.mixing(0).neighbours(i) for i in range(N)]
    np.testing.assert_array_equal(run.stack.X.numpy(), [median(before, near, i) for i in range(N)])


@pytest.mark.parametrize("rule", [DSGD(0.9), QGDSGDm()], ids=name)
def test_blocks_of_columns_are_the_whole(rule, monkeypatch):
    same_in_blocks(Robust(rule, CoordinateTrimmedMean(1)), monkeypatch, Graph(Ring(), 4))


def test_only_two_that_take_columns_are_called_on_blocks():
    assert Robust(DSGD(), CoordinateMedian()).in_blocks
    assert not Robust(SharpnessAwareDSGD(), CoordinateMedian()).in_blocks
    assert not Robust(DSGD(), SCClip()).in_blocks


# ---------------------------------------------------------------------- numbers that are not finite


def test_a_row_that_is_not_finite_counts_as_lost():
    V = torch.arange(24.0).view(2, 3, 4)
    w = torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]])
    V[0, 2, 1], V[1, 1, 3] = math.nan, math.inf
    cleaned, weights = discard(V, w, by_column=False)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25, 0], [0.7, 0, 0.3]]))
    assert torch.equal(cleaned[0], V[0, [0, 1, 0]])
    assert torch.equal(cleaned[1], V[1, [0, 0, 2]])


def test_a_number_that_is_not_finite_is_the_nodes_own_in_its_column():
    V, w = torch.arange(12.0).view(1, 3, 4), torch.full((1, 3), 1 / 3)
    V[0, 2, 1] = -math.inf
    cleaned, weights = discard(V, w, by_column=True)
    V[0, 2, 1] = V[0, 0, 1]
    assert torch.equal(cleaned, V)
    assert torch.equal(weights, w)


def test_a_node_whose_own_row_is_not_finite_shows_it():
    V, w = torch.ones(1, 3, 4), torch.full((1, 3), 1 / 3)
    V[0, 0, 2] = math.nan
    for aggregator in (CoordinateMedian(), SCClip(1.0)):
        result = aggregator(*discard(V, w, aggregator.columnwise), SimpleNamespace(targets=None))
        assert not result.isfinite().all()


@pytest.mark.parametrize("aggregator", [CoordinateMedian(), Krum(0), SCClip(1.0)], ids=name)
@pytest.mark.parametrize("lie", [math.nan, math.inf, 1e300])
def test_one_liar_does_not_spoil_the_others(aggregator, lie):
    """Node 0 replaces its row by the lie before every step; its neighbours stay near the optima of the others."""
    run = driver(Robust(DSGD(), aggregator), RING, Quadratics())
    for run.step in range(30):
        run.stack.X[0] = lie
        run.stack.G.copy_(run.stack.gradient(run.stack.X))
        run.stack.G[0] = 0
        run.update(0.1, (None, None))
    assert run.stack.X[1:].abs().max() < 5


# ---------------------------------------------------------------------- rules and graphs

REFUSED = {
    "averages over all nodes": [AllReduce(), GossipPGA(), LocalSteps(AllReduce())],
    "swaps messages": [NGC(), CCL(), RelaySGD()],
    "sends nothing": [Isolated()],
    "aggregates already": [Robust(DSGD(), CoordinateMedian())],
    "acts node by node": [ADPSGD(), AsyncGossip(), SwarmSGD()],
    "sends weights with its parameters": [SGP(), LocalSteps(SGP())],
    "relies on the same weights in every step": [D2(), EDM(), GUT(), DecentLaM(), ChocoSGD(), AdaGossip()],
    "relies on sums over all nodes that no node leaves": [GradientTracking(), MomentumTracking()],
}


@pytest.mark.parametrize(("reason", "rule"), [(reason, rule) for reason, rules in REFUSED.items() for rule in rules],
                         ids=lambda value: value if isinstance(value, str) else name(value))  # fmt: skip
def test_rules_that_do_more_than_mix_are_refused_with_the_reason(reason, rule):
    message = f"gossip.rule: Robust takes rules that only mix, but {name(rule)} {reason}"
    with pytest.raises(UserError, match=message):
        Robust(rule, CoordinateMedian())


@pytest.mark.parametrize(("send", "does"), [
    (lambda ctx, X: ctx.mean(X), "averages over all nodes, so it must have 'mean' in sends"),
    (lambda ctx, X: ctx.swap(X[ctx.edges[:, 0]]), "swaps messages, so it must have 'swap' in sends"),
    (lambda ctx, X: ctx.receive(X), "aggregates already, so it must have 'receive' in sends"),
])  # fmt: skip
def test_a_rule_of_ones_own_that_does_not_say_so_is_refused_when_it_does_more(send, does):
    class Mine(Gossip):
        def update(self, X, G, state, ctx):
            send(ctx, X)
            return X

    with pytest.raises(UserError, match=f"Robust takes rules that only mix, but Mine {does}"):
        trajectory(Robust(Mine(), CoordinateMedian()), RING, Quadratics())


def test_an_aggregator_of_ones_own_that_returns_another_shape_is_refused():
    class Mine(Aggregator):
        def __call__(self, V, w, ctx):
            return V.mean((0, 1))

    with pytest.raises(UserError, match=rf"gossip: Mine returns \[{P}\]; allowed: a tensor of shape \[{N}, {P}\]"):
        trajectory(Robust(DSGD(), Mine()), RING, Quadratics())


def test_graphs_that_the_rule_or_the_aggregator_refuses_are_refused():
    with pytest.raises(UserError, match="QGDSGDm needs weights whose rows and columns sum to 1"):
        Robust(QGDSGDm(), CoordinateMedian()).check(Graph(Chain(), 5, "average"))
    with pytest.raises(UserError, match=r"gossip.aggregator.trim: 2 given; allowed: 0 to 1, as no node"):
        Robust(DSGD(), CoordinateTrimmedMean(2)).check(Graph(Chain(), 5))
    Robust(DSGD(), CoordinateTrimmedMean(1)).check(RING)


def test_the_loss_needs_whole_rows():
    class Mine(Aggregator):
        columnwise = True

        def __call__(self, V, w, ctx):
            return V[:, 0] * ctx.loss(V[:, 0])[:, None]

    with pytest.raises(UserError, match="Robust asks for the loss, so it must set columnwise = False"):
        trajectory(Robust(DSGD(), Mine()), RING, Quadratics())


# ---------------------------------------------------------------------- hooks and state


def test_hooks_and_state_of_the_rule_within_are_kept():
    class Watching(DSGD):
        def on_check(self, run):
            self.run = run

        def on_step_end(self, step):
            self.seen = step

        def state_dict(self):
            return {"seen": self.seen}

    rule, run = Robust(Watching(), BALANCE()), SimpleNamespace(epoch=1, epochs=2)
    rule.on_check(run)
    rule.on_step_end(step=7)
    assert rule.rule.run is rule.aggregator.run is run
    assert rule.state_dict() == {"seen": 7}
    assert not hasattr(rule, "on_epoch_end")


def test_ubar_sees_the_losses_of_what_it_received():
    """On the quadratics' own losses, a node never takes a row that is worse on its own loss, unless all are."""

    class WithLoss(Quadratics):
        def loss(self, X, *_):
            D = X - torch.tensor(self.c)
            return 0.5 * torch.einsum("ip,ipq,iq->i", D, torch.tensor(self.A), D)

    stack = WithLoss()
    half, near = stack.X - 0.1 * stack.gradient(stack.X), [RING.mixing(0).neighbours(i) for i in range(N)]
    run = driver(Robust(DSGD(), UBAR(1.0, 0.5)), RING, stack)
    stack.G.copy_(stack.gradient(stack.X))
    run.update(0.1, (None, torch.zeros(N)))
    got = stack.X.numpy()
    for i in range(N):
        cost = [0.5 * (x - stack.c[i]) @ stack.A[i] @ (x - stack.c[i]) for x in half.numpy()]
        good = [j for j in near[i] if cost[j] <= cost[i]] or [min(near[i], key=lambda j: cost[j])]
        expected = 0.5 * half[i].numpy() + 0.5 * half[good].numpy().mean(0)
        np.testing.assert_allclose(got[i], expected, rtol=1e-12, atol=1e-12)
