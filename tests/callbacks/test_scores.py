"""Scores against definitions worked out in 80 digits, plain re-implementations, and pytorch-ood."""

import math
import sys
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist
from scipy.stats import rankdata
from sklearn.covariance import LedoitWolf, shrunk_covariance
from sklearn.metrics import roc_auc_score
from torch import nn

import lightning_idkd.callbacks.ood.features as features_module
from lightning_idkd.callback import OodScore
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
    PytorchOOD,
    RankEnsemble,
    ReAct,
    ViM,
)
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs

CLASSES, FEATURES = 10, 16


def name_of(value):
    return type(value).__name__ if isinstance(value, OodScore) else None


def draws(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logits(samples=500, classes=CLASSES, scale=3.0, dtype=torch.float64, seed=0):
    return scale * draws(samples, classes, seed=seed, dtype=dtype)


def sure_logits(samples=160, low=0.0, high=60.0, seed=1):
    """float32 logits whose largest is ahead by ``low`` to ``high``, of any class and any level."""
    z = logits(samples, dtype=torch.float32, scale=2.0, seed=seed)
    top = torch.arange(samples) * 7 % CLASSES
    others = z.scatter(1, top[:, None], -math.inf).amax(1)
    ahead = low + (high - low) * (torch.arange(samples) + 0.5) / samples
    return z.scatter(1, top[:, None], (others + ahead)[:, None]) + 20 * draws(samples, 1, seed=seed + 1)


def same_order(ours, theirs, slack=1e-5):
    """Whether two scores rank alike: only neighbours that are closer than ``slack`` of the range may trade places."""
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    both = ours[theirs.argsort()], theirs[ours.argsort()]
    return all(((v.cummax(0).values - v) <= slack * (v.max() - v.min())).all() for v in both)


# ---------------------------------------------------------------------- a node whose features are clusters

CENTRES = 6 * draws(CLASSES, FEATURES, seed=11).abs()


def head(bias=True):
    """The best linear classifier of the clusters around ``CENTRES``."""
    made = nn.Linear(FEATURES, CLASSES, bias=bias)
    with torch.no_grad():
        made.weight.copy_(CENTRES)
        if bias:
            made.bias.copy_(-CENTRES.square().sum(1) / 2)
    return made.requires_grad_(False)


HEAD = head()


def outputs(x, of=HEAD):
    return Outputs(of(x), x, of)


def clusters(samples, held=range(CLASSES), seed=0, noise=1.0):
    """Features and labels of samples of the classes ``held``."""
    held = torch.tensor(list(held))
    y = held[torch.arange(samples) % len(held)]
    return (CENTRES[y] + noise * draws(samples, FEATURES, seed=seed)).relu(), y


def strangers(samples, seed=5):
    """Features far from all clusters, between which the head cannot tell."""
    return (CENTRES.mean(0) + 2 * draws(samples, FEATURES, seed=seed)).relu()


def fitted(score, held=range(CLASSES), samples=120):
    x, y = clusters(samples, held)
    score.fit(outputs(x), y)
    return score


def detector(name):
    """A detector of pytorch-ood, where that is installed."""
    return getattr(pytest.importorskip("pytorch_ood.detector"), name)


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
    theirs = theirs(None, lambda maps: HEAD(maps.flatten(1)), **({"percentile": score.percentile} | their_options | energy))
    own, x = 0.05 * clusters(201)[0], 0.05 * torch.cat([clusters(60, seed=1)[0], strangers(60)])
    score.fit(outputs(own), None)
    if kind is ReAct:
        theirs.fit_feature_maps(own[:, :, None, None], torch.zeros(len(own), dtype=torch.int64))
        assert (own <= score.clip).double().mean() == pytest.approx(score.percentile, abs=1e-3)
    torch.testing.assert_close(score(outputs(x)), -theirs.predict_feature_maps(x[:, :, None, None]), rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------- features


FEATURE_SCORES = [
    KNN(5), Mahalanobis(), Mahalanobis(0.0), Mahalanobis(0.5), RMD(), RMD(0.1), ViM(), DensityRatio(60), ReAct(), ASH(), SCALE(),
    ReAct(KLMatching()), ReAct(KNN(5)),
]  # fmt: skip


@pytest.mark.parametrize("score", FEATURE_SCORES, ids=name_of)
@pytest.mark.parametrize("held", [[0, 3, 7], [4]], ids=["three classes", "one class"])
def test_a_node_may_lack_classes(score, held):
    x = torch.cat([clusters(40, held, seed=1)[0], strangers(30)])
    found = fitted(score, held)(outputs(x))
    assert found.dtype == torch.float32
    assert found.shape == (70,)
    assert found.isfinite().all()


@pytest.mark.parametrize("score", FEATURE_SCORES, ids=name_of)
def test_a_node_may_have_one_sample(score):
    assert fitted(score, [4], samples=1)(outputs(clusters(40)[0])).isfinite().all()


@pytest.mark.parametrize("kind", [Mahalanobis, RMD])
def test_only_the_classes_that_a_node_holds_count(kind):
    x, y = clusters(90, [0, 3, 7])
    judged = outputs(clusters(50)[0])
    score, renamed = kind(0.1), kind(0.1)
    score.fit(outputs(x), y)
    renamed.fit(outputs(x), torch.tensor([2, 0, 0, 1, 0, 0, 0, 9])[y])
    torch.testing.assert_close(score(judged), renamed(judged))
    torch.testing.assert_close(score.means[1], x[y == 3].double().mean(0))
    assert len(score.means) == 3


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [Mahalanobis, RMD])
def test_mahalanobis_distances_are_numpys(kind, shrinkage):
    x, y = clusters(120, range(4))
    score = kind(shrinkage)
    score.fit(outputs(x), y)

    judged, x, y = strangers(40), x.double().numpy(), y.numpy()
    means = np.stack([x[y == c].mean(0) for c in range(4)])
    share = LedoitWolf(assume_centered=True).fit(x - means[y]).shrinkage_ if shrinkage is None else shrinkage

    def precision(centred):
        return np.linalg.inv(shrunk_covariance(centred.T @ centred / len(centred), share))

    np.testing.assert_allclose(score.inverse, precision(x - means[y]), rtol=1e-6, atol=1e-9)
    squared = cdist(judged, means, "mahalanobis", VI=precision(x - means[y])).min(1) ** 2
    if kind is RMD:
        squared -= cdist(judged, x.mean(0)[None], "mahalanobis", VI=precision(x - x.mean(0)))[:, 0] ** 2
    np.testing.assert_allclose(score(outputs(judged)), -squared, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_rmd_shrinks_both_covariances_alike_so_that_nearly_isotropic_features_are_told_apart(seed):
    """100 own samples of three classes whose covariance is the identity; public ones of other classes. Of Ledoit and Wolf's two
    shares one is near 1 and the other is not: with a share each the distances are of two kinds."""
    rng, size = np.random.default_rng(seed), 64
    means, others = 0.7 * rng.standard_normal((2, 3, size))
    y, here = np.arange(100) % 3, np.arange(300) % 3
    x, own, public = means[y], means[here], others[here]
    x, own, public = (centres + rng.standard_normal(centres.shape) for centres in (x, own, public))
    score = RMD()
    score.fit(Outputs(torch.zeros(100, 3), torch.tensor(x).float()), torch.tensor(y))
    assert score.shrunk_by == pytest.approx(LedoitWolf(assume_centered=True).fit(x - score.means.numpy()[y]).shrinkage_, rel=1e-3)
    assert score.shrunk_by > 0.9 > 0.5 > LedoitWolf().fit(x).shrinkage_

    def judged(features):
        return score(Outputs(torch.zeros(300, 3), torch.tensor(features).float())).numpy()

    assert roc_auc_score(np.repeat([1, 0], 300), np.concatenate([judged(own), judged(public)])) > 0.98


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.5])
def test_with_one_sample_a_class_the_distance_is_euclidean(shrinkage):
    (x, y), score, judged = clusters(3, [0, 3, 7]), Mahalanobis(shrinkage), strangers(20)
    score.fit(outputs(x), y)
    np.testing.assert_allclose(score(outputs(judged)), -(cdist(judged, x).min(1) ** 2), rtol=1e-5)


