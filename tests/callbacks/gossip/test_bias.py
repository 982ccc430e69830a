"""Rules that reach the optimum of all data: exact diffusion and tracking, against their papers and on quadratics."""

import numpy as np
import pytest
import torch
from quadratics import (
    GRAPHS,
    LOCAL,
    LR,
    N,
    Quadratics,
    average,
    neighbours,
    same_as_the_paper,
    same_in_blocks,
    sgd,
    trajectory,
)

from lightning_idkd.callbacks import D2, DSGD, EDM, GUT, AllReduce, DecentLaM, GradientTracking, MomentumTracking
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Complete, Graph, Ring, Torus
from lightning_idkd.topologies import HypercubeOnePeer

RING = Graph(Ring(), 9)  # of 9, since with 8 the smallest eigenvalue is -1/3
ON = {"ring": RING, "joined": GRAPHS["joined"]}


def gradients(f, x, weight_decay):
    return [f.A[i] @ (x[i] - f.c[i]) + weight_decay * x[i] for i in range(len(x))]


def d2(f, lrs, near, weight_decay=0.0):
    """Tang et al. 2018, Algorithm 1, with the gradient before at its own learning rate."""
    n = len(near)
    x, before = list(f.x0), None
    yield np.array(x)
    for lr in lrs:
        g = gradients(f, x, weight_decay)
        if before is None:
            half = [x[i] - lr * g[i] for i in range(n)]
        else:
            x_old, g_old, lr_old = before
            half = [2 * x[i] - x_old[i] - lr * g[i] + lr_old * g_old[i] for i in range(n)]
        before, x = (x, g, lr), [average(half, near, i) for i in range(n)]
        yield np.array(x)


def exact_diffusion(f, lrs, near, momentum=0.0, nesterov=False, weight_decay=0.0, damped=False):
    """Adapt, correct, combine (Yuan et al. 2019); the adaptation with momentum, ``damped`` as in EDM."""
    n = len(near)
    x, m = list(f.x0), [0.0] * n
    psi = list(x)
    yield np.array(x)
    for lr in lrs:
        g = gradients(f, x, weight_decay)
        scale = 1 - momentum if damped else 1
        new = [sgd(i, x[i], scale * g[i], m, lr, momentum, nesterov, 0.0) for i in range(n)]
        phi = [new[i] + x[i] - psi[i] for i in range(n)]
        psi, x = new, [average(phi, near, i) for i in range(n)]
        yield np.array(x)


def edm(**options):
    return exact_diffusion(damped=True, **options)


def gradient_tracking(f, lrs, near, momentum=0.0, nesterov=False, weight_decay=0.0):
    """y_i estimates the mean gradient; sent as y_i, then x_i - lr y_i."""
    n = len(near)
    x, y, g_old, m = list(f.x0), [np.zeros_like(f.x0[0])] * n, [0.0] * n, [0.0] * n
    yield np.array(x)
    for lr in lrs:
        g = gradients(f, x, weight_decay)
        y = [average(y, near, i) + g[i] - g_old[i] for i in range(n)]
        half = [sgd(i, x[i], y[i], m, lr, momentum, nesterov, 0.0) for i in range(n)]
        x, g_old = [average(half, near, i) for i in range(n)], g
        yield np.array(x)


def momentum_tracking(f, lrs, near, momentum=0.9, weight_decay=0.0):
    """Takezawa et al. 2023, Algorithm 1, from u = c = 0."""
    n = len(near)
    x, u, c = list(f.x0), [0.0] * n, [np.zeros_like(f.x0[0])] * n
    yield np.array(x)
    for lr in lrs:
        g = gradients(f, x, weight_decay)
        u = [momentum * u[i] + g[i] for i in range(n)]
        x = [average(x, near, i) - lr * (u[i] - c[i]) for i in range(n)]
        told = [c[i] - u[i] for i in range(n)]
        c = [average(told, near, i) + u[i] for i in range(n)]
        yield np.array(x)


