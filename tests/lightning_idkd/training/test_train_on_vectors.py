"""Whole runs on vectors: every engine and number of processes, resuming, evaluating, messages."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from forked import fit_on_two_hosts
from short_runs import build, checkpoint, latest, lines, same
from sklearn.datasets import load_breast_cancer
from torch import nn

from lightning_idkd import load
from lightning_idkd.analysis.benchmark import Case, build_step
from lightning_idkd.cli import main
from lightning_idkd.command.topology import expect_inputs
from lightning_idkd.config.parse import configure
from lightning_idkd.data import ScikitLearn

NAME = "ring_breast_cancer"
BRIEF = ["--logger", "null", "--graph.nodes", "4", "--train.epochs", "6", "--train.evaluate_every", "2",
         "--distillation.start", "3", "--distillation.every", "2", "--run.pictures", "false",
         "--run.threads", "1"]  # fmt: skip


@pytest.fixture
def fit_vectors(configs, tmp_path):
    """Train on the vectors of scikit-learn's table; returns the exit code."""

    def call(*arguments, folder="runs"):
        config = str(configs / f"{NAME}.yaml")
        return main(["fit", "--config", config, *BRIEF, "--run.dir", str(tmp_path / folder), *arguments])

    call.runs = tmp_path / "runs"
    return call


class Tower(nn.Module):
    """A network of a user: two layers for vectors of any length."""

    def __init__(self, features, classes):
        super().__init__()
        self.body, self.head = nn.Linear(features, 5), nn.Linear(5, classes)

    def features(self, x):
        return self.body(x).tanh()

    def forward(self, x):
        return self.head(self.features(x))