def test_rmd_of_a_node_with_one_class_tells_nothing():
    assert (fitted(RMD(), [4])(outputs(clusters(40)[0])) == 0).all()


def test_knn_is_the_distance_to_the_kth_nearest_direction():
    own, judged = clusters(50)[0], strangers(30)
    angles = [x / x.norm(dim=1, keepdim=True) for x in (judged.double(), own.double())]
    distances = np.sort(cdist(*angles), axis=1)
    for k in (1, 7, 50):
        score = fitted(KNN(k), samples=50)
        np.testing.assert_allclose(score(outputs(judged)), -distances[:, k - 1], rtol=1e-6)
        torch.testing.assert_close(score(outputs(5 * judged)), score(outputs(judged)))


def test_knn_with_more_neighbours_than_own_samples_takes_the_farthest():
    judged = outputs(strangers(30))
    assert torch.equal(fitted(KNN(1000), samples=50)(judged), fitted(KNN(50), samples=50)(judged))


def test_knn_tells_collapsed_features_apart():
    """A trained network maps a class to nearly one point; float32 products lose distances below 1e-3."""
    own, judged = (10 + 1e-4 * draws(80, FEATURES, seed=seed) for seed in (1, 2))
    score = KNN(3)
    score.fit(Outputs(own, own), None)
    angles = [x / x.norm(dim=1, keepdim=True) for x in (judged.double(), own.double())]
    np.testing.assert_allclose(score(Outputs(judged, judged)), -np.sort(cdist(*angles), axis=1)[:, 2], rtol=1e-2)


