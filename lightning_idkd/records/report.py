"""What a person sees: one aligned line an evaluation, the final table, a report."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from lightning_idkd.callback import format_probability
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAUSE = 10  # seconds between lines of progress
COLUMNS = ("epoch", "phase", "loss", "node mean", "min", "max", "consensus", "distance", "sent", "samples/s", "left")
_FORM = "{:>9}  {:<7} {:>7}  {:>9} {:>6} {:>6} {:>10} {:>9} {:>9} {:>10} {:>7}"


def format_head() -> str:
    """The line above the columns; accuracies in percent."""
    return _FORM.format(*COLUMNS)


def format_bytes(n: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def format_duration(seconds: float) -> str:
    """Minutes and seconds, hours where it takes that long."""
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Countdown:
    """Says every 10 s how far a long piece of work is.

    Args:
        what: the work, in words.
        total: its steps.
        say: prints a line.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None]):
        self.what, self.total, self.say, self.done = what, total, say, 0
        self.started = self.said = time.monotonic()

    def step(self) -> None:
        """One step begins."""
        now = time.monotonic()
        if now - self.said >= PAUSE:
            self.said, share = now, min(max(self.done, 1) / self.total, 1)
            self.say(
                format_field(
                    "progress", f"{self.what}: {share:.0%}, {format_duration((now - self.started) * (1 - share) / share)} left"
                )
            )
        self.done += 1


def describe_exchange(exchange: dict, kept: float) -> str:
    """The lines about an exchange of labels; ``kept`` is the share of the public set that nodes keep."""
    sizes, (before, after) = exchange["distilled"], exchange["homogeneity"]
    text = (
        f"exchange before epoch {exchange['epoch'] + 1}: kept {kept:.1%} of the public set, "
        f"{sum(sizes) / len(sizes):,.0f} distilled samples a node, heterogeneity {before:.3f} -> {after:.3f}"
    )
    if empty := [str(node) for node, size in enumerate(sizes) if not size]:
        text += f"\nno distilled samples for {len(empty)} nodes: {', '.join(empty)}"
    return text


def format_line(metrics: dict, epochs: int, left: float) -> str:
    """One evaluation; ``left`` in seconds."""
    epoch = metrics["epoch"]
    sent = sum(v for k, v in metrics.items() if k.startswith("communication/") and k.endswith("_bytes"))
    percent = [f"{100 * metrics[f'accuracy/{k}']:.1f}" for k in ("node_mean", "node_min", "node_max", "consensus")]
    return _FORM.format(
        f"{epoch}/{epochs}", metrics["phase"], f"{metrics['train/loss']:.4f}" if "train/loss" in metrics else "-", *percent,
        f"{metrics['consensus_distance']:.4f}", format_bytes(sent), f"{metrics['throughput/samples_per_second']:,.0f}",
        format_duration(left),
    )  # fmt: skip


