"""Compares finished runs: a table with mean and spread over seeds, and curves over epochs, bytes or time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

from lightning_idkd.analysis.curves import Curve, collect_curves, find_stems, group_curves
from lightning_idkd.analysis.rows import Row, build_rows, gather
from lightning_idkd.analysis.table import METRICS, build_table, format_table
from lightning_idkd.analysis.target import add_target
from lightning_idkd.errors import UserError, did_you_mean, require

FORMATS = ("table", "markdown", "csv", "latex")


@dataclass
class Comparison:
    """A comparison of finished runs, from :func:`compare`."""

    rows: list[Row]
    """One for each method in each setting; ``row.values`` has its numbers by metric, then by seed."""
    head: list[str]
    """Names of the columns of the table."""
    lines: list[list]
    """Lines of the table: setting, method, number of seeds, and a :class:`~.table.Cell` for each metric."""
    curves: list[Curve]
    """One for each row, in the same order; empty without ``y``."""
    stems: list[Curve]
    """Initial trainings that several curves share. Each of these curves leaves its stem at the point ``curve.fork``."""

    def format(self, form: str = "table") -> str:
        """Format the table as aligned text (``table``), ``markdown``, ``csv`` or ``latex``."""
        if form not in FORMATS:
            raise UserError(f"form: '{form}' given.{did_you_mean(form, FORMATS)} Allowed: {', '.join(FORMATS)}")
        return format_table(self.head, self.lines, form)


def compare(
    runs: str | PathLike | Sequence[str | PathLike],
    metrics: Sequence[str] = METRICS,
    baseline: str | None = None,
    target: float | None = None,
    x: str = "epoch",
    y: str | None = "node_mean",
    band: str = "minmax",
) -> Comparison:
    """Compare finished runs.

    Args:
        runs: run folders, or folders with runs below them.
        metrics: columns of the table, keys of ``summary.json`` with slashes.
        baseline: a method that the others are compared to, paired by seed.
        target: an accuracy, as a fraction. The table gets the epochs, bytes and simulated seconds after which the first
            of ``metrics`` reaches it.
        x: what the curves are drawn over: epoch, step, bytes, or time (simulated seconds).
        y: what the curves show: node_mean, worst, consensus, consensus_distance, heterogeneity, or a key of
            ``metrics.jsonl``; None for no curves.
        band: minmax (smallest to largest value over the seeds) or sd (mean ± standard deviation).

    Raises:
        UserError: there are no finished runs, they lack a metric, or an argument is not one of these values.
    """
    paths = [runs] if isinstance(runs, (str, PathLike)) else runs
    read, names = gather([str(path) for path in paths]), list(metrics)
    if target is not None:
        read, added = add_target(read, names[0], target)
        names += added
    head, lines = build_table(read, names, baseline)
    rows = build_rows(read, names)
    curves = [] if y is None else collect_curves(rows, x, y, band)
    stems = [stem for of_panel in group_curves(curves).values() for stem in find_stems(of_panel)]
    return Comparison(rows, head, lines, curves, stems)


def show(
    paths: list[str],
    metrics: list[str],
    baseline: str | None,
    form: str,
    plot: str | None = None,
    target: float | None = None,
    curves: str | None = None,
    x: str | None = None,
    y: str | None = None,
    band: str | None = None,
    width: float | None = None,
    limits: list[float] | None = None,
    scale: str | None = None,
) -> None:
    """Print the table over the runs at or below ``paths``; draw it, and curves.

    Args:
        plot: image file for the table or, with ``x``, for curves; None: none.
        curves: image file for curves; None: none.
        x: axis of the curves, by default epoch.
        y: metric of the curves, by default the first of ``metrics``.
        band: band of the curves, by default minmax.
        width: of the curves in inches.
        limits: of their y axis, in its unit; by default those of the curves.
        scale: of their y axis, linear (default) or log.

    Raises:
        UserError: as for :func:`compare`, or a picture cannot be drawn.
    """
    key = "--curves"
    if curves is None and x is not None:
        key, curves, plot = "--plot", plot, None
    if curves is None:
        drawing = {"--x": x, "--y": y, "--band": band, "--width": width, "--limits": limits, "--scale": scale}
        for name, value in drawing.items():
            require(value is None, name, f"{value}", "with --curves FILE, the picture to draw")
    from lightning_idkd.analysis import figures

    for option, file in ((key, curves), ("--plot", plot)):
        if file is not None:
            figures.check_file(option, file, width)
    x, y, band, scale = x or "epoch", y or metrics[0], band or "minmax", scale or "linear"
    figures.check_axis(limits, scale)
    compared = compare(paths, metrics, baseline, target, x, None if curves is None else y, band)
    if plot is not None:
        figures.save(figures.draw_dots(compared.head, compared.lines), "--plot", plot)
    if curves is not None:
        figures.save(figures.draw_curves(compared.curves, x, y, band, width, limits, scale), key, curves)
        print(f"caption: {figures.describe(compared.curves, x, y, band)}", file=sys.stderr)
    print(compared.format(form), end="")
