"""Curves over runs whose metrics are written by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml

import lightning_idkd as idkd
from lightning_idkd.analysis import figures
from lightning_idkd.cli import main

HOW_TO = Path(__file__).resolve().parents[3] / "configs" / "docs" / "how_to" / "figures.md"


def write_run(parent, method, seed, lines, alpha=0.1, **summary):
    """Write a finished run; its folder is named by its method, alpha and seed."""
    folder = parent / f"{method}-{alpha}" / str(seed)
    folder.mkdir(parents=True)
    config = {
        "seed": seed, "graph": {"nodes": 4}, "node": {}, "train": {"lr": 0.1}, "run": {"precision": 32},
        "data": {"partition": {"class_path": "x.Dirichlet", "init_args": {"alpha": alpha}}},
        "gossip": {"class_path": "lightning_idkd.callbacks.DSGD", "init_args": {"momentum": 0.9}},
        "calibration": None, "callbacks": [],
        "distillation": method and {"class_path": f"lightning_idkd.callbacks.{method}", "init_args": {}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    accuracy = {"node_mean": 0.5, "node_min": 0.4, "consensus": 0.6}
    (folder / "summary.json").write_text(json.dumps({"seed": seed, "accuracy": accuracy} | summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(epoch, accuracy, training, sent=0, phase="train"):
    """An evaluation. ``training`` stands for the seconds of computation, which no two trainings have in common."""
    return {
        "epoch": epoch, "step": 10 * epoch, "phase": phase, "accuracy/node_mean": accuracy,
        "accuracy/node_min": accuracy - 0.01, "accuracy/consensus": accuracy + 0.02,
        "consensus_distance": 3 * accuracy, "homogeneity/after": 1 - accuracy, "mine/own": 7 * accuracy,
        "communication/parameter_bytes": sent or 100 * epoch, "communication/label_bytes": 5,
        "communication/messages": 4, "time/simulated": 0.5 * epoch, "throughput/seconds": training + epoch,
    }  # fmt: skip


@pytest.fixture
def seeds(tmp_path):
    """One method with three seeds, evaluated at epochs 1, 2 and 4; accuracies of seed s are 0.1, 0.2 and 0.3, plus
    0.02 s²."""
    for seed in range(3):
        values = [0.1 + 0.02 * seed**2, 0.2 + 0.02 * seed**2, 0.3 + 0.02 * seed**2]
        lines = [line(epoch, value, seed / 7) for epoch, value in zip((1, 2, 4), values, strict=True)]
        write_run(tmp_path, "IDKD", seed, lines)
    return tmp_path


@pytest.fixture
def forks(tmp_path):
    """Three methods with seeds 0 and 1. All share epochs 1 and 2, and the last two epoch 3 besides; each ends at epoch
    4, with an accuracy of its own, and after the final gossip. Seed 1 sends a tenth more."""
    for seed in (0, 1):
        trunk = [line(epoch, 0.1 * epoch + 0.02 * seed, seed / 7, (100 + 10 * seed) * epoch) for epoch in (1, 2)]
        later = [*trunk, line(3, 0.3 + 0.02 * seed, seed / 7 + 0.3, (100 + 10 * seed) * 3)]
        for method, stem, own in ((None, trunk, 0.4), ("VanillaKD", later, 0.5), ("IDKD", later, 0.6)):
            last = line(4, own + 0.02 * seed, seed / 7 + own, (100 + 10 * seed) * 4, "final")
            source = None if method is None else f"gone/checkpoints/epoch_{len(stem)}.ckpt"
            more = [] if method else [line(3, 0.25 + 0.02 * seed, seed / 7 + 0.1, (100 + 10 * seed) * 3)]
            write_run(tmp_path, method, seed, [*stem, *more, last], **{"from": source, "final_gossip": 1})
    return tmp_path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that the command line draws, which are saved, too."""
    kept, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, *given: kept.append(figure) or save(figure, *given))
    return kept


# ---------------------------------------------------------------------- numbers


