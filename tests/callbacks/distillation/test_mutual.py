"""Neighbours' models as teachers on a node's own samples."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from four_nodes import TRAIN, K, N, counted, everything, real_run, softmax, train

from lightning_idkd.callbacks import MutualKD
from lightning_idkd.graph import Chain
from lightning_idkd.network import Network


class NoLabels(Network):
    """Labels must not be sent."""

    def exchange(self, labels, step=0, **kwargs):
        raise AssertionError("labels were sent")


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.2, 3.0), (1.0, 0.5), (0.0, 1.0)])
def test_mutual_targets_are_own_labels_and_the_mean_of_the_neighbours_answers(weight, temperature):
    """The answers of a neighbour's parameters with a node's own norm statistics, which do not cross."""
    kd = MutualKD(start=1, weight=weight, temperature=temperature)
    run = real_run(kd, public=0, topology=Chain(), network=NoLabels)
    X, before = run.stack.X.clone(), counted(run)
    buffers = {k: b.clone() for k, b in run.stack.buffers.items()}
    assert not torch.equal(buffers["network.layers.1.0.running_mean"][0], buffers["network.layers.1.0.running_mean"][1])
    run.call("on_epoch_start", epoch=1)
    for i in range(N):
        x, y = everything(run.store, i)
        own = torch.tensor(TRAIN[i]) % K
        answers = []
        for j in [j for j in (i - 1, i + 1) if 0 <= j < N]:
            parameters = {slot.name: slot.view(X[j]) for slot in run.stack.layout}
            model = copy.deepcopy(run.stack.modules[i]).eval()
            with torch.no_grad():
                z = torch.func.functional_call(model, {**parameters, **{k: b[i] for k, b in buffers.items()}}, (x,))
            answers.append(softmax(z.numpy() / temperature))
        expected = (1 - weight) * np.eye(K)[own] + weight * np.mean(answers, 0)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    after = counted(run)
    # float64, six directed edges
    assert after["parameter_bytes"] - before["parameter_bytes"] == 6 * 8 * run.stack.parameters
    assert after["label_bytes"] == after["other_bytes"] == 0
    assert after["messages"] - before["messages"] == 6
    assert torch.equal(run.stack.X, X)
    assert run.stack.views_intact()
    assert all(torch.equal(run.stack.buffers[k], b) for k, b in buffers.items())
    assert train(run, 2).isfinite().all()


def test_mutual_distillation_goes_on_with_the_sets_as_they_are():
    """The same samples in the same order, only their labels change, at each exchange anew."""
    runs = [real_run(MutualKD(start=1, every=2), public=0) for _ in range(2)]
    order, targets = runs[0].store.order(3, 5), []
    for epoch in range(5):
        runs[0].call("on_epoch_start", epoch=epoch)
        targets.append(torch.cat([everything(runs[0].store, i)[1] for i in range(N)]))
        train(runs[0], 1)
        train(runs[1], 1)
    assert [not torch.equal(a, b) for a, b in pairwise(targets)] == [True, False, True, False]
    assert torch.equal(runs[0].store.order(3, 5), order)
    assert runs[0].store.sizes == [5, 6, 7, 8]
    assert runs[0].phase == "distil"
    assert not torch.equal(runs[0].stack.X, runs[1].stack.X)


class InTurns(Chain):
    """A chain that the last node is part of at even steps only."""

    period = 2

    def graph(self, nodes, step, seed):
        graph = super().graph(nodes, step, seed)
        graph.remove_edges_from([(nodes - 2, nodes - 1)] * step)
        return graph


def test_without_neighbours_mutual_distillation_leaves_the_labels():
    run = real_run(MutualKD(start=0, every=1), public=0, topology=InTurns(), steps=3)
    for epoch in range(2):
        run.call("on_epoch_start", epoch=epoch)
        hard = [(everything(run.store, i)[1] == 1).any(1).all() for i in range(N)]
        assert hard == [False, False, False, epoch == 0]  # before step 3 and step 4
        train(run, 1)


def test_mutual_distillation_has_no_labels_to_send():
    assert (MutualKD.public, MutualKD.calibrated, MutualKD().shares) == (False, False, "")
    assert MutualKD.label is MutualKD.aggregate is None
