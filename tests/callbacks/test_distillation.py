"""What nodes send about public samples, how they make one label of several, when, and how they learn from it."""

import copy
import inspect
import json
import math
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from callbacks import (
    DSGD,
    ERA,
    IDKD,
    MSP,
    ClassCount,
    ConfidenceMean,
    Fixed,
    Gossiped,
    LogitMean,
    Mean,
    MovingAverage,
    MutualKD,
    Packed,
    VanillaKD,
    Vote,
    Youden,
)
from lightning_idkd.callback import HOOKS, Callback, FineTuning, Selection
from lightning_idkd.cli import main
from lightning_idkd.config import TrainConfig
from lightning_idkd.data.partition import Split
from lightning_idkd.data.source import Images
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph, Ring
from lightning_idkd.models import CNN
from lightning_idkd.network import Labels, Network
from lightning_idkd.node import NodeModule, Outputs
from lightning_idkd.orchestrator import Orchestrator
from lightning_idkd.stack import NodeStack

PUBLIC = 6
K = 3


def labels(rows):
    """Labels from {index: probabilities}."""
    index = torch.tensor(list(rows), dtype=torch.int64)
    return Labels(index, torch.tensor(list(rows.values())).reshape(len(rows), 2))


def as_dict(labels):
    return dict(zip(labels.index.tolist(), labels.probabilities.tolist(), strict=True))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class FakeRun:
    """Nodes on a chain whose outputs and selections are given; only what an exchange needs."""

    def __init__(self, outputs, kept, epochs=10):
        self.outputs, self.kept, self.epochs, self.step = outputs, kept, epochs, 0
        self.network = Network(Graph(Chain(), len(outputs)))
        self.stack = SimpleNamespace(n=len(outputs), X=None, standing_on=lambda X: nullcontext())
        self.held = torch.tensor([[5, 0, 1], [0, 9, 2], [3, 3, 3], [0, 0, 20]]).repeat(3, 1)[: len(outputs)].int()
        self.store = SimpleNamespace(distilled=None, public=len(outputs[0]), k=K, counts=lambda: self.held)
        self.scores = [torch.zeros(len(z)) for z in outputs]
        self.calibrated, self.called, self.before = 0, [], []

    @contextmanager
    def exchanging(self):
        self.before.append(self.network.counts()["messages"])
        yield

    def predict_public(self, i):
        return Outputs(self.outputs[i])

    def calibrate(self, public):
        assert all(torch.equal(p.logits, o) for p, o in zip(public, self.outputs, strict=True))
        self.calibrated += 1
        empty = torch.empty(0)
        return [Selection(kept, 0.0, empty, score, empty) for kept, score in zip(self.kept, self.scores, strict=True)]

    def distil(self, distilled):
        self.store.distilled = distilled

    def call(self, hook, **payload):
        assert {"run", *payload} == set(HOOKS[hook])
        self.called.append((hook, payload))


def chain(nodes, public=None):
    """Node i keeps public sample i, of which it alone has a label."""
    public = public or nodes
    outputs = [torch.randn(public, K, generator=torch.Generator().manual_seed(i)) for i in range(nodes)]
    return FakeRun(outputs, [torch.arange(public) == i for i in range(nodes)])


def chain_of_four():
    return chain(4, PUBLIC)


def counted(run):
    return run.network.counts()


# ---------------------------------------------------------------------- real runs, tiny

N, SIZE, HELD_OUT = 4, 8, 8


def images(count, seed):
    pixels = torch.randint(256, (count, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images(pixels, torch.arange(count) % K, ("a", "b", "c"))


def split():
    """Node i has 5 + i training samples, most of class i, and 8 held out: 58 samples of the classes 0, 1, 2, 0, ..."""
    free, train = [list(range(c, 58, K)) for c in range(K)], []
    for i in range(N):
        train.append([free[i % K].pop() for _ in range(4 + i)] + [free[(i + 1) % K].pop()])
    rest = sorted(s for of in free for s in of)
    validation = [rest[i * HELD_OUT : (i + 1) * HELD_OUT] for i in range(N)]
    return Split(*([np.array(p) for p in part] for part in (train, validation)), "", np.zeros((N, K), np.int64), "IID", None)


TRAIN = [samples.tolist() for samples in split().train]


def real_run(distillation, calibration=None, *, topology=None, public=11, network=Network, engine="loop", dtype=torch.float64,
             norm="batch", epochs=10, steps=3, batch=4, private=None, seed=0):  # fmt: skip
    """All the parts of a run of four nodes with random images, whose rows lie apart; ``steps`` are trained."""
    store = Store(images(58, 1) if private is None else private, images(5, 2), images(public, 3) if public else None, split(),
                  range(N), batch=batch, tuning=distillation.tuning, dtype=dtype)  # fmt: skip
    stack = NodeStack(lambda: NodeModule(CNN(4, norm=norm).build(1, SIZE, K)), range(N), seed, dtype=dtype, engine=engine)
    stack.X.add_(0.3 * torch.randn(stack.X.shape, generator=torch.Generator().manual_seed(9)).to(dtype))
    run = Orchestrator(Fabric(accelerator="cpu", devices=1), stack, network(Graph(topology or Ring(), N)), store, DSGD(),
                       TrainConfig(epochs=epochs, batch_size=batch), calibration, distillation)  # fmt: skip
    train(run, steps)
    return run


def train(run, steps):
    """Losses [steps, rows] of some steps of an epoch."""
    order, losses, run.epoch_step = run.store.order(run.step, max(steps, 1)), [], 0
    for _ in range(steps):
        losses.append(run.train_step(order))
        run.call("on_step_end", step=run.step, losses=losses[-1])
    run.epoch_step = 0
    return torch.stack(losses) if losses else torch.empty(0, N)


def everything(store, i):
    """All that node ``i`` trains on, in order: images, targets times weights, and temperatures where there are some."""
    positions = torch.zeros(N, store.sizes[i], dtype=torch.int64)
    positions[i] = torch.arange(store.sizes[i])
    return [part[i] for part in store.batch(positions, 0)]


# ---------------------------------------------------------------------- one label of several


class TestClassCount:
    """Three nodes with 5, 2, 0 samples of class 0 and 1, 9, 9 of class 1."""

    def rule(self):
        rule = ClassCount()
        rule.histograms = {0: torch.tensor([5, 1]), 1: torch.tensor([2, 9]), 2: torch.tensor([0, 9])}
        return rule

    def test_the_label_of_the_node_with_most_samples_of_the_class_it_predicts_is_taken(self):
        received = {0: labels({4: [0.6, 0.4]}), 1: labels({4: [0.9, 0.1]}), 2: labels({4: [0.3, 0.7]})}  # 5, 2 and 9 samples
        assert as_dict(self.rule()(received)) == {4: pytest.approx([0.3, 0.7])}

    def test_the_first_of_equals_is_taken(self):
        received = {1: labels({4: [0.2, 0.8]}), 2: labels({4: [0.3, 0.7]})}
        assert as_dict(self.rule()(received)) == {4: pytest.approx([0.2, 0.8])}

    def test_a_node_that_did_not_keep_a_sample_has_no_say(self):
        """In the authors' code node 0 would win sample 7 with a label of zeros: class 0, of which it has most."""
        received = {0: labels({4: [0.6, 0.4]}), 1: labels({7: [0.9, 0.1]}), 2: labels({})}
        assert as_dict(self.rule()(received)) == {4: pytest.approx([0.6, 0.4]), 7: pytest.approx([0.9, 0.1])}

    def test_histograms_go_to_neighbours_and_are_counted(self):
        run = chain_of_four()
        run.store.counts = lambda: torch.arange(12, dtype=torch.int32).reshape(4, 3)
        rule = ClassCount()
        rule.prepare(run)
        assert rule.histograms[2].tolist() == [6, 7, 8]
        assert run.network.counts() == {"parameter_bytes": 0, "label_bytes": 0, "other_bytes": 6 * 3 * 4, "messages": 6}


def test_a_label_is_the_mean_over_those_that_kept_the_sample():
    received = {
        1: labels({0: [1.0, 0.0], 2: [0.5, 0.5]}),
        4: labels({5: [0.2, 0.8], 0: [0.4, 0.6]}),  # in an order of its own
        6: labels({2: [0.0, 1.0], 0: [0.1, 0.9]}),
    }
    mean = Mean()(received)
    assert mean.index.tolist() == [0, 2, 5]
    assert mean.index.dtype == torch.int64
    expected = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.2, 0.8]])
    torch.testing.assert_close(mean.probabilities, expected)


