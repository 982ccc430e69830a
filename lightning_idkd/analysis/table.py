"""The table of a comparison: mean and spread over seeds, and the difference to a baseline, paired by seed."""

from __future__ import annotations

import csv
import io
import math
import statistics
from typing import NamedTuple

from lightning_idkd.analysis.rows import Row, Run, build_rows
from lightning_idkd.errors import UserError, did_you_mean, nearest, require

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
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "<": "$<$", ">": "$>$"}
)  # fmt: skip


class Cell(NamedTuple):
    """A metric of one row, summarised over seeds."""

    mean: float | None
    """None if the column is about a target that no seed reaches."""
    spread: float | None
    """None for one seed."""
    seeds: int
    """The number of seeds in the mean."""
    never: int = 0
    """The number of seeds that do not reach the target; they are not in the mean."""


def summarise(values: list[float]) -> Cell:
    """Mean, standard deviation (with n - 1) and number of the values; infinity stands for a target never reached."""
    finite = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(finite) if finite else None
    spread = statistics.stdev(finite) if len(finite) > 1 else None
    return Cell(mean, spread, len(finite), len(values) - len(finite))


def compare_by_seed(row: Row, baseline: Row, metric: str) -> Cell | None:
    """Mean difference to the baseline over the seeds that both have, with its standard error; None if they share no
    seed."""
    ours, theirs = row.values.get(metric, {}), baseline.values.get(metric, {})
    differences = [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean, sd, seeds, _ = summarise(differences)
    return Cell(mean, None if sd is None else sd / math.sqrt(seeds), seeds)


def find_scale(metric: str) -> int:
    """The factor by which a metric is multiplied for display: 100 for accuracies, which are shown in percent."""
    return 100 if metric.startswith(("accuracy", "validation")) else 1


def format_heading(metric: str) -> str:
    """Format a metric's heading, with its unit."""
    words = WORDS.get(metric, metric.replace("/", ", ").replace("_", " "))
    return f"{words} (%)" if find_scale(metric) == 100 else words


def format_number(
    metric: str, mean: float | None, sd: float | None, seeds: int, never: int = 0, sign: bool = False
) -> str:
    """Format a metric's mean, followed by the spread and the number of seeds if there are several.

    Of a target that ``never`` seeds do not reach, the number is that of the seeds that reach it, of all seeds.
    """
    if mean is None:
        return f"never ({never})"
    by = find_scale(metric)
    form = ".1f" if by == 100 else ".4g"
    text = f"{by * mean:{'+' if sign else ''}{form}}"
    if sd is not None:
        text += f" ± {by * sd:{form}}"
    if never:
        return f"{text} ({seeds} of {seeds + never}; {never} never)"
    return text if sd is None else f"{text} ({seeds})"


AGAINST = "against "
"""Begins the name of the column with differences to the baseline."""
TO = " to "
"""Stands in the name of a column that says where runs reach a target, before the target."""
LEGEND = (
    "mean ± standard deviation (number of seeds), of one seed its value; "
    "difference: mean ± standard error (number of seeds), paired by seed"
)
NEVER = "never: seeds that do not reach the target, which are not in the mean"


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
            known = sorted({name for run in runs for name in list_numbers(run.summary)})
            group = metric.split("/")[0]
            same = [name for name in known if name.startswith(f"{group}/")]
            near = nearest(group, {name.split("/")[0] for name in known})
            hint = did_you_mean(metric, [name for name in known if name.split("/")[0] == near])
            if (group == metric and same) or not hint:  # a group alone is as near to any of its keys
                hint = f" Allowed: {', '.join(same or known)}"
            raise UserError(f"--metrics: no run has a number '{metric}'.{hint}")
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


def list_numbers(summary: dict, above: str = "") -> list[str]:
    """The keys of a summary that hold a number, with slashes."""
    keys = []
    for key, value in summary.items():
        if isinstance(value, dict):
            keys += list_numbers(value, f"{above}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            keys.append(f"{above}{key}")
    return keys


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
    legend = LEGEND
    if any(cell is not None and cell.never for line in lines for cell in line[3:]):
        legend += f"; {NEVER}"
    if form == "table":
        return f"{format_aligned([headings, *rows])}{legend}\n"
    if form == "latex":
        return f"% {legend}\n{format_latex([headings, *rows])}"
    body = "".join(f"| {' | '.join(row)} |\n" for row in (headings, ["---"] * len(headings), *rows))
    return f"{body}\n*{legend}*\n"


def format_csv(head: list[str], lines: list[list]) -> str:
    """Format the table as CSV, with all digits.

    Spreads and numbers of seeds have columns of their own, and so has the number of seeds that never reach a target.
    """
    targets = {name for name in head[3:] if TO in name and not name.startswith(AGAINST)}
    names = head[:3]
    for name in head[3:]:
        names += [name, f"{name} {'se' if name.startswith(AGAINST) else 'sd'}", f"{name} seeds"]
        if name in targets:
            names.append(f"{name} never")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for line in lines:
        values = line[:3]
        for name, cell in zip(head[3:], line[3:], strict=True):
            mean, spread, seeds, never = cell or Cell(None, None, 0)
            values += [mean, spread, seeds, *([never] if name in targets else [])]
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
    return text


def format_latex(rows: list[list[str]]) -> str:
    """Format the table, whose first row is the head, as a LaTeX tabular with the rules of booktabs."""
    head, *body = (f"{' & '.join(cell.translate(LATEX) for cell in row)} \\\\\n" for row in rows)
    columns = "ll" + "r" * (len(rows[0]) - 2)
    begin, end = f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n", "\\bottomrule\n\\end{tabular}\n"
    return f"{begin}{head}\\midrule\n{''.join(body)}{end}"
