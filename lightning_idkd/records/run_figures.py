"""The figures of a run's HTML report: curves, graph, label mass, detector and confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_idkd.records import charts, report
from lightning_idkd.records.charts import Line
from lightning_idkd.records.markup import Html, element, join
from lightning_idkd.records.page import Column, build_facts, build_table, drop_empty, figure, fold, paragraph, scroll
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.records.run_result import Confusion, Result, drop_shared, name_class, read_points

MOST_BARS = 64
"""Nodes whose label mass is drawn as bars; of more nodes, or more than ten classes, it is a heat map."""
OWN_SCALES = 8
"""How many times more label mass than before makes the pictures of before and after have a scale each."""
MOST_CELLS = 20
"""Classes of a confusion matrix with numbers; one of more classes is a heat map."""
LARGEST_PICTURE = 400_000
"""Bytes of a picture of ``plots/`` that a page takes up."""


def show_curves(run: Result, control: Result | None) -> Html:
    """Accuracy over epochs, and over simulated time if there is a clock; training loss; consensus distance."""
    if not run.lines:
        return paragraph("The run has no metrics.jsonl, so there are no curves.")
    exchanges = [
        (e["epoch"], f"exchange of labels after epoch {e['epoch']}") for e in run.summary.get("exchanges") or []
    ]
    figures = [draw_accuracy(run, control, "epoch", exchanges)]
    if "simulated" in run.summary.get("time", {}):
        figures.append(draw_accuracy(run, control, "time", []))
    for key, title in (("train/loss", "training loss"), ("consensus_distance", "consensus distance")):
        lines = [Line(title, read_points(run.lines, "epoch", key), "s0")]
        if control is not None:
            rest = drop_shared(control.lines, run.lines)
            lines.append(Line("control", read_points(rest, "epoch", key), "base", dash="6 3"))
        if not lines[0].points:
            continue
        first, last = lines[0].points[0], lines[0].points[-1]
        alt = f"{title} over epochs: {first[1]:.3g} at epoch {first[0]}, {last[1]:.3g} at epoch {last[0]}"
        picture = charts.draw_lines(lines, "epoch", title, alt, marks=exchanges, y_range=(0, above(lines)))
        figures.append(figure(title.capitalize(), picture, legend_of(lines)))
    notes = "Evaluations before the last use a part of the test samples (train.evaluate_samples)."
    if exchanges:
        notes += " Dotted vertical lines are exchanges of labels."
    return join(element("div", figures, class_="pair"), paragraph(notes, muted=True))


def above(lines: Sequence[Line]) -> float:
    """The end of an axis that begins at 0."""
    values = [p[1] for line in lines for p in line.points if math.isfinite(p[1])]
    return 1.06 * max([*values, 1e-9])


def draw_accuracy(
    run: Result, control: Result | None, axis: str, marks: Sequence[tuple[float, str]], title: str | None = None
) -> Html:
    """Accuracy of the nodes, with a band from the worst to the best, and of the consensus model."""
    usable = [line for line in run.lines if report.read_axis(line, axis) is not None]
    low, high = ([100 * line[f"accuracy/node_{end}"] for line in usable] for end in ("min", "max"))
    lines = [
        Line("node mean", read_points(usable, axis, "accuracy/node_mean", 100), "s0", low, high, unit=" %"),
        Line("consensus model", read_points(usable, axis, "accuracy/consensus", 100), "s1", unit=" %"),
    ]
    if control is not None:
        rest = drop_shared(control.lines, run.lines)
        lines.append(
            Line(
                "control, node mean", read_points(rest, axis, "accuracy/node_mean", 100), "base", dash="6 3", unit=" %"
            )
        )
    words = report.AXES[axis]
    name = "epoch" if axis == "epoch" else words
    final = run.summary["accuracy"]
    alt = (
        f"Test accuracy over {words}. At the end: node mean {final['node_mean']:.1%}, from {final['node_min']:.1%} to "
        f"{final['node_max']:.1%}; consensus model {final['consensus']:.1%}"
    )
    picture = charts.draw_lines(lines, name, "test accuracy (%)", alt, marks=marks, in_bytes=axis == "bytes")
    entries = [*((line.name, line.style, line.dash) for line in lines), ("worst to best node", "s0 band", "area")]
    return figure(title or f"Accuracy over {words}", picture, charts.legend(entries))


def legend_of(lines: Sequence[Line]) -> Html | None:
    """A legend, if there is more than one line."""
    return charts.legend([(line.name, line.style, line.dash) for line in lines]) if len(lines) > 1 else None


def show_graph_and_labels(run: Result) -> Html:
    """The graph with the nodes' accuracies, and the label mass before and after the exchanges."""
    return join(show_graph(run), show_label_mass(run))