def test_a_curve_has_the_mean_over_seeds_and_the_smallest_and_largest_value(seeds):
    (curve,) = idkd.compare(seeds).curves
    assert (curve.seeds, curve.x.tolist(), curve.interpolated, curve.fork) == ([0, 1, 2], [1, 2, 4], False, 0)
    assert curve.values.tolist() == pytest.approx(np.array([[0.1, 0.2, 0.3], [0.12, 0.22, 0.32], [0.18, 0.28, 0.38]]))
    assert curve.mean == pytest.approx([0.4 / 3, 0.7 / 3, 1 / 3])
    assert curve.low == pytest.approx([0.1, 0.2, 0.3])
    assert curve.high == pytest.approx([0.18, 0.28, 0.38])


def test_the_other_band_is_the_standard_deviation_with_n_minus_1(seeds):
    (curve,) = idkd.compare(seeds, band="sd").curves
    sd = math.sqrt(((0 - 0.1 / 3) ** 2 + (0.02 - 0.1 / 3) ** 2 + (0.08 - 0.1 / 3) ** 2) / 2)
    assert curve.low == pytest.approx(np.array([0.1, 0.2, 0.3]) + 0.1 / 3 - sd)
    assert curve.high == pytest.approx(np.array([0.1, 0.2, 0.3]) + 0.1 / 3 + sd)


def test_one_seed_has_no_band(seeds):
    for band in ("minmax", "sd"):
        (curve,) = idkd.compare(seeds / "IDKD-0.1" / "1", band=band).curves
        assert curve.low.tolist() == curve.mean.tolist() == curve.high.tolist() == pytest.approx([0.12, 0.22, 0.32])


@pytest.mark.parametrize(
    ("x", "places"),
    [("epoch", [1, 2, 4]), ("step", [10, 20, 40]), ("bytes", [105, 205, 405]), ("time", [0.5, 1, 2])],
)
def test_axes(seeds, x, places):
    assert idkd.compare(seeds, x=x).curves[0].x.tolist() == places


@pytest.mark.parametrize(
    ("y", "first"),
    [("node_mean", 0.12), ("worst", 0.11), ("consensus", 0.14), ("consensus_distance", 0.36), ("heterogeneity", 0.88),
     ("mine/own", 0.84)],
)  # fmt: skip
def test_metrics(seeds, y, first):
    assert idkd.compare(seeds, y=y).curves[0].values[1, 0] == pytest.approx(first)


def test_seeds_at_different_places_are_interpolated_at_all_of_them_where_all_have_values(tmp_path):
    """Over bytes, seed 0 is evaluated at 105, 205 and 405, and seed 1 at 155, 255 and 305."""
    write_run(tmp_path, None, 0, [line(1, 0.1, 0.0, 100), line(2, 0.3, 0.0, 200), line(3, 0.4, 0.0, 400)])
    write_run(tmp_path, None, 1, [line(1, 0.2, 0.5, 150), line(2, 0.6, 0.5, 250), line(3, 0.5, 0.5, 300)])
    (curve,) = idkd.compare(tmp_path, x="bytes").curves
    assert curve.interpolated
    assert curve.x.tolist() == [155, 205, 255, 305]
    first = [0.1 + 0.2 * 50 / 100, 0.3, 0.3 + 0.1 * 50 / 200, 0.3 + 0.1 * 100 / 200]
    second = [0.2, 0.2 + 0.4 * 50 / 100, 0.6, 0.5]
    assert curve.values == pytest.approx(np.array([first, second]))
    assert curve.mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    assert curve.low == pytest.approx([min(pair) for pair in zip(first, second, strict=True)])


def test_evaluations_before_the_first_value_of_a_metric_are_left_out(seeds):
    for path in seeds.rglob("metrics.jsonl"):
        first, *others = map(json.loads, path.read_text().splitlines())
        path.write_text("".join(json.dumps(e) + "\n" for e in [first | {"mine/own": None}, *others]))
    assert idkd.compare(seeds, y="mine/own").curves[0].x.tolist() == [2, 4]


