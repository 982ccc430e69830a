"""The HTML report of a run: its result, figures, nodes, messages and config."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_idkd.config import yaml_file
from lightning_idkd.config.changes import list_changes
from lightning_idkd.config.kinds import summarise
from lightning_idkd.config.resolved import look_up
from lightning_idkd.config.trust import find_object, is_own_class
from lightning_idkd.errors import UserError
from lightning_idkd.records import report
from lightning_idkd.records.markup import Html, element, join
from lightning_idkd.records.page import (
    Column,
    Section,
    build_facts,
    build_page,
    build_table,
    build_tiles,
    code,
    drop_empty,
    fold,
    paragraph,
)
from lightning_idkd.records.run_figures import (
    draw_accuracy,
    show_confusion,
    show_curves,
    show_detector,
    show_graph_and_labels,
)
from lightning_idkd.records.run_result import Confusion, Result, describe_origin, describe_run, name_class, name_nodes

MOST_ROWS = 1024
"""Rows of the table of nodes; of more nodes, those with the lowest accuracy are shown."""
MEASURES = (
    ("auroc", "AUROC", ".3f"),
    ("threshold", "threshold", ".3f"),
    ("kept_fraction", "public kept", ".1%"),
    ("own_kept", "own kept", ".1%"),
    ("noise_kept", "noise kept", ".1%"),
    ("label_accuracy", "labels right", ".1%"),
)
"""Columns of the table of nodes: key, heading and format."""
PAPER = """@article{ravikumar2024idkd,
  title   = {Homogenizing Non-{IID} Datasets via In-Distribution Knowledge Distillation for Decentralized Learning},
  author  = {Ravikumar, Deepak and Saha, Gobinda and Aketi, Sai Aparna and Roy, Kaushik},
  journal = {Transactions on Machine Learning Research},
  year    = {2024},
  note    = {arXiv:2304.04326}
}"""


def build_run_page(
    run: Result,
    control: Result | None = None,
    confusion: Confusion | str | None = None,
) -> str:
    """Build the page of a run.

    Args:
        control: the run without distillation that it is compared to.
        confusion: the confusion matrix, or the sentence why there is none; None leaves the section out.

    Raises:
        UserError: the summary is not that of a run of this version.
    """
    try:
        sections = [
            Section("result", "Result", show_result(run, control)),
            Section("curves", "Learning curves", show_curves(run, control)),
            Section("labels", "Graph and labels", show_graph_and_labels(run)),
        ]
        if run.summary["ood"].get("threshold") is not None:
            sections.append(Section("detector", "Detector", show_detector(run)))
        sections.append(Section("nodes", "Nodes", show_nodes(run)))
        if confusion is not None:
            sections.append(Section("confusion", "Confusion matrix", show_confusion(confusion)))
        sections += [
            Section("communication", "Communication", show_communication(run, control)),
            Section("config", "Configuration", show_config(run)),
            Section("repeat", "Repeat this run", show_environment(run)),
            Section("cite", "Cite", show_citation(run.config)),
        ]
        subtitle = f"{run.folder.path.name}, seed {run.summary['seed']}{describe_origin(run.summary)}"
        footer = f"Written by idkd report from the files of {run.folder.path.parent.name}/{run.folder.path.name}."
        return build_page(run.name, subtitle, describe_run(run.config, run.summary, run.partition), sections, footer)
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as e:  # not what a run writes
        raise UserError(f"'{run.folder.path}' is damaged, or of another version ({type(e).__name__}: {e})") from e


def format_date(folder: str) -> str:
    """The time in the name of a run folder, in words; empty if it has none."""
    match = re.match(r"(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)", folder)
    return "{}-{}-{} {}:{}".format(*match.groups()) if match else ""


def show_result(run: Result, control: Result | None) -> Html:
    """The most important numbers, the control beside them, points to note, and the final table."""
    summary, accuracy = run.summary, run.summary["accuracy"]
    base = control and control.summary["accuracy"]

    def against(key: str) -> object:
        if not base:
            return ""
        gain = 100 * (accuracy[key] - base[key])
        side, style = ("above", "gain") if gain >= 0 else ("below", "loss")
        return element("span", f"{abs(gain):.1f} points {side} the control", class_=style)

    before, after = (summary["homogeneity"][when] for when in ("before", "after"))
    sent = report.sum_bytes(summary["communication"])
    share = summary["communication"].get("overhead_at_equal_steps")
    tiles = [
        ("node mean", f"{accuracy['node_mean']:.1%}", against("node_mean") or f"sd {accuracy['node_std']:.1%}"),
        ("worst node", f"{accuracy['node_min']:.1%}", against("node_min") or f"best {accuracy['node_max']:.1%}"),
        ("consensus model", f"{accuracy['consensus']:.1%}", against("consensus") or "mean of the parameters"),
        (
            "heterogeneity",
            f"{after:.2f}",
            f"{before:.2f} before exchanges" if summary.get("exchanges") else "0 is alike",
        ),
        ("sent", report.format_bytes(sent), "" if not share else f"{share:+.2%} by exchanges"),
    ]
    parts = [build_tiles(tiles)]
    if control is not None:
        parts += [element("h3", "Beside its control"), compare_to_control(run, control)]
        note = "One seed. Seeds differ by more than methods often do, so repeat the run with --seed 1, 2 and so on."
        parts.append(paragraph(note, muted=True))
    if points := list_points(run, control):
        parts += [element("h3", "Points to note"), element("ul", [element("li", p) for p in points], class_="points")]
    return join(parts, fold("All results", build_facts(report.list_results(summary), "All results")))


def compare_to_control(run: Result, control: Result) -> Html:
    """A table of the accuracies of a run and its control, and what they sent."""
    rows: list[list[Any]] = []
    keys = ("node_mean", "node_min", "consensus")
    for name, result in ((name_class(run.config["distillation"]), run), ("control, no distillation", control)):
        accuracy = [100 * result.summary["accuracy"][key] for key in keys]
        rows.append([name, *accuracy, report.format_bytes(report.sum_bytes(result.summary["communication"]))])
    gains = [rows[0][i] - rows[1][i] for i in (1, 2, 3)]
    rows.append(["difference", *(f"{gain:+.1f}" for gain in gains), ""])
    columns = [Column(""), *(Column(f"{name} (%)", ".1f") for name in ("node mean", "worst node", "consensus"))]
    return build_table([*columns, Column("sent", style="short")], rows, "The run and its control")


def list_points(run: Result, control: Result | None) -> list[str]:
    """What a reader of the numbers should know, a sentence each.

    The warnings and notes that the run printed at its start, and what follows from its summary and metrics.
    """
    summary, accuracy, per_node = run.summary, run.summary["accuracy"], run.summary["per_node"]
    points = [f"{note[0].upper()}{note[1:]}." for note in summary.get("notes", [])]
    if str(summary.get("git_commit", "")).endswith("-dirty"):
        points.append("The code differed from its commit (-dirty), so the commit does not identify what was run.")
    if control is None and run.config["run"].get("control") and run.config["distillation"] is not None:
        points.append("The run asks for a control (run.control), but there is no finished one.")
    if control is not None and control.summary["steps"] != summary["steps"]:
        points.append(f"The control has {control.summary['steps']:,} steps, the run {summary['steps']:,}.")
    faults = summary.get("faults", {})
    if "liars" in faults:
        mean = faults["liars_mean"]
        points.append(f"Lying nodes: {faults['liars']}. They count in no mean; their own mean accuracy is {mean:.1%}.")
    if "lost" in faults:
        lost, absent = faults["lost"], faults["absent"]
        points.append(f"Faults took {lost:.1%} of the messages, and nodes were absent in {absent:.1%} of their steps.")
    for exchange in summary.get("exchanges") or []:
        if empty := [i for i, size in enumerate(exchange["distilled"]) if not size]:
            points.append(f"Before epoch {exchange['epoch'] + 1}, {name_nodes(empty)} got no distilled samples.")

    def where(key: str, condition: Any) -> list[int]:
        values = per_node.get(key) or []
        return [i for i, value in enumerate(values) if value is not None and condition(value)]

    if nodes := where("auroc", lambda value: value < 0.5):
        sentence = "the score ranks public samples above the node's own held-out ones (AUROC below 0.5)"
        points.append(f"At {name_nodes(nodes)}, {sentence}.")
    if nodes := where("keeps_none", lambda value: value == 1):
        points.append(f"The threshold of {name_nodes(nodes)} keeps no public sample.")
    if summary["ood"].get("threshold") is not None and None in (per_node.get("auroc") or []):
        nodes = [i for i, value in enumerate(per_node["auroc"]) if value is None]
        points.append(f"No AUROC is known at {name_nodes(nodes)}: no samples are held out there.")
    if (gap := accuracy["node_mean"] - accuracy["node_min"]) > 0.1:
        points.append(f"The worst node is {100 * gap:.1f} points below the mean.")
    if (lag := accuracy["consensus"] - accuracy["node_mean"]) > 0.03:
        gossip = "more train.final_gossip brings nodes closer to it"
        points.append(f"Nodes are {100 * lag:.1f} points below their consensus model; {gossip}.")
    earlier = max((line["accuracy/node_mean"], line["epoch"]) for line in run.lines) if run.lines else (0, 0)
    if earlier[0] - accuracy["node_mean"] > 0.02:
        points.append(
            f"At epoch {earlier[1]} the node mean was higher, {earlier[0]:.1%} (on "
            f"{run.config['train']['evaluate_samples']} test samples)."
        )
    return points


def show_nodes(run: Result) -> Html:
    """A table with a row for every node, which sorts."""
    per_node, sizes = run.summary["per_node"], run.partition.get("sizes") or {}
    exchanges = run.summary.get("exchanges") or []
    distilled = exchanges[-1]["distilled"] if exchanges else []
    histogram = run.partition.get("histogram") or []
    columns = [Column("node", "d"), Column("accuracy", ".2%"), Column("training samples", ",d"),
               Column("classes", "d"), Column("held out", ",d"), Column("distilled", ",d"),
               *(Column(title, form) for _, title, form in MEASURES)]  # fmt: skip

    def pick(values: Sequence | None, node: int) -> Any:
        return values[node] if values and node < len(values) else None

    rows = []
    for node, accuracy in enumerate(per_node["accuracy"]):
        own = pick(histogram, node)
        held = [None if own is None else sum(count > 0 for count in own), pick(sizes.get("validation"), node)]
        measures = [pick(per_node.get(key), node) for key, _, _ in MEASURES]
        rows.append([node, accuracy, pick(sizes.get("train"), node), *held, pick(distilled, node), *measures])
    text = "Click a heading to sort."
    if len(rows) > MOST_ROWS:
        rows = sorted(rows, key=lambda row: row[1] if row[1] is not None else -1)[:MOST_ROWS]
        text += f" Shown are the {MOST_ROWS:,} nodes of the lowest accuracy, of {len(per_node['accuracy']):,}."
    if run.liars:
        text += f" Lying: {name_nodes(run.liars)}."
    return join(build_table(*drop_empty(columns, rows), "Nodes", sortable=True), paragraph(text, muted=True))


def show_communication(run: Result, control: Result | None) -> Html:
    """Bytes by kind, and accuracy over bytes sent."""
    sent, nodes = run.summary["communication"], run.summary["nodes"]
    total = report.sum_bytes(sent)
    rows: list[list[Any]] = []
    for kind, name in (("parameter", "parameters"), ("label", "labels"), ("other", "other")):
        count = sent[f"{kind}_bytes"]
        per_node = report.format_bytes(count / nodes)
        rows.append([name, report.format_bytes(count), count / total if total else None, per_node])
    rows.append(["in all", report.format_bytes(total), 1.0 if total else None, report.format_bytes(total / nodes)])
    columns = [Column("kind"), Column("sent", style="short"), Column("share", ".2%"), Column("a node", style="short")]
    text = f"{sent['messages']:,} messages, counted over directed edges; a message of a node to itself does not count."
    for unit in ("steps", "epochs"):
        if (share := sent.get(f"overhead_at_equal_{unit}")) is not None:
            text += f" Beyond training alone at equal {unit}: {share:+.2%}."
    parts = [element("div", [build_table(columns, rows, "Bytes sent"), paragraph(text, muted=True)])]
    if run.lines:
        parts.append(draw_accuracy(run, control, "bytes", []))
    return element("div", parts, class_="pair")


def show_config(run: Result) -> Html:
    """Values that differ from the defaults, and the whole config folded."""
    changes = [[change.key, change.value, change.default] for change in list_changes(run.config)]
    columns = [Column("key"), Column("value"), Column("default")]
    text = "Values that differ from the defaults of idkd fit; a class is compared to its own defaults."
    whole = code(yaml_file.write(run.config), "The whole config")
    return join(
        paragraph(text, muted=True), build_table(columns, changes, "Changed values"), fold("The whole config", whole)
    )


def show_environment(run: Result) -> Html:
    """The command that repeats the run, and the versions and machine it ran on."""
    summary, config = run.summary, run.config
    commit = str(summary.get("git_commit") or "")
    place = Path(config["run"]["dir"]) / run.folder.path.parent.name / run.folder.path.name / "config.yaml"
    command = f"idkd fit --config {shlex.quote(str(place))}"
    if config["run"].get("resume"):
        command += " --run.resume null"
    if re.fullmatch(r"[0-9a-f]{7,40}", commit):
        command = f"git checkout {commit}\n{command}"
    rows: list[tuple[str, object]] = list((run.data.get("environment") or {}).items())
    cast = ", bfloat16" if summary.get("autocast") else ""
    engine = f"{summary['engine']}, {config['run']['threads']} threads{cast}"
    rows += [("code", commit or "not known"), ("engine", engine)]
    rows += [("partition", summary.get("partition_hash") or "not known")]
    if started := format_date(run.folder.path.name):
        rows.append(("started", started))
    rows.append(("duration", report.format_duration(summary["throughput"]["seconds"])))
    text = "Without the folder, save the whole config above as config.yaml and name that file."
    if start := config["run"].get("from"):
        text += (
            f" The run begins at the checkpoint {start} of another run, which must exist too; otherwise, repeat that "
            "run first."
        )
    text += " On the same machine with the same versions the result is the same bit by bit."
    parts = [code(command, "Command"), paragraph(text, muted=True), build_facts(rows, "Environment")]
    if not run.data.get("environment"):
        parts.append(paragraph("The run has not stored the versions of its packages.", muted=True))
    return join(parts)


def show_citation(config: dict) -> Html:
    """The paper, and what the docstrings of the run's classes say about their sources."""
    rows = []
    keys = ("graph.topology", "data.partition", "node.loss", "gossip", "calibration", "distillation")
    score = ((config["calibration"] or {}).get("init_args") or {}).get("score")
    for spec in [*(look_up(config, key) for key in keys), score]:
        if isinstance(spec, dict) and is_own_class(spec["class_path"]):
            text = summarise(find_object(spec["class_path"]))
            rows.append((name_class(spec), text.replace("``", "")))
    return join(code(PAPER, "BibTeX"), fold("What the classes of this run are", build_facts(rows, "Classes")))
