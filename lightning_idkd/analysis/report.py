"""Writes ``report.md`` and ``report.html`` of a run, or of all finished runs below a folder.

It lies here rather than in ``records``, because it compares runs and evaluates the consensus model.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_idkd.analysis import curves, table
from lightning_idkd.analysis.rows import Row, Run, build_rows, find_unfinished, gather, join_label
from lightning_idkd.config import yaml_file
from lightning_idkd.config.changes import Change, list_changes
from lightning_idkd.config.resolved import RESULT, difference
from lightning_idkd.errors import UserError
from lightning_idkd.files import write
from lightning_idkd.records import charts, report
from lightning_idkd.records.charts import Line
from lightning_idkd.records.markup import Html, element, escape_markdown, fence, join
from lightning_idkd.records.page import (
    Column,
    Section,
    Sorted,
    allow_breaks,
    build_facts,
    build_page,
    build_table,
    code,
    figure,
    fold,
    paragraph,
)
from lightning_idkd.records.run_figures import LARGEST_PICTURE
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.records.run_page import PAPER, build_run_page
from lightning_idkd.records.run_result import Confusion, Result, describe_run

MOST_RUNS = 200
"""Runs of a folder whose results the report opens on a click; further ones have their row in the table only."""
MOST_PICTURES = 6
"""Pictures in the folder that its report shows."""
UNFINISHED = 20
"""Unfinished runs that a report names."""


def write_report(path: str, quick: bool = False, trust: bool = False, baseline: str | None = None) -> list[Path]:
    """Write the reports of a run, or of the finished runs below a folder, into it; returns both files.

    Args:
        path: a run folder, or a folder with runs below it, such as that of a sweep.
        quick: leave out the confusion matrix, for which the consensus model is evaluated on the test set.
        trust: whether the run's config may name classes that are not part of this project.
        baseline: the method that the others are compared to, for a folder of runs; None: ``none`` if there is one.

    Raises:
        UserError: there is no finished run, its files are damaged, or the folder cannot be written.
    """
    folder = RunFolder(Path(path).resolve())
    if any(folder.file(name).exists() for name in ("config.yaml", "summary.json")):
        if baseline is not None:
            raise UserError(f"--baseline: {baseline} given for a single run; allowed for folders with several runs")
        texts = report_run(folder, path, quick, trust)
    else:
        texts = report_folder(folder.path, path, baseline)
    files = []
    for name, text in zip(("report.md", "report.html"), texts, strict=True):
        files.append(folder.file(name))
        write(files[-1], lambda part, text=text: part.write_text(text, encoding="utf-8"), "report")
    return files


# ------------------------------------------------------------------ a run


def report_run(folder: RunFolder, path: str, quick: bool, trust: bool) -> tuple[str, str]:
    """The Markdown and the HTML report of a run."""
    summary = folder.summary()
    if summary is None:
        raise UserError(f"'{path}' has not finished; continue it with --run.resume auto")
    try:
        report.format_title(summary), report.list_results(summary)
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise UserError(f"'{folder.file('summary.json')}' is damaged, or not the summary of a run") from e
    run = Result.read(folder, summary)
    confusion = None if quick else measure_confusion(folder, trust)
    page = build_run_page(run, find_control(run), confusion)
    return format_run(run), page


def format_run(run: Result) -> str:
    """The Markdown report of a run: its final table, pictures and config."""
    rows = report.list_results(run.summary)
    results = "".join(f"| {escape_markdown(key)} | {escape_markdown(value)} |\n" for key, value in rows)
    pictures = ""
    files = run.folder.file("plots").glob("*.png")
    for file in sorted(files, key=lambda p: (p.stem.split("_")[0], p.stat().st_mtime_ns)):
        name = escape_markdown(file.stem.replace("_", " "))
        pictures += f"![{name}](plots/{urllib.parse.quote(file.name)})\n\n"
    sentence = escape_markdown(describe_run(run.config, run.summary, run.partition))
    head = f"# {escape_markdown(report.format_title(run.summary))}\n\n{sentence}\n\n| | |\n| --- | --- |\n"
    return f"{head}{results}\n{pictures}## Config\n\n{fence(yaml_file.write(run.config), 'yaml')}"


def find_control(run: Result) -> Result | None:
    """The newest finished control of a run, which ``run.control`` has trained: the same without distillation.

    It begins at a checkpoint of this run, or where the run itself begins; folders may have moved together.
    """
    if run.config["distillation"] is None:
        return None
    alike = [key for key in RESULT if key != "distillation"]
    name = f"{run.folder.path.parent.name}_control"
    for file in sorted((run.folder.path.parent.parent / name).glob("*/summary.json"), reverse=True):
        try:
            folder = RunFolder(file.parent)
            summary, config = folder.summary(), folder.config()
            if summary is None or difference(config, run.config, tuple(alike)) is not None:
                continue
            start = config["run"]["from"]
            own = start and Path(start).parts[-4:-2] == run.folder.path.parts[-2:]
            if own or start == run.summary.get("from"):
                return Result.read(RunFolder(file.parent.resolve()), summary)
        except (UserError, KeyError, TypeError):
            continue
    return None


def measure_confusion(folder: RunFolder, trust: bool) -> Confusion | str:
    """The confusion matrix of a run's consensus model on the test set; the reason in a sentence if that is not
    possible, such as data that this machine lacks."""
    from lightning_idkd.analysis.evaluate import count_confusion
    from lightning_idkd.analysis.load import load

    try:
        run = load(folder.path, trust=trust)
        test, _ = run.test_images()
        counts = count_confusion(run.outputs(run.consensus(), test), test)
    except UserError as e:
        return str(e)
    return Confusion(counts.numpy(), list(run.describe()["classes"]))


# ------------------------------------------------------------------ a folder of runs


def report_folder(folder: Path, path: str, baseline: str | None) -> tuple[str, str]:
    """The Markdown and the HTML report of all finished runs below a folder."""
    if not folder.exists():
        raise UserError(
            f"'{path}' does not exist; give a run folder such as runs/NAME/latest, or one with runs below it"
        )
    if not any(folder.rglob("summary.json")):
        raise UserError(f"'{path}' is not a run folder, and there is no finished run below it")
    runs = gather([str(folder)])
    metrics = [metric for metric in table.METRICS if any(read_metric(run, metric) is not None for run in runs)]
    rows = build_rows(runs, metrics)
    if baseline is None and len(rows) > 1 and any(row.method == "none" for row in rows):
        baseline = "none"
    head, lines = table.build_table(runs, metrics, baseline)
    title, lead = folder.name, describe_runs(runs, rows)
    unfinished = list_unfinished(folder)
    sections = [
        Section("comparison", "Comparison", show_comparison(head, lines)),
        Section("curves", "Learning curves", show_curves(rows)),
    ]
    if images := embed_pictures(folder):
        sections.append(Section("pictures", "Pictures", join(images)))
    sections.append(Section("runs", "Runs", show_runs(rows, folder, unfinished)))
    sections.append(Section("config", "Configuration", show_shared(runs)))
    sections.append(Section("cite", "Cite", code(PAPER, "BibTeX")))
    left = f"Not finished: {len(unfinished)}." if unfinished else "All runs of this folder are finished."
    footer = f"Written by idkd report from the runs below {folder.name}."
    page = build_page(title, left, lead, sections, footer)
    return format_folder(title, lead, head, lines, rows, folder, unfinished), page


def read_metric(run: Run, metric: str) -> float | None:
    """A metric of a run's summary; None where it has none."""
    value: object = run.summary
    for part in metric.split("/"):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, (int, float)) else None


