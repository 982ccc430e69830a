"""Draws comparisons for papers: curves over finished runs, and the numbers of a table as dots."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_idkd import colours
from lightning_idkd.analysis.curves import BANDS, Curve, X, find_stems, group_curves, name_metric
from lightning_idkd.analysis.rows import join_label
from lightning_idkd.analysis.table import AGAINST, Cell, find_scale, format_heading
from lightning_idkd.errors import UserError, require
from lightning_idkd.records.pictures import make_figure
from lightning_idkd.records.report import format_bytes

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".pdf", ".svg", ".png")
COLUMN, PAGE = 3.25, 6.75
"""Widths in inches of a column and of a page with two columns."""
COLUMNS = 3
"""Panels side by side, at most."""
LETTER = 0.055
"""Mean width in inches of a letter of the legend."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
MARKERS = "os^Dv*P"
"""Lines differ in dashes and markers besides colour, so that 28 can be told apart without colour."""
MARKED = 8
"""Markers on a line, at most."""
STEM = {"color": "0.35", "linestyle": "-", "linewidth": 2}
OPEN = {"linestyle": "", "markerfacecolor": "white", "zorder": 3}
"""The point after the final gossip."""
BAND = 0.2
"""Opacity of a band."""
SHORT = {"minmax": "min to max", "sd": "mean ± sd"}
"""The bands in the legend."""
LEGEND = {"frameon": False, "handlelength": 2.6, "columnspacing": 1}
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # TrueType; publishers refuse Type 3, the default
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a label may have a $
}  # fmt: skip
WORDS = {
    "accuracy/node_mean": "node mean accuracy (%)",
    "accuracy/node_min": "worst node accuracy (%)",
    "accuracy/consensus": "consensus accuracy (%)",
    "homogeneity/after": "heterogeneity",
}
"""Headings of metrics on an axis, where they differ from those of a table."""


def check_file(key: str, file: str, width: float | None = None) -> None:
    """Refuse a file that cannot be drawn, and a width that no page has.

    Raises:
        UserError: the file's ending is unknown, its folder does not exist, or the width is not in 1 to 20 inches.
    """
    endings = f"a file that ends in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
    require(Path(file).suffix.lower() in ENDINGS, key, f"'{file}'", endings)
    require(Path(file).parent.is_dir(), key, f"'{file}'", "a file in a folder that exists")
    require(width is None or 1 <= width <= 20, "--width", width, "1 to 20 inches")


def save(figure: Figure, key: str, file: str) -> None:
    """Save a figure: as PDF with TrueType fonts, as SVG with text as text, or as PNG with 300 dots an inch.

    Raises:
        UserError: the file cannot be written; ``key`` begins the message.
    """
    from matplotlib import rc_context

    try:
        with rc_context(STYLE):
            figure.savefig(file, dpi=300)
    except (OSError, ValueError) as e:  # matplotlib raises a ValueError for an unknown ending
        raise UserError(f"{key}: cannot draw into '{file}' ({getattr(e, 'strerror', None) or e})") from e
    print(f"drawn: {file}", file=sys.stderr)


# ------------------------------------------------------------------ curves


def check_axis(limits: list[float] | None, scale: str) -> None:
    """Refuse limits of the y axis that are none.

    Raises:
        UserError: the lower limit is not below the upper one, or not above 0 on a logarithmic axis.
    """
    if limits is not None:
        low, high = limits
        require(low < high, "--limits", f"{low:g} {high:g}", "two numbers, the lower one first")
        require(scale == "linear" or low > 0, "--limits", f"{low:g} {high:g}", "numbers above 0 with --scale log")


