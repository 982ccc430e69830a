"""What all scores have in common: ranks of pytorch-ood, their direction, and mistakes."""

import math

import pytest
import torch
from clusters import FEATURES, HEAD, clusters, detector, draws, fitted, logits, name_of, outputs, same_order, strangers
from sklearn.metrics import roc_auc_score

from lightning_idkd.callbacks import (
    ASH,
    GEN,
    KNN,
    MSP,
    ODIN,
    RMD,
    SCALE,
    DensityRatio,
    Energy,
    Entropy,
    KLMatching,
    Mahalanobis,
    Margin,
    MaxLogit,
    RankEnsemble,
    ReAct,
    ViM,
)
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs

# ---------------------------------------------------------------------- ranks of pytorch-ood


def unsaturated():
    z = logits(200, scale=2.0)
    first, second = z.topk(2, dim=1).values.unbind(1)
    assert (first - second).max() < 12
    return z


@pytest.mark.parametrize(
    ("score", "name", "options"),
    [
        (MSP(), "MaxSoftmax", {}),
        (MaxLogit(), "MaxLogit", {}),
        (Energy(2.0), "EnergyBased", {"t": 2.0}),
        (Entropy(), "Entropy", {}),
        (GEN(), "GEN", {}),
        (GEN(0.5, 4), "GEN", {"gamma": 0.5, "M": 4}),
        (KLMatching(), "KLMatching", {}),
    ],
    ids=name_of,
)
def test_logit_scores_rank_as_pytorch_ood_does(score, name, options):
    theirs, z, own = detector(name)(None, **options), unsaturated(), logits(90, scale=2.0, seed=1)
    score.fit(Outputs(own.float()), torch.zeros(90))
    if theirs.requires_fit:
        theirs.fit_logits(own, torch.zeros(90, dtype=torch.int64))
    assert same_order(score(Outputs(z.float())), -theirs.predict_logits(z))


