"""Text for people: a run's progress with one aligned line per evaluation, and its final table."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from lightning_idkd.callback import format_probability

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAUSE = 10
"""Seconds between two lines of progress."""
COLUMNS = ("epoch", "phase", "loss", "node mean", "min", "max", "consensus", "distance", "sent", "samples/s", "left")
_FORM = "{:>9}  {:<7} {:>7}  {:>9} {:>6} {:>6} {:>10} {:>9} {:>9} {:>10} {:>7}"


AXES = {"epoch": "epochs", "bytes": "bytes sent", "time": "simulated seconds"}
"""What accuracy can be drawn over: the names of the axes and their headings."""


def format_head(simulated: bool = False) -> str:
    """Format the line of column names above the first evaluation. Accuracies are in percent.

    Args:
        simulated: whether the run has a clock.
    """
    return _FORM.format(*COLUMNS) + ("  simulated" if simulated else "")


def read_axis(line: dict, axis: str) -> float | None:
    """The place of a line of ``metrics.jsonl`` on an axis of :data:`AXES`; None without a simulated clock."""
    if axis == "bytes":
        return sum_bytes({k: v for k, v in line.items() if k.startswith("communication/")})
    return line.get("time/simulated" if axis == "time" else axis)


def sum_bytes(counts: dict[str, float]) -> float:
    """All bytes among the counts of what nodes have sent: of parameters, labels and others."""
    return sum(count for kind, count in counts.items() if kind.endswith("_bytes"))


def format_bytes(n: float) -> str:
    """Format a number of bytes with a decimal unit and three digits, such as 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def format_duration(seconds: float) -> str:
    """Format a duration as m:ss, or h:mm:ss from an hour on; `-` if it is not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Countdown:
    """Prints, every 10 s, how much of a long piece of work is done and how long the rest takes.

    Args:
        what: the work, in words.
        total: the number of its steps.
        say: prints a line.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None]):
        self.what, self.total, self.say, self.done = what, total, say, 0
        self.started = self.said = time.monotonic()

    def step(self) -> None:
        """Count a step that begins, and print the progress if the last line is 10 s old."""
        now = time.monotonic()
        if now - self.said >= PAUSE:
            share = min(max(self.done, 1) / self.total, 1)
            left = format_duration((now - self.started) * (1 - share) / share)
            self.say(format_field("progress", f"{self.what}: {share:.0%}, {left} left"))
            self.said = now
        self.done += 1


def describe_exchange(exchange: dict, kept: float) -> str:
    """Describe an exchange of labels in one or two lines; ``kept`` is the share of the public set that the nodes
    keep."""
    sizes, (before, after) = exchange["distilled"], exchange["homogeneity"]
    text = (
        f"exchange before epoch {exchange['epoch'] + 1}: kept {kept:.1%} of the public set, "
        f"{sum(sizes) / len(sizes):,.0f} distilled samples a node, heterogeneity {before:.3f} -> {after:.3f}"
    )
    if empty := [str(node) for node, size in enumerate(sizes) if not size]:
        text += f"\nno distilled samples for {len(empty)} nodes: {', '.join(empty)}"
    return text


def format_line(metrics: dict, epochs: int, left: float) -> str:
    """Format the line of one evaluation, with accuracies in percent.

    Args:
        metrics: a line of ``metrics.jsonl``.
        epochs: the run's number of epochs.
        left: expected seconds to the end of the run.
    """
    epoch = metrics["epoch"]
    sent, simulated = read_axis(metrics, "bytes"), read_axis(metrics, "time")
    loss = f"{metrics['train/loss']:.4f}" if "train/loss" in metrics else "-"
    percent = [f"{100 * metrics[f'accuracy/{k}']:.1f}" for k in ("node_mean", "node_min", "node_max", "consensus")]
    text = _FORM.format(
        f"{epoch}/{epochs}", metrics["phase"], loss, *percent,
        f"{metrics['consensus_distance']:.4f}", format_bytes(sent), f"{metrics['throughput/samples_per_second']:,.0f}",
        format_duration(left),
    )  # fmt: skip
    return text if simulated is None else f"{text}  {format_seconds(simulated):>9}"


def format_seconds(seconds: float) -> str:
    """Format simulated seconds with four digits, such as 0.1235 s."""
    return f"{seconds:.4g} s" if seconds < 1e4 else f"{seconds:,.0f} s"