def test_senders_that_kept_nothing_have_no_vote():
    mean = Mean()({0: labels({}), 1: labels({3: [0.3, 0.7]}), 2: labels({})})
    assert as_dict(mean) == {3: pytest.approx([0.3, 0.7])}


def test_nothing_comes_of_nothing():
    mean = Mean()({0: labels({}), 1: labels({})})
    assert mean.index.shape == (0,)
    assert mean.probabilities.shape == (0, 2)


def test_averaging_leaves_the_messages_as_they_are():
    message = labels({0: [1.0, 0.0], 1: [0.5, 0.5]})
    Mean()({0: message, 1: message, 2: labels({0: [0.0, 1.0]})})
    assert as_dict(message) == {0: [1.0, 0.0], 1: [0.5, 0.5]}


KEPT = {0: [0, 1, 2, 3], 2: [1, 2, 3, 4], 5: [2, 3, 5], 6: [3, 6]}  # one to four voters a sample
SAMPLES = 7
TEMPERATURE = 0.2  # of ERA


def answers(weighted, sharpness=2.0):
    """What four nodes say of seven samples: {node: {sample: (raw logits, weight)}}; node 2 sends no weights."""
    g = torch.Generator().manual_seed(4)
    said = {}
    for node, kept in KEPT.items():
        logits = (sharpness * torch.randn(SAMPLES, K, generator=g)).double().numpy()
        weights = torch.rand(SAMPLES, generator=g).double().numpy() + 0.05
        said[node] = {s: (logits[s], weights[s] if weighted and node != 2 else 1.0) for s in kept}
    return said


def message(said, weighted):
    index = torch.tensor(list(said))
    p = torch.from_numpy(np.stack([softmax(z) for z, _ in said.values()])).float()
    return Labels(index, p, torch.tensor([w for _, w in said.values()]).float() if weighted else None)


HISTOGRAMS = {0: [5, 1, 4], 2: [2, 9, 4], 5: [0, 9, 8], 6: [7, 7, 7]}


def by_hand(name, voters):
    """A label from [(node, logits, weight)] of those that kept the sample, a loop a formula."""
    p = [softmax(z) for _, z, _ in voters]
    w = [weight for *_, weight in voters]
    if name == "LogitMean":
        return softmax(sum(wi * z for wi, (_, z, _) in zip(w, voters, strict=True)) / sum(w))
    if name == "ClassCount":
        held = [HISTOGRAMS[node][int(np.argmax(q))] for q, (node, *_) in zip(p, voters, strict=True)]
        return p[held.index(max(held))]
    if name == "ConfidenceMean":
        w = [wi * (1 + sum(q * np.log(q)) / np.log(K)) for wi, q in zip(w, p, strict=True)]
    if name == "Vote":
        p = [np.eye(K)[np.argmax(q)] for q in p]
    mean = sum(wi * q for wi, q in zip(w, p, strict=True)) / sum(w)
    return np.exp(mean / TEMPERATURE) / np.exp(mean / TEMPERATURE).sum() if name == "ERA" else mean


def rule(name):
    rules = {"Mean": Mean(), "LogitMean": LogitMean(), "ConfidenceMean": ConfidenceMean(), "ERA": ERA(TEMPERATURE),
             "Vote": Vote(), "ClassCount": ClassCount()}  # fmt: skip
    rules["ClassCount"].histograms = {node: torch.tensor(held) for node, held in HISTOGRAMS.items()}
    return rules[name]


every_rule = pytest.mark.parametrize("name", ["Mean", "LogitMean", "ConfidenceMean", "ERA", "Vote", "ClassCount"])


@every_rule
@pytest.mark.parametrize("weighted", [False, True])
def test_every_rule_is_its_formula_over_those_that_kept_the_sample(name, weighted):
    said = answers(weighted)
    sent = {node: message(of, weighted and node != 2) for node, of in said.items()}
    found = rule(name)(sent)
    assert found.index.tolist() == list(range(SAMPLES))
    assert (found.weights, found.size) == (None, None)
    voters = [[(node, *of[s]) for node, of in said.items() if s in of] for s in range(SAMPLES)]
    assert [len(v) for v in voters] == [1, 2, 3, 4, 1, 1, 1]
    np.testing.assert_allclose(found.probabilities, [by_hand(name, v) for v in voters], rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=0, atol=1e-6)


