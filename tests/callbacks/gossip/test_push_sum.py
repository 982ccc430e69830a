"""Stochastic gradient push on directed graphs that change."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quadratics import GRAPHS, LOCAL, LR, N, P, Quadratics, driver, same_in_blocks, sgd, trajectory

from lightning_idkd.callbacks import DSGD, SGP
from lightning_idkd.graph import Graph, Ring
from lightning_idkd.mixing import Mixing


def sends(step):
    """Whom each node sends to: itself, the next one, and some others at random."""
    A = np.eye(N, dtype=bool) | np.roll(np.eye(N, dtype=bool), 1, 1)
    return A | (np.random.default_rng([7, step]).random((N, N)) < 0.2)


def mixing(step):
    A = sends(step)
    edges, share = np.argwhere(A & ~np.eye(N, dtype=bool)), 1 / A.sum(1)
    return Mixing(edges, share[edges[:, 0]], share)


PUSH = SimpleNamespace(nodes=N, mixing=mixing)


def push_sum(f, lrs, momentum=0.0, nesterov=False, weight_decay=0.0):
    """Assran et al. 2019, Algorithm 1: every node divides x and w among those it sends to; yields z and w."""
    x, w, z, m = list(f.x0), [1.0] * N, list(f.x0), [0.0] * N
    yield np.array(z), np.array(w)
    for step, lr in enumerate(lrs):
        A = sends(step)
        half = [
            x[i] + sgd(i, z[i], f.A[i] @ (z[i] - f.c[i]), m, lr, momentum, nesterov, weight_decay) - z[i]
            for i in range(N)
        ]
        x, pushed = [0.0] * N, [0.0] * N
        for j in range(N):
            for i in np.flatnonzero(A[j]):
                x[i] = x[i] + half[j] / A[j].sum()
                pushed[i] += w[j] / A[j].sum()
        w = pushed
        z = [x[i] / w[i] for i in range(N)]
        yield np.array(z), np.array(w)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("options", LOCAL)
def test_it_is_its_papers_algorithm_also_where_the_learning_rate_drops(options, weight_decay):
    options = options | {"weight_decay": weight_decay}
    expected = list(push_sum(Quadratics(), LR, **options))
    np.testing.assert_allclose(
        trajectory(SGP(**options), PUSH, Quadratics()), [z for z, _ in expected], rtol=1e-9, atol=1e-9
    )
    assert np.ptp(expected[-1][1]) > 0.1  # weights do differ


def test_rows_tend_to_the_mean_where_nothing_moves_them_and_final_gossip_goes_on_with_that():
    stack, start = Quadratics(), Quadratics().x0.mean(0)
    run = driver(SGP(), PUSH, stack)
    for run.step in range(5):
        run.update(0.1, (None, None))
    early = np.abs(stack.X.numpy() - start).max()
    for step in range(5, 65):
        run.combine(step, 0.1)
    assert early > 1e-9
    np.testing.assert_allclose(stack.X, np.broadcast_to(start, (N, P)), rtol=0, atol=1e-12)
    assert run.buffers["E"].std() > 0.1


@pytest.mark.parametrize("options", LOCAL)
def test_with_doubly_stochastic_weights_it_is_dsgd(options):
    graph = Graph(Ring(), N, "uniform")
    np.testing.assert_allclose(trajectory(SGP(**options), graph, Quadratics()),
                               trajectory(DSGD(**options), graph, Quadratics()), rtol=0, atol=1e-12)  # fmt: skip


def test_one_more_value_a_message_is_counted():
    run = driver(SGP(), GRAPHS["ring"], Quadratics())
    run.update(0.1, (None, None))
    sent = {"parameter_bytes": 2 * N * 8 * (P + 1), "label_bytes": 0, "other_bytes": 0, "messages": 2 * N}
    assert run.network.counts() == sent


def test_blocks_of_columns_are_the_whole(monkeypatch):
    same_in_blocks(SGP(0.9), monkeypatch)


def test_it_takes_column_stochastic_weights_and_keeps_a_narrow_buffer():
    assert SGP.takes == ("doubly", "column")
    run = driver(SGP(0.9), PUSH, Quadratics())
    assert {k: tuple(v.shape) for k, v in run.buffers.items()} == {"M": (N, P), "E": (N, 1)}
    assert not torch.any(run.buffers["E"])