def print_table(summary: dict, folder: Path) -> None:
    """Print the final table, and the run's folder below it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = Table(title=format_title(summary), title_justify="left", show_header=False)
    for key, value in list_results(summary):
        rows.add_row(key, escape(value))
    Console().print(rows)
    print(f"files: {folder}")  # outside the table, which would cut it


def format_start(parts: dict[str, str], simulated: bool = False) -> str:
    """Format the lines above the first evaluation: the run's parts by name, then the names of the columns."""
    return "\n".join(format_field(k, v) for k, v in parts.items()) + f"\n{format_head(simulated)}"


def format_field(name: str, text: str) -> str:
    """Format one aligned line `name  text`."""
    return f"{name:<10} {text}"


def list_results(summary: dict) -> list[tuple[str, str]]:
    """List the rows of the final table, as pairs of name and value."""
    accuracy, sent, ood, throughput = (summary[key] for key in ("accuracy", "communication", "ood", "throughput"))

    def show(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    merged = " and the exact mean" if summary.get("final_merge") else ""
    mean, sd, worst, best = (f"{accuracy[f'node_{key}']:.2%}" for key in ("mean", "std", "min", "max"))
    parameters, labels, other = (format_bytes(sent[f"{kind}_bytes"]) for kind in ("parameter", "label", "other"))
    steps, epochs = (show(sent.get(f"overhead_at_equal_{unit}"), "+.2%") for unit in ("steps", "epochs"))
    gossip = f"after {summary['final_gossip']} final gossip{merged}"
    rows = [
        (f"node accuracy, {gossip}", f"{mean} (sd {sd}, worst {worst}, best {best})"),
        ("node accuracy before it", f"{accuracy['node_mean_before_final_gossip']:.2%}"),
        ("consensus model", f"{accuracy['consensus']:.2%}"),
        ("consensus distance", f"{summary['consensus_distance']:.4f}"),
        ("sent", f"{parameters} parameters, {labels} labels, {other} other, {sent['messages']:,} messages"),
        ("beyond training alone", f"{steps} bytes at equal steps, {epochs} at equal epochs"),
    ]
    if "liars" in summary.get("faults", {}):
        rows.insert(
            3, ("lying nodes", f"{summary['faults']['liars']}, of {summary['faults']['liars_mean']:.2%} on average")
        )
    if ood["threshold"] is not None:
        public, own, noise = (show(ood.get(key), ".1%") for key in ("kept_fraction", "own_kept", "noise_kept"))
        rows += [
            ("public set", f"kept {public} (own data {own}, noise {noise})"),
            ("AUROC, held-out own against public samples", show(ood["auroc"], ".3f")),
            ("threshold", format_threshold(ood)),
        ]
    before, after = (f"{summary['homogeneity'][when]:.3f}" for when in ("before", "after"))
    rate, seconds = f"{throughput['samples_per_second']:,.0f} samples/s", format_duration(throughput["seconds"])
    peak, predicted = (format_bytes(summary[f"{kind}_memory_bytes"]) for kind in ("peak", "predicted"))
    memory = f"peak memory {peak} (predicted: {predicted})"
    if "simulated" in summary.get("time", {}):
        rows.append(("simulated time", format_seconds(summary["time"]["simulated"])))
    return [
        *rows,
        ("heterogeneity", f"{before} before, {after} after" if summary.get("exchanges") else before),
        ("throughput", f"{rate} ({summary['engine']}), whole run {seconds}, {memory}"),
    ]


def format_threshold(ood: dict) -> str:
    """Format the nodes' mean threshold with the score's name and unit, and as a probability if the score has one."""
    if ood["threshold"] is None:
        return "-"
    p = ood.get("threshold_probability")
    parts = [ood.get("score") or "", "" if p is None else f"probability {format_probability(p)}"]
    about = "; ".join(filter(None, parts))
    value = f"{ood['threshold']:.3f}"
    return f"{value} ({about})" if about else value


def format_title(summary: dict) -> str:
    """Format the line that says which run it is: name, seed, nodes, epochs and steps."""
    run = f"{summary['name']}, seed {summary['seed']}"
    return f"{run}: {summary['nodes']} nodes, {summary['epochs']} epochs, {summary['steps']} steps"
