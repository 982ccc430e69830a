"""What a class of a user's own returns that does not fit: a sentence that names the class, never a wrong result."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lightning_idkd import Aggregation, Architecture, Calibration, Gossip, OodScore, Source, Topology
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError


class Forgetful(Gossip):
    def update(self, X, G, state, ctx):
        X -= ctx.lr * G


class Narrow(Gossip):
    buffers = ("M",)

    def update(self, X, G, state, ctx):
        state.M = G[:, :3]
        return ctx.mix(X)


class Single(Gossip):
    def update(self, X, G, state, ctx):
        return ctx.mix(X)[:1]


class Wide(Aggregation):
    def combine(self, probabilities, votes, senders):
        return probabilities[0, :3]


class Nowhere(Aggregation):
    def combine(self, probabilities, votes, senders):
        return probabilities.mean(0) * float("nan")


class Negative(Aggregation):
    def combine(self, probabilities, votes, senders):
        return -probabilities.mean(0)


class Undecided(Calibration):
    fallback_below = 1

    def threshold(self, private, public):
        return float("nan")


class Wordy(Calibration):
    fallback_below = 1

    def threshold(self, private, public):
        return "high"


class Matrix(Topology):
    def graph(self, nodes, step, seed):
        return np.eye(nodes)


class Nothing(Architecture):
    def build(self, channels, size, classes):
        return None


class Unscored(OodScore):
    def score(self, outputs):
        return outputs.logits.amax(1)


class Square(OodScore):
    def __call__(self, outputs):
        return outputs.logits


class Learner(Square):
    def fit(self, outputs, labels):
        self.mean = outputs.features.mean(0)

    def __call__(self, outputs):
        return (outputs.features - self.mean).norm(dim=1).tolist()


class Untyped(OodScore):
    def __init__(self, a):
        self.a = a

    def __call__(self, outputs):
        return outputs.logits.amax(1)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--gossip", "Forgetful"], r"gossip: Forgetful\.update returns NoneType; allowed: a tensor of shape \[\d+, \d+\]"),
    (["--gossip", "Single"], r"gossip: Single\.update returns \[1, \d+\]; allowed: a tensor of shape \[\d+, \d+\]"),
    (["--gossip", "Narrow"],
     r"gossip: Narrow sets its buffer M to \[\d+, 3\]; allowed: a tensor of shape \[\d+, \d+\]"),
    (["--distillation.aggregation", "Wide"],
     r"distillation\.aggregation: Wide\.combine returns \[3, 10\]; allowed: a tensor"),
    (["--distillation.aggregation", "Nowhere"], r"distillation\.aggregation: Nowhere\.combine returns labels that are"),
    (["--distillation.aggregation", "Negative"],
     r"distillation\.aggregation: Negative\.combine returns labels that are"),
    (["--calibration", "Undecided"], r"calibration: Undecided gives node \d a threshold that is not a number"),
    (["--calibration", "Wordy"], r"calibration: Wordy\.threshold returns str; allowed: a number"),
    (["--graph.topology", "Matrix"], r"graph\.topology: Matrix\.graph returns ndarray; allowed: a networkx graph"),
    (["--node.network", "Nothing"], r"node\.network: Nothing\.build returns NoneType; allowed: a torch\.nn\.Module"),
    (["--calibration.score", "Unscored"],
     r"calibration\.score: '\S+\.Unscored' does not define __call__, which its base class"),
    (["--calibration.score", "Untyped"],
     r"calibration\.score: argument 'a' of \S+\.Untyped has no default, so it needs a type"),
])  # fmt: skip
def test_the_class_is_named_with_what_it_should_have_returned(fit, capsys, arguments, said):
    key, name = arguments
    assert fit(key, f"{__name__}.{name}") == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") <= 2
    assert re.match(f"error: {said}", captured)


@pytest.mark.parametrize(("name", "given"), [("Square", r"\[64, 10\]"), ("Learner", "list")])
def test_a_score_that_cannot_do_is_told_before_there_is_a_run(fit, capsys, name, given):
    assert fit("--calibration.score", f"{__name__}.{name}") == 2
    said = capsys.readouterr().err
    assert re.match(
        rf"error: calibration\.score: {name} returns {given} for 64 samples; a score has shape \[64\]\n$", said
    )
    assert not fit.runs.exists()


class Given(Source):
    """Returns what it was given."""

    def __init__(self, found):
        self.found = found

    def read(self, split, size, key):
        return self.found


IMAGE = np.zeros((8, 8), np.uint8)


@pytest.mark.parametrize(("found", "said"), [
    (None, r"Given\.read returns NoneType; allowed: class names or None, and \(sample, label\) pairs"),
    ([IMAGE, IMAGE], r"Given\.read returns list; allowed"),
    ((None, [IMAGE]), r"sample 0 of split 'train' is ndarray; allowed: \(sample, label\) with a label from 0 on"),
    ((None, [(IMAGE / 255, 0)]), r"image 0 of split 'train' cannot be decoded: an array of float64; allowed: uint8"),
    ((None, [(IMAGE, 0), (IMAGE, [0, 1])]), r"sample 1 of split 'train' is one with label \[0, 1\]"),
    ((("a", "b"), [(IMAGE, 1), (IMAGE, 2)]),
     r"sample 1 of split 'train' is one with label 2; .* a label from 0 to 1, or -1"),
    ((("a", "b"), [(IMAGE, -2)]), r"sample 0 of split 'train' is one with label -2"),
])  # fmt: skip
def test_a_source_that_delivers_something_else(found, said):
    with pytest.raises(UserError, match=rf"^data\.public: {said}"):
        Given(found).load("train", key="data.public")


def test_numpy_labels_are_labels():
    images = Given((("a", "b"), [(IMAGE, np.int64(1)), (IMAGE, np.uint8(0)), (IMAGE, -1)])).load("train")
    assert torch.equal(images.labels, torch.tensor([1, 0, -1]))


@pytest.mark.parametrize("command", ["fit", "partition"])
def test_a_private_set_needs_labels_in_every_command(command, fit, capsys, tmp_path):
    arguments = ["--data.private", "Noise", "--data.image_size", "8"]
    assert (fit(*arguments) if command == "fit" else main([command, *arguments, "--out", str(tmp_path / "x.png")])) == 2
    assert "data.private: this set has no labels" in capsys.readouterr().err
