"""Whole runs of asynchronous rules."""

import itertools

import pytest
import torch
from interrupts import InterruptAt
from short_runs import checkpoint, extra, latest, lines, same

CLOCK = "{compute: {class_path: LogNormal, init_args: {median: 1, sigma: 0.5}}, latency: {class_path: Fixed, " \
        "init_args: {seconds: 0.7}}, slow: {1: 5}}"  # fmt: skip


@pytest.mark.parametrize("rule", ["ADPSGD", "AsyncGossip"])
def test_a_resumed_run_equals_one_in_one_go(fit, rule):
    """Messages are under way and gradients begun where it stops, between two exchanges and in an epoch."""
    arguments = ["--gossip", rule, "--gossip.momentum", "0.9", "--clock", CLOCK]
    assert fit(*arguments, folder="whole") == 0
    assert fit(*arguments, *extra(InterruptAt, steps=[50, 95])) == 130
    assert fit(*arguments, *extra(InterruptAt, steps=[50, 95]), "--run.resume", "auto") == 130
    assert fit(*arguments, *extra(InterruptAt, steps=[50, 95]), "--run.resume", "auto") == 0
    cut, whole = latest(fit.runs), latest(fit.runs.parent / "whole")
    assert same(checkpoint(cut) | {"callbacks": 0}, checkpoint(whole) | {"callbacks": 0}) is None
    assert lines(cut) == lines(whole)
    times = [line["time/simulated"] for line in lines(cut)]
    assert times == sorted(times)


def test_a_slow_node_takes_fewer_batches_and_all_together_those_of_the_steps(fit):
    assert fit("--gossip", "ADPSGD", "--clock", CLOCK, "--distillation", "null") == 0
    state = checkpoint(latest(fit.runs))
    own, begun = state["events"]["own"], state["events"]["begun"]
    assert torch.equal(own + ~state["events"]["computed"], begun)
    assert begun.sum() == 4 * state["step"] + 4, "every node has begun one that it has not acted on"
    assert begun[1] < begun.float().mean() / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "clock: gossip ADPSGD acts in simulated time and needs one"),
        (["--clock", CLOCK, "--run.devices", "2"], "run.devices: 2 given; allowed: 1 with gossip ADPSGD"),
    ],
)
def test_what_it_needs_is_said_before_any_file_is_written(fit, capsys, arguments, message):
    assert fit("--gossip", "ADPSGD", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not fit.runs.exists()


def test_an_exchange_of_labels_takes_simulated_time(fit):
    """Epochs take equally long but the one that begins with the exchange, by the bytes of the largest message."""
    narrow = ["--clock", "{bandwidth: 10000}", "--train.evaluate_every", "1", "--distillation.every", "null"]
    assert fit("--gossip", "AsyncGossip", *narrow) == 0
    times = [line["time/simulated"] for line in lines(latest(fit.runs))]
    epochs = [later - time for time, later in itertools.pairwise(times)]  # from epoch 2 on
    assert epochs[0] == pytest.approx(epochs[1], rel=0.02)
    assert epochs[2] > epochs[1] + 1, "the exchange before epoch 4"
    assert times == sorted(times)