def decentlam(f, lrs, near, momentum=0.9, weight_decay=0.0):
    """Yuan et al. 2021, Algorithm 2."""
    n = len(near)
    x, m = list(f.x0), [0.0] * n
    yield np.array(x)
    for lr in lrs:
        g = gradients(f, x, weight_decay)
        half = [x[i] - lr * g[i] for i in range(n)]
        tilde = [(x[i] - average(half, near, i)) / lr for i in range(n)]
        m = [momentum * m[i] + tilde[i] for i in range(n)]
        x = [x[i] - lr * m[i] for i in range(n)]
        yield np.array(x)


def gut(f, lrs, near, scaling=0.9, momentum=0.0, nesterov=False, weight_decay=0.0, mixed=True):
    """Aketi et al. 2023, Algorithm 1: node i knows x_j of its neighbours, at the start as equal to its own."""
    n = len(near)
    x, m, before = list(f.x0), [0.0] * n, None
    known = [dict.fromkeys((*near[i], i), x[i]) for i in range(n)]

    def weighted(values, i):
        w = {j: 1 / (1 + max(len(near[i]), len(near[j]))) for j in near[i]}
        return sum(w[j] * values[j] for j in near[i]) + (1 - sum(w.values())) * values[i]

    def gossip(known, x, i):
        return weighted({j: known[i][j] - x[i] for j in known[i]}, i)

    yield np.array(x)
    for lr in lrs:
        rows = [x[i] + gossip(known, x, i) if mixed else x[i] for i in range(n)]
        delta, y = [g - gossip(known, x, i) / lr for i, g in enumerate(gradients(f, rows, weight_decay))], []
        for i in range(n):
            y.append(delta[i])
            if before is not None:
                x_old, known_old, delta_old, lr_old = before
                factor = 1 + momentum + (momentum**2 if nesterov else 0)
                told = {j: (known_old[i][j] - known[i][j]) / lr_old - factor * (known_old[i][j] - x_old[i]) / lr_old
                        for j in known[i]}  # fmt: skip
                y[i] = y[i] + scaling * (weighted(told, i) - delta_old[i])
        before = x, known, delta, lr
        x = [sgd(i, x[i], y[i], m, lr, momentum, nesterov, 0.0) for i in range(n)]
        known = [{j: x[j] for j in (*near[i], i)} for i in range(n)]
        yield np.array([x[i] + gossip(known, x, i) if mixed else x[i] for i in range(n)])


def tracked_steps(f, lrs, near, momentum=0.0, nesterov=False):
    """Gradient tracking as RelaySGD's code has it: c adds what the mean of all local steps is ahead of a node's own."""
    n = len(near)
    x, c, m = list(f.x0), [np.zeros_like(f.x0[0])] * n, [0.0] * n
    yield np.array(x)
    for lr in lrs:
        g = gradients(f, x, 0.0)
        u = [sgd(i, x[i], g[i], m, lr, momentum, nesterov, 0.0) - x[i] for i in range(n)]
        moved, told = [x[i] + u[i] + c[i] for i in range(n)], [c[i] + u[i] for i in range(n)]
        x, c = [average(moved, near, i) for i in range(n)], [average(told, near, i) - u[i] for i in range(n)]
        yield np.array(x)


DAMPED = [{"momentum": 0.0}, {"momentum": 0.8}]
CASES = [
    (D2, d2, {}),
    *[(D2, exact_diffusion, options) for options in LOCAL],
    *[(EDM, edm, options) for options in DAMPED],
    *[(GradientTracking, gradient_tracking, options) for options in LOCAL],
    *[(MomentumTracking, momentum_tracking, options) for options in DAMPED],
    *[(DecentLaM, decentlam, options) for options in DAMPED],
    *[
        (GUT, gut, options | {"scaling": 0.06 if options else 0.9, "mixed": m})
        for options in LOCAL
        for m in (True, False)
    ],
]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("graph", ON)
@pytest.mark.parametrize(("rule", "paper", "options"), CASES)
def test_a_rule_is_its_papers_algorithm_also_where_the_learning_rate_drops(rule, paper, options, graph, weight_decay):
    same_as_the_paper(rule, paper, options | {"weight_decay": weight_decay}, ON[graph])


