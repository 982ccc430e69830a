"""Values of a config that are not the defaults."""

from __future__ import annotations

import sys

import pytest

from lightning_idkd.config.changes import Change, list_changes
from lightning_idkd.config.parse import configure


def changes(*arguments):
    return {
        (c.key, c.value, c.default) for c in list_changes(configure(["--data.private", "Digits", *arguments]).resolved)
    }


DIGITS = ("data.private", "Digits", "")


def test_a_config_that_sets_nothing_changes_nothing():
    """The private set has no default, so that it is always given."""
    assert changes() == {DIGITS}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.epochs", "7"], {("train.epochs", "7", "60")}),
        (["--seed", "3", "--graph.nodes", "8"], {("seed", "3", "0"), ("graph.nodes", "8", "16")}),
        (["--gossip", "DSGD"], {("gossip", "DSGD", "QGDSGDm")}),
        (["--gossip", "DSGD", "--gossip.momentum", "0.5"],
         {("gossip", "DSGD", "QGDSGDm"), ("gossip.momentum", "0.5", "0.0")}),
        (["--calibration.score", "Energy"], {("calibration.score", "Energy", "MSP")}),
        (["--data.partition", "Dirichlet", "--data.partition.alpha", "0.1"],
         {("data.partition", "Dirichlet", "IID"), ("data.partition.alpha", "0.1", "")}),
        (["--logger", "null"], {("logger", "null", "LoggerConfig")}),
        (["--clock", "{bandwidth: 100}"], {("clock.bandwidth", "100.0", "null")}),
        (["--run.engine", "loop", "--run.name", "x"], set()),
    ],
)  # fmt: skip
def test_changes_are_those_that_were_given(arguments, expected):
    assert changes(*arguments) == {DIGITS, *expected}


def test_settings_below_a_class_are_compared_to_its_own_defaults():
    given = ["--data.public", "Glyphs", "--distillation", "IDKD", "--distillation.tuning.weight", "2"]
    assert changes(*given) == {
        DIGITS, ("data.public", "Glyphs", "null"), ("distillation", "IDKD", "null"),
        ("distillation.tuning.weight", "2.0", "1.0"),
    }  # fmt: skip


def test_a_users_own_class_is_listed_and_never_imported():
    config = configure(["--data.private", "Digits"]).resolved
    config["gossip"] = {"class_path": "strangers.Rule", "init_args": {"momentum": 0.9}}
    found = list_changes(config)
    assert Change("gossip", "strangers.Rule", "QGDSGDm") in found
    assert Change("gossip.momentum", "0.9", "") in found
    assert "strangers" not in sys.modules


def test_a_users_class_with_the_name_of_the_default_is_a_change():
    config = configure(["--data.private", "Digits"]).resolved
    config["gossip"]["class_path"] = "mine.QGDSGDm"
    assert Change("gossip", "mine.QGDSGDm", "QGDSGDm") in list_changes(config)