@pytest.mark.parametrize("score", [KNN(5), DensityRatio(60)], ids=["KNN", "DensityRatio"])
def test_chunks_change_nothing(score, monkeypatch):
    judged, of = outputs(strangers(50)), fitted(score)
    whole = of(judged)
    monkeypatch.setattr(features_module, "BLOCK", 7)
    torch.testing.assert_close(of(judged), whole, rtol=1e-6, atol=1e-9)


def test_a_zero_feature_vector_has_a_finite_distance():
    assert fitted(KNN(3))(outputs(torch.zeros(1, FEATURES))).isfinite().all()


def test_vim_is_energy_less_the_scaled_norm_outside_the_principal_subspace():
    x, judged, kept = clusters(200)[0].double().numpy(), strangers(40), 5
    score = fitted(ViM(kept), samples=200)
    w, b = HEAD.weight.double().numpy(), HEAD.bias.double().numpy()
    origin = np.linalg.lstsq(w, -b, rcond=None)[0]
    principal = np.linalg.svd(x - origin, full_matrices=False)[2][:kept]

    def rest(x):
        x = x - origin
        return np.linalg.norm(x - x @ principal.T @ principal, axis=1)

    alpha = (x @ w.T + b).max(1).mean() / rest(x).mean()
    energy = Energy()(outputs(judged)).double().numpy()
    np.testing.assert_allclose(score(outputs(judged)), energy - alpha * rest(judged.double().numpy()), rtol=1e-4, atol=1e-2)


def test_vim_needs_fewer_dimensions_than_features_and_takes_a_head_without_bias():
    with pytest.raises(UserError, match=r"calibration\.score\.dimension: 16 given; allowed: below the 16 features"):
        fitted(ViM(FEATURES))
    x, y = clusters(60)
    score, bare = ViM(4), head(bias=False)
    score.fit(outputs(x, bare), y)
    assert score(outputs(x, bare)).isfinite().all()
    assert not score.origin.any()


def test_density_ratio_minimises_the_kulsif_objective():
    """Kanamori et al. (2012), Eq. 6, over all functions on the samples by its normal equations, not by the closed form."""
    x, judged = draws(7, 3, seed=1), draws(30, 3, seed=2)
    score = DensityRatio(samples=9, penalty=0.3)
    score.fit(Outputs(x, x), None)
    own, uniform = score.own.numpy(), score.uniform.numpy()
    assert sorted(own.tolist()) == sorted(x.double().tolist())
    assert uniform.shape == (9, 3)
    assert (uniform >= x.numpy().min(0)).all()
    assert (uniform <= x.numpy().max(0)).all()
    width = np.median(pdist(x.double()))
    assert float(score.width) == pytest.approx(width)

    def kernel(a, b):
        return np.exp(-cdist(a, b, "sqeuclidean") / (2 * width**2))

    points = np.concatenate([own, uniform])
    among, to_uniform = kernel(points, points), kernel(points, uniform)
    curvature = to_uniform @ to_uniform.T / 9 + 0.3 * among
    weights = np.linalg.lstsq(curvature, kernel(points, own).mean(1), rcond=1e-14)[0]
    got = score(Outputs(judged, judged))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, kernel(judged, points) @ weights, rtol=1e-4, atol=1e-6)


