"""Scores in forms that float32 does not saturate, thresholds, and the selection they lead to."""

import math

import numpy as np
import pytest
import torch

from callbacks import MSP, Energy, Fixed, IdQuantile, Youden
from lightning_idkd.callback import OodScore
from lightning_idkd.errors import UserError
from lightning_idkd.node import Outputs


def logits(samples=500, classes=10, scale=3.0, dtype=torch.float64, seed=0):
    return scale * torch.randn(samples, classes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def two_class(scores):
    """Outputs whose MSP log-odds are exactly ``scores``."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return Outputs(torch.stack([scores / 2, -scores / 2], 1))


# ---------------------------------------------------------------------- MSP


def test_msp_is_the_log_odds_of_the_largest_probability():
    p = logits().softmax(1).amax(1)
    torch.testing.assert_close(MSP()(Outputs(logits())), torch.log(p / (1 - p)), rtol=1e-9, atol=1e-9)


def test_msp_of_a_hand_example():
    # p = (2, 1, 1) / 4: odds 1; the shift of all logits cancels
    assert MSP()(Outputs(torch.tensor([[2.0, 1.0, 1.0]]).log() + 7)).item() == pytest.approx(0, abs=1e-6)
    assert MSP()(Outputs(torch.zeros(1, 5))).item() == pytest.approx(math.log(1 / 4))


def test_msp_in_float32_rises_without_ties_where_the_probability_has_long_been_one():
    margin = np.arange(0, 60, 0.05)
    z = np.zeros((len(margin), 10))
    z[:, 3] = margin
    others = np.random.default_rng(2).normal(0, 0.1, 9)
    z[:, [i for i in range(10) if i != 3]] = others - others.max()
    exact = margin - np.log(np.exp(others - others.max()).sum())
    got = MSP()(Outputs(torch.tensor(z, dtype=torch.float32)))
    assert got.dtype == torch.float32
    assert (got.diff() > 0).all()
    np.testing.assert_allclose(got, exact, rtol=1e-6, atol=2e-6)
    p = torch.tensor(z, dtype=torch.float32).softmax(1).amax(1)
    assert (p[margin > 20] == 1).all()  # which is why p itself is of no use


def test_msp_ranks_as_the_largest_probability_does():
    z = logits(2000, 10)
    assert torch.equal(MSP()(Outputs(z)).argsort(), z.softmax(1).amax(1).argsort())


def test_msp_of_two_equal_largest_logits_is_finite():
    assert MSP()(Outputs(torch.tensor([[50.0, 50.0, -50.0]]))).item() == pytest.approx(0, abs=1e-6)


def test_a_probability_is_its_log_odds():
    assert MSP().from_probability(0.98) == pytest.approx(math.log(49))
    assert MSP().from_probability(0.5) == 0


# ---------------------------------------------------------------------- Energy


def test_energy_closed_forms():
    assert Energy()(Outputs(torch.full((1, 8), 2.5))).item() == pytest.approx(2.5 + math.log(8))
    assert Energy(3.0)(Outputs(torch.full((1, 8), 2.5))).item() == pytest.approx(2.5 + 3 * math.log(8))
    z = logits()
    for t in (0.5, 1.0, 10.0):
        torch.testing.assert_close(Energy(t)(Outputs(z)), t * torch.exp(z / t).sum(1).log(), rtol=1e-12, atol=1e-12)


def test_energy_knows_how_large_logits_are_where_msp_sees_their_differences_only():
    z = logits(dtype=torch.float64)
    torch.testing.assert_close(Energy()(Outputs(z + 5)), Energy()(Outputs(z)) + 5)
    torch.testing.assert_close(MSP()(Outputs(z + 5)), MSP()(Outputs(z)))
    assert Energy()(Outputs(torch.full((1, 3), 1000.0))).isfinite().all()


# ---------------------------------------------------------------------- thresholds and selections


def select(calibration, private, public, held_out=None, node=0, said=None):
    held_out = len(private) if held_out is None else held_out
    say = (said if said is not None else []).append
    return calibration.select(two_class(private), two_class(public), held_out, say, node)


def test_youden_keeps_at_and_above_the_threshold_that_separates_best():
    private, public = [1.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], [0.0, 1.0, 2.0, 2.5, 5.0, 9.5]
    # 7/8 - 2/6 at 3; the next best is 6/8 - 2/6 at 4
    said = []
    selection = select(Youden(MSP()), private, public, said=said)
    assert selection.threshold == 3
    assert selection.kept.tolist() == [False, False, False, False, True, True]
    above = sum((a > b) + (a == b) / 2 for a in private for b in public)
    assert selection.auroc == pytest.approx(above / 48)
    assert selection.private.tolist() == private
    assert selection.public.tolist() == public
    assert said == []


def test_a_sample_at_the_threshold_is_kept():
    assert select(Fixed(MSP(), threshold=2.0), [1.0], [1.9999, 2.0, 2.0001]).kept.tolist() == [False, True, True]
    assert select(IdQuantile(MSP(), 0.5), list(range(10)), [4.0, 5.0]).kept.tolist() == [False, True]


def test_id_quantile_gives_up_that_share_of_own_samples():
    private = torch.arange(100.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    for q in (0, 0.05, 0.5, 0.99):
        selection = select(IdQuantile(MSP(), q), private, private)
        assert selection.threshold == 100 * q
        assert selection.kept.double().mean() == pytest.approx(1 - q)


def test_fixed_takes_a_probability_or_a_threshold_in_the_scores_unit():
    p = torch.tensor([0.5, 0.97, 0.979, 0.981, 0.999999])
    odds = torch.log(p / (1 - p))
    assert select(Fixed(MSP(), probability=0.98), [0.0], odds).kept.tolist() == [False, False, False, True, True]
    assert Fixed(MSP(), probability=0.98).threshold(odds, odds) == pytest.approx(math.log(49))
    assert Fixed(Energy(), threshold=-3.5).threshold(odds, odds) == -3.5
    assert Fixed(MSP(), threshold=0.0).threshold(odds, odds) == 0


def test_below_eight_held_out_samples_the_threshold_is_their_5_percent_quantile_said_once_a_node():
    calibration = Youden(MSP())
    private, public, said = [5.0, 1.0, 4.0, 2.0, 3.0, 7.0, 6.0], [0.5, 1.0, 6.5], []
    for node in (3, 3, 11, 3):
        selection = select(calibration, private, public, node=node, said=said)
        assert selection.threshold == 1
        assert selection.kept.tolist() == [False, True, True]
    assert len(said) == 2
    assert "node 3 " in said[0]
    assert "7 held-out" in said[0]
    assert "node 11 " in said[1]
    assert select(calibration, [*private, 8.0], public, node=4, said=said).threshold > 1
    assert len(said) == 2


def test_a_node_without_held_out_samples_uses_the_quantile_of_its_training_scores():
    said = []
    assert select(Youden(MSP()), torch.arange(40.0), [3.0], held_out=0, said=said).threshold == 2
    assert len(said) == 1


def test_a_quantile_needs_no_fallback():
    said = []
    assert select(IdQuantile(MSP(), q=0.5), [5.0, 1.0, 4.0, 2.0, 3.0, 7.0, 6.0], [0.5], said=said).threshold == 4
    assert said == []


def test_a_fixed_threshold_has_no_fallback():
    said = []
    for held_out in (0, 3, 100):
        assert select(Fixed(MSP(), threshold=4.0), [1.0, 2.0, 3.0], [5.0], held_out=held_out, said=said).threshold == 4
    assert said == []


def test_a_score_of_ones_own_may_be_fixed_by_threshold_only():
    class Largest(OodScore):
        def __call__(self, outputs):
            return outputs.logits.amax(1)

    assert select(Fixed(Largest(), threshold=1.0), [0.0], [1.0, 2.0, 6.0]).kept.tolist() == [False, True, True]
    with pytest.raises(UserError, match="Largest"):
        Fixed(Largest(), probability=0.9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: IdQuantile(MSP(), q=1.0), r"calibration\.q: 1\.0"),
        (lambda: IdQuantile(MSP(), q=-0.1), r"calibration\.q: -0\.1"),
        (lambda: Fixed(Energy(), probability=0.9), r"calibration\.probability: Energy .*calibration\.threshold"),
        (lambda: Fixed(MSP(), probability=0.9, threshold=1.0), r"calibration\.probability or calibration\.threshold"),
        (lambda: Fixed(MSP()), r"calibration\.probability or calibration\.threshold"),
        (lambda: Fixed(MSP(), probability=1.0), r"calibration\.probability: 1\.0"),
        (lambda: Fixed(MSP(), probability=0.0), r"calibration\.probability: 0\.0"),
        (lambda: Energy(0), r"calibration\.score\.temperature: 0 "),
        (lambda: Energy(-1.0), r"calibration\.score\.temperature: -1\.0"),
    ],
)
def test_mistakes_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=said):
        make()
