"""Whole runs with robust aggregators: resuming, processes, short names and mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from short_runs import checkpoint, latest, lines, same


def robust(aggregator, rule="{class_path: QGDSGDm}", **arguments):
    """The option that puts an aggregator around a rule."""
    aggregator = f"{{class_path: {aggregator}, init_args: {json.dumps(arguments)}}}"
    return ["--gossip", f"{{class_path: Robust, init_args: {{rule: {rule}, aggregator: {aggregator}}}}}"]


SHORTER = ["--train.epochs", "2", "--distillation", "null", "--calibration", "null", "--data.public", "null"]


@pytest.mark.parametrize("aggregator", ["UBAR", "BALANCE", "CoordinateMedian"])
def test_a_resumed_run_is_the_same_bit_for_bit(fit, aggregator):
    assert fit(*robust(aggregator), *SHORTER) == 0
    assert fit(*robust(aggregator), *SHORTER, "--run.until", "1", folder="halves") == 0
    assert fit(*robust(aggregator), *SHORTER, "--run.resume", "auto", folder="halves") == 0
    whole, halves = latest(fit.runs), latest(fit.runs.parent / "halves")
    assert same(checkpoint(whole), checkpoint(halves)) is None
    assert lines(whole) == lines(halves)


def test_engines_agree(fit):
    states = {}
    for engine in ("loop", "vmap"):
        more = ["--run.engine", engine, "--run.precision", "64"]
        assert fit(*robust("UBAR"), *SHORTER, *more, folder=engine) == 0
        states[engine] = checkpoint(latest(fit.runs.parent / engine))["X"]
    torch.testing.assert_close(states["vmap"], states["loop"], rtol=1e-8, atol=1e-10)


def test_plain_mixing_costs_as_many_bytes(fit):
    sent = []
    for folder, rule in (("plain", ["--gossip", "QGDSGDm"]), ("robust", robust("MultiKrum", liars=0))):
        assert fit(*rule, *SHORTER, folder=folder) == 0
        summary = json.loads((latest(fit.runs.parent / folder) / "summary.json").read_text())
        sent.append(summary["communication"])
    assert sent[0] == sent[1]


@pytest.mark.parametrize(("options", "message"), [
    (robust("Krum"), "gossip.aggregator.liars: 1 given; some node has 3 rows with its own; allowed: 0 to 0"),
    (robust("CoordinateTrimmedMean", trim=2), "gossip.aggregator.trim: 2 given; allowed: 0 to 1, as no node has more"),
    (robust("SCClip", rule="{class_path: D2}"), "gossip.rule: Robust takes rules that only mix, but D2 relies on the"),
    (robust("CoordinateMedia"), "Did you mean 'CoordinateMedian'?"),
    (robust("RFA", step=3), "Did you mean 'steps'?"),
    (robust("TrimmedMean"), "CoordinateTrimmedMean"),  # which aggregates labels
])  # fmt: skip
def test_mistakes_are_refused_in_a_sentence(fit, capsys, options, message):
    assert fit(*options, *SHORTER) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2
    assert not fit.runs.exists()
