"""Pictures of a run, in ``plots/`` and in W&B: curves, graph, label mass, scores, ROC."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd import colours
from lightning_idkd.callback import Callback, OodScore, format_probability
from lightning_idkd.records import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PANELS = 16  # nodes in a picture of scores: more would be too small
BARS = 20  # classes that a stacked bar can show, ten colours plain and hatched
LETTERS = 0.6  # width of a digit as a share of its height


class Pictures(Callback):
    """Draws a run when it ends: curves, graph, label mass, and the scores of its last calibration."""

    at_the_end = 5.0

    def __init__(self):
        self.scores: list[tuple] = []  # of every node: scores of own, public and noise samples, threshold

    def state_dict(self) -> dict:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.scores = state["scores"]

    def on_fit_start(self, run) -> None:
        if run.progress.ood["threshold"] is None:  # a fork that left the calibration of its source behind
            self.scores = []

    def on_calibration_end(self, run, selections) -> None:
        scores = [(s.private.cpu(), s.public.cpu(), s.noise.cpu(), s.threshold) for s in selections]
        self.scores = run.network.report_objects(scores)

    def on_evaluation_end(self, run, metrics) -> None:
        if metrics["phase"] != "final":
            return
        before, after = (run.network.report(mass).numpy() for mass in (run.store.counts(), run.store.mass()))
        if not run.fabric.is_global_zero:
            return
        run.say(report.format_field("pictures", "drawing plots/"))
        heterogeneity = metrics["homogeneity/before"], metrics["homogeneity/after"]
        figures = {
            "accuracy": draw_accuracy(run.lines, [exchange["epoch"] for exchange in run.progress.exchanges]),
            "labels": draw_label_mass(before, after if run.progress.exchanges else None, run.store.classes, heterogeneity),
        }
        if self.scores:
            scores = [(*(part.numpy() for part in parts), threshold) for *parts, threshold in self.scores]
            aurocs, score = run.progress.per_node["auroc"], run.calibration.score
            figures |= {"scores": draw_score_histograms(scores, aurocs, score), "roc": draw_roc_curves(scores, aurocs)}
        files = {name: run.folder.file(f"plots/{name}.png") for name in (*figures, "graph")}
        for name, figure in figures.items():
            figure.savefig(files[name], dpi=120)
        nodes = [100 * a for a in metrics["per_node"]["accuracy"]]
        run.network.graph.draw(files["graph"], nodes, f"test accuracy (%), {min(nodes):.1f} to {max(nodes):.1f}")
        run.add_pictures(files)


def make_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw_accuracy(lines: list[dict], exchanges: list[int]) -> Figure:
    """Accuracy of nodes and consensus over epochs; ``exchanges`` are the epochs trained before each exchange of labels."""
    figure = make_figure(7, 4)
    axes = figure.add_subplot(xlabel="epoch", ylabel="test accuracy (%)")
    epochs = [line["epoch"] for line in lines]
    for i, epoch in enumerate(exchanges):
        style = {"color": "0.45", "linestyle": ":", "linewidth": min(1, 25 / len(exchanges))}
        axes.axvline(epoch, **style, label=None if i else "exchange of labels")
    axes.fill_between(epochs, *([100 * line[f"accuracy/node_{k}"] for line in lines] for k in ("min", "max")), alpha=0.2,
                      color=colours.BLUE, linewidth=0, label="worst to best node")  # fmt: skip
    shown = (("node_mean", "node mean", colours.BLUE, "."), ("consensus", "consensus model", colours.ORANGE, "s"))
    for key, label, colour, marker in shown:
        values = [100 * line[f"accuracy/{key}"] for line in lines]
        axes.plot(epochs, values, color=colour, marker=marker, markersize=4 if marker == "s" else 7, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def draw_label_mass(
    before: np.ndarray,
    after: np.ndarray | None,
    classes: tuple[str, ...],
    heterogeneity: tuple[float, float],
) -> Figure:
    """Label mass [n, k] of every node, private and (unless None) with distilled samples, both panels on one scale: as bars, of
    many classes as shades. ``heterogeneity`` before and after stands above."""
    n, k = before.shape
    masses = [before] if after is None else [before, after]
    height = min(0.25 * n, 10) + 1.8
    if k > BARS:
        figure = make_figure(1.5 + 5 * len(masses), height)
        panels = figure.subplots(1, len(masses), sharey=True, squeeze=False)[0]
        most = max(mass.max() for mass in masses)
        for axes, mass in zip(panels, masses, strict=True):
            shown = draw_shades(axes, mass, most, 0.5)
            axes.set_xlabel("class")
        figure.colorbar(shown, ax=list(panels), label="training samples (mass), shades by its square root", aspect=30, pad=0.02)
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
    """A stacked bar a node; the eleventh class on repeats the colours, hatched."""
    left = 0 * mass[:, 0]
    for c, label in enumerate(classes):
        hatch = "" if c < len(colours.CLASSES) else "////"
        style = {"color": colours.CLASSES[c % len(colours.CLASSES)], "edgecolor": "white", "linewidth": 0, "hatch": hatch}
        axes.barh(range(len(mass)), mass[:, c], left=left, height=0.8, label=label, **style)
        left = left + mass[:, c]
    axes.set_xlabel("training samples (mass) by class")


def draw_shades(axes: Axes, mass: np.ndarray, most: float, power: float = 1) -> AxesImage:
    """A cell for every node and class, white at 0 and darkest at ``most``, its shade by ``power`` of the mass."""
    from matplotlib.colors import PowerNorm

    norm = PowerNorm(power, 0, max(most, 1e-9))
    return axes.imshow(mass, cmap=colours.shades(), norm=norm, aspect="auto", interpolation="nearest")


def draw_label_counts(histogram: np.ndarray, classes: tuple[str, ...]) -> Figure:
    """How many samples of each class every node holds, [n, k]; the numbers stand in the cells where they fit."""
    n, k = histogram.shape
    width, height = min(0.45 * k, 14), min(0.28 * n, 12)
    figure = make_figure(width + 2.5, height + 1.6)
    axes = figure.add_subplot(xlabel="class", ylabel="node")
    shown = draw_shades(axes, histogram, histogram.max())
    axes.set_yticks(range(0, n, max(1, n // 16)))
    if k <= BARS:
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, classes)) > 2 else {}
        axes.set_xticks(range(k), classes, fontsize="small", **slanted)
    digits = len(str(histogram.max()))
    size = min(8, 0.7 * 72 * height / n, 0.9 * 72 * width / k / (LETTERS * digits))  # points, of 72 an inch
    if size >= 4:
        for node, c in np.argwhere(histogram):
            colour = colours.choose_text_colour(shown.cmap(shown.norm(histogram[node, c])))
            axes.text(c, node, str(histogram[node, c]), ha="center", va="center", fontsize=size, color=colour)
    figure.colorbar(shown, ax=axes, label="samples")
    return figure


def draw_score_histograms(scores: list[tuple], aurocs: list[float], score: OodScore) -> Figure:
    """Scores of own held-out, public and noise samples with the threshold, node by node; of many nodes those with the smallest
    and largest AUROC."""
    nodes, some, half = list(range(len(scores))), "", PANELS // 2
    if len(scores) > PANELS:
        ranked = sorted(nodes, key=lambda i: (not np.isfinite(aurocs[i]), aurocs[i]))  # those without an AUROC come last
        held = sum(map(np.isfinite, aurocs))
        nodes = ranked[:half] + ranked[max(half, held - half) :][:half]
        some = f"; the {half} worst and the {half} best of {len(scores)} nodes by AUROC"
    columns = min(4, len(nodes))
    figure = make_figure(3 * columns, 2 * -(-len(nodes) // columns) + 0.4)
    panels = figure.subplots(-(-len(nodes) // columns), columns, squeeze=False).flat
    for node, axes in zip(nodes, panels, strict=False):
        private, public, noise, threshold = scores[node]
        ends = np.concatenate([np.quantile(values, [0.005, 0.995]) for values in (private, public) if len(values)])
        low, high = ends.min(), ends.max()
        if abs(threshold - (low + high) / 2) <= 1.5 * (high - low):  # others would leave no room for the samples
            low, high = min(low, threshold), max(high, threshold)
        bins = np.linspace(low, high, 36)
        held_out = np.isfinite(aurocs[node])
        own, colour = ("own held-out", colours.ORANGE) if held_out else ("own, of training", colours.GREEN)
        kinds = ((public, "public", colours.BLUE), (private, own, colour), (noise, "noise", "0.3"))
        for values, label, colour in kinds:
            if len(values):
                style = {"histtype": "step"} if label == "noise" else {"alpha": 0.6}
                axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), label=label, color=colour, **style)
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
        p = score.probability(threshold)
        for side, place, outside in (("left", 0.02, noise < low), ("right", 0.98, noise > high)):
            if outside.sum() > 0.05 * len(noise):
                told = f"{outside.mean():.0%} of noise\nfurther {side}"
                axes.text(place, 0.85, told, fontsize="xx-small", color="0.3", ha=side, transform=axes.transAxes)
        auroc = f", AUROC {aurocs[node]:.2f}" if held_out else ", none held out"
        limit = "" if p is None else f", threshold p {format_probability(p)}"
        axes.set_title(f"node {node}{auroc}{limit}", fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks([])
    for axes in panels:
        axes.set_axis_off()
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.axes[0].legend(handles.values(), handles.keys(), fontsize="x-small")
    figure.supxlabel(f"{score.title} (dashed: threshold, kept to its right{some})", fontsize="small")
    figure.supylabel("share of samples", fontsize="small")
    return figure


def draw_roc_curves(scores: list[tuple], aurocs: list[float]) -> Figure:
    """ROC of own held-out against public samples: nodes in grey with their thresholds as dots, their mean (of own samples kept
    at every share of public ones) in bold, and the AUROC above."""
    figure = make_figure(4.8, 4.8)
    axes = figure.add_subplot(
        xlabel="public samples kept", ylabel="held-out own samples kept", xlim=(0, 1), ylim=(0, 1.01), aspect="equal"
    )
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=0.8, linestyle="--")
    held = [i for i, value in enumerate(aurocs) if np.isfinite(value)]
    grid, curves = np.linspace(0, 1, 501), []
    for private, public, _, threshold in (scores[i] for i in held):
        cuts = np.sort(np.concatenate([private, public]))[::-1]
        x, y = ([0, *(1 - np.searchsorted(np.sort(v), cuts) / len(v)), 1] for v in (public, private))
        axes.plot(x, y, linewidth=0.6, color="0.7", label=None if curves else "nodes")
        axes.plot((public >= threshold).mean(), (private >= threshold).mean(), "o", markersize=3, color="0.45", clip_on=False,
                  label=None if curves else "their thresholds")  # fmt: skip
        curves.append(np.interp(grid, x, y))
    if curves:
        axes.plot([0, *grid], [0, *np.mean(curves, axis=0)], linewidth=2.5, color=colours.BLUE, label="mean of the nodes")
        axes.legend(fontsize="small", loc="lower right")
        found = [aurocs[i] for i in held]
        spread = f" (nodes: {min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
        axes.set_title(f"AUROC {np.mean(found):.3f}{spread}, held-out own against public", fontsize="small")
    return figure


def draw_dots(names: list[str], metrics: dict[str, list[tuple | None]]) -> Figure:
    """A panel a metric: its mean in every row of a table with spread and number of seeds (mean, spread, seeds), None where a row
    has none."""
    figure = make_figure(2.5 + 0.06 * max(map(len, names)) + 2.4 * len(metrics), 0.9 + 0.28 * len(names))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (metric, cells) in zip(panels, metrics.items(), strict=True):
        for row, cell in enumerate(cells):
            if cell is not None:
                mean, spread, seeds = cell
                axes.errorbar(mean, row, xerr=spread, fmt="o", color=colours.BLUE, capsize=3)
                if spread is not None:
                    style = {"textcoords": "offset points", "ha": "center", "fontsize": "xx-small"}
                    axes.annotate(f"{seeds} seeds", (mean, row), (0, 4), **style)
        axes.set_xlabel(metric)
        axes.margins(x=0.12)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.7)
    return figure
