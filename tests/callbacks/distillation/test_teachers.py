"""Whose answers a node sends: its own, those of its row after more gossip, or of an average over its past."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from four_nodes import real_run, train

from lightning_idkd.callback import Teacher
from lightning_idkd.callbacks import IDKD, MSP, Fixed, Gossiped, MovingAverage, VanillaKD, Youden
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph, Ring, Topology
from lightning_idkd.network import Network
from lightning_idkd.nodes.stack import run_network
from lightning_idkd.topologies import Star


def rows_of(X, network=None, step=0):
    """What a teacher needs of a run."""
    return SimpleNamespace(stack=SimpleNamespace(X=X), network=network or Network(Graph(Ring(), len(X))), step=step)


def random(n=5, P=7, seed=0):
    return torch.randn(n, P, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class InTurns(Topology):
    """The edges 0-1 and 2-3 at even steps, 1-2 at odd ones."""

    period = 2

    def graph(self, nodes, step, seed):
        graph = Chain().graph(nodes, step, seed)
        graph.remove_edges_from([[(1, 2)], [(0, 1), (2, 3)]][step])
        return graph


def labels_of(run, rows):
    """Softmax of the answers that nodes with these rows [n, P] and their own norm statistics give to the public set."""
    found = []
    for i in range(run.stack.n):
        model = run.stack.model(rows[i], {k: b[i] for k, b in run.stack.buffers.items()})
        logits = run_network(
            model, run.store._batches(run.store.pool, torch.arange(run.store.public) + run.store.private)
        ).logits
        found.append(logits.softmax(1))
    return found


# ---------------------------------------------------------------------- gossip for labelling only


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("topology", [Ring(), Chain()], ids=["ring", "chain"])
def test_gossiped_rows_are_the_rows_times_the_weights_to_that_power(topology, steps):
    X = random()
    run, kept = rows_of(X, Network(Graph(topology, 5))), X.clone()
    W = run.network.graph.mixing(0).W
    np.testing.assert_allclose(Gossiped(steps).rows(run), np.linalg.matrix_power(W, steps) @ X.numpy(), atol=1e-14)
    assert torch.equal(X, kept)
    edges = {"Ring": 10, "Chain": 8}[type(topology).__name__]
    one_mix = edges * 7 * 8  # float64
    assert run.network.counts() == {"parameter_bytes": steps * one_mix, "label_bytes": 0, "other_bytes": 0,
                                    "messages": steps * edges}  # fmt: skip


def test_gossip_follows_a_graph_that_changes_from_the_step_of_the_run_on():
    X = random(4)
    run = rows_of(X, Network(Graph(InTurns(), 4)), step=7)
    even, odd = (run.network.graph.mixing(step).W for step in (0, 1))
    np.testing.assert_allclose(Gossiped(3).rows(run), odd @ even @ odd @ X.numpy(), atol=1e-14)


def test_gossip_by_column_stochastic_weights_divides_by_what_a_row_sums_to():
    graph = Graph(Star(), 5, "push_sum")
    T = Gossiped(4).rows(rows_of(X := random(), Network(graph)))
    W = np.linalg.matrix_power(graph.mixing(0).W, 4)
    assert abs(W.sum(1) - 1).max() > 0.1
    np.testing.assert_allclose(T, W @ X.numpy() / W.sum(1, keepdims=True), atol=1e-14)


def test_much_gossip_is_the_consensus_model():
    X = random()
    torch.testing.assert_close(Gossiped(200).rows(rows_of(X)), X.mean(0).expand_as(X))


@pytest.mark.parametrize("cls", [VanillaKD, IDKD])
def test_a_run_labels_with_gossiped_rows_and_goes_on_with_its_own(cls):
    calibration = Fixed(MSP(), threshold=-1e6) if cls is IDKD else None
    run, plain = (real_run(cls(start=0, teacher=t), calibration) for t in (Gossiped(3), None))
    X = run.stack.X.clone()
    buffers = {k: b.clone() for k, b in run.stack.buffers.items()}
    before = run.network.counts()
    W = torch.from_numpy(np.linalg.matrix_power(run.network.graph.mixing(0).W, 3))
    expected = labels_of(run, W @ X)
    for sent, p in zip(run.distillation.label(run), expected, strict=True):
        np.testing.assert_allclose(sent.probabilities, p, atol=1e-6)
    after = run.network.counts()
    assert after["parameter_bytes"] - before["parameter_bytes"] == 3 * 8 * 8 * run.stack.parameters
    assert after["messages"] - before["messages"] == 3 * 8
    assert after["label_bytes"] == after["other_bytes"] == 0
    assert torch.equal(run.stack.X, X)
    assert run.stack.views_intact()
    assert all(torch.equal(run.stack.buffers[k], b) for k, b in buffers.items())
    for r in (run, plain):
        r.store.distil(r.distillation.aggregate(r, [{0: labels} for labels in plain.distillation.label(plain)]), r.step)
    assert torch.equal(train(run, 3), train(plain, 3))  # the same labels, so the same training


def test_the_detector_judges_the_teachers_answers():
    run, consensus, own = (real_run(IDKD(start=0, teacher=t), Youden(MSP())) for t in (Gossiped(60), None, None))
    consensus.stack.X.copy_(run.stack.X.mean(0).expand_as(run.stack.X))
    judged = [torch.stack([s.public for s in selections(r)]) for r in (run, consensus, own)]
    torch.testing.assert_close(judged[0], judged[1], rtol=1e-4, atol=1e-4)
    assert (judged[0] - judged[2]).abs().max() > 0.01


def selections(run):
    """What a run's nodes decide when they are to label."""
    found, calibrate = [], run.calibrate

    def noted(public, offsets):
        found.extend(calibrate(public, offsets))
        return found

    run.calibrate = noted
    run.distillation.label(run)
    run.calibrate = calibrate
    return found