@every_rule
def test_who_did_not_keep_a_sample_does_not_matter_whatever_it_is_taken_for(name):
    """``combine`` gets something in its place, with a vote of 0."""
    probabilities = torch.rand(3, 5, K, generator=torch.Generator().manual_seed(1)).softmax(2)
    votes = torch.tensor([[1.0, 0, 1, 0, 0.3], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0.7]])
    found = rule(name).combine(probabilities, votes, [0, 2, 5])
    for garbage in (torch.zeros(K), torch.full((K,), 1 / K), torch.tensor([0.0, 1, 0])):
        other = probabilities.where(votes[..., None] > 0, garbage)
        torch.testing.assert_close(rule(name).combine(other, votes, [0, 2, 5]), found, rtol=0, atol=0)


@every_rule
def test_scaling_all_weights_changes_nothing(name):
    sent = {node: message(of, True) for node, of in answers(True).items()}
    half = {node: Labels(m.index, m.probabilities, m.weights / 2) for node, m in sent.items()}
    torch.testing.assert_close(rule(name)(half).probabilities, rule(name)(sent).probabilities)


def test_logit_means_stand_margins_of_sixty():
    z = torch.tensor([[[40.0, 0, -20]], [[-57.0, 3, 0]]])
    found = LogitMean().combine(z.softmax(2), torch.ones(2, 1), [0, 1])
    np.testing.assert_allclose(found, softmax(z.double().mean(0).numpy()), rtol=1e-4)


def test_logit_means_of_hard_labels_are_the_majority():
    hard = torch.eye(K)[torch.tensor([[0, 0], [1, 0], [1, 0]])]
    found = LogitMean().combine(hard, torch.ones(3, 2), [0, 1, 2])
    torch.testing.assert_close(found, torch.eye(K)[[1, 0]])


def test_sharpening_goes_from_the_uniform_to_the_most_probable_class():
    said = {0: labels({0: [0.6, 0.4], 1: [0.1, 0.9]}), 1: labels({0: [0.5, 0.5]})}
    soft, sharp = (ERA(t)(said).probabilities for t in (1e6, 1e-3))
    torch.testing.assert_close(soft, torch.full((2, 2), 0.5))
    torch.testing.assert_close(sharp, torch.tensor([[1.0, 0], [0, 1]]))
    mean = Mean()(said).probabilities
    entropies = [torch.special.entr(ERA(t)(said).probabilities).sum(1) for t in (0.1, 0.3, 1.0)]
    assert (entropies[0] < entropies[1]).all()
    assert (entropies[1] < entropies[2]).all()
    assert (ERA()(said).probabilities.argmax(1) == mean.argmax(1)).all()


def test_a_sure_label_outweighs_those_at_random():
    said = {0: labels({3: [1.0, 0]}), 1: labels({3: [0.5, 0.5], 4: [0.5, 0.5]}), 2: labels({4: [0.5, 0.5]})}
    assert as_dict(ConfidenceMean()(said)) == {3: pytest.approx([1, 0], abs=1e-5), 4: [0.5, 0.5]}


def test_votes_are_counted():
    said = {v: labels({8: p}) for v, p in enumerate([[0.51, 0.49], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]])}
    assert as_dict(Vote()(said)) == {8: [0.75, 0.25]}


# ---------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_labels_are_softmax_at_the_temperature_of_the_kept_samples(temperature):
    run = chain_of_four()
    run.kept = [torch.tensor([True, False, True, False, False, True])] * 4
    for sent, z in zip(IDKD(temperature=temperature).label(run), run.outputs, strict=True):
        assert sent.index.tolist() == [0, 2, 5]
        e = torch.exp(z[[0, 2, 5]] / temperature)
        torch.testing.assert_close(sent.probabilities, e / e.sum(1, keepdim=True))


def test_a_node_that_keeps_nothing_sends_no_label():
    run = chain_of_four()
    run.kept[2] = torch.zeros(PUBLIC, dtype=torch.bool)
    sent = IDKD().label(run)[2]
    assert sent.index.shape == (0,)
    assert sent.probabilities.shape == (0, 3)
    assert sent.nbytes == 0


def test_vanilla_kd_sends_every_label_without_calibration():
    run = chain_of_four()
    for sent, z in zip(VanillaKD(temperature=2.0).label(run), run.outputs, strict=True):
        assert sent.index.tolist() == list(range(PUBLIC))
        torch.testing.assert_close(sent.probabilities, (z / 2).softmax(1))
    assert run.calibrated == 0


# ---------------------------------------------------------------------- hard, sharpened, corrected labels


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("prior", [0.0, 0.5, 1.0])
def test_a_label_leaves_out_the_nodes_own_prior(prior, temperature):
    """Logits minus the log of add-one label frequencies, before the softmax."""
    run = chain_of_four()
    for i, sent in enumerate(VanillaKD(prior=prior, temperature=temperature).label(run)):
        frequency = (run.held[i].numpy() + 1) / (run.held[i].sum().item() + K)
        z = run.outputs[i].double().numpy() - prior * np.log(frequency)
        np.testing.assert_allclose(sent.probabilities, softmax(z / temperature), rtol=1e-5, atol=1e-7)


def test_a_prior_in_proportion_to_the_answers_leaves_nothing():
    """A node that answers with its label frequencies has learned nothing of the image."""
    run = chain_of_four()
    run.outputs = [(held + 1.0).log().expand(PUBLIC, K).clone() for held in run.held]
    for sent in VanillaKD(prior=1.0).label(run):
        torch.testing.assert_close(sent.probabilities, torch.full((PUBLIC, K), 1 / K))


@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_hard_labels_are_the_most_probable_class_after_the_correction(prior):
    run = chain_of_four()
    found = VanillaKD(hard=True, prior=prior, temperature=0.3).label(run)
    flipped = 0
    for i, sent in enumerate(found):
        z = run.outputs[i].numpy() - prior * np.log((run.held[i].numpy() + 1) / (run.held[i].sum().item() + K))
        assert sent.probabilities.tolist() == np.eye(K)[z.argmax(1)].tolist()
        flipped += (z.argmax(1) != run.outputs[i].numpy().argmax(1)).sum()
    assert (flipped > 0) == (prior > 0)


def test_selection_looks_at_uncorrected_answers():
    """`FakeRun.calibrate` asserts that it gets them."""
    run, plain = chain_of_four(), chain_of_four()
    sent, bare = IDKD(prior=1.0).label(run), IDKD().label(plain)
    assert run.calibrated == 1
    for a, b in zip(sent, bare, strict=True):
        assert torch.equal(a.index, b.index)
        assert not torch.equal(a.probabilities, b.probabilities)


