"""Draws the pictures of a run, for ``plots/`` and W&B: accuracy, graph, label mass, scores and ROC. The numbers behind
them go to ``plots/report.json``, for the report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd import colours
from lightning_idkd.callback import Callback, OodScore, format_probability
from lightning_idkd.files import to_json
from lightning_idkd.records import report, report_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PANELS = 16
"""Nodes in the picture of scores; more panels would be too small."""
BARS = 20
"""Classes that a stacked bar can show, in ten colours, plain and hatched."""
DIGIT_WIDTH = 0.6
"""Width of a digit as a share of its height."""


class Pictures(Callback):
    """Draws a run when it ends: curves, graph, label mass, and the scores of its last calibration."""

    at_the_end = 5.0

    def __init__(self):
        self.scores: list[tuple] = []  # per node: scores of its own, of public and of noise samples, and its threshold

    def state_dict(self) -> dict:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.scores = state["scores"]

    def on_fit_start(self, run) -> None:
        if run.progress.ood["threshold"] is None:  # a fork that does not take over its source's calibration
            self.scores = []

    def on_calibration_end(self, run, selections) -> None:
        scores = [(s.private.cpu(), s.public.cpu(), s.noise.cpu(), s.threshold) for s in selections]
        self.scores = run.network.collect_objects(scores) or []  # the first process draws them

    def on_evaluation_end(self, run, metrics) -> None:
        if metrics["phase"] != "final":
            return
        before, after = run.network.report(run.store.counts()).numpy(), run.network.report(run.store.mass()).numpy()
        if not run.fabric.is_global_zero:
            return
        run.say(report.format_field("pictures", "drawing plots/"))
        after = after if run.progress.exchanges else None
        heterogeneity = metrics["homogeneity/before"], metrics["homogeneity/after"]
        figures = {
            "accuracy": draw_accuracy(run.lines, [exchange["epoch"] for exchange in run.progress.exchanges]),
            "labels": draw_label_mass(before, after, run.store.classes, heterogeneity),
        }
        if "time/simulated" in metrics:
            figures["accuracy_over_time"] = draw_accuracy(run.lines, [], "time")
        scores, aurocs, title = [], [], ""
        if self.scores:
            for private, public, noise, threshold in self.scores:
                scores.append((private.numpy(), public.numpy(), noise.numpy(), threshold))
            aurocs, score = run.progress.per_node["auroc"], run.calibration.score
            figures |= {"scores": draw_score_histograms(scores, aurocs, score), "roc": draw_roc_curves(scores, aurocs)}
            title = score.title
        for name, figure in figures.items():
            run.draw(name, figure)
        graph = run.folder.file("plots/graph.png")
        nodes = [100 * a for a in metrics["per_node"]["accuracy"]]
        meaning, links = f"test accuracy (%), {min(nodes):.1f} to {max(nodes):.1f}", run.network.links
        meaning += "; thick outline: lying nodes" if links.liars else ""
        run.network.graph.draw(graph, nodes, meaning, outlined=~links.honest)
        run.add_pictures({"graph": graph})
        device = report_data.name_device(run.fabric.device)
        data = report_data.collect(run.store.classes, before, after, run.network.graph, scores, aurocs, title, device)
        data["liars"] = np.flatnonzero(~links.honest).tolist()
        run.folder.text("plots/report.json", json.dumps(to_json(data, "report.json")) + "\n")


def make_figure(width: float, height: float) -> Figure:
    """Make an empty figure; ``width`` and ``height`` are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_accuracy(lines: list[dict], exchanges: list[int], axis: str = "epoch") -> Figure:
    """Draw the accuracy of nodes and consensus model over epochs, or another axis of :data:`report.AXES`.

    Args:
        lines: the lines of ``metrics.jsonl``.
        exchanges: where on the axis each exchange of labels is; each is marked.
    """
    figure = make_figure(7, 4)
    axes = figure.add_subplot(xlabel="epoch" if axis == "epoch" else report.AXES[axis], ylabel="test accuracy (%)")
    places = [report.read_axis(line, axis) for line in lines]
    for i, epoch in enumerate(exchanges):
        style = {"color": "0.45", "linestyle": ":", "linewidth": min(1, 25 / len(exchanges))}
        axes.axvline(epoch, **style, label=None if i else "exchange of labels")

    def in_percent(key: str) -> list[float]:
        return [100 * line[f"accuracy/{key}"] for line in lines]

    band = {"alpha": 0.2, "color": colours.BLUE, "linewidth": 0, "label": "worst to best node"}
    axes.fill_between(places, in_percent("node_min"), in_percent("node_max"), **band)
    curves = (("node_mean", "node mean", colours.BLUE, "."), ("consensus", "consensus model", colours.ORANGE, "s"))
    for key, label, colour, marker in curves:
        values = in_percent(key)
        axes.plot(places, values, color=colour, marker=marker, markersize=4 if marker == "s" else 7, label=label)
    axes.xaxis.get_major_locator().set_params(integer=axis == "epoch")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def draw_label_mass(
    before: np.ndarray,
    after: np.ndarray | None,
    classes: tuple[str, ...],
    heterogeneity: tuple[float, float],
) -> Figure:
    """Draw the label mass of every node, private and with distilled samples, in two panels of one scale.

    Up to 20 classes are stacked bars, more are shades.

    Args:
        before: mass of the private samples [n, k].
        after: mass with the distilled samples [n, k]; None for a run without, which gets one panel.
        classes: their names.
        heterogeneity: before and after distillation, for the titles.
    """
    n, k = before.shape
    masses = [before] if after is None else [before, after]
    height = min(0.25 * n, 10) + 1.8
    if k > BARS:
        figure = make_figure(1.5 + 5 * len(masses), height)
        panels = figure.subplots(1, len(masses), sharey=True, squeeze=False)[0]
        most = max(mass.max() for mass in masses)
        for axes, mass in zip(panels, masses, strict=True):
            image = draw_shades(axes, mass, most, 0.5)
            axes.set_xlabel("class")
        label = "training samples (mass), shades by its square root"
        figure.colorbar(image, ax=list(panels), label=label, aspect=30, pad=0.02)
    else:
        figure = make_figure(1.5 + 4.25 * len(masses), height)
        panels = figure.subplots(1, len(masses), sharex=True, sharey=True, squeeze=False)[0]
        for axes, mass in zip(panels, masses, strict=True):
            draw_bars(axes, mass, classes)
        panels[0].set_ylim(n - 0.4, -0.6)  # node 0 at the top
        panels[-1].legend(fontsize="x-small", ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes, title, value in zip(panels, ("private", "private + distilled"), heterogeneity, strict=False):
        axes.set_title(f"{title} (heterogeneity {value:.2f})", fontsize="medium")
    panels[0].set(ylabel="node", yticks=range(0, n, max(1, n // 16)))
    return figure


def draw_bars(axes: Axes, mass: np.ndarray, classes: tuple[str, ...]) -> None:
    """Draw a stacked bar per node from ``mass`` [n, k]; from the eleventh class on the colours repeat, hatched."""
    left = 0 * mass[:, 0]
    for c, label in enumerate(classes):
        hatch = "" if c < len(colours.CLASSES) else "////"
        colour = colours.CLASSES[c % len(colours.CLASSES)]
        style = {"color": colour, "edgecolor": "white", "linewidth": 0, "hatch": hatch}
        axes.barh(range(len(mass)), mass[:, c], left=left, height=0.8, label=label, **style)
        left = left + mass[:, c]
    axes.set_xlabel("training samples (mass) by class")


def draw_shades(axes: Axes, mass: np.ndarray, most: float, power: float = 1) -> AxesImage:
    """Draw a cell for every node and class from ``mass`` [n, k], white at 0 and darkest at ``most``; the shade follows
    the mass to the ``power``."""
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(power, 0, max(most, 1e-9))
    return axes.imshow(mass, cmap=colours.shades(), norm=norm, aspect="auto", interpolation="nearest")


def draw_label_counts(histogram: np.ndarray, classes: tuple[str, ...]) -> Figure:
    """Draw how many samples of each class every node holds, from ``histogram`` [n, k]. Cells show their numbers if
    these fit."""
    n, k = histogram.shape
    width, height = min(0.45 * k, 14), min(0.28 * n, 12)
    figure = make_figure(width + 2.5, height + 1.6)
    axes = figure.add_subplot(xlabel="class", ylabel="node")
    image = draw_shades(axes, histogram, histogram.max())
    axes.set_yticks(range(0, n, max(1, n // 16)))
    if k <= BARS:
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, classes)) > 2 else {}
        axes.set_xticks(range(k), classes, fontsize="small", **slanted)
    digits = len(str(histogram.max()))
    size = min(8, 0.7 * 72 * height / n, 0.9 * 72 * width / k / (DIGIT_WIDTH * digits))  # in points, 72 to an inch
    if size >= 4:
        for node, c in np.argwhere(histogram):
            colour = colours.choose_text_colour(image.cmap(image.norm(histogram[node, c])))
            axes.text(c, node, str(histogram[node, c]), ha="center", va="center", fontsize=size, color=colour)
    figure.colorbar(image, ax=axes, label="samples")
    return figure


def draw_score_histograms(scores: list[tuple], aurocs: list[float], score: OodScore) -> Figure:
    """Draw the histograms of own held-out, public and noise scores with the threshold, in a panel per node.

    Of more than 16 nodes, those with the smallest and the largest AUROC are drawn.

    Args:
        scores: per node, the scores of its own, of public and of noise samples, and its threshold.
        aurocs: per node, held-out own against public samples; nan for a node without held-out samples, whose own scores
            are those of its training samples.
        score: names the axis, and gives thresholds as probabilities where it can.
    """
    nodes, selection, half = list(range(len(scores))), "", PANELS // 2
    if len(scores) > PANELS:
        # nodes without an AUROC come last
        ranked = sorted(nodes, key=lambda i: (not np.isfinite(aurocs[i]), aurocs[i]))
        with_auroc = sum(map(np.isfinite, aurocs))
        nodes = ranked[:half] + ranked[max(half, with_auroc - half) :][:half]
        selection = f"; the {half} worst and the {half} best of {len(scores)} nodes by AUROC"
    columns = min(4, len(nodes))
    rows = -(-len(nodes) // columns)
    figure = make_figure(3 * columns, 2 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for node, axes in zip(nodes, panels, strict=False):
        draw_node_scores(axes, node, scores[node], aurocs[node], score)
    for axes in panels:  # those that are left over
        axes.set_axis_off()
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    figure.axes[0].legend(handles.values(), handles.keys(), fontsize="x-small")
    figure.supxlabel(f"{score.title} (dashed: threshold, kept to its right{selection})", fontsize="small")
    figure.supylabel("share of samples", fontsize="small")
    return figure


def draw_node_scores(axes: Axes, node: int, scores: tuple, auroc: float, score: OodScore) -> None:
    """Draw one panel of :func:`draw_score_histograms`."""
    private, public, noise, threshold = scores
    ends = np.concatenate([np.quantile(values, [0.005, 0.995]) for values in (private, public) if len(values)])
    low, high = ends.min(), ends.max()
    if abs(threshold - (low + high) / 2) <= 1.5 * (high - low):  # a threshold further out would squeeze the samples
        low, high = min(low, threshold), max(high, threshold)
    bins = np.linspace(low, high, 36)
    held_out = np.isfinite(auroc)
    own, colour = ("own held-out", colours.ORANGE) if held_out else ("own, of training", colours.GREEN)
    kinds = ((public, "public", colours.BLUE), (private, own, colour), (noise, "noise", "0.3"))
    for values, label, colour in kinds:
        if len(values):
            style = {"histtype": "step"} if label == "noise" else {"alpha": 0.6}
            axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), label=label, color=colour, **style)
    axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
    for side, place, outside in (("left", 0.02, noise < low), ("right", 0.98, noise > high)):
        if outside.sum() > 0.05 * len(noise):
            text = f"{outside.mean():.0%} of noise\nfurther {side}"
            axes.text(place, 0.85, text, fontsize="xx-small", color="0.3", ha=side, transform=axes.transAxes)
    p = score.probability(threshold)
    quality = f"AUROC {auroc:.2f}" if held_out else "none held out"
    limit = "" if p is None else f", threshold p {format_probability(p)}"
    axes.set_title(f"node {node}, {quality}{limit}", fontsize="small")
    axes.tick_params(labelsize="x-small")
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks([])


def draw_roc_curves(scores: list[tuple], aurocs: list[float]) -> Figure:
    """Draw the ROC of own held-out against public samples: nodes in grey with their thresholds as dots, and their mean
    in bold.

    The mean is that of the shares of own samples kept, at every share of public samples kept. The title gives the
    AUROC.

    Args:
        scores: per node, the scores of its own, of public and of noise samples, and its threshold.
        aurocs: per node; nan for a node without held-out samples, which is left out.
    """
    figure = make_figure(4.8, 4.8)
    axes = figure.add_subplot(
        xlabel="public samples kept", ylabel="held-out own samples kept", xlim=(0, 1), ylim=(0, 1.01), aspect="equal"
    )
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8, linestyle="--")
    held = [i for i, value in enumerate(aurocs) if np.isfinite(value)]
    grid, curves = np.linspace(0, 1, 501), []
    for i in held:
        private, public, _, threshold = scores[i]
        cuts = np.sort(np.concatenate([private, public]))[::-1]
        x, y = (trace_kept(values, cuts) for values in (public, private))
        axes.plot(x, y, linewidth=0.6, color="0.7", label=None if curves else "nodes")
        dot = {"markersize": 3, "color": "0.45", "clip_on": False, "label": None if curves else "their thresholds"}
        axes.plot((public >= threshold).mean(), (private >= threshold).mean(), "o", **dot)
        curves.append(np.interp(grid, x, y))
    if curves:
        mean = [0, *np.mean(curves, axis=0)]
        axes.plot([0, *grid], mean, linewidth=2.5, color=colours.BLUE, label="mean of the nodes")
        axes.legend(fontsize="small", loc="lower right")
        known = [aurocs[i] for i in held]
        spread = f" (nodes: {min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
        axes.set_title(f"AUROC {np.mean(known):.3f}{spread}, held-out own against public", fontsize="small")
    return figure


def trace_kept(scores: np.ndarray, cuts: np.ndarray) -> list[float]:
    """The share of ``scores`` that each of the falling ``cuts`` keeps, from 0 to 1."""
    return [0, *(1 - np.searchsorted(np.sort(scores), cuts) / len(scores)), 1]