@pytest.mark.parametrize("options", LOCAL)
def test_gradients_tracked_are_the_steps_tracked_until_the_learning_rate_drops(options):
    theirs = np.array(list(tracked_steps(Quadratics(), LR, neighbours(GRAPHS["joined"]), **options)))
    ours = trajectory(GradientTracking(**options), GRAPHS["joined"], Quadratics())
    np.testing.assert_allclose(ours[:11], theirs[:11], rtol=1e-9, atol=1e-9)
    assert np.abs(ours[12] - theirs[12]).max() > 1e-3


EVERY = [D2(0.5), EDM(), GradientTracking(0.9), MomentumTracking(), DecentLaM(), GUT(0.3, 0.5), GUT(mixed=False)]


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: type(rule).__name__)
def test_blocks_of_columns_give_the_same_bits_as_the_whole(rule, monkeypatch):
    same_in_blocks(rule, monkeypatch)


# ---------------------------------------------------------------------- the optimum


def distance(rule, graph, lr, steps=1500):
    """How far the worst node ends from the optimum of the sum of all quadratics."""
    stack = Quadratics(graph.nodes)
    optimum = np.linalg.solve(stack.A.sum(0), np.einsum("ipq,iq->p", stack.A, stack.c))
    return np.abs(trajectory(rule, graph, stack, [lr] * steps)[-1] - optimum).max()


@pytest.mark.parametrize("graph", ON.values(), ids=ON)
@pytest.mark.parametrize(
    "rule",
    [D2(), D2(0.5), EDM(), GradientTracking(), GradientTracking(0.5), MomentumTracking(0.8)],
    ids=lambda rule: type(rule).__name__,
)
def test_unlike_nodes_reach_the_optimum(rule, graph):
    assert distance(rule, graph, 0.05) < 1e-8


def test_the_optimum_is_reached_from_a_learning_rate_that_dropped():
    stack = Quadratics(9)
    optimum = np.linalg.solve(stack.A.sum(0), np.einsum("ipq,iq->p", stack.A, stack.c))
    seen = trajectory(D2(), RING, stack, [0.05] * 100 + [0.03] * 1800)
    np.testing.assert_allclose(seen[-1], np.broadcast_to(optimum, (9, 5)), rtol=0, atol=1e-8)


def test_dsgd_stalls_at_a_bias_that_shrinks_with_the_step_size():
    far = [distance(DSGD(), RING, lr) for lr in (0.04, 0.02, 0.01)]
    assert far[0] > 1e-2
    assert 1.5 < far[0] / far[1] < 2.5
    assert 1.5 < far[1] / far[2] < 2.5


def test_global_update_tracking_shrinks_dsgds_bias_by_its_scaling():
    far = [distance(GUT(scaling), RING, 0.02) for scaling in (0.0, 0.5, 0.9)]
    assert far[0] == pytest.approx(distance(DSGD(), RING, 0.02), rel=1e-6)
    assert far[1] == pytest.approx(far[0] / 2, rel=0.2)
    assert far[2] == pytest.approx(far[0] / 10, rel=0.2)


def test_decentlam_stalls_where_dsgd_does_and_local_momentum_farther_away():
    plain, heavy = distance(DSGD(), RING, 0.02), distance(DSGD(0.8), RING, 0.02)
    assert distance(DecentLaM(0.8), RING, 0.02) == pytest.approx(plain, rel=1e-6)
    assert heavy > 3 * plain


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize(("rule", "options", "factor"), [
    *[(rule, options, 1) for rule in (D2, GradientTracking) for options in LOCAL],
    *[(rule, options, 1) for rule in (MomentumTracking, DecentLaM) for options in DAMPED],
    (EDM, {"momentum": 0.8}, 0.2), (GUT, {"scaling": 0.7}, 1),
])  # fmt: skip
def test_one_node_is_centralised_sgd(rule, options, factor):
    alone = Graph(Ring(), 1)
    plain = {k: v for k, v in options.items() if k != "scaling"}
    expected = trajectory(DSGD(weight_decay=0.05, **plain), alone, Quadratics(1), [lr * factor for lr in LR])
    got = trajectory(rule(weight_decay=0.05, **options), alone, Quadratics(1))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", LOCAL)