def test_weights_are_the_ranks_of_the_kept_scores():
    run = chain_of_four()
    run.kept = [torch.tensor([True, True, False, True, True, False])] * 3 + [torch.zeros(PUBLIC, dtype=torch.bool)]
    run.scores = [torch.tensor([0.3, -7, 99, 5, 0.2, 98])] * 4
    *sent, nothing = IDKD(weighted=True).label(run)
    for message in sent:
        assert message.index.tolist() == [0, 1, 3, 4]
        assert message.weights.tolist() == [0.75, 0.25, 1.0, 0.5]
    assert nothing.weights.shape == (0,)


def test_weights_of_equal_scores_do_not_hang_on_anything_else():
    run = chain_of_four()
    run.kept = [torch.ones(PUBLIC, dtype=torch.bool)] * 4
    for message in IDKD(weighted=True).label(run):
        assert message.weights.tolist() == pytest.approx([(i + 1) / PUBLIC for i in range(PUBLIC)])


def test_weights_are_declared_and_cost_four_bytes():
    assert VanillaKD().shares == IDKD().shares == ""
    assert IDKD(weighted=True).shares == "ranks of the kept samples' scores"
    assert IDKD(aggregation=ClassCount()).shares == "class histograms of private data"
    both = IDKD(aggregation=ClassCount(), weighted=True).shares
    assert both == "class histograms of private data, ranks of the kept samples' scores"
    costs = []
    for weighted in (False, True):
        run = chain_of_four()
        IDKD(start=0, weighted=weighted).on_epoch_start(run, 0)
        costs.append(counted(run)["label_bytes"])
    assert costs == [6 * 16, 6 * 20]  # one sample over each of six directed edges


def test_weights_weigh():
    """Sample 0 is the best of node 0 and the worst of node 1."""
    run = chain(2)
    run.kept, run.scores = [torch.ones(2, dtype=torch.bool)] * 2, [torch.tensor([9.0, 1]), torch.tensor([-3.0, -2])]
    IDKD(start=0, weighted=True).on_epoch_start(run, 0)
    p = [z.softmax(1) for z in run.outputs]
    for distilled in run.store.distilled:
        torch.testing.assert_close(distilled.probabilities[0], (1.0 * p[0][0] + 0.5 * p[1][0]) / 1.5)
        torch.testing.assert_close(distilled.probabilities[1], (0.5 * p[0][1] + 1.0 * p[1][1]) / 1.5)
        assert distilled.weights is None


# ---------------------------------------------------------------------- when


def due(distillation, epochs):
    return [e for e in range(epochs) if distillation.due(e, epochs)]


def test_an_exchange_is_due_at_a_fraction_of_the_epochs_or_at_an_epoch():
    assert due(IDKD(), 60) == [36]
    assert due(IDKD(start=0.5), 7) == [3]
    assert due(IDKD(start=24), 40) == [24]
    assert due(IDKD(start=0), 5) == [0]


def test_exchanges_repeat_every_so_many_epochs():
    assert due(IDKD(start=24, every=4), 40) == [24, 28, 32, 36]
    assert due(VanillaKD(start=0.5, every=1), 6) == [3, 4, 5]


# ---------------------------------------------------------------------- exchanges on a chain


def test_relayed_labels_spread_one_hop_an_exchange():
    run, kd = chain_of_four(), IDKD(start=1, every=2, labels="relayed")
    own = [z[i].softmax(0).tolist() for i, z in enumerate(run.outputs)]
    hops = 0
    for epoch in range(10):
        kd.on_epoch_start(run, epoch)
        hops += epoch in (1, 3, 5, 7, 9)
        if not hops:
            assert run.store.distilled is None
            continue
        for i, distilled in enumerate(run.store.distilled):
            expected = {j: own[j] for j in range(4) if abs(i - j) <= hops}  # equal labels average to themselves
            assert as_dict(distilled) == {j: pytest.approx(p, abs=1e-6) for j, p in expected.items()}
    assert run.calibrated == 1


def test_fresh_labels_stay_with_the_neighbours():
    run, kd = chain_of_four(), IDKD(start=1, every=2)
    for epoch in range(10):
        kd.on_epoch_start(run, epoch)
    for i, distilled in enumerate(run.store.distilled):
        assert distilled.index.tolist() == [j for j in range(4) if abs(i - j) <= 1]
    assert run.calibrated == 5


def test_fresh_labels_are_those_of_the_nodes_as_they_are_now():
    run, kd = chain_of_four(), IDKD(start=1, every=1)
    kd.on_epoch_start(run, 1)
    run.outputs = [-z for z in run.outputs]
    kd.on_epoch_start(run, 2)
    torch.testing.assert_close(run.store.distilled[0].probabilities[1], run.outputs[1][1].softmax(0))


def test_an_exchange_averages_neighbours_and_self_and_tells_the_callbacks():
    run, kd = chain_of_four(), VanillaKD(start=2)
    for epoch in range(10):
        kd.on_epoch_start(run, epoch)
    p = [z.softmax(1) for z in run.outputs]
    expected = [(p[0] + p[1]) / 2, (p[0] + p[1] + p[2]) / 3, (p[1] + p[2] + p[3]) / 3, (p[2] + p[3]) / 2]
    for distilled, mean in zip(run.store.distilled, expected, strict=True):
        torch.testing.assert_close(distilled.probabilities, mean)
    [(hook, payload)] = run.called
    assert hook == "on_exchange_end"
    assert payload["epoch"] == 2
    assert payload["distilled"] is run.store.distilled


def test_an_exchange_costs_its_labels_on_every_directed_edge():
    run, kd = chain_of_four(), IDKD(start=0, every=1)
    kd.on_epoch_start(run, 0)
    # one sample a node, 4 bytes of index and 3 of 4 bytes of probabilities, over 6 directed edges
    assert run.network.counts() == {"parameter_bytes": 0, "label_bytes": 6 * 16, "other_bytes": 0, "messages": 6}
    kd.on_epoch_start(run, 1)
    assert run.before == [0, 6]  # the run is told before the first byte


@pytest.mark.parametrize("hops", [1, 2, 3, 9])
def test_hops_reach_exactly_so_many_neighbours_and_cost_bytes_each_time(hops):
    nodes = 6
    run = chain(nodes)
    own = [z[i].softmax(0).tolist() for i, z in enumerate(run.outputs)]
    IDKD(start=0, hops=hops).on_epoch_start(run, 0)
    for i, distilled in enumerate(run.store.distilled):
        expected = {j: own[j] for j in range(nodes) if abs(i - j) <= hops}
        assert as_dict(distilled) == {j: pytest.approx(p, abs=1e-6) for j, p in expected.items()}
    cost = 0  # at hop h a node sends what lay within h - 1 of it, 16 bytes each
    for h in range(1, hops + 1):
        known = [sum(abs(i - j) < h for j in range(nodes)) for i in range(nodes)]
        cost += sum(16 * known[i] * (2 if 0 < i < nodes - 1 else 1) for i in range(nodes))
    assert counted(run) == {"parameter_bytes": 0, "label_bytes": cost, "other_bytes": 0, "messages": 10 * hops}
    assert run.calibrated == 1


