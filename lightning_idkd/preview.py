"""What a graph or a partition is like, before any training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_idkd.graph import WATCHED, Graph
from lightning_idkd.report import size

if TYPE_CHECKING:
    from lightning_idkd.config import Config

SUMS = {"doubly": "rows and columns sum to 1", "column": "columns sum to 1", "row": "rows sum to 1"}


def image_shape(config: Config) -> tuple[int, int]:
    """Channels and side of the images, as far as they are known without reading any: those of the digits, or of CIFAR."""
    digits = type(config.data.private).__name__ == "Digits"
    return 1 if digits else 3, config.data.image_size or (8 if digits else 32)


def parameters(config: Config) -> tuple[int, str]:
    """Number of parameters of a node for 10 classes of such images, and what was counted in words."""
    from lightning_idkd.fit import node_maker

    channels, side = image_shape(config)
    count = sum(p.numel() for p in node_maker(config, channels, side, 10)().parameters())
    return count, f"{count:,} parameters of {type(config.node.network).__name__} for {channels}x{side}x{side}, 10 classes"


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
    expected = 0 if gap == 1 else math.log(1000) / -math.log1p(-gap) if gap > 0 else math.inf
    if expected > most:
        return f"about {expected:,.0f} steps to 1/1000 of the distance, by the spectral gap"
    found = graph.consensus_steps(2 * most)
    exact = graph.consensus_steps(found, 1e-12) is not None
    return f"the exact mean after {found} steps" if exact else f"{found:,} steps to 1/1000 of the distance"
