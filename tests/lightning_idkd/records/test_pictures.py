"""What the pictures of a run show."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from short_runs import SHORT
from sklearn.metrics import roc_auc_score

from lightning_idkd import colours
from lightning_idkd.callbacks import MSP, Energy, MaxLogit
from lightning_idkd.cli import main
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph, Ring
from lightning_idkd.records import pictures
from lightning_idkd.topologies import EpidemicLocal, OnePeerExponential


def masses(nodes, classes):
    """Label counts with zeros, and more of everything after an exchange."""
    draws = np.random.default_rng(0)
    before = draws.integers(0, 9, (nodes, classes)) * (draws.random((nodes, classes)) < 0.5)
    return before, before + draws.random((nodes, classes))


def names(classes):
    return tuple(f"class {c}" for c in range(classes))


def scores(nodes, own=20):
    """Per node: scores of own samples (better the higher its number), of public ones and of noise, and a threshold."""
    draws = np.random.default_rng(0)
    return [
        (draws.normal(0.04 * i, 1, own), draws.normal(0, 1, 100), draws.normal(-1, 1, 50), 0.1 * i)
        for i in range(nodes)
    ]


def aurocs(found):
    return [roc_auc_score([1] * len(own) + [0] * len(public), [*own, *public]) for own, public, *_ in found]


# ---------------------------------------------------------------------- label mass


def test_label_mass_is_a_bar_a_node_and_both_panels_have_one_scale():
    before, after = masses(4, 12)
    left, right = pictures.draw_label_mass(before, after, names(12), (0.8, 0.25)).axes
    for axes, mass in ((left, before), (right, after)):
        assert [[bar.get_width() for bar in bars] for bars in axes.containers] == pytest.approx(mass.T)
    assert left.get_xlim() == right.get_xlim()
    assert left.get_xlim()[1] >= after.sum(1).max()
    assert left.get_ylim()[0] > left.get_ylim()[1]  # node 0 at the top
    assert [axes.get_title() for axes in (left, right)] == [
        "private (heterogeneity 0.80)", "private + distilled (heterogeneity 0.25)"
    ]  # fmt: skip
    assert [t.get_text() for t in right.get_legend().get_texts()] == list(names(12))
    looks = [(bars[0].get_facecolor(), bars[0].get_hatch()) for bars in left.containers]
    assert len(set(looks)) == 12  # ten colours, then hatched


def test_label_mass_above_twenty_classes_is_a_heatmap_with_one_scale_that_is_white_at_zero():
    before, after = masses(5, 21)
    left, right, bar = pictures.draw_label_mass(before, after, names(21), (0.8, 0.25)).axes
    for axes, mass in ((left, before), (right, after)):
        (image,) = axes.images
        assert np.array_equal(image.get_array(), mass)
        assert (image.norm.vmin, image.norm.vmax) == (0, after.max())
        assert image.cmap(image.norm(0.0))[:3] == (1, 1, 1)
    assert bar.get_ylim() == (0, after.max())


@pytest.mark.parametrize("classes", [10, 100])
def test_without_distillation_label_mass_is_one_panel(classes):
    figure = pictures.draw_label_mass(masses(3, classes)[0], None, names(classes), (0.5, 0.5))
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["private (heterogeneity 0.50)"]


def test_label_mass_of_many_nodes_fits_a_screen():
    for classes in (10, 100):
        before, after = masses(64, classes)
        assert pictures.draw_label_mass(before, after, names(classes), (0.5, 0.5)).get_figheight() <= 12


# ---------------------------------------------------------------------- partition


def test_a_partition_is_white_at_zero_and_has_its_counts_in_the_cells():
    histogram = np.array([[0, 12, 1200], [35, 0, 20]])
    axes, _ = pictures.draw_label_counts(histogram, ("a", "b", "c")).axes
    (image,) = axes.images
    assert np.array_equal(image.get_array(), histogram)
    colour = image.cmap(image.norm(histogram))
    assert ((colour[..., :3] == 1).all(-1) == (histogram == 0)).all()
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert cells == {(0, 1): "12", (0, 2): "1200", (1, 0): "35", (1, 2): "20"}


def test_counts_stand_only_in_cells_that_hold_them():
    """Cells of 100 classes are 10 points wide, so that six digits would need fonts below 3 points."""
    fits, crowded = np.full((8, 100), 88), np.full((8, 100), 500_000)
    assert len(pictures.draw_label_counts(fits, names(100)).axes[0].texts) == 800
    assert not pictures.draw_label_counts(crowded, names(100)).axes[0].texts
    assert not pictures.draw_label_counts(np.full((1000, 10), 3), names(10)).axes[0].texts


# ---------------------------------------------------------------------- scores


def test_the_axis_of_scores_names_score_and_unit():
    few = scores(2)
    for score, words in ((MSP(), "MSP, log-odds of the top class"), (MaxLogit(), "MaxLogit, a logit")):
        assert pictures.draw_score_histograms(few, aurocs(few), score)._supxlabel.get_text().startswith(words)


def test_of_many_nodes_the_scores_of_the_worst_and_best_are_shown():
    many = scores(40)
    of = aurocs(many)
    of[5] = math.nan  # without held-out samples
    figure = pictures.draw_score_histograms(many, of, MSP())
    shown = [int(axes.get_title().split(",")[0].removeprefix("node ")) for axes in figure.axes]
    ranked = sorted(set(range(40)) - {5}, key=of.__getitem__)
    assert shown == ranked[:8] + ranked[-8:]
    assert "the 8 worst and the 8 best of 40 nodes by AUROC" in figure._supxlabel.get_text()
    some = pictures.draw_score_histograms(many[:16], of[:16], MSP())
    assert [axes.get_title().split(",")[0] for axes in some.axes] == [f"node {i}" for i in range(16)]
    assert "worst" not in some._supxlabel.get_text()


def test_a_panel_has_the_nodes_auroc_and_threshold_and_all_its_own_samples():
    few = [(np.array([5.0]), np.random.default_rng(0).normal(0, 1, 1000), np.zeros(0), math.log(0.7 / 0.3))]
    (axes,) = pictures.draw_score_histograms(few, [0.25], MSP()).axes
    assert axes.get_title() == "node 0, AUROC 0.25, threshold p 0.700"
    assert [line.get_xdata()[0] for line in axes.lines] == [math.log(0.7 / 0.3)]
    public, own = axes.containers
    assert sum(bar.get_height() for bar in own) == 1
    assert sum(bar.get_height() for bar in public) > 0.98
    assert pictures.draw_score_histograms(few, [math.nan], Energy()).axes[0].get_title() == "node 0, none held out"


def test_noise_beyond_the_axis_is_counted_and_a_threshold_near_the_samples_widens_it():
    own, public = np.linspace(0, 1, 50), np.linspace(-0.5, 0.5, 50)
    noise = np.concatenate([np.full(30, -9.0), np.full(10, 9.0), np.zeros(60)])
    for threshold, right in ((0.2, 1.0), (1.4, 1.4), (50.0, 1.0)):
        (axes,) = pictures.draw_score_histograms([(own, public, noise, threshold)], [0.5], Energy()).axes
        assert {t.get_text() for t in axes.texts} == {"30% of noise\nfurther left", "10% of noise\nfurther right"}
        ends = [patch.get_x() + patch.get_width() for bars in axes.containers for patch in bars]
        assert max(ends) == pytest.approx(right, abs=0.02)
    (axes,) = pictures.draw_score_histograms([(own, public, np.zeros(9), 0.2)], [0.5], Energy()).axes
    assert not axes.texts


def test_samples_of_a_node_without_held_out_ones_are_not_called_held_out():
    few = scores(2)
    figure = pictures.draw_score_histograms(few, [math.nan, 0.7], Energy())
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(texts) == ["noise", "own held-out", "own, of training", "public"]


def test_values_of_another_number_than_nodes_are_refused_in_a_sentence(tmp_path):
    graph = Graph(Ring(), 5, seed=0)
    with pytest.raises(UserError, match="values: 4 of them given; allowed: one for each of the 5 nodes"):
        graph.draw(tmp_path / "a.png", [1.0] * 4)
    with pytest.raises(UserError, match="labels: 6 of them given"):
        graph.draw(tmp_path / "a.png", labels=list("abcdef"))


# ---------------------------------------------------------------------- ROC


def test_the_roc_has_grey_nodes_a_bold_mean_and_the_auroc_in_its_title():
    found = [*scores(6), (np.zeros(0), np.ones(3), np.zeros(0), 0.0)]
    of = [*aurocs(found[:6]), math.nan]
    (axes,) = pictures.draw_roc_curves(found, of).axes
    nodes = [line for line in axes.lines if len(line.get_xdata()) > 100 and line.get_linewidth() < 1]
    (mean,) = (line for line in axes.lines if line.get_linewidth() > 2)
    assert len(nodes) == 6
    assert all(len(set(to_rgb(line.get_color()))) == 1 for line in nodes)
    assert len(set(to_rgb(mean.get_color()))) > 1
    for line, auroc in zip(nodes, of, strict=False):
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(auroc)
    assert np.trapezoid(mean.get_ydata(), mean.get_xdata()) == pytest.approx(np.nanmean(of), abs=0.005)
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [d.get_xydata()[0].tolist() for d in dots] == [
        [np.mean(public >= t), np.mean(own >= t)] for own, public, _, t in found[:6]
    ]
    assert axes.get_title() == (
        f"AUROC {np.nanmean(of):.3f} (nodes: {np.nanmin(of):.3f} to {np.nanmax(of):.3f}), held-out own against public"
    )


def test_a_roc_of_nodes_without_held_out_samples_is_empty():
    (axes,) = pictures.draw_roc_curves([(np.zeros(0), np.ones(3), np.zeros(0), 0.0)], [math.nan]).axes
    assert axes.get_title() == ""


# ---------------------------------------------------------------------- accuracy


def test_every_exchange_is_marked_at_its_own_epoch():
    keys = [f"accuracy/{k}" for k in ("node_mean", "node_min", "node_max", "consensus")]
    lines = [{"epoch": e, **dict.fromkeys(keys, e / 20)} for e in (5, 10)]
    (axes,) = pictures.draw_accuracy(lines, [6, 7, 9]).axes
    marks = [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"]
    assert marks == [[6, 6], [7, 7], [9, 9]]
    assert [t.get_text() for t in axes.get_legend().get_texts()].count("exchange of labels") == 1
    (plain,) = pictures.draw_accuracy(lines, []).axes
    assert not [line for line in plain.lines if line.get_linestyle() == ":"]


def test_accuracy_is_drawn_over_simulated_time_too():
    keys = [f"accuracy/{k}" for k in ("node_mean", "node_min", "node_max", "consensus")]
    lines = [{"epoch": e, "time/simulated": e * 1.5, **dict.fromkeys(keys, e / 20)} for e in (5, 10)]
    (axes,) = pictures.draw_accuracy(lines, [], "time").axes
    assert axes.get_xlabel() == "simulated seconds"
    assert [list(line.get_xdata()) for line in axes.lines] == [[7.5, 15], [7.5, 15]]


def test_a_run_marks_its_exchanges_and_shades_its_graph_from_zero(tmp_path, configs, monkeypatch):
    drawn, accuracy, draw = {}, pictures.draw_accuracy, Graph.draw
    monkeypatch.setattr(
        pictures, "draw_accuracy", lambda lines, epochs: drawn.update(epochs=epochs) or accuracy(lines, epochs)
    )
    monkeypatch.setattr(
        Graph, "draw", lambda graph, *given, **marks: drawn.setdefault("graph", given) and draw(graph, *given, **marks)
    )
    arguments = [*SHORT[:-2], "--run.dir", str(tmp_path)]  # with pictures
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *arguments]) == 0
    assert drawn["epochs"] == [3, 5]  # from epoch 3 on every 2 of 6
    _, values, meaning = drawn["graph"]
    assert meaning == f"test accuracy (%), {min(values):.1f} to {max(values):.1f}"


# ---------------------------------------------------------------------- graph


def nodes_of(graph, **given):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    graph.draw(axes, **given)
    (drawn,) = (c for c in axes.collections if len(c.get_offsets()) == graph.nodes)
    return axes, drawn


def test_node_colours_run_from_zero_to_the_maximum_unless_asked_otherwise():
    graph, values = Graph(Ring(), 5), [90.0, 91, 92, 93, 94]
    axes, drawn = nodes_of(graph, values=values, meaning="test accuracy (%)")
    assert (drawn.norm.vmin, drawn.norm.vmax) == (0, 94)
    assert axes.figure.axes[1].get_ylabel() == "test accuracy (%)"
    assert nodes_of(graph, values=values, scale=(90, 95))[1].norm.vmin == 90
    assert nodes_of(graph, values=values, scale=(90, 95))[1].norm.vmax == 95
    assert nodes_of(graph, values=[-1.0, 0, 0, 0, 3])[1].norm.vmin == -1
    assert nodes_of(graph, values=[0.0] * 5)[1].norm.vmax > 0


def edges_of(axes):
    """Arrows as pairs of positions."""
    return {tuple(np.round([*a.get_path().vertices[0], *a.get_path().vertices[-1]], 1)) for a in axes.patches}


def test_a_graph_that_changes_says_which_step_is_drawn():
    static, periodic, endless = Graph(Ring(), 8), Graph(OnePeerExponential(), 8), Graph(EpidemicLocal(s=2), 8)
    assert nodes_of(static)[0].get_title() == ""
    assert nodes_of(periodic)[0].get_title() == "all 3 steps of a graph that repeats after 3 steps"
    assert nodes_of(periodic, step=1)[0].get_title() == "step 1 of a graph that repeats after 3 steps"
    assert nodes_of(endless)[0].get_title() == "step 0 of a graph that never repeats"
    assert nodes_of(endless, step=5)[0].get_title() == "step 5 of a graph that never repeats"
    counts = [len(nodes_of(periodic, **given)[0].patches) for given in ({}, {"step": 0}, {"step": 1})]
    assert counts == [24, 8, 8]
    assert edges_of(nodes_of(endless, step=5)[0]) != edges_of(nodes_of(endless)[0])


def test_a_step_whose_edges_leave_nodes_apart_can_be_drawn():
    class Pair(Ring):
        period = 2

        def graph(self, nodes, step, seed):
            made = nx.path_graph(nodes)
            made.remove_edges_from(list(made.edges)[step::2])
            return made

        def positions(self, nodes):
            return None

    axes, _ = nodes_of(Graph(Pair(), 4), step=0)
    assert len(axes.texts) == 4


# ---------------------------------------------------------------------- colours

DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What is seen of linear RGB (Machado, Oliveira and Fernandes, 2009, severity 1)."""


def seen(colour, deficiency):
    """CIE L*a*b* (D65) of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    x, y, z = (
        np.cbrt(v) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in to_xyz @ linear / [0.95047, 1, 1.08883]
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_of_classes_and_lines_differ_for_colour_blind_readers(deficiency):
    """Matplotlib's default ten come as close as 5 for protanopes; 2.3 is a just noticeable difference."""
    for palette in (colours.CLASSES, (colours.BLUE, colours.ORANGE, colours.GREEN)):
        apart = [
            np.linalg.norm(seen(a, deficiency) - seen(b, deficiency)) for a, b in itertools.combinations(palette, 2)
        ]
        assert min(apart) > 15


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_shades_darken_steadily_from_white_for_colour_blind_readers(deficiency):
    assert colours.shades()(0.0)[:3] == (1, 1, 1)
    lightness = [seen(colours.shades()(v)[:3], deficiency)[0] for v in np.linspace(0, 1, 33)]
    assert (np.diff(lightness) < -0.5).all()
