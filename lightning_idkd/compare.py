"""Tables over finished runs: mean and spread over seeds, and the difference to a baseline, paired by seed."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.run_folder import RESULT, RunFolder, difference

SETTING = ("graph", "data", "node", "train")
METHOD = ("gossip", "calibration", "distillation", "callbacks")
ALIKE = tuple(key for key in RESULT if key != "seed")
METRICS = ("accuracy/node_mean", "accuracy/node_min", "accuracy/consensus")


@dataclass
class Row:
    """All seeds of one method in one setting."""

    setting: str
    method: str
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric, then seed."""


def gather(paths: list[str]) -> list[tuple[dict, dict]]:
    """(config, summary) of every finished run at or below ``paths``; of runs with one config and seed the newest."""
    found: list[tuple[dict, dict]] = []
    for text in paths:
        path = Path(text)
        if not path.exists():
            raise UserError(f"'{text}' does not exist; give run folders, or folders with runs below them")
        summaries = [path / "summary.json"] if (path / "summary.json").exists() else path.rglob("summary.json")
        folders = {s.resolve().parent for s in summaries}
        for folder in sorted(folders, key=lambda f: (f.name, str(f)), reverse=True):  # a run's name begins with its time
            try:
                config, summary = RunFolder(folder).config(), json.loads((folder / "summary.json").read_text())
                same = any(difference(config, other) is None for other, _ in found)
                _ = summary["seed"]
            except (OSError, KeyError, TypeError, ValueError):
                print(f"left out: '{folder}' is no run of this version", file=sys.stderr)
                continue
            if not same:
                found.append((config, summary))
    if not found:
        raise UserError(f"no finished run (summary.json) at or below {', '.join(paths)}")
    return found


def flat(value: object, key: str = "") -> dict[str, object]:
    """Dotted keys and their values; a class stands for itself, its arguments below it."""
    if isinstance(value, dict):
        if "class_path" in value:
            found = {key: value["class_path"].rsplit(".", 1)[-1]}
            return found | flat(value.get("init_args") or {}, key)
        found = {}
        for k, v in value.items():
            found |= flat(v, f"{key}.{k}".lstrip("."))
        return found
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        found = {key: "+".join(str(flat(v, "x").get("x", v)) for v in value)}
        for v in value:
            found |= {k: w for k, w in flat(v, f"{key}.{flat(v, 'x').get('x', '')}").items() if k.count(".") > 1}
        return found
    return {key: value}


def short(key: str, keys: set[str]) -> str:
    """The end of ``key`` that no other of ``keys`` has."""
    parts = key.split(".")
    ends = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((end for end in ends if not any(k != key and f".{k}".endswith(f".{end}") for k in keys)), key)


def label(config: dict, groups: tuple[str, ...], varied: set[str]) -> str:
    """What sets this run apart in ``groups``: values of the keys that differ between the runs."""
    parts = []
    for group in groups:
        here = {k: v for k, v in flat(config.get(group), group).items() if k in varied}
        if group in METHOD and group in flat(config.get(group), group) and any(k.split(".")[0] == group for k in varied):
            name = flat(config[group], group)[group]
            parts.append("none" if name is None else str(name))
            here.pop(group, None)
        parts += [f"{short(k, varied)}={'none' if v is None else v}" for k, v in here.items()]
    return " ".join(parts) or "-"