def test_the_table_comes_with_the_curves(seeds):
    compared = idkd.compare([seeds], metrics=["accuracy/node_mean"], target=0.3)
    assert [row.values["accuracy/node_mean"] for row in compared.rows] == [{0: 0.5, 1: 0.5, 2: 0.5}]
    assert compared.head[:5] == ["setting", "method", "seeds", "accuracy/node_mean", "epochs to 0.3"]
    assert compared.lines[0][4] == (4, 0, 3, 0)
    assert compared.format("csv").splitlines()[1].startswith("-,-,3,0.5,0.0,3,4")
    assert idkd.compare(seeds, y=None).curves == []


# ---------------------------------------------------------------------- forks


def test_what_forks_share_is_a_stem_and_a_fork_of_a_fork_gives_a_second_one(forks):
    compared = idkd.compare(forks)
    assert [(curve.method, curve.fork, len(curve.x)) for curve in compared.curves] == [
        ("IDKD", 2, 4), ("VanillaKD", 2, 4), ("none", 1, 4)
    ]  # fmt: skip
    first, second = compared.stems
    assert (first.method, first.x.tolist()) == ("IDKD, VanillaKD, none", [1, 2])
    assert (second.method, second.x.tolist()) == ("IDKD, VanillaKD", [2, 3])
    assert first.mean == pytest.approx([0.11, 0.21])
    assert second.mean == pytest.approx([0.21, 0.31])


def test_over_bytes_a_stem_ends_where_the_first_seed_forks(forks):
    """Seeds fork at 200 and 220 bytes, and 300 and 330, besides 5 bytes of labels."""
    compared = idkd.compare(forks, x="bytes")
    assert [curve.x[curve.fork] for curve in compared.curves] == [305, 305, 205]
    for stem, curve in zip(compared.stems, (compared.curves[2], compared.curves[0]), strict=True):
        assert stem.x[-1] == curve.x[curve.fork]
        assert stem.mean[-1] == curve.mean[curve.fork]


def test_runs_that_were_trained_separately_share_nothing_even_if_their_metrics_are_equal(tmp_path):
    for method, training in ((None, 0.1), ("IDKD", 0.2)):
        write_run(tmp_path, method, 0, [line(1, 0.1, training), line(2, 0.2, training)])
    compared = idkd.compare(tmp_path)
    assert compared.stems == []
    assert [curve.fork for curve in compared.curves] == [0, 0]


def test_methods_with_other_seeds_share_nothing(forks):
    (forks / "IDKD-0.1" / "1" / "summary.json").unlink()
    compared = idkd.compare(forks)
    assert [(curve.method, curve.fork) for curve in compared.curves] == [("IDKD", 0), ("VanillaKD", 1), ("none", 1)]
    assert [stem.method for stem in compared.stems] == ["VanillaKD, none"]


# ---------------------------------------------------------------------- figures


def test_a_figure_draws_every_stem_once_and_every_method_from_its_fork_on(forks, drawn, tmp_path, capsys):
    given = ["--x", "epoch", "--band", "sd"]
    assert main(["compare", str(forks), "--curves", str(tmp_path / "c.svg"), *given]) == 0
    (axes,) = drawn[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epochs", "node mean accuracy (%)")
    lines = [(one.get_xdata().tolist(), one.get_ydata().tolist()) for one in axes.lines]
    whole = [(x, pytest.approx(y)) for x, y in lines if len(x) > 1]
    assert whole == [
        ([1, 2], [11, 21]), ([2, 3], [21, 31]), ([3, 4], [31, 61]), ([3, 4], [31, 51]), ([2, 3, 4], [21, 26, 41])
    ]  # fmt: skip
    assert [(x, pytest.approx(y)) for x, y in lines if len(x) == 1] == [([4], [61]), ([4], [51]), ([4], [41])]
    assert len({one.get_color() for one in axes.lines}) == 4
    assert len(axes.collections) == 5
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "IDKD", "VanillaKD", "none", "initial training", "mean ± sd, 2 seeds", "after final gossip",
    ]  # fmt: skip
    assert capsys.readouterr().err.splitlines()[-1] == (
        "caption: node mean accuracy (%) over epochs: mean of 2 seeds; band mean ± standard deviation; "
        "grey: initial training that methods share; open: after the final gossip."
    )


