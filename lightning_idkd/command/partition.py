"""``idkd partition``: shows how a partition divides the private set, before any training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_idkd.command.options import configure, draw

if TYPE_CHECKING:
    from lightning_idkd.data.partition import Split

MOST_COLUMNS = 20
"""Up to this number of classes the table has a column for each."""


def main(arguments: list[str]) -> int:
    """Print the label histogram of every node and draw it."""
    config = configure(arguments, "partition")
    from lightning_idkd.data.identity import collect_notes
    from lightning_idkd.data.partition import partition
    from lightning_idkd.records import pictures, report
    from lightning_idkd.training.build import load_private

    private = load_private(config)
    for note in collect_notes(("data.private", private)):
        print(report.format_field("note", note))
    labels, k = private.labels.numpy(), len(private.classes)
    split = partition(config.data.partition, labels, config.graph.nodes, config.seed, config.data.validation, k)
    print_table(split, private.classes)
    for name, text in describe_split(split).items():
        print(report.format_field(name, text))
    figure = pictures.draw_label_counts(split.histogram, private.classes)
    picture = f"{split.rule.lower()}_{config.graph.nodes}.png"
    draw(config.resolved["out"], picture, lambda file: figure.savefig(file, dpi=120))
    return 0


def describe_split(split: Split) -> dict[str, str]:
    """The lines below the table: their names and texts."""
    import torch

    from lightning_idkd.metrics import heterogeneity

    mass, sizes = torch.from_numpy(split.histogram), split.histogram.sum(1)
    skew = heterogeneity(mass, mass.sum(0))
    return {
        "partition": f"{split.rule}, hash {split.hash}",
        "sizes": f"{sizes.min():,} to {sizes.max():,}, mean {sizes.mean():,.1f}, training and validation together",
        "labels": f"heterogeneity {skew['tv']:.3f} (total variation, 0: all alike), "
        f"{skew['js']:.3f} bits Jensen-Shannon, {skew['classes']:.2f} effective classes a node",
    }


def print_table(split: Split, classes: tuple[str, ...]) -> None:
    """Print how many samples of each class every node holds.

    With more than :data:`MOST_COLUMNS` classes, print how many classes a node holds and which is the most frequent.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    few = len(classes) <= MOST_COLUMNS
    columns = [escape(name) for name in classes] if few else ["classes", "most frequent"]
    rows = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("node", "training", "held out", *columns):
        rows.add_column(name, justify="right", no_wrap=True)
    for node, row in enumerate(split.histogram):
        if few:
            counts = [f"{count:,}" if count else "." for count in row]
        else:
            counts = [str((row > 0).sum()), f"{escape(classes[row.argmax()])} {row.max() / row.sum():.0%}"]
        rows.add_row(str(node), f"{len(split.train[node]):,}", f"{len(split.validation[node]):,}", *counts)
    console = Console()
    width = rows.__rich_measure__(console, console.options.update(max_width=1000)).maximum
    console.width = max(console.width, 1 + width)  # so that no column is cut
    console.print(rows)
