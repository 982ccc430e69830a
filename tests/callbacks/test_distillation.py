"""What nodes send about public samples, how they average it, and when."""

from types import SimpleNamespace

import pytest
import torch

from callbacks import IDKD, ClassCount, Mean, VanillaKD
from lightning_idkd.callback import HOOKS, Selection
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Chain, Graph
from lightning_idkd.network import Labels, Network
from lightning_idkd.node import Outputs

PUBLIC = 6


def labels(rows):
    """Labels from {index: probabilities}."""
    index = torch.tensor(list(rows), dtype=torch.int64)
    return Labels(index, torch.tensor(list(rows.values())).reshape(len(rows), 2))


def as_dict(labels):
    return dict(zip(labels.index.tolist(), labels.probabilities.tolist(), strict=True))


class FakeRun:
    """Nodes on a chain whose outputs and selections are given; only what an exchange needs."""

    def __init__(self, outputs, kept, epochs=10):
        self.outputs, self.kept, self.epochs, self.step = outputs, kept, epochs, 0
        self.network = Network(Graph(Chain(), len(outputs)))
        self.stack, self.store = SimpleNamespace(n=len(outputs)), SimpleNamespace(distilled=None)
        self.calibrated, self.called = 0, []

    def predict_public(self, i):
        return Outputs(self.outputs[i])

    def calibrate(self, public):
        assert all(torch.equal(p.logits, o) for p, o in zip(public, self.outputs, strict=True))
        self.calibrated += 1
        empty = torch.empty(0)
        return [Selection(kept, 0.0, 0.5, empty, empty) for kept in self.kept]

    def distil(self, distilled):
        self.store.distilled = distilled

    def call(self, hook, **payload):
        assert {"run", *payload} == set(HOOKS[hook])
        self.called.append((hook, payload))


def chain_of_four():
    """Node i keeps public sample i, of which it alone has a label."""
    outputs = [torch.randn(PUBLIC, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    return FakeRun(outputs, [torch.arange(PUBLIC) == i for i in range(4)])


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


# ---------------------------------------------------------------------- averages


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
    run = chain_of_four()
    IDKD(start=0).on_epoch_start(run, 0)
    # one sample a node, 4 bytes of index and 3 of 4 bytes of probabilities, over 6 directed edges
    assert run.network.counts() == {"parameter_bytes": 0, "label_bytes": 6 * 16, "other_bytes": 0, "messages": 6}


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("cls", [IDKD, VanillaKD])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, r"distillation\.temperature: 0 "),
        ({"temperature": -1.0}, r"distillation\.temperature: -1\.0"),
        ({"every": 0}, r"distillation\.every: 0 "),
        ({"steps": "equl"}, r"distillation\.steps: 'equl'.*equal nor grow.*'equal'"),
    ],
)
def test_mistakes_are_refused_with_their_key(cls, options, said):
    with pytest.raises(UserError, match=said):
        cls(**options)


def test_a_start_beyond_the_last_epoch_is_refused_with_its_key():
    with pytest.raises(UserError, match=r"distillation\.start: 40 .*40 epochs"):
        IDKD(start=40).due(0, 40)
