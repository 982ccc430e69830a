"""Whole runs with a local loss: engines, resuming, forks, remarks, labels of comparisons, and configs from before."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from forked import fit_on_two_hosts
from short_runs import SHORT, checkpoint, latest, lines, same

from lightning_idkd import load
from lightning_idkd.cli import main
from lightning_idkd.config.class_paths import drop_removed

BALANCED = ["--node.loss", "BalancedSoftmax", "--node.loss.tau", "0.8"]


def test_engines_and_processes_agree(fit, configs):
    states = {}
    for engine in ("loop", "vmap"):
        assert fit(*BALANCED, "--run.engine", engine, "--run.precision", "64", folder=engine) == 0
        states[engine] = checkpoint(latest(fit.runs.parent / engine))
    torch.testing.assert_close(states["vmap"]["X"], states["loop"]["X"], rtol=1e-8, atol=1e-10)
    command = ["--config", str(configs / "ring_digits.yaml"), *SHORT, *BALANCED, "--run.precision", "64"]
    runs = fit_on_two_hosts(command, fit.runs.parent / "two")
    assert same(checkpoint(latest(runs)), states["loop"]) is None


def test_nothing_more_is_sent(fit):
    assert fit(folder="plain") == 0
    assert fit(*BALANCED) == 0
    plain, balanced = (json.loads((latest(fit.runs.parent / folder) / "summary.json").read_text())["communication"]
                       for folder in ("plain", "runs"))  # fmt: skip
    assert plain["parameter_bytes"] == balanced["parameter_bytes"]
    assert plain["other_bytes"] == balanced["other_bytes"] == 0


def test_without_its_change_the_run_is_that_of_the_cross_entropy_bit_for_bit(fit):
    assert fit(folder="plain") == 0
    assert fit("--node.loss", "BalancedSoftmax", "--node.loss.tau", "0") == 0
    plain, zero = (checkpoint(latest(fit.runs.parent / folder)) for folder in ("plain", "runs"))
    assert torch.equal(plain["X"], zero["X"])
    assert same(plain["distilled"], zero["distilled"]) is None


def test_a_resumed_run_is_the_same_bit_for_bit(fit):
    assert fit(*BALANCED) == 0
    assert fit(*BALANCED, "--run.until", "4", folder="halves") == 0
    assert fit(*BALANCED, "--run.resume", "auto", folder="halves") == 0
    whole, halves = latest(fit.runs), latest(fit.runs.parent / "halves")
    assert same(checkpoint(whole), checkpoint(halves)) is None
    assert lines(whole) == lines(halves)


def test_a_fork_may_go_on_with_another_loss(fit, capsys):
    assert fit("--run.keep", "[2]", "--run.until", "2", folder="source") == 0
    source = latest(fit.runs.parent / "source") / "checkpoints" / "epoch_2.ckpt"
    assert fit(*BALANCED, "--run.from", str(source)) == 0
    assert "; BalancedSoftmax; " in capsys.readouterr().out


def test_a_comparison_counts_the_loss_as_part_of_the_method(fit, capsys):
    for name, more in {"a": [], "b": BALANCED, "c": ["--node.loss", "Focal"]}.items():
        assert fit(*more, "--train.epochs", "1", "--distillation", "null", "--run.name", name) == 0
    capsys.readouterr()
    assert main(["compare", str(fit.runs), "--format", "csv"]) == 0
    said = capsys.readouterr().out
    assert [word in said for word in ("CrossEntropy", "BalancedSoftmax", "Focal")] == [True] * 3


def test_nodes_of_one_class_are_remarked_once(fit, capsys, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(alone_with_a_class()))
    partition = ["--data.partition", "FromFile", "--data.partition.path", str(tmp_path / "split.json")]
    brief = ["--train.epochs", "1", "--distillation", "null", "--node.loss", "CalibratedLogits"]
    assert fit(*partition, *brief) == 0
    said = capsys.readouterr().out
    assert said.count("node.loss: one class only") == 1
    assert "learns nothing of its samples: nodes 0, 2\n" in said


def alone_with_a_class():
    from lightning_idkd.data import Digits

    labels = Digits().load("train").labels
    zeros, ones = ((labels == c).nonzero()[:, 0].tolist() for c in (0, 1))
    rest = (labels > 1).nonzero()[:, 0].tolist()
    return [zeros, rest[:500], ones, rest[500:]]


@pytest.mark.parametrize(("value", "code"), [(0.0, 0), (1.0, 2)])
def test_configs_from_before_are_read_where_their_key_had_no_effect(fit, value, code, tmp_path, capsys):
    tuned = ["--distillation.start", "2", "--distillation.tuning.weight", "1.5"]
    assert fit("--train.epochs", "3", *tuned) == 0
    run = latest(fit.runs)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "logit_adjustment" not in config["distillation"]["init_args"]["tuning"]
    del config["node"]["loss"]
    config["distillation"]["init_args"]["tuning"]["logit_adjustment"] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["evaluate", str(run), "--json"]) == code
    if code:
        assert "logit_adjustment" in capsys.readouterr().err
    else:
        assert load(run).config.node.loss.plain
        assert fit("--train.epochs", "4", *tuned, "--run.from", str(run), folder="fork") == 0


def test_an_argument_of_ones_own_of_a_removed_name_stays():
    own = {"callbacks": [{"class_path": "mine.Drop", "init_args": {"logit_adjustment": 0.0}}]}
    assert drop_removed(own) == own
    tuned = {"distillation": {"init_args": {"tuning": {"weight": 2.0, "logit_adjustment": 0.0}}}}
    assert drop_removed(tuned) == {"distillation": {"init_args": {"tuning": {"weight": 2.0}}}}


def test_a_removed_key_names_what_is_in_its_place(fit, capsys):
    assert fit("--distillation.tuning.logit_adjustment", "1") == 2
    said = capsys.readouterr().err
    assert "distillation.tuning.logit_adjustment: this key was removed; use node.loss" in said
    assert len(said.strip().splitlines()) == 1


def test_counts_that_no_loss_uses_are_noted(fit, capsys):
    counted = ["--distillation.tuning.count_distilled", "true"]
    assert fit(*counted, "--run.until", "1") == 0
    assert "count_distilled: CrossEntropy uses no label counts" in capsys.readouterr().out
    assert fit(*counted, *BALANCED, "--run.until", "1", folder="balanced") == 0
    assert "uses no label counts" not in capsys.readouterr().out
