"""Numbers about scores, labels and rows, against scikit-learn, counting, and closed forms."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_idkd.metrics import auroc, consensus_distance, homogeneity, quantile, roc, youden


def scores(ties, seed=0):
    """Positive and negative scores; with ``ties`` of seven values only."""
    rng = np.random.default_rng([seed, 5])
    positive, negative = rng.normal(0.7, 1, 83), rng.normal(0, 1, 141)
    if ties:
        positive, negative = (np.clip(np.round(s), -3, 3) for s in (positive, negative))
    return torch.tensor(positive), torch.tensor(negative)


@pytest.mark.parametrize("ties", [False, True])
def test_roc_and_auroc_are_scikit_learns(ties):
    positive, negative = scores(ties)
    truth, given = np.r_[np.ones(83), np.zeros(141)], np.r_[positive, negative]
    fpr, tpr, thresholds = roc_curve(truth, given, drop_intermediate=False)
    for got, expected in zip(roc(positive, negative), (thresholds, tpr, fpr), strict=True):
        np.testing.assert_allclose(got, expected[1:], rtol=0, atol=1e-15)  # theirs begins with an infinite threshold
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(truth, given), abs=1e-12)


def test_auroc_counts_the_pairs_in_order_and_half_of_the_ties():
    assert auroc(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0, 3.0])) == pytest.approx((2 + 1.5) / 6)
    assert auroc(torch.tensor([1.0, 1.0]), torch.tensor([1.0])) == 0.5
    assert auroc(torch.tensor([1.0]), torch.tensor([0.0])) == 1
    assert math.isnan(auroc(torch.tensor([1.0]), torch.tensor([])))
    assert math.isnan(auroc(torch.tensor([]), torch.tensor([1.0])))


def test_auroc_depends_on_the_order_of_scores_alone():
    positive, negative = scores(False)
    exact = auroc(positive, negative)
    assert auroc(1000 + 37 * positive, 1000 + 37 * negative) == exact  # far outside [0, 1], which others squash
    assert auroc(1e-6 * positive, 1e-6 * negative) == exact
    assert auroc(positive.exp(), negative.exp()) == exact
    assert auroc(-positive, -negative) == pytest.approx(1 - exact, abs=1e-12)


def test_auroc_of_close_float32_scores_is_exact():
    steps = torch.arange(100, dtype=torch.float32)
    assert auroc(50 + steps[1::2] * 2**-15, 50 + steps[::2] * 2**-15) == pytest.approx((50 * 51 / 2) / 2500)


def test_youden_on_an_example():
    # at 4: 1/4 - 0; at 3: 2/4 - 0; at 2: 3/4 - 1/3; at 1: 1 - 2/3
    assert youden(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([2.0, 1.5, 0.0])) == 3


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_youden_is_the_best_by_exact_counting_and_the_largest_of_equals(ties, seed):
    positive, negative = (s[:12] for s in scores(ties, seed))

    def j(t):
        return Fraction(int((positive >= t).sum()), len(positive)) - Fraction(int((negative >= t).sum()), len(negative))

    assert youden(positive, negative) == max(positive.tolist() + negative.tolist(), key=lambda t: (j(t), t))


def test_youden_takes_the_largest_of_equally_good_thresholds_despite_rounding():
    # J is 1/3 - 0 at 3 and 1 - 2/3 at 1, which differ in the last bit
    assert youden(torch.tensor([3.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])) == 3


def test_quantile_is_a_score_with_at_most_that_share_below():
    s = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])[torch.tensor([3, 0, 4, 1, 2])]
    assert [quantile(s, q) for q in (0, 0.19, 0.2, 0.5, 0.99)] == [s[i].item() for i in (1, 1, 3, 4, 2)]
    for size in (1, 7, 20, 100):
        s = torch.randn(size, generator=torch.Generator().manual_seed(size))
        for q in np.arange(100) / 100:
            t = quantile(s, q)
            assert t in s.tolist()
            assert (s < t).double().mean() <= q + 1e-12
            assert (s <= t).double().mean() > q - 1e-12  # no larger score would do


@pytest.mark.parametrize("k", [2, 5, 10])
def test_homogeneity_of_one_class_a_node_and_of_equal_nodes(k):
    one_each = 30 * torch.eye(k)
    assert homogeneity(one_each, one_each.sum(0)) == pytest.approx(1 - 1 / k)
    assert homogeneity(torch.ones(7, k), 100 * torch.ones(k)) == 0


def test_homogeneity_counts_mass_and_not_samples():
    # nodes (3/4, 1/4) and (1/2, 1/2) against (1/2, 1/2): half of |1/4| + |1/4|, and 0; nodes weigh the same
    assert homogeneity(torch.tensor([[3.0, 1.0], [500.0, 500.0]]), torch.tensor([10, 10])) == pytest.approx(0.125)
    soft = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.75, 0.25]]).sum(0)
    assert homogeneity(torch.stack([soft, soft]), torch.tensor([3, 1])) == pytest.approx(0, abs=1e-7)


def test_consensus_distance_is_the_rms_distance_over_the_norm_of_the_mean():
    assert consensus_distance(torch.tensor([[4.0, 4.0], [2.0, 4.0]])) == pytest.approx(1 / 5)
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    assert consensus_distance(rows) == 0
    offsets = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert consensus_distance(rows + offsets) == pytest.approx(math.sqrt((9 + 9 + 1 + 1) / 4) / 5)
    assert consensus_distance(1000 * (rows + offsets)) == pytest.approx(math.sqrt(5) / 5)
