"""Runs with refitted heads: gossip over graphs and processes, bytes, resuming, networks that have no such head."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from forked import fit_on_two_hosts
from short_runs import SHORT, build, checkpoint, latest, lines, same

from lightning_idkd import load
from lightning_idkd.callbacks.heads.calibrated import CalibratedHead
from lightning_idkd.callbacks.heads.fits import LDA, NearestMean, VirtualFeatures
from lightning_idkd.config.parse import configure

HEAD = ["--callbacks", "[{class_path: CalibratedHead, init_args: {head: LDA, rounds: 12}}]"]


@pytest.mark.parametrize("head", [LDA(), NearestMean(), VirtualFeatures(50)])
def test_a_class_that_no_node_has_is_never_predicted(configs, head):
    run = brief_run(configs, "--data.private.classes", "['3', '5', '7']")
    run.store.labels.clamp_(max=1)  # nobody has the last class any more
    CalibratedHead(head, rounds=5).refit(run)
    for module in run.stack.modules:
        batches, _ = run.store.evaluation_set("test", 60)
        logits = torch.cat([module.eval()(x) for x in batches()])
        assert logits.isfinite().all()
        assert (logits.argmax(1) != 2).all()


# ---------------------------------------------------------------------- runs


def brief_run(configs, *more):
    return build(configure(["--config", str(configs / "ring_digits.yaml"), *SHORT, "--run.precision", "64",
                            "--distillation", "null", *more]))  # fmt: skip


@pytest.mark.parametrize(("topology", "weights"), [("Complete", "metropolis"), ("DirectedExponential", "push_sum")])
def test_after_gossip_every_node_has_the_head_of_all_samples(configs, topology, weights):
    """Nodes start equal, so their features are those of one model on all private samples."""
    rule = ["--gossip", "SGP"] if weights == "push_sum" else []
    graph = ["--graph.topology", topology.removeprefix("Directed"), "--graph.weights", weights, *rule]
    run = brief_run(configs, *graph)
    before = run.network.counts()
    CalibratedHead(LDA(0.05), rounds=60).refit(run)
    x, y = [], []
    for i, own in enumerate(run.store.own):
        x += [run.stack.modules[i].eval().network.features(batch).detach() for batch in run.store.private_batches(own)]
        y.append(run.store.labels[own])
    x, y = torch.cat(x).numpy(), torch.cat(y).numpy()
    means = np.stack([x[y == c].mean(0) for c in range(10)])
    around = x - means[y]
    covariance = around.T @ around / len(x)
    covariance = 0.95 * covariance + 0.05 * np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
    expected = np.linalg.solve(covariance, means.T).T
    for module in run.stack.modules:
        np.testing.assert_allclose(module.network.head.weight.detach(), expected, rtol=1e-5, atol=1e-5)
    width = x.shape[1]
    values = 10 + 10 * width + width * (width + 1) // 2
    edges = sum(len(run.network.edges(turn)) for turn in range(60))
    after = run.network.counts()
    assert after["other_bytes"] - before["other_bytes"] == edges * values * 8
    assert after["parameter_bytes"] == before["parameter_bytes"]


def test_the_head_lies_in_the_rows(configs):
    run = brief_run(configs)
    CalibratedHead().refit(run)
    bias = run.stack.modules[2].network.head.bias.detach()
    assert torch.equal(run.stack.X[2, -10:], bias)


def test_noise_changes_the_head_and_is_the_same_in_every_run(configs):
    heads = []
    for noise in (0.0, 0.5, 0.5):
        run = brief_run(configs)
        CalibratedHead(noise=noise).refit(run)
        heads.append(run.stack.X.clone())
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])


def test_a_run_says_what_is_shared_and_ends_with_the_refitted_heads(fit, capsys, configs):
    assert fit(*HEAD) == 0
    run = latest(fit.runs)
    assert "class counts, sums and second moments of features" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["communication"]["other_bytes"] > 0
    assert not torch.equal(checkpoint(run)["X"], load(run).stack.X)  # last.ckpt is from before the final gossip
    folder = fit_on_two_hosts(["--config", str(configs / "ring_digits.yaml"), *SHORT, *HEAD], fit.runs.parent / "two")
    one, two = (torch.load(path / "checkpoints" / "final.ckpt") for path in (run, latest(folder)))
    assert torch.equal(one["X"], two["X"])
    assert lines(run) == lines(latest(folder))


def test_refits_on_the_way_resume_bit_for_bit(fit):
    often = [HEAD[0], HEAD[1].replace("rounds: 12", "rounds: 3, every: 2")]
    assert fit(*often) == 0
    assert fit(*often, "--run.until", "3", folder="halves") == 0
    assert fit(*often, "--run.resume", "auto", folder="halves") == 0
    whole, halves = latest(fit.runs), latest(fit.runs.parent / "halves")
    assert same(checkpoint(whole), checkpoint(halves)) is None
    assert lines(whole) == lines(halves)


# ---------------------------------------------------------------------- bad input


class Bare(torch.nn.Module):
    """A network without a bias in its head."""

    def __init__(self, classes):
        super().__init__()
        self.head = torch.nn.Linear(64, classes, bias=False)

    def features(self, x):
        return x.flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


@pytest.mark.parametrize(("arguments", "said"), [
    (["--node.network", "TorchModule", "--node.network.path", f"{__name__}.Bare"], "needs a trained head with a bias"),
    (["--node.network", "TorchModule", "--node.network.path", "torchvision.models.resnet18", "--data.channels", "3",
      "--data.image_size", "32", "--node.network.frozen", "[fc.*]"], "needs a trained head with a bias"),
])  # fmt: skip
def test_networks_without_such_a_head_are_refused(fit, arguments, said, capsys):
    assert fit(*HEAD, *arguments, "--train.epochs", "1", "--distillation", "null", "--data.private.limit", "90") == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    ["--callbacks", "[{class_path: SkewProbe}]", "--data.validation", "0", "--distillation", "null"],
    ["--distillation.aggregation", "TrimmedMean", "--distillation.aggregation.trim", "2"],
])  # fmt: skip
def test_a_callback_that_cannot_work_leaves_no_run_behind(fit, capsys, options):
    assert fit(*options) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not fit.runs.exists()


def test_nodes_whose_statistics_are_lies_keep_their_heads(fit, capsys):
    lies = "[{class_path: Liars, init_args: {nodes: [1], attack: {class_path: SignFlip, init_args: {scale: 1.0e+30}}}}]"
    callbacks = ["--callbacks", "[{class_path: CalibratedHead, init_args: {rounds: 3}}]"]
    assert (
        fit("--gossip", "Isolated", "--faults", lies, "--train.final_gossip", "0", "--distillation", "null", *callbacks)
        == 0
    )
    assert "are no class means, so their heads stay" in capsys.readouterr().out
