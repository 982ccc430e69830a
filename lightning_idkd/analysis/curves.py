"""Curves over finished runs: a metric over epochs, steps, bytes or simulated time, with mean and band over seeds."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lightning_idkd.analysis.rows import Row, join_label
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.records import report

X = {"epoch": report.AXES["epoch"], "step": "steps"} | report.AXES
"""What a curve can be drawn over: the names of the axes and their headings."""
Y = {
    "node_mean": "accuracy/node_mean",
    "worst": "accuracy/node_min",
    "consensus": "accuracy/consensus",
    "consensus_distance": "consensus_distance",
    "heterogeneity": "homogeneity/after",
}
"""Short names of metrics of ``metrics.jsonl``; any other is named by its key."""
BANDS = {"minmax": "from the smallest to the largest value", "sd": "mean ± standard deviation"}
"""The bands around a mean."""


@dataclass
class Curve:
    """The curve of one method in one setting. Accuracies are fractions."""

    setting: str
    method: str
    """Label of the method; of an initial training that several methods share, their labels."""
    seeds: list[int]
    x: np.ndarray
    """Places on the axis [points], ascending."""
    values: np.ndarray
    """The metric at these places, a row for each seed [seeds, points]."""
    mean: np.ndarray
    """Mean over the seeds [points]."""
    low: np.ndarray
    """Lower end of the band [points]."""
    high: np.ndarray
    """Upper end of the band [points]."""
    interpolated: bool
    """Whether the seeds have their evaluations at different places."""
    ends_with_gossip: bool
    """Whether the last point is measured after the final gossip."""
    fork: int = 0
    """The point from which on the runs of this method train alone; 0 if they share no initial training with others."""
    lines: list[list[tuple[float, str]]] = field(default_factory=list, repr=False)
    """For each seed, the place and the text of every evaluation; equal texts come from one training."""


def is_count(metric: str) -> bool:
    """Whether a key of ``metrics.jsonl`` only counts what a run has done so far, or is an axis; no curve shows it."""
    return metric in (*X, "throughput/seconds") or metric.startswith(("communication/", "time/"))


def name_metric(y: str) -> str:
    """The key in ``metrics.jsonl`` of a metric that ``y`` names by its short name or its key."""
    return Y.get(y, y)


def collect_curves(rows: list[Row], x: str, y: str, band: str) -> list[Curve]:
    """Collect a curve for every row.

    Seeds that have their evaluations at different places, as they have over bytes or time, are interpolated linearly:
    at every place at which one of them has an evaluation, within the range that all of them cover.

    Args:
        x: an axis of :data:`X`.
        y: a metric, by its name in :data:`Y` or its key in ``metrics.jsonl``.
        band: a band of :data:`BANDS`.

    Raises:
        UserError: the axis or band does not exist, the metric is an axis or a count, runs lack the metric or
            simulated time, or the seeds of a row have no range in common.
    """
    for key, value, allowed in (("--x", x, X), ("--band", band, BANDS)):
        if value not in allowed:
            raise UserError(f"{key}: '{value}' given.{did_you_mean(value, allowed)} Allowed: {', '.join(allowed)}")
    allowed = f"{', '.join(Y)}, or a measured key of metrics.jsonl, no axis and no count"
    require(not is_count(y), "--y", f"'{y}'", allowed)
    check_runs(rows, x, y)
    return [build_curve(row, x, name_metric(y), band) for row in rows]


def check_runs(rows: list[Row], x: str, y: str) -> None:
    """Refuse runs whose evaluations lack the metric ``y``, or that have no place on the axis ``x``."""
    lacking, timeless, known = [], [], set(Y)
    for run in (run for row in rows for run in row.runs):
        lines = run.evaluations(name_metric(y))
        if not lines:
            lacking.append(run.folder.path)
            for line in run.folder.metrics():
                known |= {k for k, value in line.items() if isinstance(value, (int, float)) and not is_count(k)}
        elif any(report.read_axis(line, x) is None for line in lines):
            timeless.append(run.folder.path)
    if lacking:
        hint, allowed = did_you_mean(y, sorted(known - {y})), f"{', '.join(Y)}, or a key of metrics.jsonl of all runs"
        raise UserError(f"--y: '{y}' given.{hint} Allowed: {allowed}. {name_runs(lacking)} {name_metric(y)}")
    if timeless:
        reason = "simulated time (clock: null)" if x == "time" else f"'{x}' in evaluations"
        others = ", ".join(name for name in X if name != x)
        raise UserError(f"--x: '{x}' given; allowed: {others}. {name_runs(timeless)} {reason}")


def name_runs(folders: list[Path]) -> str:
    """Say that runs lack something; the first is named by its shortest path, the others are counted."""
    shortest = min(str(folders[0]), os.path.relpath(folders[0]), key=len)
    return f"'{shortest}' lacks" if len(folders) == 1 else f"'{shortest}' and {len(folders) - 1} more lack"


def build_curve(row: Row, x: str, metric: str, band: str) -> Curve:
    """Build the curve of a row, whose runs all have the metric."""
    runs = row.runs
    by_seed = [run.evaluations(metric) for run in runs]
    places = [np.array([report.read_axis(line, x) for line in lines], float) for lines in by_seed]
    measured = [np.array([line[metric] for line in lines], float) for lines in by_seed]
    grid, interpolated = places[0], any(not np.array_equal(places[0], other) for other in places)
    if interpolated:
        grid = np.unique(np.concatenate(places))
        grid = grid[(max(p[0] for p in places) <= grid) & (grid <= min(p[-1] for p in places))]
        measured = [np.interp(grid, p, m) for p, m in zip(places, measured, strict=True)]
    if not len(grid):
        name = join_label(row.setting, row.method)
        raise UserError(f"--x: the seeds of '{name}' have no range of {X[x]} in common; allowed: another axis")
    values = np.array(measured)
    mean = values.mean(0)
    low, high = values.min(0), values.max(0)
    if band == "sd":
        deviation = values.std(0, ddof=1) if len(values) > 1 else 0 * mean
        low, high = mean - deviation, mean + deviation
    gossip = [run.summary.get("final_gossip") or run.summary.get("final_merge") for run in runs]
    final = [lines[-1].get("phase") == "final" for lines in by_seed]
    texts = []
    for p, lines in zip(places, by_seed, strict=True):
        of_run = [json.dumps(line | {"per_node": None}, sort_keys=True) for line in lines]
        texts.append(list(zip(p.tolist(), of_run, strict=True)))
    return Curve(
        row.setting, row.method, [run.summary["seed"] for run in runs], grid, values, mean, low, high, interpolated,
        all(gossip) and all(final), lines=texts,
    )  # fmt: skip


# ------------------------------------------------------------------ panels and forks


def group_curves(curves: list[Curve]) -> dict[str, list[Curve]]:
    """Group the curves into panels: by setting or, where there is only one method, all in one."""
    if len({curve.method for curve in curves}) == 1:
        return {"-": curves}
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault(curve.setting, []).append(curve)
    return panels


def find_stems(curves: list[Curve], shared: int = 0, start: int = 0) -> list[Curve]:
    """Find the initial trainings that curves of one panel share, and set their ``fork`` to the end of these.

    Runs share their initial training as long as their evaluations are equal in all metrics, the measured seconds of
    computation included. Only curves with the same seeds share one. A fork of a fork gives a stem that begins at the
    end of another.

    Args:
        curves: curves that are known to share their first ``shared`` evaluations.
        start: the point at which these end.
    """
    stems, alike = [], {}
    for curve in curves:
        next_lines = [lines[shared][1] if shared < len(lines) else None for lines in curve.lines]
        alike.setdefault(tuple(next_lines), []).append(curve)
    for group in alike.values():
        shortest = min(len(lines) for curve in group for lines in curve.lines)
        count = shared
        while count < shortest and len({tuple(lines[count][1] for lines in c.lines) for c in group}) == 1:
            count += 1
        if len(group) == 1 or count == shared:
            continue
        end = min(lines[count - 1][0] for lines in group[0].lines)
        fork = int(np.searchsorted(group[0].x, end, side="right")) - 1
        if fork > start:
            for curve in group:
                curve.fork = fork
            stems.append(cut_stem(group, start, fork))
        stems += find_stems(group, count, max(fork, start))
    return stems


def cut_stem(curves: list[Curve], start: int, end: int) -> Curve:
    """The part from point ``start`` to ``end`` that ``curves`` share, as a curve of its own."""
    of, part = curves[0], slice(start, end + 1)
    arrays = {name: getattr(of, name)[..., part] for name in ("x", "values", "mean", "low", "high")}
    method = ", ".join(curve.method for curve in curves)
    return replace(of, method=method, ends_with_gossip=False, fork=0, lines=[], **arrays)
