"""Commands beside fit: what they say and write."""

from __future__ import annotations

import pytest

from lightning_idkd.cli import main


class TestTopology:
    def test_the_picture_overwrites_no_file_unasked(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["topology", "--graph.nodes", "5"]) == 0
        said = capsys.readouterr().out
        assert "Ring, 5 nodes, static" in said
        assert "drawn: ring_5.png" in said
        (tmp_path / "ring_5.png").write_bytes(b"mine")
        assert main(["topology", "--graph.nodes", "5"]) == 0
        assert "not drawn: there is a ring_5.png already; --out FILE overwrites" in capsys.readouterr().out
        assert (tmp_path / "ring_5.png").read_bytes() == b"mine"

    def test_another_place_may_be_named(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["topology", "--graph.nodes", "5", "--out", "mine.svg"]) == 0
        assert [f.name for f in tmp_path.iterdir()] == ["mine.svg"]
        for wrong in ("nowhere/mine.svg", "mine.mine"):
            assert main(["topology", "--out", wrong]) == 2
            said = capsys.readouterr().err
            assert said.startswith("error: --out: ")
            assert wrong in said


@pytest.mark.parametrize("arguments", [["--help"], ["runs/x", "-h"], ["--data.limit", "5", "--help"]])
def test_help_of_evaluate_lists_its_options_and_where_the_others_are(arguments, capsys):
    assert main(["evaluate", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for word in ("RUN", "runs/NAME/latest", "--export FOLDER", "--json", "--trust", "data.*", "calibration.score",
                 "as for idkd fit"):  # fmt: skip
        assert word in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run is required"),
        (["--data.limit", "5"], "run is required"),
        (["runs/x", "--export"], "--export: expected one argument"),
    ],
)
def test_evaluate_reports_what_it_lacks(arguments, said, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert said in capsys.readouterr().err