def describe_runs(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """Say in a sentence how many methods, settings and seeds were run."""
    methods, settings = {row.method for row in rows}, {row.setting for row in rows}
    seeds = sorted({run.summary["seed"] for run in runs})
    names = ", ".join(map(str, seeds[:8])) + (" and more" if len(seeds) > 8 else "")

    def count(number: int, word: str) -> str:
        return f"{number} {word}{'s' * (number != 1)}"

    what = f"{count(len(runs), 'run')} of {count(len(methods), 'method')} in {count(len(settings), 'setting')}"
    return f"{what}, {'seed' if len(seeds) == 1 else 'seeds'} {names}."


def list_unfinished(folder: Path) -> list[Path]:
    """The run folders below ``folder`` that have no summary, relative to it."""
    return sorted(path.relative_to(folder) for path in find_unfinished(folder) if path.is_relative_to(folder))


def show_comparison(head: Sequence[str], lines: Sequence[Sequence]) -> Html:
    """The table of methods."""
    columns = [Column("setting"), Column("method"), Column("seeds", "d")]
    for name in head[3:]:
        is_difference = name.startswith(table.AGAINST)
        title = table.format_heading(head[3] if is_difference else name)
        against = name.removeprefix(table.AGAINST)
        columns.append(Column(f"{title}, difference to {against}" if is_difference else title, style="short"))
    rows = []
    for line in lines:
        cells: list[Any] = list(line[:3])
        for name, cell in zip(head[3:], line[3:], strict=True):
            is_difference = name.startswith(table.AGAINST)
            metric = head[3] if is_difference else name
            text = "" if cell is None else table.format_number(metric, *cell, sign=is_difference)
            cells.append(None if cell is None else Sorted(text, cell[0]))
        rows.append(cells)
    if all(row[0] == "-" for row in rows):
        columns, rows = columns[1:], [row[1:] for row in rows]
    legend = f"{table.LEGEND[0].upper()}{table.LEGEND[1:]}."
    return join(build_table(columns, rows, "Comparison of methods", sortable=True), paragraph(legend, muted=True))


def show_curves(rows: Sequence[Row]) -> Html:
    """Test accuracy over epochs: a chart of the node mean for every setting, of a single setting one of the worst node
    too; a line for every method. What several methods share, an initial training, is drawn once."""
    usable = [row for row in rows if all(run.evaluations("accuracy/node_mean") for run in row.runs)]
    if not usable:
        return paragraph("The runs have no evaluations in metrics.jsonl, so there are no curves.")
    found = curves.collect_curves(usable, "epoch", "node_mean", "minmax")
    figures = draw_settings(found, "node mean")
    if len(figures) == 1 and all(run.evaluations("accuracy/node_min") for row in usable for run in row.runs):
        figures += draw_settings(curves.collect_curves(usable, "epoch", "worst", "minmax"), "worst node")
    band = "Lines are means over seeds, bands reach from the smallest to the largest seed. "
    text = f"{band if any(len(curve.seeds) > 1 for curve in found) else ''}Evaluations before the last use a part of "
    text += "the test samples (train.evaluate_samples)."
    return join(element("div", figures, class_="pair"), paragraph(text, muted=True))


def draw_settings(found: Sequence[curves.Curve], name: str) -> list[Html]:
    """A chart over epochs for every setting; ``name`` is the accuracy that it shows."""
    methods = list(dict.fromkeys(curve.method for curve in found))
    figures = []
    for setting, of_setting in curves.group_curves(found).items():
        stems = curves.find_stems(of_setting)
        lines = [build_line(stem, f"initial training of {stem.method}", "base", "") for stem in stems]
        shown = []
        for curve in of_setting:
            label = curve.method if setting == curve.setting or setting == "-" else curve.setting
            shown.append(build_line(curve, label, *charts.choose_style(methods.index(curve.method))))
        ends = ", ".join(f"{line.name} {line.points[-1][1]:.1f} %" for line in shown[:8])
        alt = f"Test accuracy, {name}, over epochs; at the end: {ends}"
        picture = charts.draw_lines([*lines, *shown], "epoch", f"{name} (%)", alt)
        entries = [(line.name, line.style, line.dash) for line in shown]
        if stems:
            entries.append(("initial training that they share", "base", ""))
        figures.append(figure(None if setting == "-" else setting, picture, charts.legend(entries)))
    return figures


def build_line(curve: curves.Curve, name: str, style: str, dash: str) -> Line:
    """The line of a curve, from its fork on."""
    x, mean, low, high = (values[curve.fork :].tolist() for values in (curve.x, *(
        100 * part for part in (curve.mean, curve.low, curve.high))))  # fmt: skip
    points = list(zip(x, mean, strict=True))
    return Line(name, points, style, *((low, high) if len(curve.seeds) > 1 else (None, None)), dash=dash, unit=" %")


def show_runs(rows: Sequence[Row], folder: Path, unfinished: Sequence[Path]) -> Html:
    """A row for every run with a link to its own report if there is one, then each run's results, folded."""
    lines, folded = [], []
    for row in rows:
        for run in sorted(row.runs, key=lambda run: run.summary["seed"]):
            place, label = locate(run, folder), join_label(row.setting, row.method)
            name: object = Sorted(allow_breaks(place), place)
            if run.folder.file("report.html").exists() and not place.is_absolute():
                name = Sorted(element("a", allow_breaks(place), href=urllib.parse.quote(f"{place}/report.html")), place)
            accuracy, seconds = run.summary.get("accuracy", {}), run.summary.get("throughput", {}).get("seconds")
            sent = report.sum_bytes(run.summary.get("communication", {}))
            values = [accuracy.get(key) for key in ("node_mean", "node_min", "consensus")]
            lines.append([label, run.summary["seed"], *values, sent / 1e6, seconds, name])
            if len(folded) < MOST_RUNS:
                folded.append(fold(f"{label}, seed {run.summary['seed']}", *describe_one(run, place)))
    columns = [Column("method"), Column("seed", "d"), Column("node mean", ".2%"), Column("worst node", ".2%"),
               Column("consensus", ".2%"), Column("sent (MB)", ",.1f"), Column("seconds", ",.0f"),
               Column("folder", style="path")]  # fmt: skip
    parts = [build_table(columns, lines, "Runs", sortable=True)]
    if unfinished:
        names = ", ".join(map(str, unfinished[:UNFINISHED])) + (" and more" if len(unfinished) > UNFINISHED else "")
        parts.append(paragraph(f"Not finished, and left out: {names}."))
    more = f" of the first {MOST_RUNS} runs" if len(lines) > MOST_RUNS else ""
    links = "A folder is a link where idkd report has written that run's own page."
    parts.append(paragraph(f"{links} Below are the results{more}, one to open each.", muted=True))
    return join(parts, folded)


def locate(run: Run, folder: Path) -> Path:
    """The path of a run from a folder; its whole path if it lies elsewhere, behind a link."""
    path = run.folder.path
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def describe_one(run: Run, place: Path) -> list[Html]:
    """What was run and its results, for a folded part of the page."""
    try:
        result = Result.read(run.folder, run.summary)
        lead = describe_run(run.config, run.summary, result.partition)
        facts = build_facts([("folder", str(place)), *report.list_results(run.summary)], f"Results of {place}")
        return [paragraph(lead), facts]
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        return [paragraph(f"'{place}' is not a run of this version, so only its row above is known.")]


def show_shared(runs: Sequence[Run]) -> Html:
    """Values that differ from the defaults in every run alike, and those that differ between runs."""
    changes: list[list[Change]] = []
    for run in runs:
        try:
            changes.append(list_changes(run.config))
        except (LookupError, TypeError, AttributeError):
            continue
    if not changes:
        return paragraph("The configs are of another version.")
    shared = [list(change) for change in changes[0] if all(change in others for others in changes)]
    columns = [Column("key"), Column("value"), Column("default")]
    text = "Values that all runs share and that differ from the defaults of idkd fit."
    return join(paragraph(text, muted=True), build_table(columns, shared, "Shared values"))


def embed_pictures(folder: Path) -> list[Html]:
    """The pictures that lie directly in a folder, such as those of a search; of many, the first six. Of two files of
    one name, the SVG is shown."""
    files: dict[str, Path] = {}
    for kind in (".png", ".svg"):
        found = [path for path in sorted(folder.glob(f"*{kind}")) if path.is_file() and not path.is_symlink()]
        files |= {path.stem: path for path in found if path.stat().st_size <= LARGEST_PICTURE}
    images = []
    for stem, file in sorted(files.items())[:MOST_PICTURES]:
        encode = charts.encode_svg if file.suffix == ".svg" else charts.encode_png
        name = stem.replace("_", " ")
        images.append(
            figure(name.capitalize(), element("img", src=encode(file.read_bytes()), alt=name, class_="picture"))
        )
    return images


def format_folder(title: str, lead: str, head: list[str], lines: list[list], rows: Sequence[Row], folder: Path,
                  unfinished: Sequence[Path]) -> str:  # fmt: skip
    """The Markdown report of a folder: the table of methods, and a line for every run."""
    escaped = [[escape_markdown(line[0]), escape_markdown(line[1]), *line[2:]] for line in lines]
    comparison = table.format_table([*head[:3], *map(escape_markdown, head[3:])], escaped, "markdown")
    text = f"# {escape_markdown(title)}\n\n{escape_markdown(lead)}\n\n{comparison}\n## Runs\n\n"
    for row in rows:
        for run in sorted(row.runs, key=lambda run: run.summary["seed"]):
            label = f"{join_label(row.setting, row.method)}, seed {run.summary['seed']}"
            text += f"- [{escape_markdown(label)}]({urllib.parse.quote(str(locate(run, folder)))})\n"
    if unfinished:
        text += f"\nNot finished: {', '.join(escape_markdown(path) for path in unfinished[:UNFINISHED])}\n"
    return text
