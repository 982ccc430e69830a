"""What an exchange can do about label skew: which labels are kept, how they weigh, and who draws them."""

import numpy as np
import pytest
import torch
from four_nodes import TRAIN, K, N, chain_of_four, images, real_run, softmax, train

from lightning_idkd import metrics
from lightning_idkd.callbacks import IDKD, LDA, MSP, Fixed, Mean, Refitted, SelfTraining, VanillaKD, ViM, Youden
from lightning_idkd.callbacks.heads.calibrated import Refit
from lightning_idkd.errors import UserError
from lightning_idkd.labels import FineTuning, Labels, Outputs

# ---------------------------------------------------------------------- which labels, and how they weigh


def test_labels_of_lacking_classes_alone_are_kept():
    """Node 2 has three samples of every class, so that it lacks none."""
    run, plain = chain_of_four(), chain_of_four()
    VanillaKD(start=0, lacking=True).on_epoch_start(run, 0)
    VanillaKD(start=0).on_epoch_start(plain, 0)
    lacks = [{1, 2}, {0, 2}, set(), {0, 1}]  # of [5, 0, 1], [0, 9, 2], [3, 3, 3], [0, 0, 20]
    kept = 0
    for few, found, every in zip(lacks, run.store.distilled, plain.store.distilled, strict=True):
        expected = [j for j, p in zip(every.index.tolist(), every.probabilities.tolist(), strict=True)
                    if int(np.argmax(p)) in few]  # fmt: skip
        assert found.index.tolist() == expected
        kept += len(expected)
    assert kept > 0
    assert len(run.store.distilled[2]) == 0


def test_agreement_is_one_minus_the_jensen_shannon_divergence():
    p = torch.tensor([[[1, 0, 0], [0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.5, 0.5, 0]],
                      [[0, 1, 0], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0, 0, 1]]], dtype=torch.float64)  # fmt: skip
    votes = torch.tensor([[1.0, 1, 0.2, 1], [1, 1, 1, 0]])
    a, b = p[:, 2].numpy()
    m = (a + b) / 2
    js = 0.5 * ((a * np.log(a / m)).sum() + (b * np.log(b / m)).sum())
    expected = [0, 1, 1 - js / np.log(2), 1]
    np.testing.assert_allclose(metrics.agreement(p, votes), expected, atol=1e-12)


def test_labels_are_weighed_by_agreement_after_the_last_hop_alone():
    run = chain_of_four()
    VanillaKD(start=0, agreement=True).on_epoch_start(run, 0)
    p = [softmax(z.double().numpy()) for z in run.outputs]
    for senders, labels in zip([[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]], run.store.distilled, strict=True):
        q = np.stack([p[j] for j in senders])
        h = lambda x: -(x * np.log(x)).sum(-1)  # noqa: E731
        expected = 1 - (h(q.mean(0)) - h(q).mean(0)) / np.log(len(senders))
        np.testing.assert_allclose(labels.weights, expected, rtol=1e-4, atol=1e-5)
    twice = chain_of_four()
    VanillaKD(start=0, agreement=True, hops=2).on_epoch_start(twice, 0)
    once, mean = chain_of_four(), Mean()
    VanillaKD(start=0).on_epoch_start(once, 0)
    for senders, labels in zip([[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]], twice.store.distilled, strict=True):
        expected = mean({j: once.store.distilled[j] for j in senders}, agreement=True)
        torch.testing.assert_close(labels.weights, expected.weights)


def test_relayed_labels_carry_no_weights():
    run = chain_of_four()
    method = VanillaKD(start=0, every=1, agreement=True, labels="relayed")
    method.on_epoch_start(run, 0)
    assert all(labels.weights is not None for labels in run.store.distilled)
    assert all(labels.weights is None for labels in method.label(run))