def test_density_ratio_looks_at_so_many_own_samples_and_at_the_same_ones_every_time():
    x = draws(300, 3, seed=1)
    first, again = DensityRatio(50), DensityRatio(50)
    for score in (first, again):
        score.fit(Outputs(x, x), None)
    assert first.own.shape == (50, 3)
    assert torch.equal(first(Outputs(x, x)), again(Outputs(x, x)))


def test_density_ratio_prefers_own_samples_to_uniform_ones():
    x = draws(400, 4, seed=1)
    score = DensityRatio(200)
    score.fit(Outputs(x, x), None)
    fresh, uniform = draws(200, 4, seed=2), score.uniform.float()
    own, other = score(Outputs(fresh, fresh)), score(Outputs(uniform, uniform))
    assert own.mean() > 2 * other.mean()
    assert roc_auc_score([1] * 200 + [0] * 200, torch.cat([own, other])) > 0.8


# ---------------------------------------------------------------------- changed activations and images


def test_shapings_of_a_hand_example():
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    eye = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        eye.weight.copy_(torch.eye(4))
    assert ASH(percentile=0.5, variant="p").shape(x).tolist() == [[4, 0, 3, 0], [0] * 4]
    assert ASH(percentile=0.5, variant="b").shape(x).tolist() == [[5, 0, 5, 0], [0] * 4]
    up = math.exp(10 / 7)
    assert ASH(percentile=0.5).shape(x)[0].tolist() == pytest.approx([4 * up, 0, 3 * up, 0])
    assert SCALE(percentile=0.5).shape(x)[0].tolist() == pytest.approx([4 * up, up, 3 * up, 2 * up])
    assert SCALE(percentile=0.5).shape(x)[1].tolist() == [0] * 4
    clipped = ReAct(MaxLogit(), percentile=0.75)
    clipped.fit(Outputs(x[:1], x[:1], eye), None)
    assert clipped.shape(x)[0].tolist() == [4, 1, 3, 2]
    clipped = ReAct(MaxLogit(), percentile=0.5)
    clipped.fit(Outputs(x[:1], x[:1], eye), None)
    assert clipped(Outputs(x, x, eye)).tolist() == [3, 0]


def test_shaping_passes_shaped_features_and_logits_to_a_score_that_learns():
    shaped, plain = ReAct(KLMatching(), percentile=0.7), KLMatching()
    (x, y), judged = clusters(100), strangers(40)
    shaped.fit(outputs(x), y)
    plain.fit(outputs(x.clamp(max=shaped.clip)), y)
    torch.testing.assert_close(shaped(outputs(judged)), plain(outputs(judged.clamp(max=shaped.clip))))
    assert shaped.fitted
    assert not ASH().fitted
    assert ASH(KNN()).fitted


