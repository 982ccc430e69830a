"""Scores of features against plain re-implementations."""

import numpy as np
import pytest
import torch
from clusters import FEATURES, HEAD, clusters, draws, fitted, head, name_of, outputs, strangers
from scipy.spatial.distance import cdist, pdist
from sklearn.covariance import LedoitWolf, shrunk_covariance
from sklearn.metrics import roc_auc_score

import lightning_idkd.callbacks.ood.features as features_module
from lightning_idkd.callbacks import (
    ASH,
    KNN,
    RMD,
    SCALE,
    DensityRatio,
    Energy,
    KLMatching,
    Mahalanobis,
    ReAct,
    ViM,
)
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs

FEATURE_SCORES = [
    KNN(5), Mahalanobis(), Mahalanobis(0.0), Mahalanobis(0.5), RMD(), RMD(0.1), ViM(), DensityRatio(60), ReAct(),
    ASH(), SCALE(), ReAct(KLMatching()), ReAct(KNN(5)),
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
def test_rmd_shrinks_both_covariances_alike_so_that_nearly_isotropic_features_are_distinguished(seed):
    """100 own samples of three classes whose covariance is the identity; public ones of other classes. Of Ledoit and
    Wolf's two shares one is near 1 and the other is not: with a share each the distances are of two kinds."""
    rng, size = np.random.default_rng(seed), 64
    means, others = 0.7 * rng.standard_normal((2, 3, size))
    y, here = np.arange(100) % 3, np.arange(300) % 3
    x, own, public = means[y], means[here], others[here]
    x, own, public = (centres + rng.standard_normal(centres.shape) for centres in (x, own, public))
    score = RMD()
    score.fit(Outputs(torch.zeros(100, 3), torch.tensor(x).float()), torch.tensor(y))
    assert score.shrunk_by == pytest.approx(
        LedoitWolf(assume_centered=True).fit(x - score.means.numpy()[y]).shrinkage_, rel=1e-3
    )
    assert score.shrunk_by > 0.9 > 0.5 > LedoitWolf().fit(x).shrinkage_

    def judged(features):
        return score(Outputs(torch.zeros(300, 3), torch.tensor(features).float())).numpy()

    assert roc_auc_score(np.repeat([1, 0], 300), np.concatenate([judged(own), judged(public)])) > 0.98


@pytest.mark.parametrize("shrinkage", [None, 0.0, 0.5])
def test_with_one_sample_a_class_the_distance_is_euclidean(shrinkage):
    (x, y), score, judged = clusters(3, [0, 3, 7]), Mahalanobis(shrinkage), strangers(20)
    score.fit(outputs(x), y)
    np.testing.assert_allclose(score(outputs(judged)), -(cdist(judged, x).min(1) ** 2), rtol=1e-5)


def test_rmd_of_a_node_with_one_class_is_zero():
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


def test_knn_distinguishes_collapsed_features():
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
    np.testing.assert_allclose(
        score(outputs(judged)), energy - alpha * rest(judged.double().numpy()), rtol=1e-4, atol=1e-2
    )


def test_vim_needs_fewer_dimensions_than_features_and_takes_a_head_without_bias():
    with pytest.raises(UserError, match=r"calibration\.score\.dimension: 16 given; allowed: below the 16 features"):
        fitted(ViM(FEATURES))
    x, y = clusters(60)
    score, bare = ViM(4), head(bias=False)
    score.fit(outputs(x, bare), y)
    assert score(outputs(x, bare)).isfinite().all()
    assert not score.origin.any()


def test_density_ratio_minimises_the_kulsif_objective():
    """Kanamori et al. (2012), Eq. 6, over all functions on the samples by its normal equations, not the closed form."""
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
