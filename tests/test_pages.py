"""The documentation names every class once, with a command that runs it, and takes in files with their links."""

from __future__ import annotations

import re
import shlex
import sys
from inspect import Parameter
from pathlib import Path

import pytest

from lightning_idkd.callbacks import AllReduce, QGDSGDm
from lightning_idkd.config.kinds import parameters
from lightning_idkd.config.parse import configure

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "configs" / "docs"
sys.path.insert(0, str(DOCS))

import pages  # noqa: E402 (it lies beside the configuration of Sphinx)


def test_the_classes_of_every_key_are_on_one_page():
    markers = [key for page in DOCS.rglob("*.md") for key in re.findall("<!-- classes: (.*) -->", page.read_text())]
    assert sorted(markers) == sorted(pages.kinds())


@pytest.mark.parametrize("key", pages.kinds())
def test_examples_are_commands_with_these_arguments(key):
    """Classes that need no arguments in their examples differ by name alone: the first of them stands for all."""
    classes = pages.kinds()[key][2]
    given = pages.EXAMPLES.get(key, ("", {}))[1]
    assert given.keys() <= classes.keys()
    plain = [name for name in classes if name not in given]
    for name in [*given, *plain[:1]]:
        program, command, *words = shlex.split(pages.example(key, name))
        assert program == "idkd"
        configure(words if "--config" in words else ["--data.private", "Digits", *words], command)
    if key == "gossip":
        assert pages.presets().keys() == classes.keys()
    else:
        needed = {name for name in plain for p in parameters(classes[name]).values() if p.default is Parameter.empty}
        assert not needed, "pages.EXAMPLES needs their arguments"


def test_a_class_has_its_docstring_options_formula_and_command():
    text = pages.write_kind("gossip")
    section = text[text.index("### QGDSGDm") : text.index("### RelaySGD")]
    assert "(Lin et al., ICML 2021, Alg. 1" in section
    assert "- `momentum` (default 0.9): Factor of the quasi-global momentum." in section
    assert "M = self.momentum * state.M + D" in section
    assert "idkd fit --config ring_digits --config presets/rules/qg_dsgdm_n" in section
    assert "Args:" not in section


def test_a_formula_has_inherited_methods_but_none_of_the_core():
    base = QGDSGDm.__bases__[0]
    names = re.findall(r"def (\w+)", pages.write_formula(AllReduce, base))
    assert names == ["combine", "update", "direction", "accelerate"]
    assert re.findall(r"def (\w+)", pages.write_formula(QGDSGDm, base)) == ["update"]


def test_a_class_is_described_by_its_documented_attributes_and_methods():
    class Example:
        """Shows members."""

        plain = 0
        sizes: dict[str, int] = {}  # noqa: RUF012
        """Sizes
        by name."""
        undocumented: int = 1

        def grow(self, name: str, by: int = 1) -> int:
            """Returns the new size.

            Further lines."""

        def _hidden(self):
            """Is private."""

    assert pages.describe_members(Example) == [
        "- `sizes: dict[str, int] = {}`: Sizes by name.",
        "- `grow(self, name: str, by: int = 1) -> int`: Returns the new size.",
    ]


def test_docstrings_become_markdown():
    assert pages.escape("x*y < z of ``a*b``, ``_c``") == r"x\*y \< z of ``a*b``, ``_c``"
    assert pages.escape("see :class:`VanillaKD`") == "see [VanillaKD](#distillation-vanillakd)"
    assert pages.escape("of :meth:`~a.b.Moment.uniform`") == "of `uniform`"


def test_links_and_titles_of_a_file_suit_its_page(tmp_path, monkeypatch):
    text = "# One\n[own](../callbacks/README.md#a-rule) ![p](a.png)\n```sh\n# [a](b.md)\n```\n[c](x.yaml)\n# Two\n"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/a.md").write_text(text)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "DOCS", tmp_path / "configs/docs")
    assert pages.write_file("configs/a.md", "results/page") == (
        "# One\n[own](../how_to/own_classes.md#a-rule) ![p](../../a.png)\n```sh\n# [a](b.md)\n```\n"
        "c (`configs/x.yaml`)\n## Two\n"
    )


def test_the_readme_counts_the_classes():
    counted = re.search(
        r"(\d+) optimisers, (\d+) families\s+of graphs, (\d+)\s+scores", (ROOT / "README.md").read_text()
    )
    keys = ("gossip", "graph.topology", "calibration.score")
    assert [int(number) for number in counted.groups()] == [len(pages.kinds()[key][2]) for key in keys]