@pytest.mark.parametrize("rule", [D2, GradientTracking])
def test_on_the_complete_graph_they_are_all_reduce(rule, options):
    graph = Graph(Complete(), N)
    expected = trajectory(AllReduce(**options), graph, together(N))
    np.testing.assert_allclose(trajectory(rule(**options), graph, together(N)), expected, rtol=0, atol=1e-12)


def together(n):
    """Nodes that start from the same row, so that those with local momentum keep it the same too."""
    stack = Quadratics(n)
    stack.X.copy_(stack.X[:1].expand_as(stack.X))
    return stack


def test_decentlam_from_one_row_on_the_complete_graph_is_all_reduce_with_momentum():
    graph = Graph(Complete(), N)
    expected = trajectory(AllReduce(0.8), graph, together(N))
    np.testing.assert_allclose(trajectory(DecentLaM(0.8), graph, together(N)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", [GradientTracking(), MomentumTracking()])
def test_tracking_keeps_the_mean_of_the_gradients(rule):
    """So the mean of the rows moves as if by the mean gradient."""
    stack = Quadratics()
    rule.momentum = 0.0
    seen = trajectory(rule, GRAPHS["joined"], stack)
    for t, lr in enumerate(LR):
        X = torch.tensor(seen[t])
        np.testing.assert_allclose(seen[t + 1].mean(0), (X - lr * stack.gradient(X)).mean(0), rtol=0, atol=1e-12)


REFUSED = [(D2(), Ring(), 8, "-0.3333", "-0.3333"), (EDM(), Torus(4, 4), 16, "-0.3333", "-0.6000"),
           (GUT(0.9), Torus(4, 4), 16, "-0.3571", "-0.6000")]  # fmt: skip


@pytest.mark.parametrize(("rule", "topology", "n", "least", "smallest"), REFUSED)
def test_weights_under_which_nodes_part_are_refused(rule, topology, n, least, smallest):
    with pytest.raises(
        UserError, match=rf"above {least}, .*{type(topology).__name__} is {smallest}; set graph.weights: lazy"
    ):
        rule.check(Graph(topology, n))


@pytest.mark.parametrize("rule", [D2(), GUT(0.9), GUT(0.5), GUT(0.05, 0.9, nesterov=True)])
def test_they_do_part_there(rule):
    with pytest.raises(UserError, match="lazy"):
        rule.check(Graph(Torus(4, 4), 16))
    assert distance(rule, Graph(Torus(4, 4), 16), 0.01, 300) > 1e3


@pytest.mark.parametrize("rule", [GUT(0.3), GUT(0.06, 0.9)])
def test_the_torus_is_taken_where_they_do_not(rule):
    rule.check(Graph(Torus(4, 4), 16))
    assert distance(rule, Graph(Torus(4, 4), 16), 0.005, 800) < 1


@pytest.mark.parametrize(("arguments", "below"), [((1.0,), "1"), ((0.1, 0.9), "0.1"), ((0.5, 0.5, True), "0.5")])
def test_scalings_that_feed_themselves_are_refused(arguments, below):
    with pytest.raises(UserError, match=rf"gossip.scaling: .* given; allowed: 0 to below 1 - momentum, {below}"):
        GUT(*arguments)


@pytest.mark.parametrize("rule", [D2(), EDM(), DecentLaM(), GUT()], ids=lambda rule: type(rule).__name__)
def test_graphs_that_change_are_refused(rule):
    """What the last step's weights mixed, this step's would take back: nodes part, whatever each one's spectrum."""
    with pytest.raises(
        UserError, match=rf"{type(rule).__name__} takes static graphs, but graph.topology HypercubeOnePeer changes"
    ):
        rule.check(Graph(HypercubeOnePeer(), 8, "lazy"))
