"""Draws charts as SVG for the HTML report. The page's style sheet has their colours, for light and dark pages."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lightning_idkd import colours
from lightning_idkd.records.markup import Html, element
from lightning_idkd.records.report import format_bytes

WIDTH, HEIGHT = 440, 270
"""Size of a chart in units of its view box; a page shows a unit as 0.8 to 1.2 pixels."""
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 10, 44
"""Margins around the axes."""
POINTS = 300
"""Most points of a line; of more, evenly spaced ones are drawn."""
DASHES = ("", "6 3", "2 3", "8 3 2 3")
PALEST = 0.15
"""Opacity of the node with the lowest accuracy in a drawing of the graph."""
HEAT = (63, 144, 218)
"""Colour of heat maps (red, green, blue), whose opacity follows the values: it stands out from white and from black."""


class Line(NamedTuple):
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    """Class in the style sheet: ``s0`` to ``s9`` are colours with contrast, ``faint`` is for single nodes."""
    low: Sequence[float] | None = None
    """Lower end of a band around the line."""
    high: Sequence[float] | None = None
    dash: str = ""
    """``stroke-dasharray`` of the line."""
    unit: str = ""
    """Follows the values in tooltips."""


def thin(points: Sequence, most: int = POINTS) -> list:
    """At most ``most`` evenly spaced points, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def find_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def format_tick(value: float) -> str:
    """Format the number at a tick."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def n(value: float) -> str:
    """A coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def draw_lines(
    lines: Sequence[Line],
    x: str,
    y: str,
    alt: str,
    *,
    marks: Sequence[tuple[float, str]] = (),
    dots: Sequence[tuple[float, float, str]] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    in_bytes: bool = False,
    square: bool = False,
) -> Html:
    """Draw lines over two axes.

    Args:
        x: name of the horizontal axis; ``y``: of the vertical one.
        alt: text that says what the chart shows, for those who do not see it.
        marks: places on the horizontal axis with a vertical line, and their names.
        dots: further points, with what a tooltip says.
        x_range: ends of the axis; None: those of the lines.
        in_bytes: whether the horizontal axis counts bytes.
        square: whether both axes have the same length.
    """
    finite = [
        line._replace(points=[p for p in line.points if all(map(math.isfinite, p))]) if line.low is None else line
        for line in lines
    ]
    xs = [p[0] for line in finite for p in line.points] or [0.0]
    ys = [p[1] for line in finite for p in line.points] or [0.0]
    for line in finite:
        ys += [*(line.low or ()), *(line.high or ())]
    width, height = (320, 320) if square else (WIDTH, HEIGHT)
    x0, x1 = x_range or widen(min(xs), max(xs), 0.0)
    y0, y1 = y_range or widen(min(ys), max(ys), 0.06)

    def px(value: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * (value - x0) / (x1 - x0)

    def py(value: float) -> float:
        return height - BOTTOM - (height - TOP - BOTTOM) * (value - y0) / (y1 - y0)

    parts = draw_axes(x, y, (x0, x1), (y0, y1), px, py, width, height, in_bytes)
    top, bottom = n(TOP), n(height - BOTTOM)
    for place, name in thin(marks, 40):
        mark = element("line", element("title", name), x1=n(px(place)), x2=n(px(place)), y1=top, y2=bottom)
        parts.append(element("g", mark, class_="mark"))
    for line in finite:
        parts.append(draw_line(line, px, py))
    for place, value, name in dots:
        parts.append(element("circle", element("title", name), cx=n(px(place)), cy=n(py(value)), r=2.5, class_="dot"))
    return frame(width, height, alt, parts, "square" if square else None)


def widen(low: float, high: float, share: float) -> tuple[float, float]:
    """Two ends that are never equal, wider by a share of their distance; 0 stays a lower end."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    more = share * (high - low)
    return (low if low == 0 else low - more), high + more


def draw_axes(
    x: str,
    y: str,
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    px: Callable[[float], float],
    py: Callable[[float], float],
    width: float,
    height: float,
    in_bytes: bool,
) -> list[Html]:
    """Draw the grid, the ticks and the names of both axes."""
    parts = []
    for tick in find_ticks(*y_ends):
        parts.append(element("line", x1=LEFT, x2=width - RIGHT, y1=n(py(tick)), y2=n(py(tick)), class_="rule"))
        parts.append(element("text", format_tick(tick), x=LEFT - 7, y=n(py(tick) + 4), text_anchor="end"))
    ticks = find_ticks(*x_ends, 4 if in_bytes else 5)
    for tick in ticks:
        text = format_bytes(tick) if in_bytes else format_tick(tick)
        at_end = px(tick) > width - RIGHT - 12
        anchor = "end" if at_end else "middle"
        place = width - RIGHT if at_end else px(tick)
        parts.append(element("text", text, x=n(place), y=height - BOTTOM + 17, text_anchor=anchor))
    parts.append(
        element("line", x1=LEFT, x2=width - RIGHT, y1=n(height - BOTTOM), y2=n(height - BOTTOM), class_="axis")
    )
    middle = n((TOP + height - BOTTOM) / 2)
    style = {"class_": "name", "text_anchor": "middle"}
    parts.append(element("text", x, x=n((LEFT + width - RIGHT) / 2), y=height - 6, **style))
    parts.append(element("text", y, x=12, y=middle, transform=f"rotate(-90 12 {middle})", **style))
    return parts


def draw_line(line: Line, px: Callable[[float], float], py: Callable[[float], float]) -> Html:
    """Draw a line with its band and, if there are few points, a marker with a tooltip at each."""
    parts = []
    if line.low is not None and line.high is not None:
        band = thin(list(zip(line.points, line.low, line.high, strict=True)))
        upper = [f"{n(px(p[0]))},{n(py(high))}" for p, _, high in band]
        lower = [f"{n(px(p[0]))},{n(py(low))}" for p, low, _ in reversed(band)]
        parts.append(element("polygon", points=" ".join(upper + lower), class_="band"))
    points = thin(line.points)
    path = " ".join(f"{n(px(a))},{n(py(b))}" for a, b in points)
    parts.append(element("polyline", points=path, class_="line", stroke_dasharray=line.dash or None))
    if line.style != "faint" and len(points) <= 60:
        for a, b in points:
            title = element("title", f"{line.name}: {b:.4g}{line.unit} at {format_tick(a)}")
            parts.append(element("circle", title, cx=n(px(a)), cy=n(py(b)), r=2.6, class_="point"))
    return element("g", parts, class_=line.style)


def frame(width: float, height: float, alt: str, parts: Sequence[Html], class_: str | None = None) -> Html:
    """An SVG picture with a text that stands for it."""
    view = f"0 0 {n(width)} {n(height)}"
    return element("svg", parts, viewBox=view, role="img", aria_label=alt, class_=class_)


def legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """A legend of lines: name, class in the style sheet, and ``stroke-dasharray``; ``area`` stands for a filled square,
    ``hist`` for one as pale as a histogram."""
    items = []
    for name, style, dash in entries:
        if dash in ("area", "hist"):
            sample = element("rect", x=2, y=1, width=14, height=10, class_="fill" if dash == "area" else "hist")
        else:
            sample = element("line", x1=0, x2=22, y1=6, y2=6, class_="line", stroke_dasharray=dash or None)
        picture = element("svg", element("g", sample, class_=style), viewBox="0 0 22 12", aria_hidden="true")
        items.append(element("li", picture, name))
    return element("ul", items, class_="legend")


def draw_bars(mass: np.ndarray, classes: Sequence[str], most: float, x: str, alt: str) -> Html:
    """Draw a stacked bar per node from ``mass`` [n, k], k up to ten; ``most`` is the end of the axis."""
    nodes, row = len(mass), 15 if len(mass) <= 32 else 10
    height = TOP + row * nodes + BOTTOM

    def px(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / most

    parts = []
    for tick in find_ticks(0, most, 4):
        parts.append(element("line", x1=n(px(tick)), x2=n(px(tick)), y1=TOP, y2=height - BOTTOM, class_="rule"))
        at_end = px(tick) > WIDTH - RIGHT - 12
        anchor, place = ("end", WIDTH - RIGHT) if at_end else ("middle", px(tick))
        parts.append(element("text", format_tick(tick), x=n(place), y=height - BOTTOM + 17, text_anchor=anchor))
    for node, values in enumerate(mass):
        y = TOP + row * node
        if node % max(1, nodes // 16) == 0:
            parts.append(element("text", node, x=LEFT - 7, y=n(y + row / 2 + 4), text_anchor="end"))
        left = 0.0
        for c, value in enumerate(values):
            if value > 0:
                title = element("title", f"node {node}, class {classes[c]}: {value:.4g}")
                size = {"x": n(px(left)), "y": n(y + 1), "width": n(px(left + value) - px(left)), "height": row - 2}
                parts.append(element("rect", title, **size, class_=f"c{c} fill"))
                left += value
    middle = n(TOP + row * nodes / 2)
    parts.append(
        element(
            "text", "node", x=12, y=middle, transform=f"rotate(-90 12 {middle})", class_="name", text_anchor="middle"
        )
    )
    style = {"class_": "name", "text_anchor": "middle"}
    parts.append(element("text", x, x=n((LEFT + WIDTH - RIGHT) / 2), y=height - 6, **style))
    return frame(WIDTH, height, alt, parts)


def draw_heat(values: np.ndarray, x: str, y: str, alt: str, most: float | None = None, square: bool = False) -> Html:
    """Draw a heat map of ``values`` [rows, columns], whose opacity follows the square root; it is full at ``most``."""
    rows, columns = values.shape
    width = 380 if square else WIDTH
    inside = width - LEFT - RIGHT
    height = TOP + BOTTOM + (inside if square else min(max(8 * rows, 160), 420))
    share = np.sqrt(np.clip(values / (most or values.max() or 1), 0, 1))
    place = {"x": LEFT, "y": TOP, "width": inside, "height": n(height - TOP - BOTTOM)}
    parts = [element("rect", **place, class_="ground")]
    parts.append(element("image", **place, href=encode_heat(share), preserveAspectRatio="none", class_="heat"))
    for tick in find_ticks(0, columns - 1, 5):
        at = LEFT + inside * (tick + 0.5) / columns
        parts.append(element("text", format_tick(tick), x=n(at), y=n(height - BOTTOM + 17), text_anchor="middle"))
    for tick in find_ticks(0, rows - 1, 5):
        at = TOP + (height - TOP - BOTTOM) * (tick + 0.5) / rows
        parts.append(element("text", format_tick(tick), x=LEFT - 7, y=n(at + 4), text_anchor="end"))
    middle = n((TOP + height - BOTTOM) / 2)
    style = {"class_": "name", "text_anchor": "middle"}
    parts.append(element("text", x, x=n(LEFT + inside / 2), y=n(height - 6), **style))
    parts.append(element("text", y, x=12, y=middle, transform=f"rotate(-90 12 {middle})", **style))
    return frame(width, height, alt, parts)


def encode_heat(share: np.ndarray) -> str:
    """A PNG, as a data URI, with one pixel for each value from 0 to 1 [rows, columns], which is its opacity."""
    from PIL import Image

    pixels = np.empty((*share.shape, 4), np.uint8)
    pixels[..., :3] = HEAT
    pixels[..., 3] = np.round(255 * share)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(file, "PNG", optimize=True)
    return encode_png(file.getvalue())


def encode_png(content: bytes) -> str:
    """A data URI that holds a PNG file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def encode_svg(content: bytes) -> str:
    """A data URI that holds an SVG file; a browser runs no script in it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"


def draw_histogram(histogram: dict, title: str, alt: str) -> Html:
    """Draw the score histograms of a node (see :func:`~lightning_idkd.records.report_data.bin_scores`)."""
    width, height, bottom = 200, 104, 20
    low, high = histogram["low"], histogram["high"]
    most = max([*histogram["own"], *histogram["public"], 1e-9])
    most = min(most, 3 * max(histogram["public"], default=most))  # few own samples would make the others flat

    def px(value: float) -> float:
        return 6 + (width - 12) * (value - low) / (high - low)

    parts = [element("text", title, x=6, y=12, class_="name")]
    styles = {"public": "s0", "own": "s1", "noise": "outline"}
    for kind, style in styles.items():
        shares = histogram[kind]
        if not shares:
            continue
        corners = [f"{n(px(low))},{height - bottom}"]
        for i, share in enumerate(shares):
            y = n(height - bottom - (height - bottom - 20) * min(share / most, 1))
            a, b = (px(low + (high - low) * (i + j) / len(shares)) for j in (0, 1))
            corners += [f"{n(a)},{y}", f"{n(b)},{y}"]
        corners.append(f"{n(px(high))},{height - bottom}")
        shape = element("polygon", points=" ".join(corners), class_="hist")
        parts.append(element("g", shape, class_=style))
    if low <= histogram["threshold"] <= high:
        at = n(px(histogram["threshold"]))
        parts.append(element("line", x1=at, x2=at, y1=18, y2=height - bottom, class_="threshold"))
    parts.append(element("line", x1=6, x2=width - 6, y1=height - bottom, y2=height - bottom, class_="axis"))
    for tick in find_ticks(low, high, 3):
        if 14 < px(tick) < width - 14:
            parts.append(element("text", format_tick(tick), x=n(px(tick)), y=height - 5, text_anchor="middle"))
    return frame(width, height, alt, parts, "small")


def find_range(accuracies: Sequence[float], liars: Sequence[int]) -> tuple[float, float]:
    """The smallest and the largest accuracy of the nodes that do not lie, or of all if all of them lie."""
    known = [value for node, value in enumerate(accuracies) if node not in liars] or accuracies
    return min(known), max(known)


def draw_graph(graph: dict, accuracies: Sequence[float], liars: Sequence[int], alt: str) -> Html:
    """Draw the graph; the larger a node's accuracy, the more it stands out, from the palest to the full one.

    Args:
        graph: ``positions`` [n, 2] and ``edges`` [E, 2].
        accuracies: [n].
        liars: the nodes with a thick outline. Their accuracies do not count in the range of the shades.
    """
    side, nodes = 400.0, len(accuracies)
    low, high = find_range(accuracies, liars)
    radius = max(2.5, min(15, 150 / math.sqrt(nodes)))
    places = np.asarray(graph["positions"], float)
    span = np.ptp(places, axis=0)
    scale = (side - 2 * radius - 6) / (span.max() or 1)
    height = max(span[1] * scale + 2 * radius + 6, 2 * radius + 6)
    x = radius + 3 + (places[:, 0] - places[:, 0].min()) * scale + (side - 2 * radius - 6 - span[0] * scale) / 2
    y = radius + 3 + (places[:, 1].max() - places[:, 1]) * scale
    path = "".join(f"M{n(x[a])} {n(y[a])}L{n(x[b])} {n(y[b])}" for a, b in graph["edges"])
    parts = [element("path", d=path, class_="edges")]
    for node, value in enumerate(accuracies):
        share = min(max((value - low) / (high - low), 0), 1) if high > low else 1.0
        shade = PALEST + (1 - PALEST) * share
        title = element("title", f"node {node}: {value:.1%}")
        lies = "liar" if node in liars else None
        circle = {"cx": n(x[node]), "cy": n(y[node]), "r": n(radius)}
        disc = [element("circle", **circle, class_="ground"),
                element("circle", **circle, class_="disc", fill_opacity=f"{shade:.2f}")]  # fmt: skip
        if radius >= 7:
            ink = "on" if shade > 0.7 else None
            size = f"{0.95 * radius:.0f}"
            middle = {"x": n(x[node]), "y": n(y[node] + 0.34 * radius), "text_anchor": "middle", "font_size": size}
            disc.append(element("text", node, **middle, class_=ink))
        parts.append(element("g", title, disc, class_=lies))
    return frame(side, height, alt, parts, "graph")


def choose_style(index: int) -> tuple[str, str]:
    """The class in the style sheet and the ``stroke-dasharray`` of the line with this number. The first twenty differ,
    and neighbours differ without colours too."""
    return f"s{index % len(colours.CLASSES)}", DASHES[index % len(DASHES)]
