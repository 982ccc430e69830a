"""Detectors of pytorch-ood by name."""

import sys

import pytest
import torch
from clusters import CENTRES, CLASSES, clusters, fitted, head, outputs, same_order, strangers

from lightning_idkd.callbacks import (
    RMD,
    Mahalanobis,
    PytorchOOD,
)
from lightning_idkd.errors import UserError


@pytest.fixture(scope="module")
def there():
    return pytest.importorskip("pytorch_ood.detector")


CARRIED = {
    "DICE": {"p": 0.5}, "EnergyBased": {"t": 2.0}, "Entropy": {}, "GEN": {"gamma": 0.5, "M": 3}, "GMM": {"reg": 0.01},
    "KLMatching": {}, "KNN": {"k": 5}, "LTS": {}, "MCM": {"text_embeddings": CENTRES.tolist()}, "Mahalanobis": {},
    "MaxLogit": {}, "MaxSoftmax": {"t": 2.0}, "NCI": {"alpha": 0.1}, "NNGuide": {"k": 5}, "OpenMax": {"tailsize": 8},
    "PNML": {}, "RMD": {}, "SHE": {}, "TemperatureScaling": {}, "ViM": {"d": 4},
    "WeightedEBO": {"weights": [1.0] * CLASSES}, "fDBD": {},
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
        (
            "KNNN",
            {},
            r"calibration\.score\.detector: KNNN is not a detector of pytorch-ood\. Did you mean 'KNN'\? Allowed: DICE",
        ),
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
    with pytest.raises(
        UserError, match=r"calibration\.score: KNN fails on a node's 30 samples \(k=50 exceeds the number"
    ):
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
