"""Rules that mix, or average over all nodes, only now and then."""

import numpy as np
import pytest
from quadratics import GRAPHS, LOCAL, LR, N, P, Quadratics, average, driver, same_in_blocks, sgd, trajectory

from lightning_idkd.callback import Gossip
from lightning_idkd.callbacks import (
    CCL,
    D2,
    DSGD,
    EDM,
    GUT,
    NGC,
    SGP,
    AllReduce,
    ChocoSGD,
    DecentLaM,
    GossipPGA,
    GradientTracking,
    Isolated,
    LocalSteps,
    QGDSGDm,
    RelaySGD,
)
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph, Ring

RING = GRAPHS["ring"]
EDGES, ROW = 2 * N, 8 * P


def by_turns(f, lrs, near, combine, momentum=0.0, nesterov=False, weight_decay=0.0):
    """SGD at every node, then ``combine(t)`` of all."""
    n = len(near)
    x, m = list(f.x0), [0.0] * n
    yield np.array(x)
    for t, lr in enumerate(lrs, 1):
        half = [sgd(i, x[i], f.A[i] @ (x[i] - f.c[i]), m, lr, momentum, nesterov, weight_decay) for i in range(n)]
        x = [combine(t)(half, near, i) for i in range(n)]
        yield np.array(x)


def mean(x, near, i):
    return sum(x) / len(x)


def own(x, near, i):
    return x[i]


NEAR = {k: [g.mixing(0).neighbours(i) for i in range(N)] for k, g in GRAPHS.items()}


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("options", LOCAL)
@pytest.mark.parametrize("graph", ["ring", "joined"])
@pytest.mark.parametrize(("rule", "combine"), [
    (lambda **o: GossipPGA(3, **o), lambda t: average if t % 3 else mean),  # Chen et al. 2021, Algorithm 1
    (lambda **o: LocalSteps(DSGD(**o), 3), lambda t: own if t % 3 else average),
    (lambda **o: LocalSteps(AllReduce(**o), 4), lambda t: own if t % 4 else mean),
])  # fmt: skip
def test_a_rule_takes_turns_as_its_paper_says(rule, combine, graph, options, weight_decay):
    options = options | {"weight_decay": weight_decay}
    expected = np.array(list(by_turns(Quadratics(), LR, NEAR[graph], combine, **options)))
    np.testing.assert_allclose(trajectory(rule(**options), GRAPHS[graph], Quadratics()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", LOCAL)
def test_an_average_in_every_step_is_all_reduce_and_one_that_never_comes_dsgd(options):
    got = trajectory(GossipPGA(1, **options), RING, Quadratics())
    np.testing.assert_array_equal(got, trajectory(AllReduce(**options), RING, Quadratics()))
    got = trajectory(GossipPGA(100, **options), RING, Quadratics())
    np.testing.assert_array_equal(got, trajectory(DSGD(**options), RING, Quadratics()))


@pytest.mark.parametrize(
    "rule", [DSGD(0.9), QGDSGDm(), GradientTracking(), SGP()], ids=lambda rule: type(rule).__name__
)
def test_with_every_step_mixed_a_rule_is_itself_and_with_none_it_runs_alone(rule):
    np.testing.assert_array_equal(
        trajectory(LocalSteps(rule, 1), RING, Quadratics()), trajectory(rule, RING, Quadratics())
    )
    alone = trajectory(LocalSteps(rule, 100), RING, Quadratics())
    for i in range(N):
        stack = Quadratics()
        stack.A, stack.c, stack.x0 = stack.A[i : i + 1], stack.c[i : i + 1], stack.x0[i : i + 1]
        stack.X, stack.G = stack.X[i : i + 1].clone(), stack.G[i : i + 1].clone()
        np.testing.assert_allclose(alone[:, i : i + 1], trajectory(rule, Graph(Ring(), 1), stack), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rule", "nbytes", "messages"), [
    (LocalSteps(DSGD(), 3), 2 * EDGES * ROW, 2 * EDGES),
    (LocalSteps(GradientTracking(), 3), 4 * EDGES * ROW, 4 * EDGES),
    (LocalSteps(AllReduce(), 3), 2 * 2 * (N - 1) * ROW, 2 * 2 * (N - 1) * N),
    (GossipPGA(3), 4 * EDGES * ROW + 2 * 2 * (N - 1) * ROW, 4 * EDGES + 2 * 2 * (N - 1) * N),
])  # fmt: skip
def test_only_what_is_sent_is_counted(rule, nbytes, messages):
    run = driver(rule, RING, Quadratics())
    for run.step in range(6):
        run.update(0.1, (None, None))
    assert run.network.counts() == {"parameter_bytes": nbytes, "label_bytes": 0, "other_bytes": 0, "messages": messages}


@pytest.mark.parametrize("rule", [GossipPGA(2, 0.9), LocalSteps(QGDSGDm(), 2), LocalSteps(SGP(), 3)])
def test_blocks_of_columns_are_the_whole(rule, monkeypatch):
    same_in_blocks(rule, monkeypatch)


EVERY_STEP = [RelaySGD(), ChocoSGD(), NGC(), CCL(), D2(), EDM(), DecentLaM(), GUT(), LocalSteps(Isolated())]


@pytest.mark.parametrize("rule", EVERY_STEP, ids=lambda rule: type(rule).__name__)
def test_rules_that_need_every_mixing_are_refused(rule):
    name = type(rule).__name__
    with pytest.raises(
        UserError, match=rf"gossip.rule: LocalSteps takes .* that may skip a mixing, but {name} needs every one"
    ):
        LocalSteps(rule)


def test_a_rule_of_ones_own_that_swaps_must_say_that_it_needs_every_mixing():
    class Swapping(Gossip):
        def update(self, X, G, state, ctx):
            ctx.swap(X[ctx.edges[:, 0]])
            return X

    with pytest.raises(UserError, match=r"gossip.rule: Swapping swaps messages, so it must set every_step = True"):
        trajectory(LocalSteps(Swapping()), RING, Quadratics())


def test_hooks_of_the_rule_within_are_called():
    class Watching(DSGD):
        def on_step_end(self, step):
            self.seen = step

    rule = LocalSteps(Watching())
    assert not hasattr(rule, "on_epoch_end")
    rule.on_step_end(step=7)
    assert rule.rule.seen == 7


def test_the_state_of_the_rule_within_is_kept():
    class Counting(DSGD):
        def state_dict(self):
            return {"count": 3}

        def load_state_dict(self, state):
            self.count = state["count"]

    rule = LocalSteps(Counting())
    rule.load_state_dict(rule.state_dict())
    assert rule.rule.count == 3


@pytest.mark.parametrize("make", [lambda: LocalSteps(DSGD(), 0), lambda: GossipPGA(0)])
def test_periods_below_one_are_refused(make):
    with pytest.raises(UserError, match=r"gossip\.(every|period): 0 given; allowed: 1 or more"):
        make()


def test_a_graph_that_the_rule_refuses_is_refused_around_it_too():
    with pytest.raises(UserError, match="QGDSGDm needs weights whose rows and columns sum to 1"):
        LocalSteps(QGDSGDm()).check(Graph(Chain(), 5, "average"))
