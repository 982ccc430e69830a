"""Where the threshold lies, given scores of own samples and of others."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from lightning_idkd.callback import OodScore
from lightning_idkd.callbacks import MSP, Energy, Fixed, IdQuantile, Mixture, TargetKept, Youden
from lightning_idkd.errors import UserError

NONE = torch.empty(0)


def gaussian(mean, deviation, samples):
    """The quantiles of a Gaussian, float32."""
    return torch.tensor(norm.ppf((np.arange(samples) + 0.5) / samples, mean, deviation), dtype=torch.float32)


# ---------------------------------------------------------------------- Youden


def test_youden_separates_best():
    private, others = torch.tensor([1.0, 3, 4, 5, 6, 7, 8, 9]), torch.tensor([0.0, 1, 2, 2.5, 5, 9.5])
    # 7/8 - 2/6 at 3; the next best is 6/8 - 2/6 at 4
    assert Youden(MSP()).threshold(private, others) == 3
    assert Youden(MSP()).threshold(private.flip(0), others.roll(2)) == 3


def test_youden_of_scores_apart_is_the_least_own_score():
    assert Youden(MSP()).threshold(torch.tensor([7.0, 5, 6]), torch.tensor([1.0, 4])) == 5


def test_youden_where_all_scores_are_equal_is_that_score():
    assert Youden(MSP()).threshold(torch.ones(9), torch.ones(5)) == 1


# ---------------------------------------------------------------------- quantile, fixed, target


def test_id_quantile_gives_up_that_share_of_own_samples():
    private = torch.arange(100.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    for q in (0, 0.05, 0.5, 0.99):
        threshold = IdQuantile(MSP(), q).threshold(private, NONE)
        assert threshold == 100 * q
        assert (private >= threshold).double().mean() == pytest.approx(1 - q)


def test_id_quantile_takes_a_tie_whole():
    assert IdQuantile(MSP(), 0.5).threshold(torch.tensor([1.0, 2, 2, 2, 3]), NONE) == 2


def test_fixed_takes_a_probability_or_a_threshold_in_the_scores_unit():
    assert Fixed(MSP(), probability=0.98).threshold(NONE, NONE) == pytest.approx(math.log(49))
    assert Fixed(Energy(), threshold=-3.5).threshold(NONE, NONE) == -3.5
    assert Fixed(MSP(), threshold=0.0).threshold(NONE, NONE) == 0


def test_a_score_of_ones_own_may_be_fixed_by_threshold_only():
    class Largest(OodScore):
        def __call__(self, outputs):
            return outputs.logits.amax(1)

    assert Fixed(Largest(), threshold=1.0).threshold(NONE, NONE) == 1
    with pytest.raises(
        UserError, match=r"calibration\.probability: Largest is not a function .*calibration\.threshold"
    ):
        Fixed(Largest(), probability=0.9)


@pytest.mark.parametrize(("fraction", "kept"), [(0.001, 1), (0.1, 1), (0.25, 2), (0.5, 5), (0.99, 10), (1.0, 10)])
def test_target_kept_keeps_that_share_and_one_at_least(fraction, kept):
    others = torch.tensor([3.0, 0, 9, 1, 7, 2, 8, 4, 6, 5])
    assert (others >= TargetKept(MSP(), fraction).threshold(NONE, others)).sum() == kept


@pytest.mark.parametrize(("fraction", "kept"), [(0.1, 4), (0.4, 4), (0.5, 9), (0.9, 9), (1.0, 10)])
def test_target_kept_keeps_a_tie_whole(fraction, kept):
    others = torch.tensor([2.0, 1, 2, 1, 1, 2, 1, 0, 2, 1])
    assert (others >= TargetKept(MSP(), fraction).threshold(NONE, others)).sum() == kept


# ---------------------------------------------------------------------- mixture


@pytest.mark.parametrize(("upper", "deviation"), [(0.5, 1.0), (0.5, 2.0), (0.2, 1.0), (0.8, 0.5)])
def test_mixture_is_where_two_gaussians_cross(upper, deviation):
    many = int(4000 * upper)
    others = torch.cat([gaussian(8, deviation, many), gaussian(0, 1, 4000 - many)])

    def ahead(t):
        return upper * norm.pdf(t, 8, deviation) - (1 - upper) * norm.pdf(t, 0, 1)

    threshold = Mixture(MSP()).threshold(NONE, others)
    assert isinstance(threshold, float)
    assert threshold == pytest.approx(brentq(ahead, 0, 8), abs=0.1)


def test_mixture_moves_with_the_scores_whatever_their_scale_and_order():
    others = torch.cat([gaussian(0, 1, 600), gaussian(6, 2, 300)]).double()
    threshold = Mixture(MSP()).threshold(NONE, others)
    for scale, shift in ((1e-6, 0), (1e5, 0), (1, 1e4), (1e-3, -1)):
        moved = Mixture(MSP()).threshold(NONE, scale * others.roll(100) + shift)
        assert (moved - shift) / scale == pytest.approx(threshold, rel=1e-3)


def test_mixture_of_a_single_mode_lies_within_it():
    others = gaussian(3, 2, 1000)
    threshold = Mixture(MSP()).threshold(NONE, others)
    assert 3 - 4 < threshold < 3 + 4
    assert Mixture(MSP()).threshold(NONE, others) == threshold


def test_mixture_of_equal_scores_is_that_score():
    assert Mixture(MSP()).threshold(NONE, torch.full((50,), 2.5)) == 2.5
    assert Mixture(MSP()).threshold(NONE, torch.tensor([4.0])) == 4


@pytest.mark.parametrize("ones", [1, 5, 9])
def test_mixture_of_two_values_parts_them(ones):
    assert 0 < Mixture(MSP()).threshold(NONE, torch.tensor([0.0] * (10 - ones) + [1.0] * ones)) < 1


# ---------------------------------------------------------------------- pooling and mistakes


@pytest.mark.parametrize("rule", [Youden, IdQuantile, TargetKept, Mixture])
def test_pooled_thresholds_are_declared(rule):
    assert rule(MSP(), pooled=True).shares == "thresholds"


@pytest.mark.parametrize(
    "calibration", [Youden(MSP()), IdQuantile(MSP()), TargetKept(MSP()), Mixture(MSP()), Fixed(MSP(), threshold=0.0)]
)
def test_other_calibrations_share_nothing(calibration):
    assert calibration.shares == ""
    assert not calibration.pooled


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: IdQuantile(MSP(), q=1.0), r"calibration\.q: 1\.0 given; allowed: 0 to below 1"),
        (lambda: IdQuantile(MSP(), q=-0.1), r"calibration\.q: -0\.1 given; allowed: 0 to below 1"),
        (lambda: IdQuantile(MSP(), q=math.nan), r"calibration\.q: nan given"),
        (lambda: TargetKept(MSP(), 0.0), r"calibration\.fraction: 0\.0 given; allowed: above 0 to 1"),
        (lambda: TargetKept(MSP(), 1.1), r"calibration\.fraction: 1\.1 given; allowed: above 0 to 1"),
        (lambda: Fixed(Energy(), probability=0.9), r"calibration\.probability: Energy .*calibration\.threshold"),
        (lambda: Fixed(MSP(), probability=0.9, threshold=1.0), r"calibration\.probability or calibration\.threshold"),
        (lambda: Fixed(MSP()), r"calibration\.probability or calibration\.threshold"),
        (lambda: Fixed(MSP(), probability=1.0), r"calibration\.probability: 1\.0 given; allowed: between 0 and 1"),
        (lambda: Fixed(MSP(), probability=0.0), r"calibration\.probability: 0\.0 given; allowed: between 0 and 1"),
        (lambda: Fixed(MSP(), threshold=math.inf), r"calibration\.threshold: inf given; allowed: a finite number"),
        (
            lambda: Youden(MSP(), against="publc"),
            r"calibration\.against: 'publc' is neither public nor noise\. Did .*'public'",
        ),
    ],
)
def test_mistakes_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=said):
        make()