def print_table(summary: dict, folder: Path) -> None:
    """The final table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = Table(title=format_title(summary), title_justify="left", show_header=False)
    for key, value in list_results(summary):
        rows.add_row(key, escape(value))
    Console().print(rows)
    print(f"files: {folder}")  # outside the table, which would cut it


def format_start(parts: dict[str, str]) -> str:
    """The lines above the first evaluation."""
    return "\n".join(format_field(k, v) for k, v in parts.items()) + f"\n{format_head()}"


def format_field(name: str, text: str) -> str:
    """One of them."""
    return f"{name:<10} {text}"


def list_results(summary: dict) -> list[tuple[str, str]]:
    """The rows of the final table."""
    accuracy, sent, ood = summary["accuracy"], summary["communication"], summary["ood"]

    def show(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    merged = " and the exact mean" if summary.get("final_merge") else ""
    rows = [
        (
            f"node accuracy, after {summary['final_gossip']} final gossip{merged}",
            f"{accuracy['node_mean']:.2%} (sd {accuracy['node_std']:.2%}, worst {accuracy['node_min']:.2%}, best "
            f"{accuracy['node_max']:.2%})",
        ),
        ("node accuracy before it", f"{accuracy['node_mean_before_final_gossip']:.2%}"),
        ("consensus model", f"{accuracy['consensus']:.2%}"),
        ("consensus distance", f"{summary['consensus_distance']:.4f}"),
        (
            "sent",
            f"{format_bytes(sent['parameter_bytes'])} parameters, {format_bytes(sent['label_bytes'])} labels, "
            f"{format_bytes(sent['other_bytes'])} other, "
            f"{sent['messages']:,} messages",
        ),
        (
            "beyond training alone",
            f"{show(sent.get('overhead_at_equal_steps'), '+.2%')} bytes at equal steps, "
            f"{show(sent.get('overhead_at_equal_epochs'), '+.2%')} at equal epochs",
        ),
    ]
    selected = ood["threshold"] is not None
    if selected:
        kept = f"kept {show(ood['kept_fraction'], '.1%')} (own data {show(ood.get('own_kept'), '.1%')}, noise "
        rows += [
            ("public set", f"{kept}{show(ood.get('noise_kept'), '.1%')})"),
            ("AUROC, held-out own against public samples", show(ood["auroc"], ".3f")),
            ("threshold", format_threshold(ood)),
        ]
    heterogeneity = [f"{summary['homogeneity'][when]:.3f}" for when in ("before", "after")]
    exchanged = bool(summary.get("exchanges"))
    return [
        *rows,
        ("heterogeneity", "{} before, {} after".format(*heterogeneity) if exchanged else heterogeneity[0]),
        (
            "throughput",
            f"{summary['throughput']['samples_per_second']:,.0f} samples/s ({summary['engine']}), whole run "
            f"{format_duration(summary['throughput']['seconds'])}, peak memory "
            f"{format_bytes(summary['peak_memory_bytes'])} (predicted: {format_bytes(summary['predicted_memory_bytes'])})",
        ),
    ]


def format_threshold(ood: dict) -> str:
    """The nodes' mean threshold with the score's name and unit, and as a probability where the score has one."""
    if ood["threshold"] is None:
        return "-"
    p = ood.get("threshold_probability")
    parts = [ood.get("score") or "", "" if p is None else f"probability {format_probability(p)}"]
    about = "; ".join(filter(None, parts))
    return f"{ood['threshold']:.3f}" + (f" ({about})" if about else "")


def format_title(summary: dict) -> str:
    """One line that says which run it is."""
    run = f"{summary['name']}, seed {summary['seed']}"
    return f"{run}: {summary['nodes']} nodes, {summary['epochs']} epochs, {summary['steps']} steps"


def write_report(run: str) -> Path:
    """``report.md`` in a finished run's folder: its numbers, pictures and config."""
    from pathlib import Path

    from lightning_idkd.records.run_folder import RunFolder

    folder = RunFolder(Path(run).resolve())
    summary = folder.summary()
    if summary is None:
        begun, none = "has not come to its end: go on with --run.resume auto", "is no run; give one such as runs/NAME/latest"
        raise UserError(f"'{run}' {begun if folder.file('config.yaml').exists() else none}")
    table = "".join(f"| {key} | {value} |\n" for key, value in list_results(summary))
    plots = sorted(folder.file("plots").glob("*.png"), key=lambda p: (p.stem.split("_")[0], p.stat().st_mtime_ns))
    pictures = "\n".join(f"![{p.stem.replace('_', ' ')}](plots/{p.name})\n" for p in plots)
    config = folder.file("config.yaml").read_text()
    folder.text(
        "report.md",
        f"# {format_title(summary)}\n\n| | |\n| --- | --- |\n{table}\n{pictures}\n## Config\n\n```yaml\n{config}```\n",
    )
    return folder.file("report.md")
