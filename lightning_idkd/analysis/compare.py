"""Compares finished runs in a table: mean and spread over seeds, and the difference to a baseline, paired by seed."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lightning_idkd.config import NodeConfig
from lightning_idkd.config.resolved import METHOD, RESULT, SETTING, difference, look_up
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.records import report
from lightning_idkd.records.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALIKE = tuple(key for key in RESULT if key != "seed")
"""Keys that are the same in all runs of a row."""
METRICS = ("accuracy/node_mean", "accuracy/node_min", "accuracy/consensus")
WORDS = {
    "accuracy/node_mean": "node mean",
    "accuracy/node_std": "standard deviation over nodes",
    "accuracy/node_min": "worst node",
    "accuracy/node_max": "best node",
    "accuracy/consensus": "consensus",
    "accuracy/node_mean_before_final_gossip": "node mean before final gossip",
    "communication/parameter_bytes": "parameters sent, bytes",
    "communication/label_bytes": "labels sent, bytes",
    "communication/other_bytes": "other sent, bytes",
    "communication/messages": "messages",
    "homogeneity/before": "heterogeneity before distillation",
    "homogeneity/after": "heterogeneity after distillation",
    "ood/auroc": "AUROC, held-out own against public",
    "ood/auroc_noise": "AUROC, held-out own against noise",
    "ood/threshold": "threshold",
    "ood/threshold_probability": "threshold as a probability",
    "ood/kept_fraction": "share of public samples kept",
    "ood/own_kept": "share of held-out samples kept",
    "ood/noise_kept": "share of noise kept",
    "peak_memory_bytes": "peak memory, bytes",
    "throughput/samples_per_second": "samples a second",
    "throughput/seconds": "seconds",
    "time/simulated": "simulated seconds",
}
"""Headings of metrics; the heading of another metric is its key with spaces."""
PLAIN = (("callbacks", []), ("node.module", NodeConfig.module), ("node.module", None))
"""Keys with default values, which a label leaves out."""
NUMBER = re.compile(r"((?:(?<!\w)-)?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "<": "$<$", ">": "$>$"}
)  # fmt: skip


class Run(NamedTuple):
    """A finished run."""

    config: dict
    summary: dict
    folder: RunFolder


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
    newest.

    Raises:
        UserError: a path does not exist, or there is no finished run.
    """
    runs: list[Run] = []
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise UserError(f"'{text}' does not exist; give run folders, or folders with runs below them")
        summaries = [path / "summary.json"] if (path / "summary.json").exists() else path.rglob("summary.json")
        folders = {s.resolve().parent for s in summaries}
        # the newest first, since a run's name begins with its time
        for folder in sorted(folders, key=lambda f: (f.name, str(f)), reverse=True):
            try:
                run = RunFolder(folder)
                config, summary = run.config(), run.summary()
                same = any(difference(config, other) is None for other, *_ in runs)
                _ = summary["seed"]
            except UserError as e:
                print(f"left out: {e}", file=sys.stderr)
                continue
            except (OSError, KeyError, TypeError, ValueError):
                print(f"left out: '{folder}' is not a run of this version", file=sys.stderr)
                continue
            if not same:
                runs.append(Run(config, summary, run))
    if not runs:
        raise UserError(f"no finished run (summary.json) at or below {', '.join(paths)}")
    return runs


def flatten(value: object, key: str = "") -> dict[str, object]:
    """Flatten a config to dotted keys. A class is the value of its key, and its arguments have keys below; a list of
    classes is their names, joined by +."""
    if isinstance(value, dict):
        if "class_path" in value:
            return {key: value["class_path"].rsplit(".", 1)[-1]} | flatten(value.get("init_args") or {}, key)
        flat: dict[str, object] = {}
        for name, below in value.items():
            flat |= flatten(below, f"{key}.{name}".lstrip("."))
        return flat
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        names = [flatten(item, "x").get("x") for item in value]
        flat = {key: "+".join(str(item if name is None else name) for item, name in zip(value, names, strict=True))}
        for item, name in zip(value, names, strict=True):
            arguments = flatten(item, f"{key}.{'' if name is None else name}")
            flat |= {k: v for k, v in arguments.items() if k.count(".") > 1}
        return flat
    return {key: value}


