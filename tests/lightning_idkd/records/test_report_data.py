"""The numbers that a run stores for its report."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lightning_idkd.graph import Graph, Ring
from lightning_idkd.records import report_data
from lightning_idkd.topologies import OnePeerExponential

DRAWS = np.random.default_rng(0)
OWN, PUBLIC, NOISE = DRAWS.normal(1, 1, 70), DRAWS.normal(0, 1, 300), DRAWS.normal(-4, 1, 50)


def test_the_roc_has_the_area_of_sklearns_and_ends_in_the_corners():
    curve = report_data.trace_roc(OWN, PUBLIC)
    auroc = roc_auc_score([1] * len(OWN) + [0] * len(PUBLIC), [*OWN, *PUBLIC])
    assert np.trapezoid(curve, report_data.GRID) == pytest.approx(auroc, abs=0.01)
    assert curve[-1] == 1
    for share, kept in zip(report_data.GRID, curve, strict=True):
        # the threshold that keeps so many public samples, found by counting
        cut = sorted(PUBLIC, reverse=True)[round(share * len(PUBLIC)) - 1] if share else np.inf
        exact = sum(own >= cut for own in OWN) / len(OWN)
        assert abs(kept - exact) < 0.08


def test_scores_that_are_all_equal_give_the_diagonal():
    curve = report_data.trace_roc(np.ones(5), np.ones(9))
    assert curve == pytest.approx(report_data.GRID)


def test_histograms_count_samples_and_say_what_lies_outside():
    found = report_data.bin_scores(OWN, PUBLIC, NOISE, 0.5, True)
    edges = np.linspace(found["low"], found["high"], report_data.BINS + 1)
    for kind, values in (("own", OWN), ("public", PUBLIC), ("noise", NOISE)):
        for i, share in enumerate(found[kind]):
            last = i == report_data.BINS - 1
            inside = [v for v in values if edges[i] <= v and (v < edges[i + 1] or (last and v <= edges[i + 1]))]
            assert share == pytest.approx(len(inside) / len(values), abs=1e-4)
    below = sum(v < found["low"] for v in NOISE) / len(NOISE)
    assert found["noise_outside"] == pytest.approx([below, 0], abs=1e-4)
    assert found["low"] <= 0.5 <= found["high"]


def test_a_threshold_near_the_samples_widens_the_axis_and_one_far_off_does_not():
    own, public = np.linspace(0, 1, 50), np.linspace(-0.5, 0.5, 50)
    for threshold, high in ((0.2, 1.0), (1.4, 1.4), (50.0, 1.0)):
        assert report_data.bin_scores(own, public, own, threshold, True)["high"] == pytest.approx(high, abs=0.02)
    assert report_data.bin_scores(np.ones(3), np.ones(3), np.zeros(0), 1.0, True)["noise"] == []


def test_of_many_nodes_the_worst_and_the_best_are_stored_and_all_enter_the_mean():
    aurocs = [*np.linspace(0.4, 0.9, 20), np.nan]
    scores = [(OWN + 0.01 * i, PUBLIC, NOISE, 0.0) for i in range(21)]
    found = report_data.summarise_scores(scores, aurocs, "MSP")
    assert [h["node"] for h in found["histograms"]] == [*range(8), *range(12, 20)]
    assert [c["node"] for c in found["roc"]["nodes"]] == [*range(8), *range(12, 20)]
    mean = np.mean([report_data.trace_roc(OWN + 0.01 * i, PUBLIC) for i in range(20)], axis=0)
    assert found["roc"]["mean"] == pytest.approx(mean, abs=1e-4)
    kept_public, kept_own = found["roc"]["nodes"][0]["at"]
    assert kept_public == pytest.approx(np.mean(PUBLIC >= 0), abs=1e-4)
    assert kept_own == pytest.approx(np.mean(OWN >= 0), abs=1e-4)


def test_nodes_that_hold_nothing_out_have_no_roc():
    found = report_data.summarise_scores([(OWN, PUBLIC, NOISE, 0.0)], [np.nan], "MSP")
    assert found["roc"] == {"nodes": [], "mean": None}
    assert not found["histograms"][0]["held_out"]


def test_the_graph_is_stored_with_its_edges_unless_there_are_too_many(monkeypatch):
    found = report_data.describe_graph(Graph(Ring(), 5))
    assert sorted(map(sorted, found["edges"])) == [[0, 1], [0, 4], [1, 2], [2, 3], [3, 4]]
    assert found["positions"][0] == [0, 1]
    assert found["spectral_gap"] == pytest.approx(2 / 3 * (1 - np.cos(2 * np.pi / 5)), abs=1e-6)
    assert found["steps"] == ""
    assert report_data.describe_graph(Graph(OnePeerExponential(), 8))["steps"].startswith("all 3 steps")
    monkeypatch.setattr(report_data, "MOST_EDGES", 4)
    found = report_data.describe_graph(Graph(Ring(), 5))
    assert (found["edges"], found["edge_count"]) == ([], 5)