@pytest.mark.parametrize(
    ("score", "name", "options"),
    [
        (KNN(7), "KNN", {"k": 7}),
        (Mahalanobis(0.0), "Mahalanobis", {}),
        (RMD(0.0), "RMD", {}),
        (ViM(6), "ViM", {"d": 6, "w": HEAD.weight, "b": HEAD.bias}),
        (ViM(), "ViM", {"d": FEATURES // 2, "w": HEAD.weight, "b": HEAD.bias}),
    ],
    ids=["KNN", "Mahalanobis", "RMD", "ViM", "ViM of half the features"],
)
def test_feature_scores_rank_as_pytorch_ood_does(score, name, options):
    theirs = detector(name)(None, **options)
    (x, y), judged = clusters(200), torch.cat([clusters(60, seed=1)[0], strangers(60)])
    score.fit(outputs(x), y)
    theirs.fit_features(x, y)
    assert same_order(score(outputs(judged)), -theirs.predict_features(judged), slack=1e-4)


@pytest.mark.parametrize("inner", [None, MSP()], ids=["Energy", "MSP"])
@pytest.mark.parametrize(
    ("kind", "name", "options", "their_options"),
    [
        (ReAct, "ReAct", {"percentile": 0.8}, {}),
        (ReAct, "ReAct", {}, {"percentile": 0.9}),
        (ASH, "ASH", {"variant": "p"}, {"variant": "ash-p"}),
        (ASH, "ASH", {"variant": "b", "percentile": 0.3}, {"variant": "ash-b"}),
        (ASH, "ASH", {}, {"variant": "ash-s"}),
        (SCALE, "SCALE", {}, {}),
        (SCALE, "SCALE", {"percentile": 0.9}, {}),
    ],
)
def test_shapings_give_the_scores_of_pytorch_ood(kind, name, options, their_options, inner):
    theirs, score = detector(name), kind(inner, **options)
    energy = {} if inner is None else {"detector": lambda z: -MSP()(Outputs(z))}
    theirs = theirs(
        None, lambda maps: HEAD(maps.flatten(1)), **({"percentile": score.percentile} | their_options | energy)
    )
    own, x = 0.05 * clusters(201)[0], 0.05 * torch.cat([clusters(60, seed=1)[0], strangers(60)])
    score.fit(outputs(own), None)
    if kind is ReAct:
        theirs.fit_feature_maps(own[:, :, None, None], torch.zeros(len(own), dtype=torch.int64))
        assert (own <= score.clip).double().mean() == pytest.approx(score.percentile, abs=1e-3)
    torch.testing.assert_close(
        score(outputs(x)), -theirs.predict_feature_maps(x[:, :, None, None]), rtol=1e-4, atol=1e-3
    )


# ---------------------------------------------------------------------- larger = more like a node's own


DIRECTED = [
    MSP(), MaxLogit(), Energy(), Entropy(), GEN(), Margin(), KLMatching(), KNN(5), Mahalanobis(), Mahalanobis(0.1),
    RMD(), ViM(), ReAct(MSP()), ASH(MSP()), SCALE(MSP()), ODIN(), RankEnsemble([MSP(), KNN(5)]),
]  # fmt: skip


@pytest.mark.parametrize("score", DIRECTED, ids=name_of)
def test_own_samples_score_above_strangers(score):
    x = torch.cat([clusters(80, seed=1)[0], strangers(80)])
    assert roc_auc_score([1] * 80 + [0] * 80, fitted(score)(outputs(x))) > 0.7


def test_density_ratio_prefers_own_samples_to_far_ones():
    """Not to those between its clusters: the kernel is as wide as the distance from one to the next."""
    x = torch.cat([clusters(80, seed=1)[0], strangers(80) + 15])
    assert roc_auc_score([1] * 80 + [0] * 80, fitted(DensityRatio(100))(outputs(x))) > 0.9


@pytest.mark.parametrize("score", [KNN(5), Mahalanobis(), RMD(), ViM(), DensityRatio(100)], ids=name_of)
def test_classes_that_a_node_lacks_are_strangers_to_the_scores_of_features(score):
    held = [0, 3, 7]
    x = torch.cat([clusters(60, held, seed=1)[0], clusters(60, [1, 2, 8], seed=2)[0]])
    assert roc_auc_score([1] * 60 + [0] * 60, fitted(score, held)(outputs(x))) > 0.9


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Energy(0), r"temperature: 0 given; allowed: above 0"),
        (lambda: Energy(-1.0), r"temperature: -1\.0 given; allowed: above 0"),
        (lambda: Energy(math.inf), r"temperature: inf given"),
        (lambda: Energy(math.nan), r"temperature: nan given"),
        (lambda: GEN(0.0), r"gamma: 0\.0 given; allowed: above 0 to 1"),
        (lambda: GEN(1.1), r"gamma: 1\.1 given; allowed: above 0 to 1"),
        (lambda: GEN(largest=0), r"largest: 0 given; allowed: 1 or more, or null for all"),
        (lambda: KNN(0), r"neighbours: 0 given; allowed: 1 or more"),
        (lambda: Mahalanobis(-0.1), r"shrinkage: -0\.1 given; allowed: 0 to 1, or null"),
        (lambda: RMD(1.1), r"shrinkage: 1\.1 given; allowed: 0 to 1, or null"),
        (lambda: ViM(0), r"dimension: 0 given; allowed: 1 or more, or null"),
        (lambda: DensityRatio(1), r"samples: 1 given; allowed: 2 or more"),
        (lambda: DensityRatio(penalty=0.0), r"penalty: 0\.0 given; allowed: above 0"),
        (lambda: ReAct(percentile=0.0), r"percentile: 0\.0 given; allowed: above 0 to 1"),
        (lambda: ASH(percentile=1.0), r"percentile: 1\.0 given; allowed: 0 to below 1"),
        (lambda: SCALE(percentile=-0.1), r"percentile: -0\.1 given; allowed: 0 to below 1"),
        (lambda: ODIN(0.0), r"temperature: 0\.0 given; allowed: above 0"),
        (lambda: ODIN(epsilon=-1.0), r"epsilon: -1\.0 given; allowed: 0 or more"),
        (lambda: RankEnsemble([MSP()]), r"scores: 1 given; allowed: two scores or more"),
        (lambda: RankEnsemble([MSP(), ODIN()]), r"scores: ODIN changes the samples"),
        (lambda: ReAct(ODIN()), r"score: ODIN changes the samples"),
    ],
)
def test_parameters_out_of_range_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=r"calibration\.score\." + said):
        make()


NEEDY = [KNN(), Mahalanobis(), RMD(), ViM(), DensityRatio(), ReAct(), SCALE(), ASH(KLMatching())]


@pytest.mark.parametrize("score", NEEDY, ids=name_of)
def test_features_asked_of_a_network_that_offers_none_are_refused(score):
    name = type(score).__name__
    with pytest.raises(
        UserError, match=rf"calibration\.score: {name} needs features\(x\) \[B, F\], which this network does not offer"
    ):
        fit_and_judge(score, Outputs(logits(20)))


@pytest.mark.parametrize("score", [ViM(), ReAct(), SCALE()], ids=name_of)
def test_a_head_asked_of_a_network_that_offers_none_is_refused(score):
    with pytest.raises(UserError, match=r"needs head \(nn\.Linear\), which this network does not offer"):
        fit_and_judge(score, Outputs(logits(20), draws(20, 4)))


def test_the_title_of_a_users_score_has_its_import_path():
    mine = type("Margin", (Margin,), {"__module__": "mine"})()
    unit = "difference of two logits"
    assert (Margin().title, mine.title) == (f"Margin, {unit}", f"mine.Margin, {unit}")


def fit_and_judge(score, outputs):
    score.fit(outputs, torch.zeros(20, dtype=torch.int64))
    return score(outputs)
