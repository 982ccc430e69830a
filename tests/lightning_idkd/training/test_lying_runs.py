"""Whole runs with liars: measures of honest nodes apart, flipped labels, resume, processes, engines, messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from interrupts import InterruptAt
from short_runs import SHORT, build, checkpoint, extra, latest, lines, run_of, same, train

from lightning_idkd.analysis.evaluate import evaluate
from lightning_idkd.analysis.load import load
from lightning_idkd.config.parse import configure
from lightning_idkd.errors import UserError
from lightning_idkd.records import report
from lightning_idkd.training.fit import describe_bounds


def liars(nodes="[2]", **arguments):
    given = ", ".join(f"{name}: {value}" for name, value in arguments.items())
    return ["--faults", f"[{{class_path: Liars, init_args: {{nodes: {nodes}, {given}}}}}]"]


NOISE = "{class_path: Noise, init_args: {sigma: 0.01}}"
WRONG = "{class_path: WrongLabels, init_args: {everything: true}}"
RANDOM = "{class_path: WrongLabels, init_args: {kind: random}}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four nodes, of which node 2 lies about everything."""
    from lightning_idkd.cli import main

    folder = tmp_path_factory.mktemp("liars")
    given = [*liars(attack=NOISE, labels=WRONG, flip="true"), "--train.final_gossip", "0"]
    config = str(Path(__file__).resolve().parents[3] / "configs" / "ring_digits.yaml")
    assert main(["fit", "--config", config, *SHORT, "--run.dir", str(folder), *given]) == 0
    return latest(folder)


HONEST = [0, 1, 3]


def test_measures_are_those_of_honest_nodes(finished):
    summary = json.loads((finished / "summary.json").read_text())
    nodes = np.array(summary["per_node"]["accuracy"])
    assert len(nodes) == 4
    expected = {"node_mean": nodes[HONEST].mean(), "node_std": nodes[HONEST].std(), "node_min": nodes[HONEST].min(),
                "node_max": nodes[HONEST].max()}  # fmt: skip
    for name, value in expected.items():
        assert summary["accuracy"][name] == pytest.approx(value, abs=1e-12), name
    before = summary["accuracy"]["node_mean_before_final_gossip"]
    assert before == pytest.approx(nodes[HONEST].mean(), abs=1e-12), "there is no final gossip"
    assert summary["faults"] == {"liars": 1, "liars_mean": pytest.approx(nodes[2], abs=1e-12)}
    assert abs(nodes[2] - nodes[HONEST].mean()) > 1e-3, "otherwise the test cannot tell them apart"
    assert ("lying nodes", f"1, of {nodes[2]:.2%} on average") in report.list_results(summary)
    for name in ("threshold", "kept_fraction"):
        assert summary["ood"][name] == pytest.approx(np.array(summary["per_node"][name])[HONEST].mean(), abs=1e-6)
    X = torch.load(finished / "checkpoints" / "final.ckpt", weights_only=True)["X"].double().numpy()[HONEST]
    mean = X.mean(0)
    distance = np.sqrt(((X - mean) ** 2).sum(1).mean()) / np.linalg.norm(mean)
    assert summary["consensus_distance"] == pytest.approx(distance, rel=1e-5)


def test_the_consensus_model_of_a_loaded_run_is_that_of_honest_nodes(finished):
    run = load(finished)
    summary = json.loads((finished / "summary.json").read_text())
    assert run.honest.tolist() == [True, True, False, True]
    result = evaluate(run, [])["accuracy"]
    assert result["consensus"] == pytest.approx(summary["accuracy"]["consensus"], abs=1e-12)
    assert result["node_mean"] == pytest.approx(summary["accuracy"]["node_mean"], abs=1e-12)
    mean = torch.cat([p.detach().flatten() for p in run.consensus().parameters()])
    rows = [torch.cat([p.detach().flatten() for p in run.stack.modules[i].parameters()]) for i in HONEST]
    torch.testing.assert_close(mean, torch.stack(rows).mean(0), rtol=0, atol=1e-6)