class Small(nn.Module):
    """A network whose answer to an image does not depend on the others."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, CLASSES))

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("temperature", [1.0, 1000.0])
def test_odin_steps_up_the_gradient_of_the_largest_log_probability(temperature):
    module, x, epsilon = Small(), draws(12, 2, 5, 5), 0.05
    expected = []
    for image in x:
        image = image[None].clone().requires_grad_()
        p = torch.softmax(module(image)[0] / temperature, 0)
        (-p.log()[p.argmax()]).backward()
        expected.append((image - epsilon * image.grad.sign()).detach()[0])
    module.zero_grad()
    score = ODIN(temperature, epsilon)
    with torch.no_grad():
        moved = score.perturb(module, x)
        z = module(moved)
    torch.testing.assert_close(moved, torch.stack(expected))
    assert not moved.requires_grad
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    p = (z.double() / temperature).softmax(1).amax(1)
    torch.testing.assert_close(score(Outputs(z)), torch.log(p / (1 - p)).float(), rtol=1e-5, atol=1e-5)
    odin = detector("ODIN")(module, eps=epsilon, temperature=temperature)
    assert same_order(score(Outputs(z)), -odin.predict(x), slack=1e-3)


def test_odin_without_a_step_changes_nothing_and_with_one_gets_surer():
    module, x = Small(), draws(12, 2, 5, 5)
    assert torch.equal(ODIN(epsilon=0.0).perturb(module, x), x)
    score = ODIN(1.0, 0.01)
    with torch.no_grad():
        assert (score(Outputs(module(score.perturb(module, x)))) > score(Outputs(module(x)))).all()


# ---------------------------------------------------------------------- ensembles


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


# ---------------------------------------------------------------------- larger = more like a node's own


DIRECTED = [
    MSP(), MaxLogit(), Energy(), Entropy(), GEN(), Margin(), KLMatching(), KNN(5), Mahalanobis(), Mahalanobis(0.1), RMD(), ViM(),
    ReAct(MSP()), ASH(MSP()), SCALE(MSP()), ODIN(), RankEnsemble([MSP(), KNN(5)]),
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


# ---------------------------------------------------------------------- pytorch-ood by name


@pytest.fixture(scope="module")
def there():
    return pytest.importorskip("pytorch_ood.detector")


CARRIED = {
    "DICE": {"p": 0.5}, "EnergyBased": {"t": 2.0}, "Entropy": {}, "GEN": {"gamma": 0.5, "M": 3}, "GMM": {"reg": 0.01},
    "KLMatching": {}, "KNN": {"k": 5}, "LTS": {}, "MCM": {"text_embeddings": CENTRES.tolist()}, "Mahalanobis": {}, "MaxLogit": {},
    "MaxSoftmax": {"t": 2.0}, "NCI": {"alpha": 0.1}, "NNGuide": {"k": 5}, "OpenMax": {"tailsize": 8}, "PNML": {}, "RMD": {},
    "SHE": {}, "TemperatureScaling": {}, "ViM": {"d": 4}, "WeightedEBO": {"weights": [1.0] * CLASSES}, "fDBD": {},
}  # fmt: skip


def theirs(there, name, head, x, y, judged):
    """Scores of ``judged`` by the detector itself."""
    takes = {"head": head, "w": head.weight, "b": head.bias}
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in CARRIED[name].items()}
    options |= {k: takes[k] for k in {"DICE": "wb", "ViM": "wb"}.get(name, "")}
    options |= {"head": head} if name in ("LTS", "NCI", "NNGuide", "PNML", "SHE", "fDBD") else {}
    made = getattr(there, name)(None, **options)
    if hasattr(made, "predict_logits"):
        x, judged = head(x), head(judged)
        if made.requires_fit:
            made.fit_logits(x, y)
        return made.predict_logits(judged).detach()
    if made.requires_fit:
        made.fit_features(x, y)
    return made.predict_features(judged)


def mild(samples, held=range(CLASSES), seed=0):
    """Clusters as small as a network's features, and the head that tells them apart."""
    x, y = clusters(samples, held, seed)
    made = head()
    with torch.no_grad():
        made.weight.mul_(0.01)
        made.bias.mul_(0.01)
    return x, y, made


@pytest.mark.parametrize("name", CARRIED)
def test_every_logit_and_feature_detector_is_carried_with_its_sign_reversed(name, there):
    (x, y, of), judged = mild(150), mild(40, seed=1)[0]
    score = PytorchOOD(name, CARRIED[name])
    assert score.fitted
    score.fit(outputs(x, of), y)
    got = score(outputs(judged, of))
    assert got.dtype == torch.float32
    assert got.isfinite().all()
    torch.testing.assert_close(got, -theirs(there, name, of, x, y, judged).float(), rtol=1e-4, atol=1e-5)