def show_graph(run: Result) -> Html:
    """The graph; nodes are coloured by their accuracy."""
    graph = run.data.get("graph")
    name = name_class(run.config["graph"]["topology"])
    if not graph:
        return embed(run.folder, "graph", "Graph", f"The graph, {name}, of {run.summary['nodes']} nodes")
    accuracies = [value or 0.0 for value in run.summary["per_node"]["accuracy"]]
    low, high = charts.find_range(accuracies, run.liars)
    edges = graph.get("edge_count", len(graph["edges"]))
    worst = accuracies.index(min(accuracies))
    alt = (
        f"Graph {name} with {len(accuracies)} nodes and {edges:,} edges; accuracies run from {min(accuracies):.1%} "
        f"at node {worst} to {max(accuracies):.1%}"
    )
    caption = (
        f"{name}, {len(accuracies)} nodes, {edges:,} edges, spectral gap {graph['spectral_gap']:.4f}. A node's shade "
        f"is its test accuracy, from {low:.1%} (palest) to {high:.1%}; the worst is node {worst} with "
        f"{min(accuracies):.1%}."
    )
    if graph.get("steps"):
        caption += f" Drawn: {graph['steps']}."
    if not graph["edges"] and edges:
        caption += " The edges are too many to be drawn."
    if run.liars:
        caption += " A thick outline marks nodes that lie."
    picture = charts.draw_graph(graph, accuracies, run.liars, alt)
    return figure("Graph", picture, caption=caption)


def show_label_mass(run: Result) -> Html:
    """The labels that every node trains on, before and after the exchanges."""
    mass = run.data.get("label_mass")
    before, after = run.summary["homogeneity"]["before"], run.summary["homogeneity"]["after"]
    if mass:
        classes = run.data["classes"]
        panels = [("private", np.array(mass["before"], float), before)]
        if mass.get("after") is not None:
            panels.append(("private and distilled", np.array(mass["after"], float), after))
    elif run.partition.get("histogram"):
        classes = (run.partition.get("data") or {}).get("classes") or list(
            map(str, range(len(run.partition["histogram"][0])))
        )
        panels = [("private (with held-out)", np.array(run.partition["histogram"], float), before)]
    else:
        return embed(run.folder, "labels", "Labels", "Label mass of every node")
    bars = len(classes) <= len(charts.colours.CLASSES) and len(panels[0][1]) <= MOST_BARS
    longest = [float(values.sum(1).max() if bars else values.max()) for _, values, _ in panels]
    own_scales = max(longest) > OWN_SCALES * min(longest)
    pictures = []
    for (title, values, heterogeneity), most in zip(
        panels, longest if own_scales else [max(longest)] * 2, strict=False
    ):
        alt = (
            f"Label mass of {len(values)} nodes over {len(classes)} classes, {title}: heterogeneity {heterogeneity:.2f}"
        )
        if bars:
            picture = charts.draw_bars(values, classes, most, "training samples (mass) by class", alt)
        else:
            picture = charts.draw_heat(values, "class", "node", alt, most)
        pictures.append(figure(f"{title.capitalize()} labels, heterogeneity {heterogeneity:.2f}", picture))
    text = (
        "Heterogeneity is the mean total variation between a node's label distribution and the global one: 0 if all "
        "nodes are alike, 1 at most."
    )
    names = charts.legend([(name, f"c{c}", "area") for c, name in enumerate(classes)]) if bars else None
    if not bars:
        text += " The darker a cell, the more samples; shades follow the square root."
    if own_scales:
        text += " The two pictures have different scales."
    if len(panels) == 1 and run.summary.get("exchanges"):
        text += " The labels after the exchanges are not stored with this run."
    return join(element("div", pictures, class_="pair"), names, paragraph(text, muted=True))