@pytest.mark.parametrize("hops", [1, 2, 4])
def test_hops_are_means_of_means(hops):
    run = chain_of_four()
    VanillaKD(start=0, hops=hops).on_epoch_start(run, 0)
    A = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]])
    power = np.linalg.matrix_power(A / A.sum(1, keepdims=True), hops)
    expected = np.einsum("ij,jsk->isk", power, np.stack([softmax(z.numpy()) for z in run.outputs]))
    for distilled, mean in zip(run.store.distilled, expected, strict=True):
        np.testing.assert_allclose(distilled.probabilities, mean, atol=1e-6)


def test_accumulated_labels_are_new_ones_over_older_ones_of_other_samples():
    run, kd = chain_of_four(), IDKD(start=0, every=1, labels="accumulated")
    kd.on_epoch_start(run, 0)
    old = [as_dict(d) for d in run.store.distilled]
    run.outputs = [2 * z for z in run.outputs]
    run.kept = [torch.isin(torch.arange(PUBLIC), torch.tensor([i, 4])) for i in range(4)]
    run.kept[0][0] = False  # node 0 no longer keeps its sample: node 1's and its own older label stay
    kd.on_epoch_start(run, 1)
    p = [z.softmax(1) for z in run.outputs]
    for i, distilled in enumerate(run.store.distilled):
        near = [j for j in range(4) if abs(i - j) <= 1]
        expected = {j: p[j][j].tolist() for j in near if j} | {4: (sum(p[j][4] for j in near) / len(near)).tolist()}
        expected |= {0: old[i][0]} if 0 in near else {}
        assert as_dict(distilled) == {j: pytest.approx(q, abs=1e-6) for j, q in sorted(expected.items())}
        assert distilled.index.tolist() == sorted(expected)
    assert run.calibrated == 2


def test_labels_below_the_confidence_are_dropped_after_averaging():
    run = chain(2, 3)
    run.outputs = [torch.tensor([[4.0, 0, 0], [4, 0, 0], [0, 0, 0]]), torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 0, 0]])]
    p = [softmax(z.double().numpy()) for z in run.outputs]
    largest = ((p[0] + p[1]) / 2).max(1)  # 0.96, 0.49, 0.33
    for least, kept in ((0.0, [0, 1, 2]), (0.4, [0, 1]), (0.6, [0]), (largest[0] + 1e-3, []), (1.0, [])):
        VanillaKD(start=0, min_confidence=least).on_epoch_start(run, 0)
        assert [d.index.tolist() for d in run.store.distilled] == [kept, kept]
        assert all(d.probabilities.shape == (len(kept), K) for d in run.store.distilled)


def test_labels_everyone_is_sure_of_pass_a_confidence_of_one():
    run = chain(2, 3)
    run.outputs = [torch.tensor([[4.0, 0, 0], [4, 0, 0], [0, 1, 0]]), torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 1, 0]])]
    VanillaKD(start=0, hard=True, min_confidence=1.0).on_epoch_start(run, 0)
    assert run.store.distilled[0].index.tolist() == [0, 2]


@pytest.mark.parametrize("labels_", ["fresh", "relayed"])
def test_labels_are_encoded_at_every_hop_and_exchange(labels_):
    """Half floats: a label of 5 bytes of head, 1 of bitmap, 2 a class, as sent by each end of 3 edges."""
    run, kd = chain_of_four(), VanillaKD(start=0, every=1, hops=2, labels=labels_, encoding=Packed("float16"))
    for epoch in range(3):
        kd.on_epoch_start(run, epoch)
        assert counted(run)["label_bytes"] == (epoch + 1) * 2 * 6 * (5 + 1 + PUBLIC * K * 2)
    A = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]])
    power = np.linalg.matrix_power(A / A.sum(1, keepdims=True), 6 if labels_ == "relayed" else 2)
    expected = np.einsum("ij,jsk->isk", power, np.stack([softmax(z.numpy()) for z in run.outputs]))
    for distilled, mean in zip(run.store.distilled, expected, strict=True):
        np.testing.assert_allclose(distilled.probabilities, mean, atol=2e-3)
        assert (distilled.probabilities.numpy() != mean).any()


# ---------------------------------------------------------------------- in a run


def test_all_that_is_kept_is_vanilla_kd():
    some = [real_run(d, c) for d, c in ((IDKD(start=0), Fixed(MSP(), threshold=-1e6)), (VanillaKD(start=0), None))]
    for run in some:
        run.call("on_epoch_start", epoch=0)
        assert run.ood["kept_fraction"] == 1.0
    for a, b in zip(*(run.store.distilled for run in some), strict=True):
        assert a.index.tolist() == list(range(11))
        assert torch.equal(a.probabilities, b.probabilities)
    assert torch.equal(train(some[0], 4), train(some[1], 4))
    assert counted(some[0]) == counted(some[1])


def test_where_nobody_keeps_anything_training_goes_on_and_each_node_says_so_once(capsys):
    """On private samples alone, and nothing but parameters is sent."""
    run = real_run(IDKD(start=0, every=1), Fixed(MSP(), threshold=1e6))
    before = counted(run)
    for epoch in range(3):
        run.epoch = epoch
        run.call("on_epoch_start", epoch=epoch)
        assert [len(d) for d in run.store.distilled] == [0] * N
        assert run.store.sizes == [5, 6, 7, 8]
        assert train(run, 3).isfinite().all()
    assert counted(run)["label_bytes"] == before["label_bytes"] == 0
    assert (run.ood["kept_fraction"], run.ood["keeps_none"]) == (0.0, 1.0)
    said = capsys.readouterr().out
    assert [said.count(f"node {i} keeps no public samples") for i in range(N)] == [1] * N


@pytest.mark.parametrize("tuning", [FineTuning(private_share=0.5), FineTuning(balance="cap"), FineTuning(balance="draw"),
                                    FineTuning(confidence=True, temperature=2.0)])  # fmt: skip