def test_rows_come_back_where_labelling_fails():
    run = real_run(VanillaKD(start=0, teacher=Gossiped(2)))
    X = run.stack.X.clone()
    run.answers = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.distillation.label(run)
    assert torch.equal(run.stack.X, X)


# ---------------------------------------------------------------------- average over the past


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_a_moving_average_is_the_sum_of_falling_weights(decay):
    """The first row weighs decay^(t-1), the one s steps ago (1 - decay) decay^s."""
    past = [random(seed=t) for t in range(6)]
    teacher, run = MovingAverage(decay), rows_of(torch.empty(5, 7, dtype=torch.float64))
    for t, X in enumerate(past):
        run.stack.X.copy_(X)  # in place, as in a run
        teacher.on_step_end(run)
        weights = [(1 - decay) * decay ** (t - s) if s else decay**t for s in range(t + 1)]
        assert sum(weights) == pytest.approx(1)
        expected = sum(w * x for w, x in zip(weights, past, strict=False))
        np.testing.assert_allclose(teacher.rows(run), expected, atol=1e-14)
    assert torch.equal(run.stack.X, past[-1])
    assert run.network.counts()["parameter_bytes"] == 0


def test_before_the_first_step_the_average_is_the_row():
    X = random()
    assert MovingAverage().rows(rows_of(X)) is X


@pytest.mark.parametrize("steps", [0, 3])
def test_the_average_survives_a_checkpoint(steps):
    X = random()
    run, teacher, fresh = rows_of(X), MovingAverage(0.7), MovingAverage(0.7)
    for _ in range(steps):
        X.mul_(1.5)
        teacher.on_step_end(run)
    saved = teacher.state_dict(run)
    X.mul_(1.5)
    teacher.on_step_end(run)  # what was saved does not move on
    X.div_(1.5)
    fresh.load_state_dict(saved, run)
    X.mul_(1.5)
    fresh.on_step_end(run)
    torch.testing.assert_close(fresh.rows(run), teacher.rows(run), rtol=1e-14, atol=0)
    assert Teacher().state_dict(run) == {}


def test_a_process_takes_its_own_rows_of_a_checkpoint():
    whole, X = random(), random(2, seed=1)
    run = rows_of(X, SimpleNamespace(rows=range(3, 5)))
    teacher = MovingAverage()
    teacher.load_state_dict({"mean": whole}, run)
    assert torch.equal(teacher.rows(run), whole[3:])


def test_a_run_labels_with_the_average_of_its_steps():
    run = real_run(VanillaKD(start=0, teacher=MovingAverage(0.6)), steps=0)
    mean = None
    for _ in range(4):
        train(run, 1)
        mean = run.stack.X.clone() if mean is None else 0.6 * mean + 0.4 * run.stack.X
    X = run.stack.X.clone()
    before = run.network.counts()
    for sent, p in zip(run.distillation.label(run), labels_of(run, mean), strict=True):
        np.testing.assert_allclose(sent.probabilities, p, atol=1e-6)
    assert run.network.counts() == before
    assert torch.equal(run.stack.X, X)
    assert run.stack.views_intact()


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gossiped(0), r"distillation\.teacher\.steps: 0 given; allowed: 1 or more"),
        (lambda: MovingAverage(1.0), r"distillation\.teacher\.decay: 1\.0 given; allowed: 0 to below 1"),
        (lambda: MovingAverage(-0.1), r"distillation\.teacher\.decay: -0\.1 given"),
        (lambda: MovingAverage(math.nan), r"distillation\.teacher\.decay: nan given"),
    ],
)
def test_mistakes_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=said):
        make()