def test_engines_and_processes_agree(fit_vectors, configs):
    states = {}
    for name, more in {
        "loop": ["--run.engine", "loop"],
        "vmap": ["--run.engine", "vmap"],
        "parallel": ["--run.engine", "parallel", "--run.threads", "2"],
    }.items():
        assert fit_vectors("--run.precision", "64", *more, folder=name) == 0
        states[name] = checkpoint(latest(fit_vectors.runs.parent / name, NAME))
    command = ["--config", str(configs / f"{NAME}.yaml"), *BRIEF, "--run.precision", "64", "--run.engine", "loop"]
    states["processes"] = checkpoint(latest(fit_on_two_hosts(command, fit_vectors.runs.parent / "two"), NAME))
    for name in ("vmap", "parallel", "processes"):
        torch.testing.assert_close(states[name]["X"], states["loop"]["X"], rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(states[name]["distilled"], states["loop"]["distilled"], strict=True):
            assert torch.equal(ours[0], theirs[0])
    assert same(states["processes"], states["loop"]) is None


def test_one_node_without_a_graph_is_plain_training(configs):
    config = configure(["--config", str(configs / f"{NAME}.yaml"), "--graph.nodes", "1", "--graph.topology", "Ring",
                        "--data.partition", "IID", "--distillation", "null", "--run.precision", "64",
                        "--run.threads", "1",
                        "--logger", "null", "--run.engine", "loop", "--gossip", "DSGD"])  # fmt: skip
    run = build(config)
    store, stack = run.store, run.stack
    model = stack.model(stack.X[0].clone(), {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    order = store.order(0, 5)
    table = ScikitLearn("breast_cancer", limit=300).load("train")
    train = store.split.train[0]
    values, labels = table.values.numpy()[train], table.labels[train]
    mean, std = values.mean(0), values.std(0)
    for step in range(5):
        run.train_step(order)
        index = order[0, step * 8 : step * 8 + 8]
        x = torch.from_numpy((values[index] - mean) / std)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels[index]).backward()
        optimizer.step()
    trained = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(stack.X[0], trained, rtol=1e-9, atol=1e-12)


def test_a_resumed_run_is_the_same_bit_for_bit(fit_vectors):
    assert fit_vectors("--run.engine", "vmap") == 0
    assert fit_vectors("--run.engine", "vmap", "--run.until", "4", folder="halves") == 0
    assert fit_vectors("--run.engine", "vmap", "--run.resume", "auto", folder="halves") == 0
    whole, halves = (latest(fit_vectors.runs.parent / folder, NAME) for folder in ("runs", "halves"))
    assert same(checkpoint(whole), checkpoint(halves)) is None
    assert lines(whole) == lines(halves)


def test_a_loaded_run_answers_as_it_did(fit_vectors, capsys, tmp_path):
    assert fit_vectors() == 0
    folder = latest(fit_vectors.runs, NAME)
    summary = json.loads((folder / "summary.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"]["node_mean"] == pytest.approx(summary["accuracy"]["node_mean"])
    run = load(folder)
    test = run.test()
    facts = run.images
    x = (test.values - facts["mean"]) / facts["std"]
    with torch.no_grad():
        right = run.consensus()(x.float()).argmax(1) == test.labels
    assert right.double().mean() == pytest.approx(summary["accuracy"]["consensus"])
    run.export(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "consensus.json").read_text())
    assert about["columns"] == load_breast_cancer().feature_names.tolist()
    np.testing.assert_allclose(about["mean"], facts["mean"])
    assert len(run.public()) == 156 + 155


def test_the_detector_leaves_noise_out(fit_vectors, configs):
    """Half of the public set is noise: a distance to the node's own features tells it from the other half."""
    assert fit_vectors() == 0
    kept = checkpoint(latest(fit_vectors.runs, NAME))["distilled"]
    real = sum(int((index < 156).sum()) for index, _ in kept)
    noise = sum(int((index >= 156).sum()) for index, _ in kept)
    assert real > 20 * noise


@pytest.mark.parametrize("score", ["ODIN", "KNN", "ReAct"])
def test_scores_work_on_vectors(fit_vectors, score):
    assert fit_vectors("--calibration.score", score) == 0


def test_a_table_of_ones_own_and_a_network_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    np.savez(tmp_path / "table.npz", x=rng.normal(size=(200, 3)) + 2 * labels[:, None], label=labels)
    arguments = ["fit", "--data.private", "Vectors", "--data.private.path", str(tmp_path / "table.npz"), *BRIEF[:6],
                 "--node.network", "TorchModule", "--node.network.path", f"{__name__}.Tower", "--run.pictures", "false",
                 "--run.dir", str(tmp_path / "runs"), "--train.batch_size", "8"]  # fmt: skip
    assert main(arguments) == 0
    summary = json.loads((latest(tmp_path / "runs", "idkd") / "summary.json").read_text())
    assert summary["accuracy"]["consensus"] > 0.9


@pytest.mark.parametrize(("arguments", "said"), [
    (["--node.network", "CNN"], "node.network: CNN needs channels and size, but vectors have features; allowed: MLP, "),
    (["--data.augment", "crop"], "data.augment: crop given; allowed for vectors: none"),
    (["--data.image_size", "8"], "data.image_size: 8 given; allowed for ScikitLearn, which holds vectors: null"),
    (["--data.channels", "1"], "data.channels: 1 given; allowed for ScikitLearn, which holds vectors: null"),
    (["--data.public", "Glyphs"], "data.public: Glyphs holds images; allowed: vectors, as the private samples"),
    (["--data.public", "ScikitLearn", "--data.public.name", "wine"],
     "data.public: the train vectors have no column 'mean radius', as the private ones do; it has alcohol, malic_acid"),
    (["--data.partition", "FeatureSkew"], "data.partition: FeatureSkew rotates images; allowed for vectors: the other"),
    (["--data.private.name", "breast"], "data.private.name: 'breast' given. Did you mean 'breast_cancer'?"),
])  # fmt: skip
def test_what_vectors_do_not_have_is_refused_before_anything_is_written(fit_vectors, arguments, said, capsys):
    assert fit_vectors(*arguments) == 2
    assert said in capsys.readouterr().err
    assert not fit_vectors.runs.exists()


def test_other_vectors_are_not_those_of_the_run(fit_vectors, monkeypatch, capsys):
    assert fit_vectors("--run.until", "4") == 0
    monkeypatch.setattr(ScikitLearn, "read", lambda self, split, size, key: changed(original(self, split, size, key)))
    assert fit_vectors("--run.resume", "auto") == 2
    assert "data.private: the training vectors are not those of" in capsys.readouterr().err


original = ScikitLearn.read


def changed(content):
    names, samples, remarks = content
    return names, ((vector + 1e-9, label) for vector, label in samples), remarks


def test_topology_and_bench_take_vectors(configs, capsys, tmp_path):
    config = ["--config", str(configs / f"{NAME}.yaml")]
    assert main(["topology", *config, "--out", str(tmp_path / "g.png")]) == 0
    assert "2,378 parameters of MLP for 30 features, 10 classes" in " ".join(capsys.readouterr().out.split())
    case = Case(configure([*config, "--graph.nodes", "2"]), expect_inputs(configure(config)), None)
    run = case.build_run("loop")
    before = run.stack.X.clone()
    build_step(run)()
    assert not torch.equal(run.stack.X, before)
    assert run.store.pool.shape == (80, 30)
