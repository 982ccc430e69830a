"""Scores of logits against definitions worked out in 80 digits, closed forms and pytorch-ood."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from clusters import CLASSES, logits, name_of, same_order, sure_logits

from lightning_idkd.callbacks import (
    GEN,
    MSP,
    Energy,
    Entropy,
    KLMatching,
    Margin,
    MaxLogit,
)
from lightning_idkd.labels import Outputs

# ---------------------------------------------------------------------- logits: float32 against 80 digits


@pytest.fixture
def digits():
    """Decimal arithmetic in 80 digits."""
    with localcontext() as context:
        context.prec = 80
        yield


def probabilities(z):
    """Softmax of every row of ``z``, in Decimals."""
    found = []
    for row in z.double().tolist():
        e = [(Decimal(v) - Decimal(max(row))).exp() for v in row]
        total = sum(e)
        found.append([v / total for v in e])
    return found


def power(x, exponent):
    return (Decimal(exponent) * x.ln()).exp()


DEFINITIONS = {  # of the probabilities and logits, largest first
    "MSP": (MSP(), lambda p, z: (p[0] / (1 - p[0])).ln()),
    "MaxLogit": (MaxLogit(), lambda p, z: z[0]),
    "Margin": (Margin(), lambda p, z: z[0] - z[1]),
    "Energy": (Energy(), lambda p, z: sum(v.exp() for v in z).ln()),
    "Energy(4)": (Energy(4.0), lambda p, z: 4 * sum((v / 4).exp() for v in z).ln()),
    "Energy(0.5)": (Energy(0.5), lambda p, z: sum((v * 2).exp() for v in z).ln() / 2),
    "Entropy": (Entropy(), lambda p, z: -(-sum(q * q.ln() for q in p)).ln()),
    "GEN": (GEN(), lambda p, z: -sum(power(q * (1 - q), "0.1") for q in p)),
    "GEN(0.5, 3)": (GEN(0.5, 3), lambda p, z: -sum(power(q * (1 - q), "0.5") for q in p[:3])),
    "GEN(1, 1)": (GEN(1.0, 1), lambda p, z: -p[0] * (1 - p[0])),
    "GEN(1, 99)": (GEN(1.0, 99), lambda p, z: -sum(q * (1 - q) for q in p)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_float32_gives_the_values_and_ranks_of_the_definition_up_to_margins_of_60(name, digits):
    score, definition = DEFINITIONS[name]
    z = sure_logits()
    values = [
        definition(sorted(p, reverse=True), sorted(map(Decimal, row), reverse=True))
        for p, row in zip(probabilities(z), z.double().tolist(), strict=True)
    ]
    got = score(Outputs(z))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, np.array(values, dtype=float), rtol=1e-5, atol=0 if "GEN" in name else 1e-5)
    assert got.argsort().tolist() == sorted(range(len(z)), key=values.__getitem__)
    assert len(got.unique()) == len(set(values)) == len(z)


def test_plain_forms_would_tie():
    """Which is why the scores are not written as they are defined."""
    assert len(sure_logits().softmax(1).amax(1).unique()) < 80


@pytest.mark.parametrize("low", [0, 30], ids=["any", "sure"])
def test_kl_matching_is_the_least_divergence_from_a_predicted_class_typical_answer(low, digits):
    own, z, score = sure_logits(60, low, seed=3), sure_logits(80, low), KLMatching()
    own[own.argmax(1) == 4, 5] += 100  # class 4 is never predicted
    score.fit(Outputs(own), torch.full((60,), 4))
    typical, predicted = [], own.argmax(1).tolist()
    for c in sorted(set(predicted)):
        of_c = [p for p, at in zip(probabilities(own), predicted, strict=True) if at == c]
        typical.append([(sum(column) / len(of_c)).ln() for column in zip(*of_c, strict=True)])
    assert len(typical) == CLASSES - 1
    least = []
    for p in probabilities(z):
        log_p = [v.ln() for v in p]
        least.append(min(sum(v * (a - b) for v, a, b in zip(p, log_p, q, strict=True)) for q in typical))
    got = score(Outputs(z))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(-got, np.array(least, dtype=float), rtol=1e-5)
    assert same_order(-(-got).log(), [-float(d.ln()) for d in least], slack=1e-6)


# ---------------------------------------------------------------------- logits: closed forms


def test_msp_is_the_log_odds_of_the_largest_probability():
    p = logits().softmax(1).amax(1)
    torch.testing.assert_close(MSP()(Outputs(logits())), torch.log(p / (1 - p)), rtol=1e-9, atol=1e-9)


def test_msp_of_a_hand_example():
    # p = (2, 1, 1) / 4: odds 1; the shift of all logits cancels
    assert MSP()(Outputs(torch.tensor([[2.0, 1.0, 1.0]]).log() + 7)).item() == pytest.approx(0, abs=1e-6)
    assert MSP()(Outputs(torch.zeros(1, 5))).item() == pytest.approx(math.log(1 / 4))


@pytest.mark.parametrize("score", [MSP(), Entropy(), GEN(), Energy(), Margin(), MaxLogit()], ids=name_of)
def test_two_equal_largest_logits_give_a_finite_score(score):
    assert score(Outputs(torch.tensor([[50.0, 50.0, -50.0], [0.0, 0.0, 0.0], [200.0, -200.0, 0.0]]))).isfinite().all()


def test_a_probability_is_its_log_odds():
    assert MSP().from_probability(0.98) == pytest.approx(math.log(49))
    assert MSP().from_probability(0.5) == 0


def test_closed_forms_of_equal_logits():
    flat = Outputs(torch.full((1, 8), 2.5))
    assert Energy()(flat).item() == pytest.approx(2.5 + math.log(8))
    assert Energy(3.0)(flat).item() == pytest.approx(2.5 + 3 * math.log(8))
    assert Entropy()(flat).item() == pytest.approx(-math.log(math.log(8)))
    assert GEN(0.5)(flat).item() == pytest.approx(-8 * math.sqrt(7) / 8)
    assert GEN(0.5, 2)(flat).item() == pytest.approx(-2 * math.sqrt(7) / 8)
    assert Margin()(flat).item() == 0
    assert MaxLogit()(flat).item() == 2.5


def test_energy_knows_how_large_logits_are_where_msp_sees_their_differences_only():
    z = logits()
    torch.testing.assert_close(Energy()(Outputs(z + 5)), Energy()(Outputs(z)) + 5)
    torch.testing.assert_close(MSP()(Outputs(z + 5)), MSP()(Outputs(z)))
    assert Energy()(Outputs(torch.full((1, 3), 1000.0))).isfinite().all()


def test_kl_matching_of_a_class_typical_answer_is_zero_and_its_own_label_does_not_count():
    answer, score = torch.tensor([[2.0, 1.0, 1.0]]).log(), KLMatching()
    score.fit(Outputs(answer.expand(5, 3)), torch.full((5,), 2))
    assert score(Outputs(answer + 3)).item() == pytest.approx(0, abs=1e-12)
    # KL((1/3, 1/3, 1/3) || (1/2, 1/4, 1/4))
    assert score(Outputs(torch.zeros(1, 3))).item() == pytest.approx(-math.log(32 / 27) / 3, rel=1e-6)