def draw_curves(curves: list[Curve], x: str, y: str, band: str, width: float | None = None,
                limits: list[float] | None = None, scale: str = "linear") -> Figure:  # fmt: skip
    """Draw a line for every curve, with a band where there are several seeds, in a panel for every setting.

    An initial training that methods share is drawn once, in grey. A point after the final gossip is open.

    Args:
        curves: from :func:`curves.collect_curves` with the same ``x``, ``y`` and ``band``.
        width: of the figure in inches; None for a column, or for a page if there are several settings.
        limits: of the y axis, in its unit; None for those of the curves.
        scale: of the y axis, ``linear`` or ``log``.

    Raises:
        UserError: a curve has a value that a logarithmic axis cannot show.
    """
    from matplotlib import rc_context

    lowest = min(curve.mean.min() for curve in curves)
    require(
        scale == "linear" or lowest > 0, "--scale", "log", f"linear, since {name_heading(y)} goes down to {lowest:g}"
    )
    panels = group_curves(curves)
    stems = {setting: find_stems(of_panel) for setting, of_panel in panels.items()}
    names = list(dict.fromkeys(name_curve(curve, curves) for curve in curves))
    down = -(-len(panels) // COLUMNS)
    across = -(-len(panels) // down)
    width = width or (COLUMN if len(panels) == 1 else PAGE)
    factor = find_scale(name_metric(y))
    unit, by = choose_byte_unit(curves) if x == "bytes" else ("", 1)
    heading = f"{X[x]} ({unit})" if unit else X[x]
    with rc_context(STYLE):
        handles = make_handles(names, curves, any(stems.values()), band, width)
        longest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
        columns = max(1, int(width / (0.47 + LETTER * longest)))
        rows = [handles[i : i + columns] for i in range(0, len(handles), columns)]
        height = sum(0.13 * max(handle.get_label().count("\n") + 1 for handle in row) + 0.03 for row in rows) + 0.2
        figure = make_figure(width, down * max(0.72 * width / across, 1.7) + height)
        grid = figure.subplots(down, across, sharey=True, squeeze=False)
        for i, (axes, (setting, of_panel)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
            for stem in stems[setting]:
                draw_curve(axes, stem, factor, STEM)
            for curve in of_panel:
                line = names.index(name_curve(curve, curves))
                draw_curve(axes, curve, factor, choose_style(line), line)
            axes.set_title("" if setting == "-" else wrap(setting, width / across))
            axes.set_xlabel(heading if i + across >= len(panels) else "")
            axes.set_ylabel(name_heading(y) if i % across == 0 else "")
            axes.grid(alpha=0.3, linewidth=0.5)
            if x == "bytes":
                axes.xaxis.set_major_formatter(lambda value, _: f"{value / by:.4g}")
            elif x == "epoch":
                axes.xaxis.get_major_locator().set_params(integer=True)
        grid[0, 0].set_yscale(scale)  # all panels share it, and its limits
        if limits is not None:
            grid[0, 0].set_ylim(*limits)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, **LEGEND)
        figure.draw_without_rendering()  # the layout depends on the font sizes of STYLE
    return figure


def name_curve(curve: Curve, curves: list[Curve]) -> str:
    """The name of a curve in the legend: its method, or its setting where all have one method."""
    one_method = all(other.method == curve.method for other in curves)
    return curve.setting if one_method and curve.setting != "-" else curve.method


def choose_style(i: int) -> dict:
    """The colour, dashes and marker of line ``i``."""
    return {
        "color": colours.CLASSES[i % len(colours.CLASSES)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def draw_curve(axes: Axes, curve: Curve, scale: float, style: dict, line: int = 0) -> None:
    """Draw mean and band of a curve from its fork on. Each ``line`` has its markers at other points."""
    x, mean, low, high = (values[curve.fork :] for values in (curve.x, curve.mean, curve.low, curve.high))
    every = -(-len(x) // MARKED)
    axes.plot(x, scale * mean, **style, markevery=(line % every, every))
    if len(curve.seeds) > 1:
        axes.fill_between(x, scale * low, scale * high, color=style["color"], alpha=BAND, linewidth=0)
    if curve.ends_with_gossip:
        axes.plot(x[-1:], scale * mean[-1:], **style | OPEN)


def choose_byte_unit(curves: list[Curve]) -> tuple[str, int]:
    """The unit of a byte axis that all panels have, and its bytes."""
    unit = format_bytes(max(curve.x[-1] for curve in curves)).split()[1]
    return unit, 1000 ** ("B", "kB", "MB", "GB", "TB").index(unit)


def make_handles(names: list[str], curves: list[Curve], forked: bool, band: str, width: float) -> list[Artist]:
    """Make the entries of the legend: the lines, then what else is in the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [Line2D([], [], **choose_style(i), label=name) for i, name in enumerate(names)]
    if forked:
        handles.append(Line2D([], [], **STEM, label="initial training"))
    if any(len(curve.seeds) > 1 for curve in curves):
        handles.append(Patch(color="0.5", alpha=BAND, linewidth=0, label=f"{SHORT[band]}, {count_seeds(curves)}"))
    if any(curve.ends_with_gossip for curve in curves):
        handles.append(Line2D([], [], **OPEN, color="0.35", marker="o", label="after final gossip"))
    for handle in handles:
        handle.set_label(wrap(handle.get_label(), width - 0.8))
    return handles


def count_seeds(curves: list[Curve]) -> str:
    """The number of seeds of the curves, or the smallest and largest."""
    fewest, most = (choose(len(curve.seeds) for curve in curves) for choose in (min, max))
    return f"{most} seed{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} seeds"


def wrap(text: str, width: float) -> str:
    """Break a text into lines of a width in inches."""
    return textwrap.fill(text, max(10, int(width / LETTER)))


def describe(curves: list[Curve], x: str, y: str, band: str) -> str:
    """Describe a figure of curves in a sentence for its caption."""
    parts = [f"{name_heading(y)} over {X[x]}: mean of {count_seeds(curves)}"]
    if any(len(curve.seeds) > 1 for curve in curves):
        parts.append(f"band {BANDS[band]}")
    if any(curve.interpolated for curve in curves):
        parts.append("seeds interpolated linearly between evaluations")
    if any(curve.fork for curve in curves):
        parts.append("grey: initial training that methods share")
    if any(curve.ends_with_gossip for curve in curves):
        parts.append("open: after the final gossip")
    return f"{'; '.join(parts)}."


def name_heading(y: str) -> str:
    """The heading of a metric on the axis of a figure, with its unit."""
    return WORDS.get(name_metric(y)) or format_heading(name_metric(y))


# ------------------------------------------------------------------ tables


def draw_dots(head: list[str], lines: list[list]) -> Figure:
    """Draw what :func:`table.build_table` returns: a panel per metric, and in it a dot with an error bar per row."""
    from matplotlib import rc_context

    names = [join_label(*line[:2]) for line in lines]
    metrics = [(column, name) for column, name in enumerate(head) if column >= 3 and not name.startswith(AGAINST)]
    with rc_context({"text.parse_math": False}):
        figure = make_figure(2.5 + 0.06 * max(map(len, names)) + 2.4 * len(metrics), 0.9 + 0.28 * len(names))
        panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for axes, (column, metric) in zip(panels, metrics, strict=True):
            scale = find_scale(metric)
            for row, line in enumerate(lines):
                mean, spread, seeds, never = line[column] or Cell(None, None, 0)
                note = ", ".join([f"{seeds} seeds"] * (spread is not None) + [f"{never} never"] * (never > 0))
                small = {"ha": "center", "fontsize": "xx-small"}
                if mean is None:
                    axes.text(0.5, row, note, transform=axes.get_yaxis_transform(), **small)
                    continue
                bar = None if spread is None else scale * spread
                axes.errorbar(scale * mean, row, xerr=bar, fmt="o", color=colours.BLUE, capsize=3)
                if note:
                    axes.annotate(note, (scale * mean, row), (0, 4), textcoords="offset points", **small)
            axes.set_xlabel(format_heading(metric))
            axes.margins(x=0.12)
            axes.grid(alpha=0.3)
        panels[0].set_yticks(range(len(names)), names)
        panels[0].set_ylim(len(names) - 0.4, -0.7)
    return figure
