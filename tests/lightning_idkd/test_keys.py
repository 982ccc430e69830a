"""The page of all keys, and that every key has a description."""

from pathlib import Path

from lightning_idkd import keys
from lightning_idkd.cli import parser


def test_configs_readme_is_what_the_docstrings_say():
    page = Path(__file__).parents[2] / "configs" / "README.md"
    assert page.read_text() == keys.text(), "run: python -m lightning_idkd.keys > configs/README.md"


def test_every_key_of_the_command_line_is_on_it():
    text = keys.text()
    for action in parser()._actions:
        key = action.dest
        if "." in key and not key.endswith(".help"):
            assert f"- `{key}` (" in text, key


def test_every_key_and_argument_is_described():
    for line in keys.text().splitlines():
        if line.lstrip().startswith("- "):
            assert not line.rstrip().endswith(":"), line
