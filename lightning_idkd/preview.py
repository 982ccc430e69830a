"""What a graph or a partition is like, before any training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_idkd.graph import WATCHED, Graph
from lightning_idkd.report import size

if TYPE_CHECKING:
    from lightning_idkd.config import Config
    from lightning_idkd.data.partition import Split

NAMED = 20  # classes that fit a table, a column each
SUMS = {"doubly": "rows and columns sum to 1", "column": "columns sum to 1", "row": "rows sum to 1"}


def image_shape(config: Config) -> tuple[int, int]:
    """Channels and side of the images, as far as they are known without reading any: those of the digits, or of CIFAR."""
    digits = type(config.data.private).__name__ == "Digits"
    return config.data.channels or (1 if digits else 3), config.data.image_size or (8 if digits else 32)


def parameters(config: Config) -> tuple[int, str]:
    """Number of trained parameters of a node for 10 classes of such images, and what was counted in words."""
    from lightning_idkd.fit import node_maker
    from lightning_idkd.layout import trained

    channels, side = image_shape(config)
    node = node_maker(config, channels, side, 10)()
    count = sum(p.numel() for p in trained(node).values())
    kind = "parameters" if all(p.requires_grad for p in node.parameters()) else "trained parameters"
    return count, f"{count:,} {kind} of {type(config.node.network).__name__} for {channels}x{side}x{side}, 10 classes"


def topology(config: Config, graph: Graph) -> dict[str, str]:
    """The lines of ``idkd topology``; a graph that never repeats is judged by its first steps."""
    import numpy as np

    steps = graph.period or WATCHED
    degrees = np.array([np.bincount(graph.mixing(step).edges[:, 0], minlength=graph.nodes) for step in range(steps)])
    often = {1: "static", None: f"never repeats (numbers of its first {WATCHED} steps)"}
    count, counted = parameters(config)
    message = count * config.run.precision // 8
    return {
        "graph": f"{graph.name}, {graph.nodes} nodes, {often.get(graph.period, f'repeats after {graph.period} steps')}",
        "weights": f"{'its own' if graph.weights == 'edges' else graph.weights}, {SUMS[graph.kind]}",
        "degree": f"{degrees.min()} to {degrees.max()}, mean {degrees.mean():.3g}" + " (at a step)" * (graph.period != 1),
        "diameter": "-" if graph.diameter is None or graph.period is None else str(graph.diameter),
        "spectrum": f"gap {graph.spectral_gap():.4f}, smallest eigenvalue {round(graph.smallest_eigenvalue(), 4) + 0.0:.4f}",
        "consensus": consensus(graph),
        "sends": f"{size(degrees.mean() * message)} a node and step, {size(degrees.sum(1).mean() * message)} all nodes, for one "
        f"message an edge ({counted})",
    }


def consensus(graph: Graph) -> str:
    """How long nodes need to agree, where they only mix."""
    gap, most = graph.spectral_gap(), 10_000
    if gap == 0:
        return "none within the first steps, in which no edge matters"
    expected = 0 if gap == 1 else math.log(1000) / -math.log1p(-gap) if gap > 0 else math.inf
    if expected > most:
        return f"about {expected:,.0f} steps to 1/1000 of the distance, by the spectral gap"
    found = graph.consensus_steps(2 * most)
    if found is None:
        return f"more than {2 * most:,} steps to 1/1000 of the distance"
    exact = graph.consensus_steps(found, 1e-12) is not None
    return f"the exact mean after {found} steps" if exact else f"{found:,} steps to 1/1000 of the distance"


def partition(split: Split) -> dict[str, str]:
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