def embed(folder: RunFolder, name: str, title: str, alt: str) -> Html:
    """A picture of ``plots/``, for runs that do not store the numbers behind it."""
    path = folder.file(f"plots/{name}.png")
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    if not content or len(content) > LARGEST_PICTURE:
        why = "is too large for this page" if content else "was not drawn (run.pictures)"
        return paragraph(f"{title}: plots/{name}.png {why}.", muted=True)
    return figure(title, element("img", src=charts.encode_png(content), alt=alt, class_="picture"))


def show_detector(run: Result) -> Html:
    """ROC and histograms of the detectors, and what every exchange kept."""
    ood, detector = run.summary["ood"], run.data.get("detector")
    rows = [(name, value) for name, value in report.list_results(run.summary)
            if name.startswith(("public set", "AUROC", "threshold"))]  # fmt: skip
    facts = build_facts(rows, "Detector")
    exchanges = run.summary.get("exchanges") or []
    table = [element("h3", "Exchanges"), tabulate_exchanges(exchanges)] if exchanges else []
    if not detector:
        pictures = [embed(run.folder, name, title, f"{title} of the nodes' detectors")
                    for name, title in (("roc", "ROC"), ("scores", "Scores"))]  # fmt: skip
        return join(facts, table, element("div", pictures, class_="pair"))
    roc, auroc = detector["roc"], ood.get("auroc")
    parts = [element("div", facts, draw_roc(roc, auroc), class_="pair") if roc["mean"] else facts, table]
    panels = []
    aurocs = run.summary["per_node"].get("auroc") or []
    for histogram in detector["histograms"]:
        node = histogram["node"]
        value = aurocs[node] if node < len(aurocs) else None
        quality = "none held out" if value is None else f"AUROC {value:.2f}"
        alt = f"Scores of node {node}: {quality}, threshold {histogram['threshold']:.3g}"
        panels.append(charts.draw_histogram(histogram, f"node {node}, {quality}", alt))
    nodes = run.summary["nodes"]
    which = f" Shown are the nodes with the lowest and the highest AUROC of {nodes}." if len(panels) < nodes else ""
    caption = (
        f"Share of samples over the score ({detector['score']}). A node keeps the public samples to the right of its "
        f"threshold, the dashed line; without one, it lies outside.{which} Own samples of a node that holds none out "
        "are those it trains on."
    )
    names = charts.legend([("public", "s0", "hist"), ("own held-out", "s1", "hist"), ("noise", "outline", "hist")])
    return join(parts, figure("Scores", element("div", panels, class_="grid"), names, caption=caption))


def draw_roc(roc: dict, auroc: float | None) -> Html:
    """The ROC of single nodes in grey with their thresholds as dots, and the mean."""
    grid = np.linspace(0, 1, len(roc["mean"])).tolist()
    lines = [Line(f"node {c['node']}", [(0, 0), *zip(grid, c["kept"], strict=True)], "faint") for c in roc["nodes"]]
    lines.append(Line("mean of the nodes", [(0, 0), *zip(grid, roc["mean"], strict=True)], "s0"))
    dots = []
    for curve in roc["nodes"]:
        public, own = curve["at"]
        dots.append((public, own, f"threshold of node {curve['node']}: keeps {own:.0%} of own, {public:.0%} of public"))
    quality = "" if auroc is None else f", AUROC {auroc:.3f} on average"
    alt = f"ROC of held-out own against public samples{quality}"
    picture = charts.draw_lines(
        lines, "public samples kept", "held-out own samples kept", alt, dots=dots, x_range=(0, 1), y_range=(0, 1.01),
        square=True,
    )  # fmt: skip
    names = charts.legend([("mean of the nodes", "s0", ""), ("single nodes", "faint", "")])
    caption = "Dots are the nodes' thresholds. The area under the curve is 0.5 for a score that cannot tell them apart."
    return figure("ROC, held-out own against public samples", picture, names, caption=caption)