@pytest.mark.parametrize("balance", ["none", "cap"])
def test_the_loss_of_a_distilled_sample_is_multiplied_by_its_weight(balance):
    run = real_run(VanillaKD(start=0, tuning=FineTuning(weight=2.0, balance=balance)))
    weight = torch.linspace(0.1, 1, 11)
    probabilities = torch.eye(K)[torch.tensor([0] * 6 + [1] * 3 + [2] * 2)]
    given = [Labels(torch.arange(11), probabilities, weight) for _ in range(N)]
    given[1] = Labels(torch.arange(11), probabilities)  # a node without weights
    run.store.distil(given, 3)
    for i, (index, weights) in enumerate(
        zip(run.store._index.split(run.store.sizes), run.store._weights.split(run.store.sizes), strict=True)
    ):
        expected = [1.0 if s < 58 else 2.0 * (1.0 if i == 1 else float(weight[s - 58])) for s in index.tolist()]
        np.testing.assert_allclose(weights, expected)
    assert min(run.store.sizes) == 5 + (11 if balance == "none" else 8)  # 6, 3, 2 are capped at 3, 3, 2


def test_weights_survive_a_checkpoint():
    run = real_run(VanillaKD(start=0, agreement=True))
    run.call("on_epoch_start", epoch=0)
    from lightning_idkd.training.checkpoint import gather

    stored = gather(run)["distilled"]
    for (index, p, weights), labels in zip(stored, run.store.distilled, strict=True):
        assert torch.equal(index, labels.index)
        assert torch.equal(p, labels.probabilities)
        assert torch.equal(weights, labels.weights)


def test_newer_labels_come_over_older_ones_with_their_weights():
    new = Labels(torch.tensor([1, 4]), torch.eye(K)[[0, 1]], torch.tensor([0.5, 0.25]))
    old = Labels(torch.tensor([0, 4]), torch.eye(K)[[2, 2]], torch.tensor([0.75, 1.0]))
    both = new.over(old)
    assert both.index.tolist() == [0, 1, 4]
    assert both.weights.tolist() == [0.75, 0.5, 0.25]
    assert both.probabilities.argmax(1).tolist() == [2, 0, 1]


# ---------------------------------------------------------------------- detectors of corrected outputs