def rows(runs: list[tuple[dict, dict]], metrics: list[str]) -> list[Row]:
    """A row for each method in each setting."""
    flats = [flat({k: v for k, v in config.items() if k in SETTING + METHOD}) for config, _ in runs]
    # a class that only some runs have brings arguments that only these have: they say nothing beyond its name
    varied = {k for k in set().union(*flats) if len({repr(f[k]) for f in flats if k in f}) > 1}
    varied |= {k for k in set().union(*flats) if k in METHOD and len({repr(f.get(k)) for f in flats}) > 1}
    found: list[tuple[dict, Row]] = []  # a config, but for its seed, and its row
    for config, summary in runs:
        row = next((row for other, row in found if difference(config, other, ALIKE) is None), None)
        if row is None:
            row = Row(label(config, SETTING, varied), label(config, METHOD, varied))
            for other, theirs in found:
                if (row.setting, row.method) == (theirs.setting, theirs.method):
                    key, ours, _ = difference(config, other, ALIKE)
                    row.method += f" {key}={ours}"  # nothing above tells them apart
            found.append((config, row))
        for metric in metrics:
            value: object = summary
            for part in metric.split("/"):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, (int, float)):
                row.values.setdefault(metric, {})[summary["seed"]] = value
    return sorted((row for _, row in found), key=lambda r: (r.setting, r.method))


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) of some values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired(row: Row, baseline: Row, metric: str) -> tuple[float, float | None] | None:
    """Mean difference to the baseline over the seeds that both have, with its standard error."""
    ours, theirs = row.values.get(metric, {}), baseline.values.get(metric, {})
    differences = [ours[s] - theirs[s] for s in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    mean, sd = spread(differences)
    return mean, None if sd is None else sd / math.sqrt(len(differences))


def scale(metric: str) -> int:
    """What a metric is multiplied by to be shown: accuracies are in percent."""
    return 100 if metric.startswith(("accuracy", "validation")) else 1


def number(metric: str, mean: float, sd: float | None, sign: bool = False) -> str:
    """A metric as it is shown, the spread behind the mean."""
    by = scale(metric)
    form = ".1f" if by == 100 else ".4g"
    return f"{by * mean:{'+' if sign else ''}{form}}" + ("" if sd is None else f" ± {by * sd:{form}}")


def table(runs: list[tuple[dict, dict]], metrics: list[str], baseline: str | None = None) -> tuple[list[str], list[list]]:
    """Head and lines: setting, method, number of seeds, then (mean, spread) of every metric, and of the first one's difference
    to ``baseline``; None where there is none. Spreads are standard deviations, the difference's is its standard error."""
    made = rows(runs, metrics)
    for metric in metrics:
        if not any(metric in row.values for row in made):
            known = sorted(f"{a}/{k}" for a, v in runs[0][1].items() if isinstance(v, dict) for k in v)
            raise UserError(f"--metrics: no run has '{metric}'.{did_you_mean(metric, known)}")
    names = sorted({row.method for row in made})
    if baseline is not None:
        require(baseline in names, "--baseline", f"'{baseline}'", f"{', '.join(names)}.{did_you_mean(baseline, names)}")
    against = {row.setting: row for row in made if row.method == baseline}
    head = ["setting", "method", "seeds", *metrics] + [f"against {baseline}"] * bool(baseline)
    lines = []
    for row in made:
        cells = [spread(list(row.values[m].values())) if m in row.values else None for m in metrics]
        if baseline is not None:
            there = row.setting in against and row.method != baseline
            cells.append(paired(row, against[row.setting], metrics[0]) if there else None)
        lines.append([row.setting, row.method, max(map(len, row.values.values()), default=0), *cells])
    return head, lines


LEGEND = "accuracy in %; mean ± standard deviation over seeds; difference: mean ± standard error, paired by seed"


def text(head: list[str], lines: list[list], form: str) -> str:
    """The table as such, as Markdown, LaTeX, or CSV, which has all digits and spreads in columns of their own."""
    metrics = [name if not name.startswith("against ") else head[3] for name in head[3:]]
    if form == "csv":
        spreads = [f"{name} {'se' if name.startswith('against ') else 'sd'}" for name in head[3:]]
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow([*head[:3], *(name for pair in zip(head[3:], spreads, strict=True) for name in pair)])
        table.writerows([*line[:3], *(part for cell in line[3:] for part in cell or (None, None))] for line in lines)
        return out.getvalue()

    def shown(metric: str, name: str, cell: tuple[float, float | None] | None) -> str:
        return "-" if cell is None else number(metric, *cell, sign=name.startswith("against "))

    cells = [
        [*map(str, line[:3]), *(shown(m, name, c) for m, name, c in zip(metrics, head[3:], line[3:], strict=True))]
        for line in lines
    ]
    head = [name.removeprefix("accuracy/").replace("_", " ") for name in head]
    if form == "table":  # never cut: what sets two rows apart may be at their ends
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        padded = [[c.ljust(w) if j < 2 else c.rjust(w) for j, (c, w) in enumerate(zip(line, widths, strict=True))]
                  for line in (head, ["-" * w for w in widths], *cells)]  # fmt: skip
        return "".join(f"{'  '.join(row).rstrip()}\n" for row in padded) + f"{LEGEND}\n"
    if form == "latex":

        def escaped(cell: str) -> str:
            for a, b in (("\\", r"\textbackslash{}"), ("_", r"\_"), ("%", r"\%"), ("&", r"\&"), ("±", r"$\pm$"), ("#", r"\#")):
                cell = cell.replace(a, b)
            return cell

        body = "".join(" & ".join(map(escaped, line)) + r" \\" + "\n" for line in cells)
        columns = "ll" + "r" * (len(head) - 2)
        return (f"% {LEGEND}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n{' & '.join(map(escaped, head))} \\\\\n\\midrule\n"
                f"{body}\\bottomrule\n\\end{{tabular}}\n")  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *cells)) + f"\n*{LEGEND}*\n"


def show(paths: list[str], metrics: list[str], baseline: str | None, form: str, picture: str | None = None) -> None:
    """Print the table, and draw it into an image file."""
    head, lines = table(gather(paths), metrics, baseline)
    if picture is not None:
        from lightning_idkd import pictures

        names = [" ".join(filter(lambda part: part != "-", line[:2])) for line in lines]
        scaled = {m: [c and tuple(v and v * scale(m) for v in c) for c in (line[3 + j] for line in lines)]
                  for j, m in enumerate(metrics)}  # fmt: skip
        try:
            pictures.dots(names, scaled).savefig(picture, dpi=120)
        except (OSError, ValueError) as e:  # matplotlib refuses a format with a ValueError
            raise UserError(f"--plot: cannot draw into '{picture}' ({getattr(e, 'strerror', None) or e})") from e
    print(text(head, lines, form), end="")
