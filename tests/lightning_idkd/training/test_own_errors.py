"""Errors in a user's own classes while they work: a sentence with class, method and line, and never a lost result."""

from __future__ import annotations

import inspect
import json

import pytest
from short_runs import extra, latest

from lightning_idkd import Callback, OodScore
from lightning_idkd.cli import main
from lightning_idkd.models import CNN

ONE = ("--train.epochs", "1", "--distillation", "null", "--graph.nodes", "2")


class Hook(Callback):
    def on_epoch_end(self, epoch):
        return self.below(epoch)

    def below(self, epoch):
        return epoch / 0


class Score(OodScore):
    def __call__(self, outputs):
        return outputs.logit.sum(1)


class Network(CNN):
    def build(self, channels, size, classes):
        network = super().build(channels, size, classes)
        network.register_forward_pre_hook(self.refuse)
        return network

    def refuse(self, module, x):
        if module.training:
            raise KeyError("weights")


class Writer(Callback):
    """Does to ``metrics`` or ``summary`` what the arguments say."""

    def __init__(self, where: str = "metrics", does: str = "key"):
        self.where, self.does = where, does

    def on_evaluation_end(self, metrics):
        self.write(metrics, "metrics")

    def on_fit_end(self, summary):
        self.write(summary, "summary")

    def write(self, values, where):
        if where != self.where:
            return
        if self.does == "key":
            values[3] = 2
        elif self.does == "remove":
            values.pop("consensus_distance")
        elif self.does == "change":
            values["consensus_distance"] = 0.5
        elif self.does == "fail":
            raise RuntimeError("no such thing")


def line_of(method, text: str) -> int:
    """The number of the line of ``method`` that holds ``text``."""
    lines, first = inspect.getsourcelines(method)
    return first + next(i for i, line in enumerate(lines) if text in line)


def place(method, text):
    return f"{__file__}, line {line_of(method, text)}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (extra(Hook), (f"callbacks: {__name__}.Hook.on_epoch_end fails with ZeroDivisionError: division by zero",
                       place(Hook.below, "epoch / 0"))),
        (["--calibration.score", f"{__name__}.Score", "--distillation", "IDKD", "--distillation.start", "0"],
         (f"calibration.score: {__name__}.Score.__call__ fails with AttributeError: "
          "'Outputs' object has no attribute 'logit'",
          place(Score.__call__, "outputs.logit"))),
        (["--node.network", f"{__name__}.Network"],
         (f"node.network: {__name__}.Network.refuse fails with KeyError: 'weights'", place(Network.refuse, "raise"))),
    ],
)  # fmt: skip
def test_an_error_in_an_own_class_is_told_with_its_line(arguments, said, fit, capsys):
    assert fit(*ONE, *arguments) == 2
    assert capsys.readouterr().err == f"error: {said[0]}\n{said[1]}\n"


@pytest.mark.parametrize("where", ["metrics", "summary"])
@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("key", "{} has the key 3, of type int; allowed: text"),
        ("remove", "{}['consensus_distance'] is changed or removed; allowed: new keys"),
        ("change", "{}['consensus_distance'] is changed or removed; allowed: new keys"),
    ],
)
def test_a_callback_adds_to_metrics_and_changes_nothing_there(where, does, said, fit, capsys):
    assert fit(*ONE, *extra(Writer, where=where, does=does)) == 2
    assert capsys.readouterr().err == f"error: callbacks: Writer: {said.format(where)}\n"


@pytest.mark.parametrize("does", ["key", "change", "fail"])
def test_a_callback_that_fails_at_the_end_costs_no_result(does, fit, tmp_path, capsys):
    assert fit(*ONE, folder="sound") == 0
    assert fit(*ONE, *extra(Writer, where="summary", does=does)) == 2
    sound, saved = (json.loads((latest(runs) / "summary.json").read_text()) for runs in (tmp_path / "sound", fit.runs))
    assert saved["accuracy"] == sound["accuracy"]
    assert saved.keys() == sound.keys()
    capsys.readouterr()
    assert main(["compare", str(fit.runs)]) == 0


def test_evaluate_tells_an_own_score_that_fails(fit, capsys):
    assert fit(*ONE) == 0
    capsys.readouterr()
    assert main(["evaluate", str(latest(fit.runs)), "--calibration.score", f"{__name__}.Score"]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: calibration.score: {__name__}.Score.__call__ fails with AttributeError"
    )
