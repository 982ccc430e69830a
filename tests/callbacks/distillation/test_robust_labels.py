"""Aggregations of labels when some senders lie."""

import numpy as np
import pytest
import torch
from four_nodes import chain, real_run

from lightning_idkd.callbacks import AgreementMean, Mean, Median, TrimmedMean, VanillaKD
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Labels

V, S, K = 5, 7, 3


def given(seed=0, missing=True):
    """Labels [v, s, k] and votes [v, s]; every sample has a vote at least."""
    rng = np.random.default_rng(seed)
    votes = (rng.random((V, S)) < 0.6) if missing else np.ones((V, S), bool)
    votes[seed % V] = True
    p = rng.dirichlet(np.ones(K), (V, S)) * votes[..., None]
    return p, votes


def trimmed(p, votes, trim):
    """Sample by sample and class by class."""
    out = np.zeros((S, K))
    for s in range(S):
        voting = [p[v, s] for v in range(V) if votes[v, s]]
        drop = min(trim, (len(voting) - 1) // 2)
        for c in range(K):
            values = sorted(label[c] for label in voting)
            kept = values[drop : len(values) - drop]
            out[s, c] = sum(kept) / len(kept)
    return out / out.sum(1, keepdims=True)


def combine(aggregation, p, votes):
    return aggregation.combine(torch.from_numpy(p), torch.from_numpy(votes.astype(float)), list(range(V))).numpy()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("trim", [0, 1, 2, 9])
def test_the_trimmed_mean_is_that_of_sorted_values(trim, seed):
    p, votes = given(seed)
    np.testing.assert_allclose(combine(TrimmedMean(trim), p, votes), trimmed(p, votes, trim), rtol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_median_is_numpys_scaled_to_sum_to_one(seed):
    p, votes = given(seed)
    expected = np.stack([np.median(p[votes[:, s], s], axis=0) for s in range(S)])
    np.testing.assert_allclose(combine(Median(), p, votes), expected / expected.sum(1, keepdims=True), rtol=1e-12)


def test_trimming_nothing_and_agreement_to_the_power_zero_are_the_mean():
    p, votes = given()
    mean = combine(Mean(), p, votes)
    for aggregation in (TrimmedMean(0), AgreementMean(0)):
        np.testing.assert_allclose(combine(aggregation, p, votes), mean, rtol=1e-12)


def test_labels_that_exclude_each_other_give_a_uniform_median():
    p = np.zeros((V, S, K))
    p[0, :, 0] = p[1, :, 1] = p[2, :, 2] = 1
    votes = np.zeros((V, S), bool)
    votes[:3] = True
    np.testing.assert_allclose(combine(Median(), p, votes), 1 / 3)


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_a_sender_counts_by_its_agreement_on_what_both_kept(power):
    p, votes = given(2)
    weights = np.ones(V)
    for i in range(V):
        agreements = []
        for j in range(V):
            both = [s for s in range(S) if votes[i, s] and votes[j, s]]
            if j != i and both:
                agreements.append(np.mean([1 - 0.5 * np.abs(p[i, s] - p[j, s]).sum() for s in both]))
        weights[i] = np.mean(agreements) ** power
    expected = np.zeros((S, K))
    for s in range(S):
        w = weights * votes[:, s]
        expected[s] = (w[:, None] * p[:, s]).sum(0) / w.sum()
    np.testing.assert_allclose(combine(AgreementMean(power), p, votes), expected, rtol=1e-12)


@pytest.mark.parametrize("aggregation", [TrimmedMean(1), Median(), AgreementMean(8.0)])
def test_one_liar_of_five_changes_little(aggregation):
    """Four nodes are nearly sure of class 0; the fifth is sure of another class."""
    p = np.tile([0.9, 0.06, 0.04], (V, S, 1))
    p[4] = [0.0, 0.0, 1.0]
    votes = np.ones((V, S), bool)
    assert combine(Mean(), p, votes)[:, 0].max() < 0.73
    assert combine(aggregation, p, votes)[:, 0].min() > 0.85


def test_alone_a_sender_keeps_its_labels():
    labels = Labels(torch.arange(4), torch.rand(4, K).softmax(1))
    for aggregation in (TrimmedMean(1), Median(), AgreementMean()):
        torch.testing.assert_close(aggregation({3: labels}).probabilities, labels.probabilities)


def test_more_trimming_than_a_node_has_labels_is_refused_with_its_bound():
    run = real_run(VanillaKD(start=0, aggregation=TrimmedMean(2)))
    said = r"distillation\.aggregation\.trim: 2 given; a node has 3 labels .* allowed: 1 or less"
    with pytest.raises(UserError, match=said):
        run.call("on_check")
    real_run(VanillaKD(start=0, aggregation=TrimmedMean(1))).call("on_check")
    with pytest.raises(UserError, match=r"distillation\.aggregation\.trim: -1 given"):
        TrimmedMean(-1)
    with pytest.raises(UserError, match=r"distillation\.aggregation\.power: -1 given"):
        AgreementMean(-1)


def test_exchanges_use_it():
    run, plain = chain(4, 6), chain(4, 6)
    run.kept = plain.kept = [torch.ones(6, dtype=torch.bool)] * 4
    for each, aggregation in ((run, Median()), (plain, Mean())):
        VanillaKD(start=0, aggregation=aggregation).on_epoch_start(each, 0)
    p = torch.stack([z.softmax(1) for z in run.outputs])
    expected = p[:3].median(0).values
    torch.testing.assert_close(run.store.distilled[1].probabilities, expected / expected.sum(1, keepdim=True))
    assert not torch.allclose(run.store.distilled[1].probabilities, plain.store.distilled[1].probabilities)