def shorten(key: str, keys: set[str]) -> str:
    """Shorten ``key`` to the shortest of its ends that no other of ``keys`` has."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(k != key and f".{k}".endswith(f".{end}") for k in keys)), key)


def build_label(config: dict, groups: tuple[str, ...], varied: set[str]) -> str:
    """Build the label of a run from the values of its keys in ``groups`` that are ``varied`` between the runs.

    The classes of a method stand without their key, further callbacks as +Name.
    """
    parts = []
    for group in groups:
        values = flatten(look_up(config, group), group)
        differing = {k: v for k, v in values.items() if k in varied and (k, v) not in PLAIN}
        if group in METHOD and group in values and any(f"{k}.".startswith(f"{group}.") for k in varied):
            differing.pop(group, None)
            if group != "callbacks":
                parts.append(format_value(values[group]))
            elif values[group]:
                parts.append(f"+{values[group]}")
        parts += [f"{shorten(k, varied)}={format_value(v, k)}" for k, v in differing.items()]
    return " ".join(parts) or "-"


def format_value(value: object, key: str = "") -> str:
    """Format a config's value for a label; the import path of a node module becomes its class name."""
    if value is None or value == []:
        return "none"
    return str(value).rsplit(".", 1)[-1] if key == "node.module" else str(value)


def build_sort_key(text: str) -> list[str | float]:
    """Build a sort key that orders texts by the values of the numbers in them, so that 2 comes before 10."""
    return [float(part) if i % 2 else part for i, part in enumerate(NUMBER.split(text))]


def distinguish(alike: list[tuple[dict, Row]]) -> None:
    """Add values of further keys to the methods of rows with the same label, until all of them differ."""
    leaves = [list_leaves({key: look_up(config, key) for key in ALIKE}) for config, _ in alike]
    keys = sorted(set().union(*leaves))
    differing = [key for key in keys if len({repr(of_row.get(key)) for of_row in leaves}) > 1]
    for key in differing:
        for (_, row), of_row in zip(alike, leaves, strict=True):
            row.method += f" {shorten(key, set(differing))}={format_value(of_row.get(key))}"
        if len({row.method for _, row in alike}) == len(alike):
            break


