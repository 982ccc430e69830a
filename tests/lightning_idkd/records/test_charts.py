"""What charts show, read back from their SVG."""

from __future__ import annotations

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from lightning_idkd.records import charts
from lightning_idkd.records.charts import Line


def find(svg, name, style=None):
    """The elements of a name, of a class in the style sheet if one is given."""
    return [e for e in ElementTree.fromstring(svg).iter(name) if style in (None, e.get("class"))]


def pairs(element):
    return np.array([[float(v) for v in p.split(",")] for p in element.get("points").split()])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.86, 0.88), (-3, 12), (2, 60), (0, 1.6e9)])
def test_ticks_are_round_and_evenly_spaced_within_the_axis(low, high):
    ticks = charts.find_ticks(low, high)
    steps = np.diff(ticks)
    assert low - 1e-9 <= ticks[0]
    assert ticks[-1] <= high + 1e-9
    assert 3 <= len(ticks) <= 7
    assert steps == pytest.approx(steps[0])
    assert f"{steps[0]:.3e}".split("e")[0].rstrip("0") in ("1.", "2.", "2.5", "5.")


def test_a_line_is_where_its_values_are_and_its_band_around_it():
    points = [(0, 0.0), (5, 50.0), (10, 100.0)]
    line = Line("a", points, "s0", [0, 40, 90], [0, 60, 100])
    svg = charts.draw_lines([line], "x", "y", "alt", x_range=(0, 10), y_range=(0, 100))
    (path,), (band,) = find(svg, "polyline"), find(svg, "polygon")
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    bottom, top = charts.HEIGHT - charts.BOTTOM, charts.TOP
    middle = [(left + right) / 2, (bottom + top) / 2]
    assert pairs(path) == pytest.approx(np.array([[left, bottom], middle, [right, top]]))
    tenth = (bottom - top) / 10
    assert pairs(band)[:, 1] == pytest.approx(
        [bottom, middle[1] - tenth, top, top + tenth, middle[1] + tenth, bottom], abs=0.06
    )
    assert [t.text for t in find(svg, "title")] == ["a: 0 at 0", "a: 50 at 5", "a: 100 at 10"]


def test_a_value_that_is_not_finite_is_left_out():
    svg = charts.draw_lines([Line("a", [(0, 1.0), (1, float("nan")), (2, 2.0)], "s0")], "x", "y", "alt")
    assert len(pairs(find(svg, "polyline")[0])) == 2


def test_long_lines_keep_their_ends():
    thinned = charts.thin(list(range(10_001)), 100)
    assert (len(thinned), thinned[0], thinned[-1]) == (100, 0, 10_000)
    assert set(np.diff(thinned)) == {101, 102} or np.ptp(np.diff(thinned)) <= 1


def test_bars_are_as_long_as_their_mass():
    mass = np.array([[1.0, 0.0, 3.0], [2.0, 2.0, 0.0]])
    svg = charts.draw_bars(mass, ["a", "b", "c"], 4.0, "mass", "alt")
    whole = charts.WIDTH - charts.LEFT - charts.RIGHT
    widths = {e.find("title").text: float(e.get("width")) / whole for e in find(svg, "rect")}
    assert widths == pytest.approx({
        "node 0, class a: 1": 0.25, "node 0, class c: 3": 0.75, "node 1, class a: 2": 0.5, "node 1, class b: 2": 0.5,
    }, abs=1e-3)  # fmt: skip


def test_a_heat_map_is_opaque_by_the_square_root_of_the_value():
    values = np.array([[0.0, 4.0], [1.0, 0.25]])
    (image,) = find(charts.draw_heat(values, "x", "y", "alt", most=4.0), "image")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(image.get("href").split(",")[1]))))
    assert pixels[..., 3].tolist() == [[0, 255], [128, 64]]


def test_the_graph_has_its_edges_and_shades_over_the_range_of_its_honest_nodes():
    graph = {"positions": [[0, 0], [1, 0], [0, 1]], "edges": [[0, 1], [1, 2]]}
    svg = charts.draw_graph(graph, [0.9, 0.94, 0.1], [2], "alt")
    discs = find(svg, "circle", "disc")
    assert [float(d.get("fill-opacity")) for d in discs] == [0.15, 1, 0.15]
    at = [f"{d.get('cx')} {d.get('cy')}" for d in discs]
    (edges,) = find(svg, "path")
    assert edges.get("d") == f"M{at[0]}L{at[1]}M{at[1]}L{at[2]}"
    assert [g.find("title").text for g in find(svg, "g", "liar")] == ["node 2: 10.0%"]
    assert float(discs[2].get("cy")) < float(discs[0].get("cy"))  # up is up
    alike = find(charts.draw_graph(graph, [0.5, 0.5, 0.5], [], "alt"), "circle", "disc")
    assert [float(d.get("fill-opacity")) for d in alike] == [1, 1, 1]


def test_the_first_twenty_lines_look_different():
    assert len({charts.choose_style(i) for i in range(20)}) == 20
