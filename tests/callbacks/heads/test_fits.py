"""Fits of the last layer: statistics by numpy, fits by scikit-learn, arguments out of range."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from lightning_idkd import UserError
from lightning_idkd.callbacks.heads.calibrated import CalibratedHead, compute_statistics
from lightning_idkd.callbacks.heads.fits import LDA, NearestMean, VirtualFeatures

K, F = 4, 3


def features(count=200, seed=0, classes=K):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    spread = rng.normal(size=(K, F, F))
    x = 2 * np.eye(K, F)[labels] + np.einsum("nf,nfg->ng", rng.normal(size=(count, F)), spread[labels])
    return x, labels


def sums(x, labels, per_class):
    """Counts, sums and second moments as one row, by loops."""
    row = [(labels == c).sum() for c in range(K)]
    for c in range(K):
        row += list(x[labels == c].sum(0))
    for members in [x[labels == c] for c in range(K)] if per_class else [x]:
        row += [(members[:, f] * members[:, g]).sum() for f in range(F) for g in range(f, F)]
    return torch.tensor(np.array(row, dtype=float))


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("factor", [1.0, 0.03])
@pytest.mark.parametrize("per_class", [False, True])
def test_statistics_are_means_and_covariances_whatever_the_factor(per_class, factor):
    x, labels = features()
    s = compute_statistics(factor * sums(x, labels, per_class), K, F, per_class)
    np.testing.assert_allclose(s.share, np.bincount(labels) / len(x), rtol=1e-12)
    for c in range(K):
        np.testing.assert_allclose(s.mean[c], x[labels == c].mean(0), rtol=1e-10, atol=1e-12)
        if per_class:
            expected = np.cov(x[labels == c].T, bias=True)
            np.testing.assert_allclose(s.covariance[c], expected, rtol=1e-9, atol=1e-11)
    around = x - np.stack([x[labels == c].mean(0) for c in range(K)])[labels]
    np.testing.assert_allclose(s.pooled, around.T @ around / len(x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shrinkage", [0.0, 0.1])
def test_lda_is_that_of_scikit_learn(shrinkage):
    x, labels = features()
    weight, bias = LDA(shrinkage).fit(compute_statistics(sums(x, labels, False), K, F, False), generator())
    theirs = LinearDiscriminantAnalysis("lsqr", priors=np.full(K, 1 / K))
    means = np.stack([x[labels == c].mean(0) for c in range(K)])
    if shrinkage:  # theirs shrinks every class's own covariance, so the formula stands here
        around = x - means[labels]
        covariance = around.T @ around / len(x)
        covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / F * np.eye(F)
        expected = np.linalg.solve(covariance, means.T).T
    else:  # theirs weights the classes' covariances by their priors, which are made equal by equal counts
        order = np.concatenate([np.flatnonzero(labels == c)[:30] for c in range(K)])
        x, labels = x[order], labels[order]
        weight, bias = LDA(0.0).fit(compute_statistics(sums(x, labels, False), K, F, False), generator())
        theirs.fit(x, labels)
        logits = x @ weight.numpy().T + bias.numpy()
        expected = theirs.decision_function(x)
        np.testing.assert_allclose(logits - logits[:, :1], expected - expected[:, :1], rtol=1e-6, atol=1e-8)
        return
    np.testing.assert_allclose(weight, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(bias, -0.5 * (expected * means).sum(1), rtol=1e-9)


def test_the_nearest_mean_is_that_of_scikit_learn():
    x, labels = features()
    weight, bias = NearestMean().fit(compute_statistics(sums(x, labels, False), K, F, False), generator())
    ours = (x @ weight.numpy().T + bias.numpy()).argmax(1)
    assert np.array_equal(ours, NearestCentroid().fit(x, labels).predict(x))


def test_virtual_features_have_the_statistics_they_are_drawn_from():
    x, labels = features()
    s = compute_statistics(sums(x, labels, True), K, F, True)
    drawn, classes = VirtualFeatures(20_000, shrinkage=0.0).draw(s, generator())
    for c in range(K):
        own = drawn[classes == c].numpy()
        np.testing.assert_allclose(own.mean(0), s.mean[c], atol=0.1)
        np.testing.assert_allclose(np.cov(own.T), s.covariance[c], atol=0.25)


def test_the_regression_on_virtual_features_is_that_of_scikit_learn():
    x, labels = features()
    head, s = VirtualFeatures(100, weight_decay=0.01), compute_statistics(sums(x, labels, True), K, F, True)
    weight, bias = head.fit(s, generator())
    drawn, classes = (t.numpy() for t in head.draw(s, generator()))
    scale = np.sqrt((drawn**2).mean())
    theirs = LogisticRegression(C=1 / (2 * 0.01 * len(drawn)), tol=1e-10, max_iter=5000).fit(drawn / scale, classes)
    ours = drawn @ weight.numpy().T + bias.numpy()
    expected = theirs.decision_function(drawn / scale)
    np.testing.assert_allclose(ours - ours[:, :1], expected - expected[:, :1], atol=1e-3)


@pytest.mark.parametrize(("make", "said"), [
    (lambda: CalibratedHead(rounds=0), r"callbacks\.rounds: 0 given; allowed: 1 or more"),
    (lambda: CalibratedHead(every=0), r"callbacks\.every: 0 given; allowed: 1 or more, or null"),
    (lambda: CalibratedHead(noise=-1.0), r"callbacks\.noise: -1\.0 given; allowed: 0 or more"),
    (lambda: LDA(1.5), r"callbacks\.head\.shrinkage: 1\.5 given; allowed: 0 to 1"),
    (lambda: VirtualFeatures(0), r"callbacks\.head\.samples: 0 given; allowed: 1 or more"),
    (lambda: VirtualFeatures(weight_decay=0.0), r"callbacks\.head\.weight_decay: 0\.0 given; allowed: above 0"),
])  # fmt: skip
def test_arguments_out_of_range_are_refused_with_their_key(make, said):
    with pytest.raises(UserError, match=f"^{said}"):
        make()