def test_validation_is_that_of_honest_nodes(configs):
    run = run_of(configs, *liars(attack=NOISE, flip="true"))
    train(run, 40)
    values = {"test": torch.tensor([0.1, 0.2, 0.9, 0.3]), "validation": torch.tensor([0.4, 0.5, 0.0, 0.6])}
    from lightning_idkd.training import record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "measure_accuracies", lambda *_given: values)
        measured, nodes = record.measure_nodes(run.stack, run.network, run.store, 10, 10, lambda: False)
    assert measured["accuracy/node_mean"] == pytest.approx(0.2)
    assert measured["validation/node_mean"] == pytest.approx(0.5)
    assert measured["faults/liars_mean"] == pytest.approx(0.9)
    assert nodes == pytest.approx([0.1, 0.2, 0.9, 0.3])


def test_the_loss_is_the_mean_over_the_batches_of_honest_nodes(configs, tmp_path):
    """Of honest nodes 0, 1 and 3, node 3 misses two of four steps; so does liar 2, which does not count."""
    (tmp_path / "trace.csv").write_text("node,from,to\n3,0,{0}\n2,0,{0}\n".format(1.5 / run_of(configs).progress.steps))
    absent = f"{{class_path: Trace, init_args: {{file: {tmp_path / 'trace.csv'}}}}}"
    lies = liars(attack=NOISE, flip="true")[1]
    run = run_of(configs, "--faults", f"{lies[:-1]}, {absent}]")
    order, losses = run.store.order(0, run.progress.steps), []
    for step in range(4):
        of_step = run.train_step(order)
        losses += [of_step[i].item() for i in HONEST if i != 3 or step >= 2]
    assert len(losses) == 4 * 3 - 2
    assert run.recorder.add_line(16, lambda: False)["train/loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_accuracies_by_class_are_those_of_honest_nodes(finished):
    found = evaluate(load(finished), [], per_class=True)["per_class"]["accuracy"]
    nodes = np.array(found["nodes"])
    assert nodes.shape == (4, 10)
    for name, values in (("node_mean", nodes[HONEST].mean(0)), ("node_min", nodes[HONEST].min(0))):
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-12)
    assert not np.allclose(found["node_mean"], nodes.mean(0))


def test_heterogeneity_counts_the_labels_that_honest_nodes_train_on(configs):
    run = run_of(configs, *liars("[0, 2]", flip="true"))
    counts = np.stack([run.store.labels[run.store.split.train[i]].bincount(minlength=10).numpy() for i in range(4)])
    p, q = counts / counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    expected = np.mean([np.abs(p[i] - q).sum() / 2 for i in (1, 3)])
    assert run.recorder.add_line(16, lambda: False)["homogeneity/before"] == pytest.approx(expected, abs=1e-12)


def test_flipped_labels_are_those_of_training_samples_of_liars_alone(configs):
    lying, plain = run_of(configs, *liars("[1]", flip="true")).store, run_of(configs).store
    for node in range(4):
        train, held_out = plain.split.train[node], plain.split.validation[node]
        before, after = plain.labels[train], lying.labels[train]
        assert torch.equal(after, 9 - before if node == 1 else before)
        assert torch.equal(lying.labels[held_out], plain.labels[held_out])
    assert lying.split.hash == plain.split.hash
    assert torch.equal(lying.test_labels, plain.test_labels)
    first = plain.sizes[0]
    of_one = slice(first, first + plain.sizes[1])
    assert torch.equal(lying._targets[of_one], plain._targets[of_one].flip(1))
    assert lying.split.data == plain.split.data


def test_a_liar_itself_trains_and_mixes_like_an_honest_node(configs):
    """After one step its row is what it would be without lies: they reach its neighbours, and come back later."""
    lying, plain = run_of(configs, *liars(attack="SignFlip")), run_of(configs)
    for run in (lying, plain):
        train(run, 1)
    assert torch.equal(lying.stack.X[2], plain.stack.X[2])
    assert torch.equal(lying.stack.X[0], plain.stack.X[0]), "node 0 is not its neighbour"
    assert not torch.equal(lying.stack.X[1], plain.stack.X[1])


