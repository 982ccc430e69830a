"""``idkd topology``: prints the properties of a graph, before any training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_idkd.command.options import configure, draw
from lightning_idkd.graph import LARGE, WATCHED, Graph
from lightning_idkd.records import report

if TYPE_CHECKING:
    from lightning_idkd.config import Config
    from lightning_idkd.data.inputs import Inputs

WEIGHT_SUMS = {"doubly": "rows and columns sum to 1", "column": "columns sum to 1", "row": "rows sum to 1"}
"""Per kind of mixing matrix, what its entries sum to."""


def main(arguments: list[str]) -> int:
    """Print a graph's properties and draw it."""
    config = configure(["--data.private", "Digits", *arguments], "topology")  # a set must be named, but none is read
    graph = config.graph.build(config.seed)
    for name, text in describe_graph(config, graph).items():
        print(report.format_field(name, text))
    draw(config.resolved["out"], f"{graph.name.lower()}_{graph.nodes}.png", graph.draw)
    return 0


def describe_graph(config: Config, graph: Graph) -> dict[str, str]:
    """The lines of ``idkd topology``: names and texts. A graph that never repeats is described by its first steps."""
    import numpy as np

    steps = graph.period or WATCHED
    degrees = np.array([np.bincount(graph.mixing(step).edges[:, 0], minlength=graph.nodes) for step in range(steps)])
    if graph.period == 1:
        repeats = "static"
    elif graph.period is None:
        repeats = f"never repeats (numbers of its first {WATCHED} steps)"
    else:
        repeats = f"repeats after {graph.period} steps"
    at_a_step = "" if graph.period == 1 else " (at a step)"
    smallest = round(graph.smallest_eigenvalue(), 4) + 0.0  # adding 0 turns -0 into 0
    spectrum = f"gap {format_gap(graph.spectral_gap())}"
    if not math.isnan(smallest):
        spectrum += f", smallest eigenvalue {smallest:.4f}"
    count, counted = count_parameters(config)
    message = count * config.run.precision // 8
    return {
        "graph": f"{graph.name}, {graph.nodes} nodes, {repeats}",
        "weights": f"{'its own' if graph.weights == 'edges' else graph.weights}, {WEIGHT_SUMS[graph.kind]}",
        "degree": f"{degrees.min()} to {degrees.max()}, mean {degrees.mean():.3g}{at_a_step}",
        "diameter": describe_diameter(graph),
        "spectrum": spectrum,
        "consensus": describe_consensus(graph),
        "sends": f"{report.format_bytes(degrees.mean() * message)} a node and step, "
        f"{report.format_bytes(degrees.sum(1).mean() * message)} all nodes, for one message an edge ({counted})",
    }


def describe_diameter(graph: Graph) -> str:
    """The diameter; a lower bound for many nodes, and - where there is none."""
    if graph.period is None or not graph.connected:
        return "-"
    return str(graph.diameter) if graph.nodes <= LARGE else f"at least {graph.diameter_bound}"


def format_gap(gap: float) -> str:
    """Format a spectral gap with four digits, however small it is."""
    return f"{gap:.4f}" if gap == 0 or gap >= 0.001 else f"{gap:.3e}"


def describe_consensus(graph: Graph) -> str:
    """After how many steps nodes agree if they only mix. Many steps are estimated by the spectral gap, few are run."""
    gap, limit = graph.spectral_gap(), min(10_000, 10_000_000 // graph.nodes)
    if gap == 0:
        return "none within the first steps, in which no edge matters"
    expected = math.inf
    if gap > 0:
        expected = 0 if gap == 1 else math.log(1000) / -math.log1p(-gap)
    if expected > limit:
        return f"about {expected:,.0f} steps to 1/1000 of the distance, by the spectral gap"
    steps = graph.consensus_steps(2 * limit)
    if steps is None:
        return f"more than {2 * limit:,} steps to 1/1000 of the distance"
    if graph.consensus_steps(steps, 1e-12) is not None:
        return f"the exact mean after {steps} steps"
    return f"{steps:,} steps to 1/1000 of the distance"


def count_parameters(config: Config) -> tuple[int, str]:
    """The number of trained parameters of a node for 10 classes of such samples, and a text that says what counts."""
    from lightning_idkd.nodes.layout import trained_parameters
    from lightning_idkd.training.build import node_maker

    inputs = expect_inputs(config)
    node = node_maker(config, inputs, 10)()
    count = sum(p.numel() for p in trained_parameters(node).values())
    kind = "parameters" if all(p.requires_grad for p in node.parameters()) else "trained parameters"
    return count, f"{count:,} {kind} of {type(config.node.network).__name__} for {inputs}, 10 classes"


def expect_inputs(config: Config) -> Inputs:
    """The form that the samples probably have: the config's where it says so. Only small tables are read."""
    return config.data.private.expect(config.data.image_size, config.data.channels)