@pytest.mark.parametrize("steps", ["equal", "grow"])
def test_nothing_kept_is_no_matter_for_any_tuning(tuning, steps):
    run = real_run(IDKD(start=0, steps=steps, tuning=tuning), Fixed(MSP(), threshold=1e6))
    run.call("on_epoch_start", epoch=0)
    assert run.steps == math.ceil(26 / N / 4)
    assert train(run, 3).isfinite().all()


def test_one_node_alone_keeps_something():
    run = real_run(IDKD(start=0), Fixed(MSP(), threshold=0.0), topology=Chain())
    kept = [torch.zeros(11, dtype=torch.bool) for _ in range(N)]
    kept[0][[2, 7]] = True
    run.calibrate = lambda public: [Selection(k, 0.0, torch.empty(0), torch.zeros(11), torch.empty(0)) for k in kept]
    run.call("on_epoch_start", epoch=0)
    assert [d.index.tolist() for d in run.store.distilled] == [[2, 7], [2, 7], [], []]
    assert train(run, 3).isfinite().all()


@pytest.mark.parametrize("engine", ["loop", "vmap"])
@pytest.mark.parametrize(
    "tuning",
    [FineTuning(), FineTuning(weight=0.3), FineTuning(confidence=True), FineTuning(temperature=2.5),
     FineTuning(weight=2.0, confidence=True, temperature=0.5, private_share=0.5)],
)  # fmt: skip
def test_the_loss_is_the_weighted_soft_cross_entropy_at_its_temperature(tuning, engine):
    """w T^2 H(target, softmax(z / T)) of a distilled sample, plain cross-entropy of a private one, over the batch."""
    run = real_run(VanillaKD(start=0, tuning=tuning), engine=engine, norm="group")
    run.call("on_epoch_start", epoch=0)
    order = run.store.order(run.step, 1)
    models = [copy.deepcopy(m) for m in run.stack.modules]
    expected = torch.zeros(N, dtype=torch.float64)
    mixed = 0
    for i, (model, positions) in enumerate(zip(models, order, strict=True)):
        for p in positions.tolist():
            own = TRAIN[i]
            if p < len(own):
                target, weight, t = torch.eye(K, dtype=torch.float64)[own[p] % K], 1.0, 1.0
                pixels = images(58, 1).pixels[own[p]]
            else:
                target = run.store.distilled[i].probabilities[p - len(own)].double()
                pixels = images(11, 3).pixels[p - len(own)]
                weight, t = tuning.weight, tuning.temperature
                if tuning.confidence:
                    weight *= float(1 + (target * target.log()).sum() / math.log(K))
            x = (pixels.double() - run.store.mean[:, None, None]) / run.store.std[:, None, None]
            with torch.no_grad():
                z = model(x[None])[0]
            expected[i] -= weight * t**2 * (target * (z / t).log_softmax(0)).sum() / 4
            mixed += p >= len(own)
    assert 0 < mixed < 4 * N
    np.testing.assert_allclose(train(run, 1)[0], expected, rtol=1e-9)


# ---------------------------------------------------------------------- mutual distillation


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
    assert after["parameter_bytes"] - before["parameter_bytes"] == 6 * 8 * run.stack.parameters  # float64, six directed edges
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


# ---------------------------------------------------------------------- nothing private leaves a node


class Guarded(Network):
    """Lets pass what may leave a node, by type, and notes its size; a test sets ``run`` and what the method ``declares``."""

    declares = ""
    run = None

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sent = {"parameter": 0, "label": 0, "other": 0}
        self.ways, self.mixed, self.training = [], [], True

    def note(self, way, kind, nbytes):
        self.ways.append(way)
        self.sent[kind] += nbytes

    def mix(self, T, step=0, *, kind="parameter", messages=True):
        assert type(T) is Tensor
        assert (kind, T.dtype, len(T)) == ("parameter", torch.float64, N)
        if not self.training:  # a teacher's rows: those of the run, or what came of mixing them
            assert any(T is rows for rows in (self.run.stack.X, *self.mixed))
        assert T.shape[1] <= self.run.stack.parameters
        self.note("mix", kind, len(self.edges()) * T.shape[1] * 8)
        self.mixed.append(super().mix(T, step, kind=kind, messages=messages))
        return self.mixed[-1]

    def swap(self, M, step=0, *, kind="parameter", messages=True):
        raise AssertionError("no method here sends a message of its own to each neighbour")

    def all_reduce(self, T, *, kind="parameter", messages=True):
        assert self.run.distillation.steps == "grow"  # sizes of the sets
        assert (kind, T.shape, T.tolist()) == ("other", (N, 1), [[size] for size in self.run.store.sizes])
        self.note("all_reduce", kind, 2 * (N - 1) * 8)
        return super().all_reduce(T, kind=kind, messages=messages)

    def exchange(self, labels, step=0, *, kind="label"):
        assert kind == "label"
        for message in labels:
            assert type(message) is Labels
            assert set(vars(message)) == {"index", "probabilities", "weights", "size"}
            assert message.index.dtype == torch.int64
            assert torch.equal(message.index, message.index.unique())
            assert ((message.index >= 0) & (message.index < self.run.store.public)).all()
            assert message.probabilities.shape == (len(message), K)
            assert (message.probabilities >= 0).all()
            torch.testing.assert_close(message.probabilities.sum(1), torch.ones(len(message)))
            if message.weights is not None:
                assert "ranks of the kept samples' scores" in self.declares
                assert message.weights.shape == (len(message),)
                steps = message.weights * len(message)  # ranks and nothing finer
                torch.testing.assert_close(steps.sort().values, torch.arange(1.0, len(message) + 1), atol=0.1, rtol=0)
            assert message.size is None or type(message.size) is int
        self.note("exchange", kind, sum(2 * message.nbytes for message in labels))
        return super().exchange(labels, step, kind=kind)

    def share(self, T, step=0, *, kind="other"):
        assert type(T) is Tensor
        if kind == "parameter":
            assert T is self.run.stack.X
        elif T.dtype == torch.int32:
            assert "class histograms of private data" in self.declares
            assert torch.equal(T, self.run.store.counts())
        else:
            assert "thresholds" in self.declares
            assert (T.shape, T.dtype) == ((N, 1), torch.float64)
        self.note("share", kind, 2 * T.numel() * T.element_size())
        return super().share(T, step, kind=kind)


def test_the_double_covers_everything_that_sends():
    senders = {name for name, f in vars(Network).items() if inspect.isfunction(f) and "self.count(" in inspect.getsource(f)}
    assert senders == {"mix", "swap", "all_reduce", "exchange", "share"}
    assert senders <= set(vars(Guarded))
    transport = {"_fetch", "_trade", "_trade_objects", "report", "report_objects", "counts"}
    for name, f in vars(Network).items():
        if inspect.isfunction(f) and "dist." in inspect.getsource(f):
            assert name in transport, name


