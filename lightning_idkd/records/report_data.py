"""Collects what the report of a run draws besides metrics and summary, for ``plots/report.json``: the label mass, the
graph's layout, the detectors' scores as histograms and ROC, and the versions that the run used.

The file holds no sample and no score of a single sample."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_idkd.machine import count_cores

if TYPE_CHECKING:
    import torch

    from lightning_idkd.graph import Graph

BINS = 36
"""Bins of a histogram of scores."""
GRID = np.linspace(0, 1, 101)
"""Shares of public samples kept at which the ROC is stored."""
MOST_EDGES = 6000
"""A graph with more edges is stored without them: a picture would be one dark area."""
PANELS = 16
"""Nodes whose histograms and ROC are stored: of more, the worst and the best half of this number by AUROC."""
PACKAGES = ("lightning-idkd", "torch", "lightning", "numpy")


def collect(
    classes: Sequence[str],
    before: np.ndarray,
    after: np.ndarray | None,
    graph: Graph,
    scores: list[tuple],
    aurocs: Sequence[float],
    score: str,
    device: str,
) -> dict[str, Any]:
    """Collect the content of ``plots/report.json``.

    Args:
        classes: their names, in the order of the columns of label masses.
        before: mass of the private training samples [n, k].
        after: mass with the distilled samples [n, k]; None for a run without.
        scores: per node, the scores of its own, of public and of noise samples, and its threshold; empty for none.
        aurocs: per node; nan for a node without held-out samples.
        score: name and unit of the score.
        device: where the nodes have trained.
    """
    return {
        "classes": list(classes),
        "label_mass": {"before": before.tolist(), "after": None if after is None else np.round(after, 3).tolist()},
        "graph": describe_graph(graph),
        "detector": summarise_scores(scores, aurocs, score) if scores else None,
        "environment": describe_environment(device),
    }


def describe_graph(graph: Graph) -> dict[str, Any]:
    """Positions [n, 2] and edges [E, 2] of a graph as it is drawn, and which steps these are of a graph that changes.

    A graph of more than 6,000 edges has none here.
    """
    union, positions = graph.layout()
    edges = [list(edge) for edge in union.edges]
    places = [[round(float(v), 4) for v in positions[node]] for node in range(graph.nodes)]
    return {
        "positions": places,
        "edges": edges if len(edges) <= MOST_EDGES else [],
        "edge_count": len(edges),
        "steps": graph.describe_steps(),
        "spectral_gap": round(graph.spectral_gap(), 6),
    }


def name_device(device: torch.device) -> str:
    """The name of a CUDA device, else its type."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe_environment(device: str) -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, the machine, its cores and the device."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    machine = f"{platform.system()} {platform.machine()}, {count_cores()} cores"
    return versions | {"machine": machine, "device": device}


def summarise_scores(scores: list[tuple], aurocs: Sequence[float], score: str) -> dict[str, Any]:
    """Histograms and ROC of the nodes with the smallest and the largest AUROC, and the mean ROC of all.

    The ROC has, at each of :data:`GRID`'s shares of public samples kept, the share of held-out own samples kept; nodes
    without held-out samples do not enter it.
    """
    held = [i for i, value in enumerate(aurocs) if np.isfinite(value)]
    shown = choose_nodes(aurocs)
    curves = {i: trace_roc(*scores[i][:2]) for i in held}
    dots = {}
    for i in held:
        private, public, _, threshold = scores[i]
        dots[i] = [round(float((values >= threshold).mean()), 4) for values in (public, private)]
    return {
        "score": score,
        "histograms": [{"node": i} | bin_scores(*scores[i], held_out=i in held) for i in shown],
        "roc": {
            "nodes": [{"node": i, "kept": curves[i].round(4).tolist(), "at": dots[i]} for i in shown if i in held],
            "mean": np.mean([curves[i] for i in held], axis=0).round(4).tolist() if held else None,
        },
    }


def choose_nodes(aurocs: Sequence[float]) -> list[int]:
    """All nodes; of more than 16, the 8 with the smallest and the 8 with the largest AUROC, ascending by it."""
    nodes, half = list(range(len(aurocs))), PANELS // 2
    if len(nodes) <= PANELS:
        return nodes
    ranked = sorted(nodes, key=lambda i: (not np.isfinite(aurocs[i]), aurocs[i]))  # nodes without an AUROC come last
    known = int(np.isfinite(aurocs).sum())
    return ranked[:half] + ranked[max(half, known - half) :][:half]


def trace_roc(own: np.ndarray, public: np.ndarray) -> np.ndarray:
    """The share of ``own`` scores kept at every share in :data:`GRID` of ``public`` scores kept, between the thresholds
    on a straight line."""
    cuts = np.unique(np.concatenate([own, public]))[::-1]
    x, y = ([0, *(1 - np.searchsorted(np.sort(v), cuts) / len(v))] for v in (public, own))
    return np.interp(GRID, x, y)


def bin_scores(own: np.ndarray, public: np.ndarray, noise: np.ndarray, threshold: float, held_out: bool) -> dict:
    """Shares of a node's scores in 36 bins from the 0.5 % to the 99.5 % quantile of own and public ones.

    The axis is widened to the threshold unless that lies far outside. ``noise`` and the others count only what lies on
    the axis; ``noise_outside`` has the shares below and above.
    """
    ends = np.concatenate([np.quantile(v, [0.005, 0.995]) for v in (own, public) if len(v)])
    low, high = float(ends.min()), float(ends.max())
    if abs(threshold - (low + high) / 2) <= 1.5 * (high - low):
        low, high = min(low, threshold), max(high, threshold)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    shares = {}
    for kind, values in (("own", own), ("public", public), ("noise", noise)):
        counts = np.histogram(values, BINS, (low, high))[0]
        shares[kind] = (counts / len(values)).round(4).tolist() if len(values) else []
    outside = [round(float(part.mean()), 4) if len(noise) else 0.0 for part in (noise < low, noise > high)]
    return {"low": low, "high": high, "threshold": float(threshold), "held_out": held_out, **shares,
            "noise_outside": outside}  # fmt: skip
