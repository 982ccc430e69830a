"""What ``idkd topology`` and ``idkd partition`` print and draw."""

import json

import numpy as np
import pytest

from lightning_idkd.cli import main
from lightning_idkd.command.partition import print_table
from lightning_idkd.data.partition import Split
from lightning_idkd.records.pictures import draw_label_counts


def lines(capsys):
    """Printed lines as key and value."""
    return {line[:10].strip(): line[11:] for line in capsys.readouterr().out.splitlines()}


@pytest.fixture
def topology(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        assert main(["topology", "--graph.topology", *arguments]) == 0
        return lines(capsys)

    return run


def test_a_torus_in_numbers(topology, tmp_path):
    said = topology("Torus", "--graph.topology.rows", "4", "--graph.topology.cols", "4", "--graph.nodes", "16",
                    "--node.network", "LeNet", "--data.private", "Noise")  # fmt: skip
    assert said["graph"] == "Torus, 16 nodes, static"
    assert said["weights"] == "metropolis, rows and columns sum to 1"
    assert said["degree"] == "4 to 4, mean 4"
    assert said["diameter"] == "4"
    assert said["spectrum"] == "gap 0.4000, smallest eigenvalue -0.6000"
    # LeNet on 3x32x32: 5x5 convolutions to 6 and 16 channels, then 400-120-84-10
    count = 6 * 76 + 16 * 151 + 401 * 120 + 121 * 84 + 85 * 10
    assert said["sends"] == (
        f"{4 * 4 * count / 1e3:.3g} kB a node and step, {16 * 4 * 4 * count / 1e6:.3g} MB all nodes, "
        f"for one message an edge ({count:,} parameters of LeNet for 3x32x32, 10 classes)"
    )
    assert (tmp_path / "torus_16.png").stat().st_size > 0


def test_a_finite_time_graph_is_exact(topology):
    said = topology("BaseGraph", "--graph.nodes", "6")
    assert said["graph"] == "BaseGraph, 6 nodes, repeats after 4 steps"
    assert said["weights"] == "its own, rows and columns sum to 1"
    assert said["degree"] == "0 to 1, mean 0.75 (at a step)"  # (4 + 4 + 4 + 6) / 24: two threes, then three pairs
    assert said["spectrum"].startswith("gap 1.0000")
    assert said["consensus"] == "the exact mean after 4 steps"


def test_a_graph_that_never_repeats_is_judged_by_its_first_steps(topology):
    said = topology("EpidemicLocal", "--graph.nodes", "8", "--graph.topology.s", "3")
    assert said["graph"] == "EpidemicLocal, 8 nodes, never repeats (numbers of its first 64 steps)"
    assert said["weights"] == "average, rows sum to 1"
    assert said["degree"] == "3 to 3, mean 3 (at a step)"
    assert said["diameter"] == "-"


def test_slow_graphs_are_not_waited_for(topology):
    assert topology("Ring", "--graph.nodes", "300")["consensus"].startswith("about 47,")  # ln 1000 / (4 pi^2 / 3 n^2)


def test_a_partition_as_a_table_and_in_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    half = list(range(0, 1438, 2))
    (tmp_path / "parts.json").write_text(json.dumps([half, [i + 1 for i in half]]))
    arguments = ["partition", "--data.private", "Digits", "--graph.nodes", "2", "--data.partition", "FromFile",
                 "--data.partition.path", "parts.json"]  # fmt: skip
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in said if line.split()[:1] in (["0"], ["1"])]
    assert [row[1:3] for row in rows] == [["575", "144"]] * 2
    assert [sum(map(int, row[3:])) for row in rows] == [719, 719]
    texts = {line[:10].strip(): line[11:] for line in said}
    assert texts["sizes"] == "719 to 719, mean 719.0, training and validation together"
    assert texts["partition"].startswith("FromFile, hash ")
    assert (tmp_path / "fromfile_2.png").exists()
    assert main([*arguments, "--out", "mine.pdf"]) == 0
    assert (tmp_path / "mine.pdf").exists()


def split(histogram):
    train, none = [np.arange(n) for n in histogram.sum(1)], [np.arange(0)] * len(histogram)
    return Split(train, none, "", histogram, "", None)


def test_many_classes_are_counted(capsys):
    histogram = np.zeros((2, 100), int)
    histogram[0, [3, 5]] = 1, 3
    histogram[1] = 7
    print_table(split(histogram), tuple(f"class {c}" for c in range(100)))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["0", "4", "0", "2", "class", "5", "75%"] in rows
    assert ["1", "700", "0", "100", "class", "0", "1%"] in rows


def test_no_column_of_a_wide_table_is_cut(capsys):
    names = tuple(f"a long name of class {c}" for c in range(20))
    print_table(split(np.full((1, 20), 1000)), names)
    said = capsys.readouterr().out
    assert all(name in said for name in names)
    assert said.count("1,000") == 20


def test_a_picture_of_a_partition_has_a_cell_for_every_count():
    histogram = np.arange(6).reshape(2, 3)
    axes, _ = draw_label_counts(histogram, ("a", "b", "long")).axes
    assert axes.images[0].get_array().tolist() == histogram.tolist()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "long"]
