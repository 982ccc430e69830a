"""Pictures of a run, in ``plots/`` and in W&B: curves, graph, label mass, scores, ROC."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd.callback import Callback

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 16  # nodes in a picture of scores: more would be too small


class Pictures(Callback):
    """Draws a run when it ends: curves, graph, label mass, and the scores of its last calibration."""

    def __init__(self):
        self.scores: list[tuple] = []  # of every node: scores of own, public and noise samples, threshold

    def state_dict(self) -> dict:
        return {"scores": self.scores}

    def load_state_dict(self, state: dict) -> None:
        self.scores = state["scores"]

    def on_fit_start(self, run) -> None:
        if run.ood["threshold"] is None:  # a fork that left the calibration of its source behind
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
        figures = {"accuracy": accuracy(run.lines), "labels": label_mass(before, after, run.store.classes)}
        if self.scores:
            scores = [(*(part.numpy() for part in parts), threshold) for *parts, threshold in self.scores]
            figures |= {"scores": score_histograms(scores), "roc": roc_curves(scores)}
        run.pictures = {name: run.folder.file(f"plots/{name}.png") for name in (*figures, "graph")}
        for name, figure in figures.items():
            figure.savefig(run.pictures[name], dpi=120)
        run.network.graph.draw(run.pictures["graph"], values=[100 * a for a in metrics["per_node"]["accuracy"]])


def new(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def accuracy(lines: list[dict]) -> Figure:
    """Accuracy of nodes and consensus over epochs."""
    figure = new(7, 4)
    axes = figure.add_subplot(xlabel="epoch", ylabel="test accuracy (%)")
    epochs = [line["epoch"] for line in lines]
    for key, label in (("node_mean", "node mean"), ("consensus", "consensus model")):
        axes.plot(epochs, [100 * line[f"accuracy/{key}"] for line in lines], marker=".", label=label)
    axes.fill_between(epochs, *([100 * line[f"accuracy/node_{k}"] for line in lines] for k in ("min", "max")), alpha=0.15,
                      label="worst to best node")  # fmt: skip
    start = next((line["epoch"] for line in lines if line["phase"] == "distil"), None)
    if start is not None:
        axes.axvline(start, color="0.6", linestyle=":", label="first evaluation with distilled labels")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def label_mass(before: np.ndarray, after: np.ndarray, classes: tuple[str, ...]) -> Figure:
    """Label mass [n, k] of every node, private and with distilled samples."""
    figure = new(10, 0.25 * len(before) + 1.8)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, mass, title in ((left, before, "private"), (right, after, "private + distilled")):
        offset = 0 * mass[:, 0]
        for c in range(mass.shape[1]):
            label = classes[c] if mass.shape[1] <= 20 else None
            axes.barh(range(len(mass)), mass[:, c], left=offset, height=0.8, label=label)
            offset = offset + mass[:, c]
        axes.set(title=title, xlabel="training samples (mass) by class")
    left.set(ylabel="node", yticks=range(0, len(before), max(1, len(before) // 16)))
    left.invert_yaxis()
    if before.shape[1] <= 20:
        right.legend(fontsize="x-small", ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def label_counts(histogram: np.ndarray, classes: tuple[str, ...]) -> Figure:
    """How many samples of each class every node holds, [n, k]."""
    n, k = histogram.shape
    figure = new(min(0.45 * k, 14) + 2.5, min(0.28 * n, 12) + 1.6)
    axes = figure.add_subplot(xlabel="class", ylabel="node")
    shown = axes.imshow(histogram, cmap="YlGnBu", vmin=0, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(0, n, max(1, n // 16)))
    if k <= 20:
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, classes)) > 2 else {}
        axes.set_xticks(range(k), classes, fontsize="small", **slanted)
    figure.colorbar(shown, ax=axes, label="samples")
    return figure


def score_histograms(scores: list[tuple]) -> Figure:
    """Scores of own held-out, public and noise samples with the threshold, node by node."""
    shown = scores[:PANELS]
    columns = min(4, len(shown))
    figure = new(3 * columns, 2 * -(-len(shown) // columns) + 0.4)
    panels = figure.subplots(-(-len(shown) // columns), columns, squeeze=False).flat
    for node, (axes, (private, public, noise, threshold)) in enumerate(zip(panels, shown, strict=False)):
        both = np.concatenate([private, public])
        bins = np.linspace(*np.quantile(both[np.isfinite(both)], [0.005, 0.995]), 40)
        for values, label in ((public, "public"), (private, "own"), (noise, "noise")):
            if len(values):
                style = {"histtype": "step", "color": "0.4"} if label == "noise" else {"alpha": 0.55}
                axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), label=label, **style)
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"node {node}", fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.set_yticks([])
    for axes in panels:
        axes.set_axis_off()
    figure.axes[0].legend(fontsize="x-small")
    some = f", the first {PANELS} of {len(scores)} nodes" * (len(scores) > PANELS)
    figure.supxlabel(f"score (dashed: threshold, kept to its right{some})", fontsize="small")
    return figure


def roc_curves(scores: list[tuple]) -> Figure:
    """ROC of own held-out against public samples, a line a node, with the chosen point."""
    figure = new(4.6, 4.4)
    axes = figure.add_subplot(
        xlabel="public samples kept", ylabel="own samples kept", xlim=(0, 1), ylim=(0, 1.01), aspect="equal"
    )
    for private, public, _, threshold in scores:
        if not len(private) or not len(public):
            continue
        cuts = np.sort(np.concatenate([private, public]))[::-1]
        kept = [1 - np.searchsorted(np.sort(v), cuts) / len(v) for v in (public, private)]
        (line,) = axes.plot([0, *kept[0], 1], [0, *kept[1], 1], linewidth=0.8, alpha=0.8)
        axes.plot((public >= threshold).mean(), (private >= threshold).mean(), "o", markersize=3, color=line.get_color())
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    axes.set_title(f"{len(scores)} nodes, dots at their thresholds", fontsize="small")
    return figure


def dots(names: list[str], metrics: dict[str, list[tuple | None]]) -> Figure:
    """A panel a metric: its mean in every row of a table with its spread (mean, spread), None where a row has none."""
    figure = new(2.5 + 0.06 * max(map(len, names)) + 2.4 * len(metrics), 0.9 + 0.28 * len(names))
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, (metric, cells) in zip(panels, metrics.items(), strict=True):
        for row, cell in enumerate(cells):
            if cell is not None:
                axes.errorbar(cell[0], row, xerr=cell[1], fmt="o", color="C0", capsize=3)
        axes.set_xlabel(
            metric.removeprefix("accuracy/").replace("_", " ") + " (%)" * metric.startswith(("accuracy", "validation"))
        )
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure
