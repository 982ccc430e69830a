"""Finds where runs reach an accuracy: after how many epochs, bytes and simulated seconds."""

from __future__ import annotations

import math

from lightning_idkd.analysis.rows import Run
from lightning_idkd.analysis.table import TO, find_scale
from lightning_idkd.errors import UserError, require
from lightning_idkd.records import report


def add_target(runs: list[Run], metric: str, target: float) -> tuple[list[Run], list[str]]:
    """Add to the summaries epoch, bytes and simulated seconds of the first evaluation whose ``metric`` is at least
    ``target``. They are infinite for a run that never reaches it.

    Returns the runs and the names of the new metrics. A run without evaluations of ``metric`` lacks all of them, and a
    run without a clock lacks the seconds.

    Raises:
        UserError: the metric is not an accuracy, or no run reaches the target.
    """
    require(find_scale(metric) == 100, "--target: the first of --metrics", f"'{metric}'", "an accuracy")
    require(0 < target <= 1, "--target", target, "a fraction above 0, at most 1")
    added, best, names = [], 0.0, {axis: f"{words}{TO}{target:g}" for axis, words in report.AXES.items()}
    for run in runs:
        lines = run.evaluations(metric)
        best = max([best, *(line[metric] for line in lines)])
        places: dict[str, float] = {}
        for axis, name in names.items():
            reached = [report.read_axis(line, axis) for line in lines if line[metric] >= target]
            if lines and report.read_axis(lines[0], axis) is not None:
                places[name] = reached[0] if reached else math.inf
        added.append(run._replace(summary=run.summary | places))
    if best < target:
        raise UserError(f"--target: no run has {metric} {target:g} in an evaluation; the best has {best:.4g}")
    return added, [name for name in names.values() if any(name in run.summary for run in added)]
