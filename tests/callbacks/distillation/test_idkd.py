"""What nodes send about public samples, when, and what comes of it."""

import numpy as np
import pytest
import torch
from four_nodes import PUBLIC, K, N, as_dict, chain, chain_of_four, counted, real_run, softmax, train

from lightning_idkd.callbacks import IDKD, MSP, ClassCount, Fixed, Packed, VanillaKD
from lightning_idkd.graph import Chain, Graph
from lightning_idkd.labels import Selection
from lightning_idkd.network import Network
from lightning_idkd.topologies import HypercubeOnePeer

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


def test_an_exchange_averages_neighbours_and_self_and_calls_the_callbacks():
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
        assert run.progress.ood["kept_fraction"] == 1.0
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
        run.progress.epoch = epoch
        run.call("on_epoch_start", epoch=epoch)
        assert [len(d) for d in run.store.distilled] == [0] * N
        assert run.store.sizes == [5, 6, 7, 8]
        assert train(run, 3).isfinite().all()
    assert counted(run)["label_bytes"] == before["label_bytes"] == 0
    assert (run.progress.ood["kept_fraction"], run.progress.ood["keeps_none"]) == (0.0, 1.0)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "no public samples are kept" in line)
    assert said.startswith("nodes 0 (threshold 1e+06, probability above 0.999), 1 (")


def test_one_node_alone_keeps_something():
    run = real_run(IDKD(start=0), Fixed(MSP(), threshold=0.0), topology=Chain())
    kept = [torch.zeros(11, dtype=torch.bool) for _ in range(N)]
    kept[0][[2, 7]] = True
    run.calibrate = lambda public, offsets: [
        Selection(k, 0.0, torch.empty(0), torch.zeros(11), torch.empty(0)) for k in kept
    ]
    run.call("on_epoch_start", epoch=0)
    assert [d.index.tolist() for d in run.store.distilled] == [[2, 7], [2, 7], [], []]
    assert train(run, 3).isfinite().all()


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


def test_hops_follow_a_graph_that_changes():
    """On a hypercube, one neighbour a step, three hops reach all eight nodes; votes of all weigh alike."""
    run = chain(8)
    run.network = Network(Graph(HypercubeOnePeer(), 8))
    VanillaKD(start=0, hops=3).on_epoch_start(run, 0)
    p = np.mean([softmax(z.double().numpy()) for z in run.outputs], axis=0)
    for distilled in run.store.distilled:
        np.testing.assert_allclose(distilled.probabilities, p, atol=1e-6)