def test_a_resumed_run_equals_one_in_one_go(fit):
    given = [*liars("1", attack=NOISE, labels=RANDOM), "--gossip", "GradientTracking"]
    stops = extra(InterruptAt, steps=[50, 95])
    assert fit(*given, folder="whole") == 0
    assert fit(*given, *stops) == 130
    assert fit(*given, *stops, "--run.resume", "auto") == 130
    assert fit(*given, *stops, "--run.resume", "auto") == 0
    cut, whole = latest(fit.runs), latest(fit.runs.parent / "whole")
    assert same(checkpoint(cut) | {"callbacks": 0}, checkpoint(whole) | {"callbacks": 0}) is None
    assert lines(cut) == lines(whole)


def test_engines_agree(configs):
    rows = []
    for engine in ("loop", "vmap"):
        run = run_of(configs, *liars(attack="ALIE"), "--run.precision", "64", "--run.engine", engine)
        train(run, 15)
        rows.append(run.stack.X.numpy().copy())
    np.testing.assert_allclose(rows[0], rows[1], rtol=0, atol=1e-9 * np.linalg.norm(rows[0]))


def test_the_start_says_who_lies_and_how(fit, capsys):
    assert fit(*liars("[2, 0]", attack=NOISE, labels=RANDOM, flip="true"), "--run.until", "1") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("liars"))
    assert line == "liars      nodes 0, 2: Noise in rows, WrongLabels in labels, flipped private labels"


@pytest.mark.parametrize(
    ("nodes", "labels", "notes"),
    [
        ("[0, 2]", WRONG, ["distillation.aggregation: TrimmedMean bears 1 lying of 2 neighbours, and more lie to nodes "
                           "1, 3"]),
        ("[0, 1]", WRONG, []),
        ("[0, 2]", "null", []),
    ],
)  # fmt: skip
def test_more_liars_than_an_aggregation_bears_are_noted_with_its_bound(nodes, labels, notes, configs):
    config = configure(["--config", str(configs / "ring_digits.yaml"), *SHORT, "--distillation.aggregation",
                        "TrimmedMean", *liars(nodes, labels=labels, flip="true")])  # fmt: skip
    assert describe_bounds(config, build(config).network) == notes


def test_more_liars_than_an_aggregator_bears_are_noted_around_whatever_rule(configs):
    robust = "{class_path: Robust, init_args: {rule: DSGD, aggregator: CoordinateTrimmedMean}}"
    config = configure(["--config", str(configs / "ring_digits.yaml"), *SHORT, "--gossip",
                        f"{{class_path: LocalSteps, init_args: {{rule: {robust}}}}}",
                        *liars("[1, 3]", attack="SignFlip")])  # fmt: skip
    expected = "gossip.aggregator: CoordinateTrimmedMean bears 1 lying of 2 neighbours, and more lie to nodes 0, 2"
    assert describe_bounds(config, build(config).network) == [expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (liars("[7]", flip="true"), "faults.nodes: node 7 given; allowed: 0 to 3"),
        (liars(attack="IPN"), "Did you mean 'IPM'?"),
        (liars(attack="{class_path: IPM, init_args: {epsilon: 0}}"), "epsilon: 0.0 given; allowed: above 0"),
        ([*liars(attack="IPM"), "--gossip", "RelaySGD", "--graph.topology", "Chain"],
         "IPM compares the messages of several nodes, but gossip RelaySGD sends a different message over every edge"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_any_file_is_written(given, message, fit, capsys):
    assert fit(*given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2
    assert not fit.runs.exists()


def test_a_liar_that_diverges_does_not_stop_the_run(configs):
    run = run_of(configs, *liars(attack=NOISE))
    train(run, 1)
    run.stack.X[2] = float("inf")
    run.recorder.check_finite(Path("last.ckpt"))
    run.stack.X[1] = float("nan")
    with pytest.raises(UserError, match="node 1 or its parameters are not finite at step 0"):
        run.recorder.check_finite(Path("last.ckpt"))