def tabulate_exchanges(exchanges: Sequence[dict]) -> Html:
    """A row for every exchange of labels; of more than 40, evenly spaced ones."""
    rows = []
    for exchange in charts.thin(exchanges, 40):
        sizes, (before, after) = exchange["distilled"], exchange["homogeneity"]
        means = [average(exchange.get(key)) for key in ("kept_fraction", "own_kept", "noise_kept", "label_accuracy")]
        rows.append([exchange["epoch"], sum(sizes) / len(sizes), *means, before, after])
    columns = [Column("after epoch", "d"), Column("distilled samples a node", ",.0f"), Column("public kept", ".1%"),
               Column("own kept", ".1%"), Column("noise kept", ".1%"), Column("labels right", ".1%"),
               Column("heterogeneity before", ".3f"), Column("after", ".3f")]  # fmt: skip
    return build_table(*drop_empty(columns, rows), "Exchanges of labels")


def average(values: Sequence[float | None] | None) -> float | None:
    """Mean of the values that are known."""
    known = [value for value in values or () if value is not None]
    return sum(known) / len(known) if known else None


def show_confusion(confusion: Confusion | str) -> Html:
    """The confusion matrix of the consensus model; of many classes, a heat map and the most frequent mistakes."""
    if isinstance(confusion, str):
        return paragraph(f"There is no confusion matrix: {confusion}")
    counts, classes = confusion.counts, confusion.classes
    totals = counts.sum(1)
    shares = counts / np.maximum(totals, 1)[:, None]
    right = counts.trace() / max(counts.sum(), 1)
    text = (
        f"The consensus model on {counts.sum():,} test samples, {right:.1%} right. Rows are true classes, columns what "
        "the model says, in percent of the row."
    )
    if len(classes) <= MOST_CELLS:
        return join(tabulate_confusion(counts, shares, classes), paragraph(text, muted=True))
    alt = f"Confusion matrix of the consensus model over {len(classes)} classes, {right:.1%} right"
    picture = charts.draw_heat(shares, "class that the model says", "true class", alt, 1.0, square=True)
    wrong = shares * (1 - np.eye(len(classes)))
    pairs = np.argsort(-wrong, axis=None)[:15]
    rows = []
    for true, said in zip(*np.unravel_index(pairs, wrong.shape), strict=True):
        if wrong[true, said] > 0:
            rows.append([classes[true], classes[said], float(wrong[true, said]), int(counts[true, said])])
    columns = [Column("true class"), Column("taken for"), Column("share", ".1%"), Column("samples", ",d")]
    table = build_table(columns, rows, "Most frequent mistakes", sortable=True)
    accuracy = [[name, float(shares[i, i]) if totals[i] else None, int(totals[i])] for i, name in enumerate(classes)]
    by_class = build_table(
        [Column("class"), Column("accuracy", ".1%"), Column("samples", ",d")], accuracy, "Classes", sortable=True
    )
    tables = [figure("Matrix", picture), figure("Most frequent mistakes", table)]
    return join(
        element("div", tables, class_="pair"), fold("Accuracy of every class", by_class), paragraph(text, muted=True)
    )


def tabulate_confusion(counts: np.ndarray, shares: np.ndarray, classes: Sequence[str]) -> Html:
    """A confusion matrix as a table whose cells are shaded."""
    long = "long" if max(map(len, classes)) > 3 else None
    heads = [element("th", element("span", name), scope="col", class_=long) for name in classes]
    rows = []
    for i, name in enumerate(classes):
        cells = []
        for j, share in enumerate(shares[i]):
            title = f"{name} taken for {classes[j]}: {counts[i, j]:,} of {counts[i].sum():,}"
            text = f"{100 * share:.0f}" if share >= 0.005 else ""
            style = {"style": f"--v:{share:.2f}", "class_": "on" if share > 0.55 else None, "title": title}
            cells.append(element("td", text, **style))
        rows.append(element("tr", element("th", name, scope="row"), cells))
    head = element("thead", element("tr", element("td", ""), heads))
    return scroll(element("table", head, element("tbody", rows), class_="confusion"), "Confusion matrix")
