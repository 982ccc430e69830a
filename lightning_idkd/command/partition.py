"""``idkd partition``: how a partition divides the private set, before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_idkd.command.options import configure, draw

if TYPE_CHECKING:
    from lightning_idkd.data.partition import Split

NAMED = 20  # classes that fit a table, a column each


def main(arguments: list[str]) -> int:
    """Print the label histogram of every node and draw it."""
    config = configure(arguments, "partition")
    from lightning_idkd.data.identity import collect_notes
    from lightning_idkd.data.partition import partition
    from lightning_idkd.records import pictures, report
    from lightning_idkd.training.build import private_images

    private = private_images(config)
    print("".join(report.format_field("note", note) + "\n" for note in collect_notes(("data.private", private))), end="")
    labels, k = private.labels.numpy(), len(private.classes)
    split = partition(config.data.partition, labels, config.graph.nodes, config.seed, config.data.validation, k)
    table(split, private.classes)
    print("\n".join(report.format_field(*found) for found in lines(split).items()))
    figure = pictures.draw_label_counts(split.histogram, private.classes)
    draw(config.resolved["out"], f"{split.rule.lower()}_{config.graph.nodes}.png", lambda file: figure.savefig(file, dpi=120))
    return 0


def lines(split: Split) -> dict[str, str]:
    """The lines of ``idkd partition`` below its table."""
    import torch

    from lightning_idkd.metrics import heterogeneity

    mass = torch.from_numpy(split.histogram)
    found, sizes = heterogeneity(mass, mass.sum(0)), split.histogram.sum(1)
    return {
        "partition": f"{split.rule}, hash {split.hash}",
        "sizes": f"{sizes.min():,} to {sizes.max():,}, mean {sizes.mean():,.1f}, training and validation together",
        "labels": f"heterogeneity {found['tv']:.3f} (total variation, 0: all alike), {found['js']:.3f} bits Jensen-Shannon, "
        f"{found['classes']:.2f} effective classes a node",
    }


def table(split: Split, classes: tuple[str, ...]) -> None:
    """Print how many samples of each class every node holds; of very many classes, how many it holds and the most frequent."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    few = len(classes) <= NAMED
    rows = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("node", "training", "held out", *(map(escape, classes) if few else ("classes", "most frequent"))):
        rows.add_column(name, justify="right", no_wrap=True)
    for node, row in enumerate(split.histogram):
        top = f"{escape(classes[row.argmax()])} {row.max() / row.sum():.0%}"
        counts = [f"{c:,}" if c else "." for c in row] if few else [str((row > 0).sum()), top]
        rows.add_row(str(node), f"{len(split.train[node]):,}", f"{len(split.validation[node]):,}", *counts)
    console = Console()
    console.width = max(console.width, 1 + rows.__rich_measure__(console, console.options.update(max_width=1000)).maximum)
    console.print(rows)