def youden(pooled=False):
    return Youden(MSP(), pooled=pooled)


WAYS = {
    "IDKD": (lambda: IDKD(start=0, every=1), youden, {"exchange"}, ""),
    "VanillaKD": (lambda: VanillaKD(start=0, every=1), None, {"exchange"}, ""),
    "MutualKD": (lambda: MutualKD(start=0, every=1), None, {"share"}, ""),
    **{
        r.__name__: (lambda r=r: IDKD(start=0, every=1, aggregation=r()), youden, {"exchange"}, "")
        for r in (Mean, LogitMean, ConfidenceMean, ERA, Vote)
    },
    "ClassCount": (lambda: IDKD(start=0, every=1, aggregation=ClassCount()), youden, {"exchange", "share"},
                   "class histograms of private data"),
    "Gossiped": (lambda: IDKD(start=0, every=1, teacher=Gossiped(3)), youden, {"exchange", "mix"}, ""),
    "MovingAverage": (lambda: IDKD(start=0, every=1, teacher=MovingAverage(0.5)), youden, {"exchange"}, ""),
    **{
        f"{values} top {top}": (lambda v=values, t=top: IDKD(start=0, every=1, encoding=Packed(v, t)), youden, {"exchange"}, "")
        for values in ("float32", "float16", "uint8")
        for top in (None, 2)
    },
    "weighted": (lambda: IDKD(start=0, every=1, weighted=True), youden, {"exchange"}, "ranks of the kept samples' scores"),
    "weighted uint8": (lambda: IDKD(start=0, every=1, weighted=True, encoding=Packed("uint8")), youden, {"exchange"},
                       "ranks of the kept samples' scores"),
    "pooled": (lambda: IDKD(start=0, every=1), lambda: youden(True), {"exchange", "share"}, "thresholds"),
    "prior, hard": (lambda: IDKD(start=0, every=1, prior=1.0, hard=True), youden, {"exchange"}, ""),
    "relayed": (lambda: IDKD(start=0, every=1, labels="relayed"), youden, {"exchange"}, ""),
    "accumulated, hops": (lambda: IDKD(start=0, every=1, labels="accumulated", hops=3, min_confidence=0.4), youden,
                          {"exchange"}, ""),
    "growing": (lambda: VanillaKD(start=0, every=1, steps="grow"), None, {"exchange", "all_reduce"}, "sizes of the nodes' sets"),
    "tuned": (lambda: IDKD(start=0, every=1, tuning=FineTuning(0.5, "cap", 0.5, True, 2.0)), youden, {"exchange"}, ""),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_only_parameters_and_labels_of_public_samples_and_what_is_declared_leave_a_node(way):
    distillation, calibration, ways, declared = WAYS[way]
    distillation = distillation()
    calibration = calibration and calibration()
    run = real_run(distillation, calibration, network=Guarded, public=11 if distillation.public else 0, steps=0)
    run.network.run = run
    run.network.declares = ", ".join([distillation.shares, calibration.shares if calibration else ""]).strip(", ")
    assert run.network.declares == declared
    train(run, 2)
    for epoch in range(3):
        run.network.ways, run.network.mixed, run.network.training = [], [], False
        run.call("on_epoch_start", epoch=epoch)
        assert set(run.network.ways) == ways
        run.network.training = True
        train(run, 2)
    assert {k: v for k, v in counted(run).items() if k != "messages"} == {f"{k}_bytes": v for k, v in run.network.sent.items()}
    assert run.network.sent["other"] == 0 or declared or "all_reduce" in ways
    assert (run.network.sent["label"] > 0) == distillation.public


def sent_by(distillation, private):
    """Every message of an exchange between nodes that stand on given rows, whatever their data."""
    run = real_run(distillation, network=Recording, private=private, steps=0)
    run.call("on_step_end", step=0, losses=None)  # a moving average begins
    run.call("on_epoch_start", epoch=0)
    return run.network.messages


class Recording(Network):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.messages = []

    def exchange(self, labels, step=0, **kwargs):
        self.messages += [part for message in labels for part in (message.index, message.probabilities)]
        return super().exchange(labels, step, **kwargs)


@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.5}, {"hard": True}, {"hops": 2}, {"aggregation": LogitMean()}, {"aggregation": ConfidenceMean()},
    {"aggregation": ERA()}, {"aggregation": Vote()}, {"teacher": Gossiped(2)}, {"teacher": MovingAverage()},
    {"encoding": Packed("uint8", 2)},
], ids=lambda options: "-".join(f"{k} {type(v).__name__}" for k, v in options.items()))  # fmt: skip
def test_labels_say_nothing_of_private_data_but_through_the_parameters(options):
    """Other private labels and, normalised alike, pixels in another order: the same messages to the last bit."""
    plain = images(58, 1)
    other = Images(plain.pixels.clone(), (plain.labels + 1) % K, plain.classes)
    for i in TRAIN:
        other.pixels[i] = other.pixels[i[::-1]]
    messages = [sent_by(VanillaKD(start=0, **copy.deepcopy(options)), data) for data in (plain, other)]
    assert len(messages[0]) == 2 * N * options.get("hops", 1)
    assert all(torch.equal(a, b) for a, b in zip(*messages, strict=True))


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("cls", [IDKD, VanillaKD])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, r"distillation\.temperature: 0 given; allowed: above 0"),
        ({"temperature": -1.0}, r"distillation\.temperature: -1\.0 given"),
        ({"temperature": math.inf}, r"distillation\.temperature: inf given"),
        ({"temperature": math.nan}, r"distillation\.temperature: nan given"),
        ({"prior": -0.5}, r"distillation\.prior: -0\.5 given; allowed: 0 or more"),
        ({"prior": math.inf}, r"distillation\.prior: inf given"),
        ({"hops": 0}, r"distillation\.hops: 0 given; allowed: 1 or more"),
        ({"min_confidence": 1.1}, r"distillation\.min_confidence: 1\.1 given; allowed: 0 to 1"),
        ({"min_confidence": -0.1}, r"distillation\.min_confidence: -0\.1 given"),
        ({"min_confidence": math.nan}, r"distillation\.min_confidence: nan given"),
        ({"every": 0}, r"distillation\.every: 0 "),
        ({"steps": "equl"}, r"distillation\.steps: 'equl'.*equal nor grow.*'equal'"),
    ],
)
def test_mistakes_are_refused_with_their_key(cls, options, said):
    with pytest.raises(UserError, match=said):
        cls(**options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ERA(0), r"distillation\.aggregation\.temperature: 0 given; allowed: above 0"),
        (lambda: ERA(math.inf), r"distillation\.aggregation\.temperature: inf given"),
        (lambda: MutualKD(temperature=0.0), r"distillation\.temperature: 0\.0 given; allowed: above 0"),
        (lambda: MutualKD(weight=1.5), r"distillation\.weight: 1\.5 given; allowed: 0 to 1"),
        (lambda: MutualKD(weight=-0.5), r"distillation\.weight: -0\.5 given"),
        (lambda: MutualKD(every=0), r"distillation\.every: 0 "),
    ],
)
def test_mistakes_in_the_parts_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_a_start_beyond_the_last_epoch_is_refused_with_its_key():
    with pytest.raises(UserError, match=r"distillation\.start: 40 .*40 epochs"):
        IDKD(start=40).due(0, 40)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--distillation.labels", "relaid"], ["distillation.labels", "relaid", "'relayed'", "fresh"]),
        (["--distillation.aggregation", "Meen"], ["distillation.aggregation", "'Mean'"]),
        (["--distillation.aggregation", "ERA", "--distillation.aggregation.temperature", "0"],
         ["distillation.aggregation.temperature", "above 0"]),
        (["--distillation.teacher", "Gosiped"], ["distillation.teacher", "'Gossiped'"]),
        (["--distillation.teacher", "Gossiped", "--distillation.teacher.steps", "0"],
         ["distillation.teacher.steps", "1 or more"]),
        (["--distillation.encoding", "Packed", "--distillation.encoding.values", "int4"],
         ["distillation.encoding.values", "int4", "uint8"]),
        (["--distillation.encoding", "Packed", "--distillation.encoding.top", "0"], ["distillation.encoding.top", "1 or more"]),
        (["--distillation.tuning.balance", "caps"], ["distillation.tuning.balance", "'cap'"]),
        (["--distillation.tuning.private_share", "1"], ["distillation.tuning.private_share", "between 0 and 1"]),
        (["--distillation.weighted", "2"], ["distillation.weighted", "2", "bool"]),
        (["--distillation", "MutualKD", "--distillation.hops", "2"], ["distillation.hops", "IDKD", "VanillaKD"]),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line_are_told_before_any_work(configs, tmp_path, capsys, arguments, words):
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), "--run.dir", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) <= 2
    assert "Traceback" not in said
    assert not [w for w in words if w not in said], said
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- resuming