def test_settings_are_panels_with_one_legend(forks, drawn, tmp_path):
    write_run(forks, None, 0, [line(1, 0.3, 0.1), line(2, 0.4, 0.1)], alpha=1.0)
    assert main(["compare", str(forks), "--curves", str(tmp_path / "c.svg"), "--x", "bytes", "--y", "worst"]) == 0
    (figure,) = drawn
    assert figure.get_figwidth() == 6.75
    assert [axes.get_title() for axes in figure.axes] == ["alpha=0.1", "alpha=1.0"]
    assert len(figure.legends) == 1
    assert [axes.get_legend() for axes in figure.axes] == [None, None]
    assert [axes.get_ylabel() for axes in figure.axes] == ["worst node accuracy (%)", ""]
    third = figures.choose_style(2)
    for axes in figure.axes:
        assert next(one.get_color() for one in axes.lines if one.get_marker() == third["marker"]) == third["color"]
    assert len(figure.axes[1].collections) == 0  # no band of one seed


def test_settings_of_one_method_are_lines_of_one_panel(tmp_path, drawn):
    for alpha in (0.1, 1.0):
        write_run(tmp_path, "IDKD", 0, [line(1, 0.3, alpha), line(2, 0.4, alpha)], alpha=alpha)
    assert main(["compare", str(tmp_path), "--curves", str(tmp_path / "c.svg"), "--width", "5.5"]) == 0
    (figure,) = drawn
    assert (figure.get_figwidth(), len(figure.axes)) == (5.5, 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alpha=0.1", "alpha=1.0"]


def test_plot_with_x_draws_curves(seeds, drawn, tmp_path):
    file = tmp_path / "times.png"
    assert main(["compare", str(seeds), "--x", "time", "--plot", str(file)]) == 0
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [0.5, 1, 2]
    width = int.from_bytes(file.read_bytes()[16:20], "big")  # of the PNG, in pixels
    assert width == 3.25 * 300


def test_pdf_and_svg_have_fonts_that_publishers_take(seeds, tmp_path):
    for ending in ("pdf", "svg"):
        given = ["--y", "consensus_distance", "--curves", str(tmp_path / f"c.{ending}")]
        assert main(["compare", str(seeds), *given]) == 0
    pdf = (tmp_path / "c.pdf").read_bytes()
    assert b"/FontFile2" in pdf  # an embedded TrueType font
    assert b"/Type3" not in pdf
    assert re.search(r"<text [^>]*>consensus distance</text>", (tmp_path / "c.svg").read_text())


def test_ticks_of_bytes_are_in_the_unit_of_the_largest_panel(tmp_path, drawn):
    write_run(tmp_path, None, 0, [line(1, 0.3, 0, 2 * 10**6 - 5), line(2, 0.4, 0, 8 * 10**6 - 5)])
    write_run(tmp_path, "IDKD", 0, [line(1, 0.3, 1, 2000), line(2, 0.4, 1, 3000)], alpha=1.0)
    assert main(["compare", str(tmp_path), "--x", "bytes", "--curves", str(tmp_path / "c.svg")]) == 0
    for axes in drawn[0].axes:
        assert axes.get_xlabel() == "bytes sent (MB)"
        assert axes.xaxis.get_major_formatter()(4e6) == "4"


def test_all_panels_have_the_asked_limits_and_scale(forks, drawn, tmp_path):
    write_run(forks, None, 0, [line(1, 0.3, 0.1), line(2, 0.4, 0.1)], alpha=1.0)
    given = ["--curves", str(tmp_path / "c.svg"), "--limits", "20", "60", "--scale", "log"]
    assert main(["compare", str(forks), *given]) == 0
    assert [(axes.get_ylim(), axes.get_yscale()) for axes in drawn[0].axes] == [((20, 60), "log")] * 2


def test_28_lines_differ_without_colour():
    styles = [figures.choose_style(i) for i in range(28)]
    assert len({(str(style["linestyle"]), style["marker"]) for style in styles}) == 28


def test_a_label_with_dollars_is_drawn_as_it_is(tmp_path, drawn):
    for lr in ("$a", "$\\b$"):
        write_run(tmp_path / lr, "IDKD", 0, [line(1, 0.3, 0), line(2, 0.4, len(lr))])
        config = tmp_path / lr / "IDKD-0.1" / "0" / "config.yaml"
        config.write_text(config.read_text().replace("lr: 0.1", f"lr: '{lr}'"))
    assert main(["compare", str(tmp_path), "--curves", str(tmp_path / "c.svg"), "--plot", str(tmp_path / "d.svg")]) == 0
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["lr=$\\b$", "lr=$a"]


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--curves", "c.docx"], "--curves: 'c.docx' given; allowed: a file that ends in .pdf, .svg or .png"),
        (["--curves", "no/c.pdf"], "--curves: 'no/c.pdf' given; allowed: a file in a folder that exists"),
        (["--curves", "c.pdf", "--width", "0.2"], "--width: 0.2 given; allowed: 1 to 20 inches"),
        (["--curves", "c.pdf", "--x", "byte"], "x: 'byte' given. Did you mean 'bytes'? Allowed: epoch, step, bytes"),
        (["--curves", "c.pdf", "--band", "std"], "band: 'std' given. Did you mean 'sd'? Allowed: minmax, sd"),
        (["--curves", "c.pdf", "--limits", "9", "9"], "--limits: 9 9 given; allowed: two numbers, the lower one first"),
        (
            ["--curves", "c.pdf", "--limits", "0", "9", "--scale", "log"],
            "--limits: 0 9 given; allowed: numbers above 0",
        ),
        (["--curves", "c.pdf", "--scale", "lin"], "scale: 'lin' given. Did you mean 'linear'? Allowed: linear, log"),
        (["--limits", "1", "2"], "--limits: [1.0, 2.0] given; allowed: with --curves FILE, the picture to draw"),
        (["--y", "worst"], "--y: worst given; allowed: with --curves FILE, the picture to draw"),
        (["--band", "sd"], "--band: sd given; allowed: with --curves FILE, the picture to draw"),
        (["--curves", "c.pdf", "--y", "consenus"], "Did you mean 'consensus'? Allowed: node_mean, worst, consensus,"),
        (["--curves", "c.pdf", "--y", "mine/on"], "Did you mean 'mine/own'?"),
    ],
)
def test_wrong_options_are_refused(seeds, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(seeds)
    assert main(["compare", ".", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (seeds / "c.pdf").exists()


def test_a_logarithmic_axis_refuses_zeros(tmp_path, capsys):
    write_run(tmp_path, None, 0, [line(1, 0.3, 0) | {"consensus_distance": 0.0}, line(2, 0.4, 0)])
    given = ["--curves", str(tmp_path / "c.svg"), "--y", "consensus_distance", "--scale", "log"]
    assert main(["compare", str(tmp_path), *given]) == 2
    assert "--scale: log given; allowed: linear, since consensus distance goes down to 0" in capsys.readouterr().err


def test_a_logarithmic_axis_refuses_zeros_of_a_shared_initial_training(tmp_path, capsys):
    start = [line(1, 0.3, 0) | {"consensus_distance": 0.0}, line(2, 0.4, 0)]
    write_run(tmp_path, None, 0, [*start, line(3, 0.5, 0)])
    write_run(tmp_path, "IDKD", 0, [*start, line(3, 0.6, 0)])
    given = ["--curves", str(tmp_path / "c.svg"), "--y", "consensus_distance", "--scale", "log"]
    assert main(["compare", str(tmp_path), *given]) == 2
    assert "goes down to 0" in capsys.readouterr().err


def test_python_refuses_the_same(seeds):
    with pytest.raises(idkd.UserError, match=r"--x: 'byte' given. Did you mean 'bytes'\? Allowed: epoch, step, bytes"):
        idkd.compare(seeds, x="byte")
    with pytest.raises(idkd.UserError, match=r"--band: 'min' given.* Allowed: minmax, sd"):
        idkd.compare(seeds, band="min")
    with pytest.raises(idkd.UserError, match="form: 'html' given"):
        idkd.compare(seeds).format("html")


def test_of_runs_without_the_metric_the_first_is_named_after_what_is_allowed(seeds, monkeypatch):
    monkeypatch.chdir(seeds)
    for seed in (0, 2):
        path = seeds / "IDKD-0.1" / str(seed) / "metrics.jsonl"
        path.write_text(path.read_text().replace("homogeneity/after", "other"))
    with pytest.raises(idkd.UserError) as refused:
        idkd.compare(seeds, y="heterogeneity")
    allowed = "node_mean, worst, consensus, consensus_distance, heterogeneity, or a key of metrics.jsonl of all runs"
    assert str(refused.value) == (
        f"--y: 'heterogeneity' given. Allowed: {allowed}. 'IDKD-0.1/0' and 1 more lack homogeneity/after"
    )


def test_a_message_names_one_run_by_its_shortest_path(seeds, monkeypatch):
    monkeypatch.chdir(seeds)
    with pytest.raises(idkd.UserError, match=r"\. 'IDKD-0\.1/0' and 2 more lack foo$"):
        idkd.compare(seeds, y="foo")


@pytest.mark.parametrize(
    "y", ["epoch", "step", "bytes", "time", "time/simulated", "communication/label_bytes", "throughput/seconds"]
)
def test_curves_show_no_axis_and_no_count(seeds, y):
    with pytest.raises(idkd.UserError, match=rf"--y: '{y}' given; allowed: node_mean, .*, or a measured key of"):
        idkd.compare(seeds, y=y)


def test_runs_without_a_clock_are_named_with_the_axes_that_they_have(seeds, monkeypatch):
    monkeypatch.chdir(seeds)
    path = seeds / "IDKD-0.1" / "1" / "metrics.jsonl"
    path.write_text(path.read_text().replace("time/simulated", "other"))
    with pytest.raises(idkd.UserError) as refused:
        idkd.compare(seeds, x="time")
    assert str(refused.value) == (
        "--x: 'time' given; allowed: epoch, step, bytes. 'IDKD-0.1/1' lacks simulated time (clock: null)"
    )


def test_of_many_runs_without_the_metric_one_is_named_and_the_others_are_counted(tmp_path):
    for seed in range(5):
        write_run(tmp_path, "IDKD", seed, [])
    with pytest.raises(idkd.UserError, match=r"--y: 'worst' given\. Allowed: node_mean.* and 4 more lack"):
        idkd.compare(tmp_path, y="worst")


def test_seeds_without_a_common_range_are_refused(tmp_path):
    write_run(tmp_path, None, 0, [line(1, 0.3, 0, 100)])
    write_run(tmp_path, None, 1, [line(1, 0.4, 1, 200)])
    with pytest.raises(idkd.UserError, match=r"--x: the seeds of '-' have no range of bytes sent in common"):
        idkd.compare(tmp_path, x="bytes")


# ---------------------------------------------------------------------- the how-to


def test_the_figure_made_by_hand_in_the_how_to_runs_as_it_stands(forks, tmp_path_factory, monkeypatch, capsys):
    folder = tmp_path_factory.mktemp("how_to")
    (folder / "runs").mkdir()
    (folder / "runs" / "methods_digits").symlink_to(forks)
    monkeypatch.chdir(folder)
    block = re.search(r"```python\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)[1]
    with matplotlib.rc_context():
        exec(block, {})
    assert b"/Type3" not in (folder / "methods.pdf").read_bytes()
    assert capsys.readouterr().out.startswith("- IDKD {0: 0.5, 1: 0.5}\n")