def list_leaves(value: object, key: str = "") -> dict[str, object]:
    """List all values that are neither a dict nor a list of dicts, by dotted keys."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {key: value}
    leaves: dict[str, object] = {}
    for name, below in value.items():
        leaves |= list_leaves(below, f"{key}.{name}".lstrip("."))
    return leaves


def find_varied_keys(configs: list[dict]) -> set[str]:
    """Find the keys of settings and methods whose values differ between the runs.

    Arguments of a class that only some runs have say nothing beyond the class's name, so a key counts only if it
    differs between runs that have it, or is itself a group of the method.
    """
    flats = []
    for config in configs:
        flat: dict[str, object] = {}
        for key in SETTING + METHOD:
            flat |= flatten(look_up(config, key), key)
        flats.append(flat)
    varied = set()
    for key in set().union(*flats):
        present = {repr(flat[key]) for flat in flats if key in flat}
        if len(present) > 1 or (key in METHOD and len({repr(flat.get(key)) for flat in flats}) > 1):
            varied.add(key)
    return varied


def build_rows(runs: list[Run], metrics: list[str]) -> list[Row]:
    """Build a row for each method in each setting, sorted by setting and method."""
    varied = find_varied_keys([run.config for run in runs])
    rows: list[tuple[dict, Row]] = []  # with the config of the row's first run
    for run in runs:
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


Cell = tuple[float, float | None, int]
"""Mean over seeds, spread (None for one seed), and number of seeds."""


def summarise(values: list[float]) -> Cell:
    """Mean, standard deviation (with n - 1) and number of the values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def compare_by_seed(row: Row, baseline: Row, metric: str) -> Cell | None:
    """Mean difference to the baseline over the seeds that both have, with its standard error; None if they share no
    seed."""
    ours, theirs = row.values.get(metric, {}), baseline.values.get(metric, {})
    differences = [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean, sd, seeds = summarise(differences)
    return mean, None if sd is None else sd / math.sqrt(seeds), seeds


def find_scale(metric: str) -> int:
    """The factor by which a metric is multiplied for display: 100 for accuracies, which are shown in percent."""
    return 100 if metric.startswith(("accuracy", "validation")) else 1


def format_heading(metric: str) -> str:
    """Format a metric's heading, with its unit."""
    words = WORDS.get(metric, metric.replace("/", ", ").replace("_", " "))
    return f"{words} (%)" if find_scale(metric) == 100 else words


def format_number(metric: str, mean: float, sd: float | None, seeds: int, sign: bool = False) -> str:
    """Format a metric's mean, followed by the spread and the number of seeds if there are several."""
    by = find_scale(metric)
    form = ".1f" if by == 100 else ".4g"
    text = f"{by * mean:{'+' if sign else ''}{form}}"
    return text if sd is None else f"{text} ± {by * sd:{form}} ({seeds})"


AGAINST = "against "
"""Begins the name of the column with differences to the baseline."""
LEGEND = (
    "mean ± standard deviation (number of seeds), of one seed its value; "
    "difference: mean ± standard error (number of seeds), paired by seed"
)


def build_table(
    runs: list[Run],
    metrics: list[str],
    baseline: str | None = None,
) -> tuple[list[str], list[list]]:
    """Build the head and the lines of the table.

    A line has setting, method, number of seeds, and a :data:`Cell` for every metric, None where the row lacks it. With
    a ``baseline``, a last cell has the difference of the first metric to that method in the same setting. Its spread is
    the standard error; the others' are standard deviations.

    Raises:
        UserError: no run has one of the metrics, or no row is the baseline.
    """
    rows = build_rows(runs, metrics)
    for metric in metrics:
        if not any(metric in row.values for row in rows):
            known = []
            for group, values in runs[0].summary.items():
                known += [f"{group}/{key}" for key in values] if isinstance(values, dict) else []
            raise UserError(f"--metrics: no run has '{metric}'.{did_you_mean(metric, sorted(known))}")
    names = sorted({row.method for row in rows})
    head = ["setting", "method", "seeds", *metrics]
    if baseline is not None:
        require(baseline in names, "--baseline", f"'{baseline}'", f"{', '.join(names)}.{did_you_mean(baseline, names)}")
        head.append(f"{AGAINST}{baseline}")
    baselines = {row.setting: row for row in rows if row.method == baseline}
    lines = []
    for row in rows:
        cells = [summarise(list(row.values[m].values())) if m in row.values else None for m in metrics]
        if baseline is not None:
            other = None if row.method == baseline else baselines.get(row.setting)
            cells.append(None if other is None else compare_by_seed(row, other, metrics[0]))
        lines.append([row.setting, row.method, max(map(len, row.values.values()), default=0), *cells])
    return head, lines


def format_table(head: list[str], lines: list[list], form: str) -> str:
    """Format what :func:`build_table` returns; ``form`` is table, markdown, latex or csv."""
    if form == "csv":
        return format_csv(head, lines)
    headings, rows = head[:3], [[str(value) for value in line[:3]] for line in lines]
    for column, name in enumerate(head[3:], start=3):
        is_difference = name.startswith(AGAINST)
        metric = head[3] if is_difference else name
        difference_to = f", difference to {name.removeprefix(AGAINST)}" if is_difference else ""
        headings.append(f"{format_heading(metric)}{difference_to}")
        for row, line in zip(rows, lines, strict=True):
            cell = line[column]
            row.append("-" if cell is None else format_number(metric, *cell, sign=is_difference))
    if form == "table":
        return format_aligned([headings, *rows])
    if form == "latex":
        return format_latex([headings, *rows])
    body = "".join(f"| {' | '.join(row)} |\n" for row in (headings, ["---"] * len(headings), *rows))
    return f"{body}\n*{LEGEND}*\n"


def format_csv(head: list[str], lines: list[list]) -> str:
    """Format the table as CSV, with all digits, and with spreads and numbers of seeds in columns of their own."""
    names = head[:3]
    for name in head[3:]:
        names += [name, f"{name} {'se' if name.startswith(AGAINST) else 'sd'}", f"{name} seeds"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for line in lines:
        values = line[:3]
        for cell in line[3:]:
            values += cell or (None, None, 0)
        writer.writerow(values)
    return out.getvalue()


def format_aligned(rows: list[list[str]]) -> str:
    """Format the table, whose first row is the head, in aligned columns. No cell is cut, since two labels may differ
    only at their ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ""
    for row in (rows[0], ["-" * width for width in widths], *rows[1:]):
        cells = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if column < 2 else cell.rjust(width))
        text += f"{'  '.join(cells).rstrip()}\n"
    return f"{text}{LEGEND}\n"


def format_latex(rows: list[list[str]]) -> str:
    """Format the table, whose first row is the head, as a LaTeX tabular with the rules of booktabs."""
    head, *body = (f"{' & '.join(cell.translate(LATEX) for cell in row)} \\\\\n" for row in rows)
    columns = "ll" + "r" * (len(rows[0]) - 2)
    begin, end = f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n", "\\bottomrule\n\\end{tabular}\n"
    return f"% {LEGEND}\n{begin}{head}\\midrule\n{''.join(body)}{end}"


def add_target(runs: list[Run], metric: str, target: float) -> tuple[list[Run], list[str]]:
    """Add to the summaries epoch, bytes and simulated seconds of the first evaluation whose ``metric`` is at least
    ``target``.

    Returns the runs and the names of the new metrics, which a run lacks if it does not reach the target.

    Raises:
        UserError: the metric is not an accuracy, or no run reaches the target.
    """
    require(find_scale(metric) == 100, "--target: the first of --metrics", f"'{metric}'", "an accuracy")
    require(0 < target <= 1, "--target", target, "a fraction above 0, at most 1")
    added, best, names = [], -math.inf, {axis: f"{words} to {target:g}" for axis, words in report.AXES.items()}
    for run in runs:
        lines = [line for line in run.folder.metrics() if metric in line]
        best = max([best, *(line[metric] for line in lines)])
        first = next((line for line in lines if line[metric] >= target), {})
        places = {name: report.read_axis(first, axis) for axis, name in names.items()} if first else {}
        added.append(run._replace(summary=run.summary | places))
    if best < target:
        raise UserError(f"--target: no run has {metric} {target:g} in an evaluation; the best has {max(best, 0):.4g}")
    return added, [name for name in names.values() if any(run.summary.get(name) is not None for run in added)]


def draw_curves(runs: list[Run], metric: str, axis: str) -> Figure:
    """Draw a metric over an axis of :data:`report.AXES`, with a curve for every row of the table.

    Raises:
        UserError: a run has no simulated time, or its evaluations do not have the metric.
    """
    from lightning_idkd.records import pictures

    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for row in build_rows(runs, []):
        of_row = curves.setdefault(join_label(row.setting, row.method), [])
        for run in row.runs:
            lines = [line for line in run.folder.metrics() if metric in line]
            if not lines:
                raise UserError(f"--metrics: the evaluations of '{run.folder.path}' do not have '{metric}'")
            if axis == "time" and any(report.read_axis(line, axis) is None for line in lines):
                others = ", ".join(name for name in report.AXES if name != axis)
                raise UserError(
                    f"--x: '{run.folder.path}' has no simulated time (its clock is null); allowed for it: {others}"
                )
            of_row.append([(report.read_axis(line, axis), find_scale(metric) * line[metric]) for line in lines])
    return pictures.draw_curves(curves, report.AXES[axis], format_heading(metric))


def join_label(setting: str, method: str) -> str:
    """The label of a row in a picture."""
    return " ".join(part for part in (setting, method) if part != "-") or "-"


def show(paths: list[str], metrics: list[str], baseline: str | None, form: str, picture: str | None = None,
         axis: str | None = None, target: float | None = None) -> None:  # fmt: skip
    """Print the table over the runs at or below ``paths``, and draw it into an image file if ``picture`` names one.

    Args:
        axis: draw the first metric over this axis of :data:`report.AXES` instead of the table.
        target: add columns that say where the first metric reaches this value.

    Raises:
        UserError: as for :func:`gather`, :func:`build_table`, :func:`add_target` and :func:`draw_curves`, or the
            picture cannot be written.
    """
    if axis is not None and picture is None:
        raise UserError(f"--x: {axis} given without --plot; allowed: with --plot FILE, the picture to draw")
    runs, added = gather(paths), []
    if target is not None:
        runs, added = add_target(runs, metrics[0], target)
    head, lines = build_table(runs, [*metrics, *added], baseline)
    if picture is not None:
        from lightning_idkd.records import pictures

        if axis is None:
            panels: dict[str, list[tuple | None]] = {}
            for column, metric in enumerate([*metrics, *added], start=3):
                panels[format_heading(metric)] = [scale_cell(line[column], find_scale(metric)) for line in lines]
            figure = pictures.draw_dots([join_label(*line[:2]) for line in lines], panels)
        else:
            figure = draw_curves(runs, metrics[0], axis)
        try:
            figure.savefig(picture, dpi=120)
        except (OSError, ValueError) as e:  # matplotlib raises a ValueError for an unknown format
            raise UserError(f"--plot: cannot draw into '{picture}' ({getattr(e, 'strerror', None) or e})") from e
        print(f"drawn: {picture}", file=sys.stderr)
    print(format_table(head, lines, form), end="")


def scale_cell(cell: Cell | None, by: int) -> Cell | None:
    """Multiply a cell's mean and spread."""
    if cell is None:
        return None
    mean, sd, seeds = cell
    return by * mean, None if sd is None else by * sd, seeds