class InterruptAt(Callback):
    """Asks to stop after these steps, as Ctrl-C does."""

    def __init__(self, steps: list[int]):
        self.steps = steps

    def on_step_end(self, run, step):
        run.interrupted = step in self.steps


VARIANTS = {
    "moving average": ["IDKD", "--distillation.teacher", "MovingAverage", "--distillation.teacher.decay", "0.8"],
    "cap": ["VanillaKD", "--distillation.tuning.balance", "cap", "--distillation.labels", "accumulated"],
    "draw": ["IDKD", "--distillation.tuning.balance", "draw", "--distillation.weighted", "true"],
    "private share": ["VanillaKD", "--distillation.tuning.private_share", "0.4", "--distillation.tuning.confidence", "true",
                      "--distillation.tuning.temperature", "2", "--distillation.encoding", "Packed",
                      "--distillation.labels", "relayed"],
    "mutual": ["MutualKD"],
}  # fmt: skip


def differences(a, b, path=""):
    """Where two checkpoints differ, times apart."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a if k not in ("seconds", "train_seconds") for d in differences(a[k], b[k], f"{path}.{k}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    equal = torch.equal(a, b) if isinstance(a, Tensor) else a == b or (a != a and b != b)
    return [] if equal else [path]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_run_ends_bit_equal(configs, tmp_path, capsys, variant):
    """Stopped within an epoch, between two exchanges; an epoch has 5 steps."""

    def fit(folder, stops):
        callback = f"[{{class_path: {__name__}.{InterruptAt.__name__}, init_args: {{steps: {stops}}}}}]"
        return main(["fit", "--config", str(configs / "ring_digits.yaml"), "--logger", "null", "--graph.nodes", "4",
                     "--train.epochs", "4", "--train.batch_size", "64", "--train.evaluate_every", "4",
                     "--train.evaluate_samples", "50", "--data.public.samples", "70", "--run.engine", "loop",
                     "--run.threads", "1", "--run.pictures", "false", "--distillation", *VARIANTS[variant],
                     "--distillation.start", "1", "--distillation.every", "2", "--run.dir", str(tmp_path / folder),
                     "--callbacks", callback, "--run.resume", "auto"])  # fmt: skip

    assert fit("whole", []) == 0
    declared = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("shares")]
    assert declared == (["ranks of the kept samples' scores"] if variant == "draw" else [])
    assert [fit("cut", [12]) for _ in range(2)] == [130, 0]
    whole, cut = (tmp_path / f / "ring_digits" / "latest" for f in ("whole", "cut"))
    kept = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, cut)]
    assert kept[0]["step"] == 20
    assert differences(*kept) == []
    found = [json.loads((f / "summary.json").read_text()) for f in (whole, cut)]
    for part in ("accuracy", "communication", "homogeneity", "ood"):
        assert found[0][part] == found[1][part]


class TestAlign:
    def test_labels_of_the_public_set_are_uniform_on_average(self):
        """Whatever the bias, here of 9 and 6 nats, and the temperature."""
        logits = 3 * torch.randn(500, K, generator=torch.Generator().manual_seed(0))
        logits[:, 0] += 9
        logits[:, -1] -= 6
        for temperature in (1.0, 2.0):
            labels = VanillaKD(align=True, temperature=temperature).soft(None, 0, logits)
            torch.testing.assert_close(labels.mean(0), torch.full((K,), 1 / K), rtol=1e-3, atol=0)

    def test_it_adds_one_number_to_each_class(self):
        logits = torch.randn(200, K, generator=torch.Generator().manual_seed(1))
        plain, aligned = (VanillaKD(align=align).soft(None, 0, logits).log() for align in (False, True))
        offset = (aligned - plain) - (aligned - plain)[:, :1]
        torch.testing.assert_close(offset, offset[:1].expand_as(offset), rtol=0, atol=1e-4)

    def test_a_class_bias_makes_no_difference(self):
        logits = torch.randn(200, K, generator=torch.Generator().manual_seed(2))
        bias = torch.linspace(-4, 4, K)
        one, other = (VanillaKD(align=True).soft(None, 0, z) for z in (logits, logits + bias))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
