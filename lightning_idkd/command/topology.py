"""``idkd topology``: what a graph is like, before any training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_idkd.command.options import configure, draw
from lightning_idkd.graph import WATCHED, Graph
from lightning_idkd.records import report

if TYPE_CHECKING:
    from lightning_idkd.config import Config

SUMS = {"doubly": "rows and columns sum to 1", "column": "columns sum to 1", "row": "rows sum to 1"}


def main(arguments: list[str]) -> int:
    """Print a graph's numbers and draw it."""
    config = configure(["--data.private", "Digits", *arguments], "topology")  # no data are needed or read
    graph = config.graph.build(config.seed)
    print("\n".join(report.format_field(*found) for found in lines(config, graph).items()))
    draw(config.resolved["out"], f"{graph.name.lower()}_{graph.nodes}.png", graph.draw)
    return 0


def lines(config: Config, graph: Graph) -> dict[str, str]:
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
        "sends": f"{report.format_bytes(degrees.mean() * message)} a node and step, "
        f"{report.format_bytes(degrees.sum(1).mean() * message)} all nodes, for one message an edge ({counted})",
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


def parameters(config: Config) -> tuple[int, str]:
    """Number of trained parameters of a node for 10 classes of such images, and what was counted in words."""
    from lightning_idkd.nodes.layout import trained_parameters
    from lightning_idkd.training.build import node_maker

    channels, side = guess_image_shape(config)
    node = node_maker(config, channels, side, 10)()
    count = sum(p.numel() for p in trained_parameters(node).values())
    kind = "parameters" if all(p.requires_grad for p in node.parameters()) else "trained parameters"
    return count, f"{count:,} {kind} of {type(config.node.network).__name__} for {channels}x{side}x{side}, 10 classes"


def guess_image_shape(config: Config) -> tuple[int, int]:
    """Channels and side of the images, as far as they are known without reading any: those of the digits, or of CIFAR."""
    digits = type(config.data.private).__name__ == "Digits"
    return config.data.channels or (1 if digits else 3), config.data.image_size or (8 if digits else 32)
