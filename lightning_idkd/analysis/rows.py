"""Reads finished runs, and sorts them into the rows of a comparison: one for each method in each setting."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lightning_idkd.analysis.row_labels import (
    ALIKE,
    build_label,
    build_sort_key,
    find_varied_keys,
    format_value,
    list_leaves,
    shorten,
)
from lightning_idkd.config.resolved import METHOD, SETTING, difference, look_up
from lightning_idkd.errors import UserError
from lightning_idkd.records.run_folder import RunFolder

MEASURED = ("accuracy", "communication", "throughput")
"""Groups of a summary that hold numbers, or null for what is not known."""


class Run(NamedTuple):
    """A finished run."""

    config: dict
    summary: dict
    folder: RunFolder

    def evaluations(self, metric: str) -> list[dict]:
        """The lines of ``metrics.jsonl`` that have a number for ``metric``."""
        return [line for line in self.folder.metrics() if isinstance(line.get(metric), (int, float))]


@dataclass
class Row:
    """The values of one method in one setting, for all seeds."""

    setting: str
    method: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """By metric, then by seed."""
    runs: list[Run] = field(default_factory=list)
    """One for each seed."""


def gather(paths: list[str]) -> list[Run]:
    """Read config and summary of every finished run at or below ``paths``; of runs with the same config and seed, the
    newest. The number of unfinished ones is printed.

    Raises:
        UserError: a path does not exist, or there is no finished run.
    """
    runs: list[Run] = []
    unfinished: set[Path] = set()
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise UserError(f"'{text}' does not exist; give run folders, or folders with runs below them")
        summaries = [path / "summary.json"] if (path / "summary.json").exists() else path.rglob("summary.json")
        folders = {s.resolve().parent for s in summaries}
        unfinished |= find_unfinished(path)
        # the newest first, since a run's name begins with its time
        for folder in sorted(folders, key=lambda f: (f.name, str(f)), reverse=True):
            try:
                run = RunFolder(folder)
                config, summary = run.config(), run.summary()
                same = any(difference(config, other) is None for other, *_ in runs)
                check_numbers(summary)
            except UserError as e:
                print(f"left out: {e}", file=sys.stderr)
                continue
            except (OSError, KeyError, TypeError, AttributeError, ValueError):
                print(f"left out: '{folder}' is not a run of this version", file=sys.stderr)
                continue
            if not same:
                runs.append(Run(config, summary, run))
    if unfinished:
        print(f"left out: {len(unfinished)} unfinished run{'s' * (len(unfinished) > 1)}", file=sys.stderr)
    if not runs:
        raise UserError(f"no finished run (summary.json) at or below {', '.join(paths)}")
    return runs


def find_unfinished(folder: Path) -> set[Path]:
    """The run folders at or below ``folder`` that have no summary, as absolute paths."""
    found = {file.resolve().parent for file in folder.rglob("config.yaml") if file.with_name("checkpoints").exists()}
    return {path for path in found if not (path / "summary.json").exists()}


def check_numbers(summary: dict) -> None:
    """Refuse a summary whose seed or measures are not numbers, by a TypeError or an error of the same kind."""
    values = [value for group in MEASURED for value in summary.get(group, {}).values() if value is not None]
    if not all(isinstance(value, (int, float)) for value in [summary["seed"], *values]):
        raise TypeError


def build_rows(runs: list[Run], metrics: list[str]) -> list[Row]:
    """Build a row for each method in each setting, sorted by setting and method, and in it by seed."""
    varied = find_varied_keys([run.config for run in runs])
    rows: list[tuple[dict, Row]] = []  # with the config of the row's first run
    for run in sorted(runs, key=lambda run: run.summary["seed"]):
        config, summary, _ = run
        row = next((row for other, row in rows if difference(config, other, ALIKE) is None), None)
        if row is None:
            row = Row(build_label(config, SETTING, varied), build_label(config, METHOD, varied))
            rows.append((config, row))
        row.runs.append(run)
        for metric in metrics:
            value: object = summary
            for part in metric.split("/"):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                row.values.setdefault(metric, {})[summary["seed"]] = value
    by_label: dict[tuple[str, str], list[tuple[dict, Row]]] = {}
    for config, row in rows:
        by_label.setdefault((row.setting, row.method), []).append((config, row))
    for alike in by_label.values():
        if len(alike) > 1:
            distinguish(alike)
    return sorted((row for _, row in rows), key=lambda row: (build_sort_key(row.setting), build_sort_key(row.method)))


def distinguish(alike: list[tuple[dict, Row]]) -> None:
    """Add values of further keys to the methods of rows with the same label, until all of them differ.

    Each time, the key that separates most rows is added, the one with the shortest text where several do.
    """
    leaves = [list_leaves({key: look_up(config, key) for key in ALIKE}) for config, _ in alike]
    values = {key: [format_value(of_row.get(key)) for of_row in leaves] for key in sorted(set().union(*leaves))}
    differing = {key for key, of_rows in values.items() if len(set(of_rows)) > 1}
    added = {
        key: [f" {shorten(key, differing)}={value}" for value in of_rows]
        for key, of_rows in values.items()
        if key in differing
    }
    while added and len({row.method for _, row in alike}) < len(alike):

        def separates(key: str) -> tuple[int, int]:
            methods = {row.method + text for (_, row), text in zip(alike, added[key], strict=True)}
            return len(methods), -max(map(len, added[key]))

        for (_, row), text in zip(alike, added.pop(max(added, key=separates)), strict=True):
            row.method += text


def join_label(setting: str, method: str) -> str:
    """The label of a row in a picture or a sentence."""
    return " ".join(part for part in (setting, method) if part != "-") or "-"
