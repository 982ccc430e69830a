"""Rank ensembles."""

import numpy as np
import pytest
import torch
from clusters import clusters, fitted, logits, outputs, same_order, strangers
from scipy.stats import rankdata

from lightning_idkd.callback import OodScore
from lightning_idkd.callbacks import (
    KNN,
    MSP,
    Energy,
    RankEnsemble,
)
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs


class Given(OodScore):
    """The logits' column ``at``, through ``change``."""

    def __init__(self, at=0, change=lambda v: v):
        self.at, self.change = at, change

    def __call__(self, outputs):
        return self.change(outputs.logits[:, self.at])


def test_an_ensemble_is_the_mean_of_the_members_ranks():
    z = logits(60, 2, dtype=torch.float32).round()  # with ties
    ranks = [(rankdata(column) - 1) / 59 for column in z.T]
    np.testing.assert_allclose(RankEnsemble([Given(0), Given(1)])(Outputs(z)), np.mean(ranks, 0), rtol=1e-6, atol=1e-7)
    weighted = RankEnsemble([Given(0), Given(1), Given(1)])(Outputs(z))
    np.testing.assert_allclose(weighted, (ranks[0] + 2 * ranks[1]) / 3, rtol=1e-6, atol=1e-7)


def test_ties_share_a_rank():
    found = RankEnsemble([Given(), Given()])(Outputs(torch.tensor([[3.0], [1.0], [3.0], [9.0], [1.0], [3.0]])))
    assert found.tolist() == pytest.approx([0.6, 0.1, 0.6, 1, 0.1, 0.6])
    assert RankEnsemble([Given(), Given()])(Outputs(torch.ones(5, 1))).tolist() == [0.5] * 5
    assert RankEnsemble([Given(), Given()])(Outputs(torch.ones(1, 1))).tolist() == [0]


def test_only_the_members_order_counts():
    z = Outputs(logits(80, 2, dtype=torch.float32))
    plain = RankEnsemble([Given(0), Given(1)])(z)
    assert torch.equal(RankEnsemble([Given(0, lambda v: (v / 4).exp()), Given(1, lambda v: 1000 * v - 7)])(z), plain)
    assert torch.equal(RankEnsemble([Given(0), Given(0)])(z).argsort(), z.logits[:, 0].argsort())


def test_members_that_learn_do():
    score = RankEnsemble([MSP(), KNN(5)])
    assert score.fitted
    assert not RankEnsemble([MSP(), Energy()]).fitted
    judged = outputs(torch.cat([clusters(40, seed=1)[0], strangers(40)]))
    ranks = [rankdata(s(judged)) for s in (MSP(), fitted(KNN(5)))]
    assert same_order(fitted(score)(judged), sum(ranks), slack=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v / 0, r"Given is not finite for 5 of 5 samples"),
        (lambda v: v[:, None], r"Given returns \[5, 1\] for 5 samples; a score has shape \[5\]"),
    ],
)
def test_a_member_in_error_is_named(change, said):
    with pytest.raises(UserError, match=said):
        RankEnsemble([MSP(), Given(0, change)])(Outputs(logits(5)))
