"""The page of all keys, and that every key has a description."""

from pathlib import Path

import pytest

from lightning_idkd import OodScore
from lightning_idkd.command import keys
from lightning_idkd.config import resolved
from lightning_idkd.config.kinds import base_of, choices, parameters
from lightning_idkd.config.parse import parser


def test_configs_readme_is_what_the_docstrings_say():
    page = Path(__file__).parents[3] / "configs" / "README.md"
    assert page.read_text() == keys.build_page(), "run: python -m lightning_idkd.command.keys > configs/README.md"


def test_every_key_of_the_command_line_is_on_it():
    text = keys.build_page()
    for action in parser()._actions:
        key = action.dest
        if "." in key and not key.endswith(".help"):
            assert f"- `{key}` (" in text, key


def test_every_key_and_argument_is_described():
    for line in keys.build_page().splitlines():
        if line.lstrip().startswith("- "):
            assert not line.rstrip().endswith(":"), line


@pytest.mark.parametrize("name", ["IDKD", "MutualKD"])
def test_arguments_are_those_that_the_command_line_takes(name):
    """IDKD passes most of its own on to VanillaKD."""
    taken = parser().parse_args(["--data.private", "Digits", "--distillation", name]).distillation.init_args
    assert {k: p.default for k, p in parameters(choices(base_of("distillation"))[name]).items()} == vars(taken)


def test_the_table_of_groups_says_which_keys_matter_for_what():
    """Forks, comparisons and ``idkd evaluate`` read keys from Config's fields; a new group needs no other list."""
    assert resolved.RESULT == (
        "seed", "graph", "data", "node", "train", "clock", "gossip", "faults", "calibration", "distillation",
        "callbacks",
        "run.precision", "run.autocast",
    )  # fmt: skip
    assert set(resolved.SAME) == {
        "seed", "graph", "clock", "node.network", "node.module", "gossip", "run.precision", "run.autocast",
        "data.private", "data.partition", "data.validation", "data.image_size", "data.channels", "data.augment",
    }  # fmt: skip
    assert set(resolved.ONGOING) == {"calibration", "distillation", "data.public", "data.augment_public"}
    assert resolved.TRAINED == ("seed", "graph", "node", "train", "clock", "gossip", "faults", "distillation")
    assert (resolved.SETTING, resolved.METHOD) == (
        ("graph", "data", "node.network", "node.module", "train", "clock", "faults"),
        ("node.loss", "gossip", "calibration", "distillation", "callbacks"),
    )
    assert resolved.OLDER == {
        "clock": None,
        "data.channels": None,
        "node.loss": {"class_path": "lightning_idkd.losses.CrossEntropy", "init_args": {}},
        "run.autocast": False,
        "run.hosts": 1,
        "faults": [],
    }
    assert {action.dest.split(".")[0] for action in parser()._actions} >= set(resolved.GROUPS)


def test_a_users_class_of_the_same_name_changes_nothing():
    before = keys.build_page()

    class Margin(OodScore):
        """Another."""

        def __call__(self, outputs):
            return outputs.logits[:, 0]

    assert keys.build_page() == before