def test_all_of_them_are_tested_above_or_refused(there):
    for name, kind in vars(there).items():
        if isinstance(kind, type) and name not in CARRIED:
            with pytest.raises(
                UserError, match=rf"calibration\.score\.detector: {name} needs the network itself.*Allowed: DICE, Ene"
            ):
                PytorchOOD(name)
    for name in ("ODIN", "ReAct", "Gram", "ASH", "GradNorm", "MahalanobisODIN", "MCD"):
        assert hasattr(there, name)


@pytest.mark.parametrize("name", [name for name in CARRIED if name != "SHE"])
def test_detectors_take_a_node_that_lacks_classes(name, there):
    x, y, of = mild(90, [0, 3, 7])
    score = PytorchOOD(name, CARRIED[name])
    score.fit(outputs(x, of), y)
    assert score(outputs(mild(40, seed=1)[0], of)).isfinite().all()


@pytest.mark.parametrize(("name", "own"), [("Mahalanobis", Mahalanobis(0.0)), ("RMD", RMD(0.0))])
def test_class_conditional_detectors_judge_by_the_classes_held(name, own, there):
    score, judged = fitted(PytorchOOD(name), [0, 3, 7]), outputs(clusters(60)[0])
    assert same_order(score(judged), fitted(own, [0, 3, 7])(judged), slack=1e-4)


def test_she_needs_every_class(there):
    with pytest.raises(UserError, match=r"SHE needs training samples of every class, but .* \[0, 3, 7\]"):
        fitted(PytorchOOD("SHE"), [0, 3, 7])


def test_a_head_without_bias_has_a_bias_of_zeros(there):
    (x, y), bare, zero = clusters(60), head(bias=False), head()
    with torch.no_grad():
        zero.bias.zero_()
    found = []
    for of in (bare, zero):
        score = PytorchOOD("ViM", {"d": 4})
        score.fit(outputs(x, of), y)
        found.append(score(outputs(x, of)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("detector", "arguments", "said"),
    [
        ("KNNN", {}, r"calibration\.score\.detector: KNNN is not a detector of pytorch-ood\. Did you mean 'KNN'\? Allowed: DICE"),
        ("knn", {}, r"calibration\.score\.detector: knn is not a detector of pytorch-ood\. Did you mean 'KNN'\?"),
        ("Zzzz", {}, r"Zzzz is not a detector of pytorch-ood\. Allowed: DICE"),
        (
            "KNN",
            {"kk": 3},
            r"calibration\.score\.arguments: KNN has no 'kk': 3 given; allowed: k, normalize\. Did you mean 'k'\?",
        ),
        ("MaxLogit", {"t": 3}, r"calibration\.score\.arguments: MaxLogit has no 't': 3 given; allowed: none"),
        ("ViM", {}, r"calibration\.score\.arguments: ViM needs d"),
        ("ViM", {"d": 3, "w": [1]}, r"calibration\.score\.arguments: ViM has no 'w'"),
    ],
)
def test_mistakes_in_names_are_refused_with_the_nearest(detector, arguments, said, there):
    with pytest.raises(UserError, match=said):
        PytorchOOD(detector, arguments)


def test_what_a_detector_does_not_take_is_a_sentence(there):
    with pytest.raises(UserError, match=r"calibration\.score: KNN fails on a node's 30 samples \(k=50 exceeds the number"):
        fitted(PytorchOOD("KNN"), samples=30)
    score = fitted(PytorchOOD("WeightedEBO", {"weights": [1.0, 2.0]}))
    with pytest.raises(UserError, match=r"calibration\.score: WeightedEBO fails on a node's 4 samples \(.*size"):
        score(outputs(strangers(4)))


@pytest.mark.parametrize("package", ["pytorch_ood", "pytorch_ood.detector"])
def test_a_missing_package_is_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=r"PytorchOOD needs a package that is not installed \(pytorch_ood.*\): pip install pytorch-ood"
    ):
        PytorchOOD("KNN")


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
        (lambda: RankEnsemble([MSP(), ODIN()]), r"scores: ODIN changes the images"),
        (lambda: ReAct(ODIN()), r"score: ODIN changes the images"),
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


def fit_and_judge(score, outputs):
    score.fit(outputs, torch.zeros(20, dtype=torch.int64))
    return score(outputs)
