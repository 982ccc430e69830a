"""What a person sees: one aligned line an evaluation, the final table, pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from lightning_idkd.graph import Graph

COLUMNS = ("epoch", "phase", "loss", "node mean", "min", "max", "consensus", "distance", "sent", "samples/s", "left")
_FORM = "{:>9}  {:<7} {:>7}  {:>9} {:>6} {:>6} {:>10} {:>9} {:>9} {:>10} {:>7}"


def head() -> str:
    """The line above the columns; accuracies in percent."""
    return _FORM.format(*COLUMNS)


def size(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def clock(seconds: float) -> str:
    """Minutes and seconds, hours where it takes that long."""
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def line(metrics: dict, epochs: int, left: float) -> str:
    """One evaluation; ``left`` in seconds."""
    epoch = metrics["epoch"]
    sent = sum(v for k, v in metrics.items() if k.startswith("communication/") and k.endswith("_bytes"))
    percent = [f"{100 * metrics[f'accuracy/{k}']:.1f}" for k in ("node_mean", "node_min", "node_max", "consensus")]
    return _FORM.format(
        f"{epoch}/{epochs}", metrics["phase"], f"{metrics['train/loss']:.4f}" if "train/loss" in metrics else "-", *percent,
        f"{metrics['consensus_distance']:.4f}", size(sent), f"{metrics['throughput/samples_per_second']:,.0f}",
        clock(left),
    )  # fmt: skip


def table(summary: dict, folder: Path) -> None:
    """The final table."""
    from rich.console import Console
    from rich.table import Table

    accuracy, sent, ood = summary["accuracy"], summary["communication"], summary["ood"]
    rows = Table(title=f"{summary['name']}, seed {summary['seed']}: {summary['nodes']} nodes, {summary['epochs']} epochs, "
                 f"{summary['steps']} steps", title_justify="left", show_header=False)  # fmt: skip

    def show(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    gossip = f"after {summary['final_gossip']} final gossip"
    rows.add_row(f"node accuracy, {gossip}", f"{accuracy['node_mean']:.2%} (sd {accuracy['node_std']:.2%}, worst "
                 f"{accuracy['node_min']:.2%}, best {accuracy['node_max']:.2%})")  # fmt: skip
    rows.add_row("node accuracy before it", f"{accuracy['node_mean_before_final_gossip']:.2%}")
    rows.add_row("consensus model", f"{accuracy['consensus']:.2%}")
    rows.add_row("consensus distance", f"{summary['consensus_distance']:.4f}")
    rows.add_row("sent", f"{size(sent['parameter_bytes'])} parameters, {size(sent['label_bytes'])} labels, "
                 f"{size(sent['other_bytes'])} other, {sent['messages']:,} messages")  # fmt: skip
    rows.add_row("public set", f"kept {show(ood['kept_fraction'], '.1%')}, AUROC {show(ood['auroc'], '.3f')}, "
                 f"threshold {show(ood['threshold'], '.3f')}")  # fmt: skip
    rows.add_row("homogeneity", f"{summary['homogeneity']['before']:.3f} before, {summary['homogeneity']['after']:.3f} after")
    rows.add_row("throughput", f"{summary['throughput']['samples_per_second']:,.0f} samples/s ({summary['engine']}), whole run "
                 f"{clock(summary['throughput']['seconds'])}, peak memory {size(summary['peak_memory_bytes'])}")  # fmt: skip
    rows.add_row("files", str(folder))
    Console().print(rows)


def pictures(folder: Path, lines: list[dict], graph: Graph, accuracy: list[float], before: np.ndarray, after: np.ndarray,
             classes: tuple[str, ...]) -> None:  # fmt: skip
    """``plots/``: accuracy over epochs, the graph coloured by accuracy, label mass [n, k] per node before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
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
    figure.savefig(folder / "accuracy.png", dpi=150)

    graph.draw(folder / "graph.png", values=[100 * a for a in accuracy])

    figure = Figure(figsize=(10, 0.25 * len(before) + 1.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, mass, title in ((left, before, "private"), (right, after, "private + distilled")):
        offset = 0 * mass[:, 0]
        for c in range(mass.shape[1]):
            axes.barh(range(len(mass)), mass[:, c], left=offset, height=0.8, label=classes[c] if mass.shape[1] <= 20 else None)
            offset = offset + mass[:, c]
        axes.set(title=title, xlabel="training samples (mass) by class")
    left.set(ylabel="node", yticks=range(0, len(before), max(1, len(before) // 16)))
    left.invert_yaxis()
    if before.shape[1] <= 20:
        right.legend(fontsize="x-small", ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "labels.png", dpi=150)


def started(parts: dict[str, str]) -> str:
    """The lines above the first evaluation."""
    return "\n".join(f"{k:<10} {v}" for k, v in parts.items()) + f"\n{head()}"
