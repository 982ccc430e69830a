"""Numbers about scores, labels and rows, against scikit-learn, counting, and closed forms."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score, roc_curve

from lightning_idkd.metrics import auroc, consensus_distance, heterogeneity, quantile, roc, square_distances, youden


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
def test_heterogeneity_of_one_class_a_node(k):
    one_each = 30 * torch.eye(k)
    # p = (1, 0, ...) and q = 1/k each: JS = H((p + q) / 2) - H(q) / 2
    a, b = (1 + 1 / k) / 2, 1 / (2 * k)
    js = -a * math.log2(a) - (k - 1) * b * math.log2(b) - math.log2(k) / 2
    assert heterogeneity(one_each, one_each.sum(0)) == pytest.approx({"tv": 1 - 1 / k, "js": js, "classes": 1})


@pytest.mark.parametrize("k", [2, 5, 10])
def test_heterogeneity_of_equal_nodes(k):
    assert heterogeneity(torch.ones(7, k), 100 * torch.ones(k)) == pytest.approx(
        {"tv": 0, "js": 0, "classes": k}, abs=1e-12
    )
    skewed = torch.arange(1.0, k + 1)
    found = heterogeneity(torch.stack([skewed, 5 * skewed]), 2 * skewed)
    assert found["tv"] == found["js"] == pytest.approx(0, abs=1e-12)
    assert 1 < found["classes"] < k


@pytest.mark.parametrize("c", [1, 3, 8])
def test_effective_classes_of_a_node_with_c_classes_alike_is_c(c):
    mass = torch.zeros(4, 8)
    mass[:, :c] = 25
    assert heterogeneity(mass, torch.ones(8))["classes"] == pytest.approx(c)
    # exp(H(1/2, 1/4, 1/4)) = 2 sqrt 2; the mean over nodes is of the numbers, not of the entropies
    two = heterogeneity(torch.tensor([[2.0, 1, 1], [7, 0, 0]]), torch.ones(3))
    assert two["classes"] == pytest.approx((2 * math.sqrt(2) + 1) / 2)


def test_divergence_of_two_points_in_bits():
    def h(p):
        return -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    for p, q in ((0.9, 0.5), (0.25, 0.75), (0.01, 0.02)):
        found = heterogeneity(
            torch.tensor([[p, 1 - p]], dtype=torch.float64), torch.tensor([q, 1 - q], dtype=torch.float64)
        )
        assert found["js"] == pytest.approx(h((p + q) / 2) - (h(p) + h(q)) / 2)
        assert found["tv"] == pytest.approx(abs(p - q))
    assert heterogeneity(torch.tensor([[1.0, 0]]), torch.tensor([0.0, 1])) == pytest.approx(
        {"tv": 1, "js": 1, "classes": 1}
    )


def test_divergence_is_scipys_distance_squared():
    mass = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    found = heterogeneity(mass, mass.sum(0))["js"]
    assert found == pytest.approx(
        np.mean([jensenshannon(row, mass.sum(0), base=2) ** 2 for row in mass.double()]), rel=1e-6
    )


def test_heterogeneity_counts_mass_and_not_samples():
    # nodes (3/4, 1/4) and (1/2, 1/2) against (1/2, 1/2): half of |1/4| + |1/4|, and 0; nodes weigh the same
    uneven = heterogeneity(torch.tensor([[3.0, 1.0], [500.0, 500.0]]), torch.tensor([10, 10]))
    assert uneven["tv"] == pytest.approx(0.125)
    soft = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.75, 0.25]]).sum(0)
    assert heterogeneity(torch.stack([soft, soft]), torch.tensor([3, 1]))["tv"] == pytest.approx(0, abs=1e-7)


def distance(rows):
    return consensus_distance(square_distances(rows, rows.mean(0)), rows.mean(0))


def test_consensus_distance_is_the_rms_distance_over_the_norm_of_the_mean():
    assert distance(torch.tensor([[4.0, 4.0], [2.0, 4.0]])) == pytest.approx(1 / 5)
    rows = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0]])
    assert distance(rows) == 0
    offsets = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert distance(rows + offsets) == pytest.approx(math.sqrt((9 + 9 + 1 + 1) / 4) / 5)
    assert distance(1000 * (rows + offsets)) == pytest.approx(math.sqrt(5) / 5)