def test_the_detector_scores_corrected_outputs_if_asked():
    run = real_run(IDKD(start=0, prior=1.0, corrected=True), Fixed(MSP(), threshold=-100.0))
    public, found = run.answers(), []
    run.hooks.callbacks.append(
        type("Note", (), {"on_calibration_end": lambda self, selections: found.extend(selections)})()
    )
    run.distillation.label(run)
    for i, selection in enumerate(found):
        count = np.bincount([s % K for s in TRAIN[i]], minlength=K) + 1
        z = public[i].logits.double().numpy() - np.log(count / count.sum())
        p = softmax(z).max(1)
        np.testing.assert_allclose(selection.public, np.log(p / (1 - p)), rtol=1e-4, atol=1e-4)
        held = torch.cat([run.stack.modules[i].eval()(x) for x in run.store.private_batches(run.store.held_out(i))])
        p = softmax(held.detach().double().numpy() - np.log(count / count.sum())).max(1)
        np.testing.assert_allclose(selection.private, np.log(p / (1 - p)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_score_of_features_sees_the_offset_in_the_head(bias):
    head = torch.nn.Linear(5, K, bias=bias)
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    offset = torch.tensor([1.0, -2.0, 0.5])
    shifted = Outputs(head(features), features, head).shift(offset)
    torch.testing.assert_close(shifted.logits, head(features) + offset)
    torch.testing.assert_close(shifted.head(features), shifted.logits)
    assert shifted.head is not head


@pytest.mark.parametrize("score", [MSP(), ViM()])
def test_a_tiny_correction_changes_nothing(score):
    kept = []
    for corrected in (False, True):
        run = real_run(IDKD(start=0, prior=1e-9, corrected=corrected), Youden(score))
        kept.append([labels.index.tolist() for labels in run.distillation.label(run)])
    assert kept[0] == kept[1]


# ---------------------------------------------------------------------- how many private samples


def test_a_node_with_more_skew_has_fewer_private_samples_in_a_batch():
    """Node i has 4 + i samples of one class and 1 of another, of three classes."""
    run = real_run(VanillaKD(start=0, tuning=FineTuning(private_share="skew")), batch=10)
    run.call("on_epoch_start", epoch=0)
    order = run.store.order(3, 6).view(N, 6, 10)
    for i, positions in enumerate(order):
        n = 5 + i
        tv = 0.5 * (abs((n - 1) / n - 1 / 3) + abs(1 / n - 1 / 3) + 1 / 3)
        private = (positions < n).sum(1).tolist()
        assert private == [round(10 * (1 - tv / 2))] * 6
    assert train(run, 2).isfinite().all()


# ---------------------------------------------------------------------- teachers with a refitted head


def test_a_refitted_teacher_labels_with_the_head_of_all_samples():
    run = real_run(VanillaKD(start=0, teacher=Refitted(LDA(0.05), rounds=40)), norm="group", steps=0)
    run.stack.X.copy_(run.stack.X[:1].expand_as(run.stack.X))  # equal rows, so that features are those of one model
    before = run.stack.X.clone()
    labels = run.distillation.label(run)
    assert torch.equal(run.stack.X, before)
    x, y = [], []
    for samples in TRAIN:
        batches = run.store.private_batches(torch.tensor(samples))
        x += [run.stack.modules[0].eval().network.features(batch).detach().numpy() for batch in batches]
        y += [s % K for s in samples]
    x, y = np.concatenate(x).astype(float), np.array(y)
    means = np.stack([x[y == c].mean(0) for c in range(K)])
    around = x - means[y]
    F = x.shape[1]
    covariance = around.T @ around / len(x)
    covariance = 0.95 * covariance + 0.05 * np.trace(covariance) / F * np.eye(F)
    weight = np.linalg.solve(covariance, means.T).T
    pixels = images(11, 3).pixels.double()
    scaled = (pixels - run.store.inputs.mean[:, None, None]) / run.store.inputs.std[:, None, None]
    features = run.stack.modules[0].network.features(scaled).detach().numpy()
    expected = softmax(features @ weight.T - 0.5 * (weight * means).sum(1))
    for message in labels:
        np.testing.assert_allclose(message.probabilities, expected, rtol=1e-4, atol=1e-5)


def test_a_refitted_teacher_says_what_it_sends():
    assert "second moments" in VanillaKD(teacher=Refitted()).shares
    with pytest.raises(UserError, match=r"distillation\.teacher\.rounds: 0 given; allowed: 1 or more"):
        Refitted(rounds=0)


def test_a_refitted_teacher_refuses_a_network_without_features():
    run = real_run(VanillaKD(start=0, teacher=Refitted()))
    for module in run.stack.modules:
        module.network.head.bias = None
    with pytest.raises(UserError, match=r"distillation\.teacher: Refitted needs a trained head with a bias"):
        run.call("on_check")


# ---------------------------------------------------------------------- labels for oneself

SURE = torch.tensor([[4.0, 0, 0]] * 4 + [[0, 4.0, 0]] * 2 + [[0.0, 1.0, 0]] * 3 + [[0, 0, 0.5]] * 1)


def test_a_sample_is_kept_where_its_class_is_sure_enough():
    p = np.exp(4) / (np.exp(4) + 2)
    labels = SelfTraining(confidence=p - 1e-3, align=False).draw(SURE)
    assert labels.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert labels.probabilities.argmax(1).tolist() == [0] * 4 + [1] * 2
    assert labels.probabilities.sum(1).tolist() == [1.0] * 6
    assert len(SelfTraining(confidence=p + 1e-3, align=False).draw(SURE)) == 0


def test_a_flexible_threshold_is_lower_for_classes_that_few_are_sure_of():
    """Sure: 4 of class 0, 2 of class 1, none of class 2; 4 are not sure. So the shares are 1, 1/2 and 0."""
    labels = SelfTraining(confidence=0.9, flexible=True, align=False).draw(SURE)
    threshold = [0.9, 0.9 * 0.5 / 1.5, 0.0]
    p = softmax(SURE.double().numpy())
    expected = [j for j in range(10) if p[j].max() >= threshold[p[j].argmax()]]
    assert expected == list(range(10))
    assert labels.index.tolist() == expected
    few = torch.cat([SURE, torch.zeros(40, K) + torch.tensor([0.0, 0.01, 0])])  # 44 are not sure: the warm-up
    labels = SelfTraining(confidence=0.9, flexible=True, align=False).draw(few)
    shares = np.array([4, 2, 0]) / 44
    p = softmax(few.double().numpy())
    assert labels.index.tolist() == [j for j in range(50) if p[j].max() >= 0.9 * (shares / (2 - shares))[p[j].argmax()]]


def test_aligned_answers_are_uniform_on_average_before_the_threshold():
    z = torch.randn(300, K, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0, 0])
    counts = []
    for align in (False, True):
        counts.append(SelfTraining(confidence=0.0, align=align).draw(z).probabilities.sum(0))
    assert counts[0][0] > 250
    assert counts[1].max() < 140


def test_self_training_sends_nothing():
    run = real_run(SelfTraining(start=0, confidence=0.0))
    before = run.network.counts()
    run.call("on_epoch_start", epoch=0)
    assert run.network.counts()["label_bytes"] == before["label_bytes"]
    assert [len(labels) for labels in run.store.distilled] == [11] * N
    assert run.progress.ood["kept_fraction"] == 1
    run.distillation.confidence = 1.0
    run.call("on_epoch_start", epoch=1)
    assert run.progress.ood["kept_fraction"] == 0
    assert train(run, 2).isfinite().all()
    with pytest.raises(UserError, match=r"distillation\.confidence: 1\.5 given; allowed: 0 to 1"):
        SelfTraining(confidence=1.5)


# ---------------------------------------------------------------------- counts for the loss


@pytest.mark.parametrize("balance", ["none", "cap"])
@pytest.mark.parametrize("share", [None, 0.25, 0.9, "skew"])
def test_the_loss_may_count_distilled_labels_as_batches_have_them(share, balance):
    """Counts are in proportion to the labels of all batches of many steps."""
    tuning = FineTuning(count_distilled=True, private_share=share, balance=balance)
    run = real_run(VanillaKD(start=0, tuning=tuning))
    own = run.store.counts().double()
    assert torch.equal(run.store.loss_counts, own)
    run.call("on_epoch_start", epoch=0)
    steps = 11 * 5 * 6 * 7 * 8  # every walk ends with a whole permutation
    order = run.store.order(run.step, steps)
    for i, (positions, targets) in enumerate(zip(order, run.store._targets.split(run.store.sizes), strict=True)):
        drawn = targets[positions].mean(0)
        counts = run.store.loss_counts[i]
        np.testing.assert_allclose(counts / counts.sum(), drawn, atol=2e-3)
    assert torch.equal(run.store.counts().double(), own)
    np.testing.assert_allclose(run.store.log_prior.exp().sum(1), 1)


def test_counts_do_not_follow_balanced_draws():
    with pytest.raises(UserError, match=r"count_distilled: True given; allowed: only where balance is none or cap"):
        FineTuning(count_distilled=True, balance="draw")


def test_labels_of_lacking_classes_are_not_relayed():
    with pytest.raises(UserError, match=r"distillation\.lacking: True given; allowed: only with fresh or accumulated"):
        VanillaKD(lacking=True, labels="relayed")


def test_a_detector_of_corrected_outputs_needs_a_correction():
    with pytest.raises(UserError, match=r"distillation\.corrected: True given; allowed: only with prior or align"):
        IDKD(corrected=True)


def test_counts_stay_as_they_are_unless_asked():
    run = real_run(VanillaKD(start=0))
    run.call("on_epoch_start", epoch=0)
    assert torch.equal(run.store.loss_counts, run.store.counts().double())


# ---------------------------------------------------------------------- heads of private and distilled samples


@pytest.mark.parametrize("distilled", [False, True])
def test_a_head_may_count_distilled_samples_by_their_labels(distilled):
    run = real_run(VanillaKD(start=0), norm="group")
    run.call("on_epoch_start", epoch=0)
    found = Refit(LDA(), 1, 0.0, distilled).sum_features(run, 1)
    pixels, labels = [images(58, 1).pixels[TRAIN[1]]], [np.eye(K)[[s % K for s in TRAIN[1]]]]
    if distilled:
        pixels.append(images(11, 3).pixels)
        labels.append(run.store.distilled[1].probabilities.numpy())
    x = (torch.cat(pixels).double() - run.store.inputs.mean[:, None, None]) / run.store.inputs.std[:, None, None]
    f = run.stack.modules[1].eval().network.features(x).detach().numpy()
    y = np.concatenate(labels)
    second = (f.T @ f)[np.triu_indices(f.shape[1])]
    expected = np.concatenate([y.sum(0), (y.T @ f).ravel(), second])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
