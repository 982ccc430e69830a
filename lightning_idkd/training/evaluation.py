"""Measures the nodes: accuracy of each and of their mean, distance between them, heterogeneity of their data."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_idkd import metrics
from lightning_idkd.data.store import Store
from lightning_idkd.labels import Outputs
from lightning_idkd.network import Network
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.nodes.stack import NodeStack, mean_buffers, run_network


class Stopped(Exception):
    """A process was asked to stop, and all processes do."""


def compute_accuracy(outputs: Outputs, labels: Tensor) -> Tensor:
    """Share of samples that one model classifies correctly, a float64 scalar."""
    return (outputs.logits.argmax(1) == labels).double().mean()


def measure_accuracies(stack: NodeStack, network: Network, store: Store, split: str, samples: int | None,
                       stop: Callable[[], bool]) -> Tensor:  # fmt: skip
    """Accuracy of every node [n] on ``samples`` (None: all) of the ``test`` or the pooled ``validation`` samples.

    Raises:
        Stopped: in all processes, where ``stop`` returned True before a batch in any of them.
    """
    batches, labels = store.examined(split, samples)

    def batches_until_stop() -> Iterator[Tensor]:
        for x in batches():
            if stop():
                raise Stopped
            yield x

    try:
        mine = torch.stack(stack.answers(batches_until_stop, lambda outputs: compute_accuracy(outputs, labels)))
    except Stopped:
        mine = torch.full((stack.n,), -1.0, dtype=torch.float64, device=labels.device)
    accuracies = network.report(mine[:, None])[:, 0].cpu()
    if (accuracies < 0).any():
        raise Stopped
    return accuracies


def summarise_nodes(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (over n), minimum and maximum of one value for each node [n]."""
    return {
        "node_mean": values.mean().item(),
        "node_std": values.std(correction=0).item(),
        "node_min": values.min().item(),
        "node_max": values.max().item(),
    }


def build_consensus(stack: NodeStack, network: Network) -> NodeModule:
    """The consensus model: the mean of all nodes, with averaged norm buffers."""
    buffers = {k: network.report(b) for k, b in stack.buffers.items()}
    return stack.model(network.report(stack.X).mean(0), mean_buffers(buffers))


def measure_model(module: NodeModule, store: Store, split: str, samples: int | None) -> float:
    """Accuracy of a single model on the samples that :func:`measure_accuracies` takes."""
    batches, labels = store.examined(split, samples)
    return compute_accuracy(run_network(module, batches()), labels).item()


def measure(stack: NodeStack, network: Network, store: Store, samples: int | None, validation: int,
            stop: Callable[[], bool]) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """The metrics of the nodes as they are, and every node's test accuracy.

    Args:
        samples: number of test samples; None for all.
        validation: number of validation samples.
        stop: whether to stop, asked before every batch.
    """
    consensus = build_consensus(stack, network)
    nodes = measure_accuracies(stack, network, store, "test", samples, stop)
    measured = {f"accuracy/{k}": v for k, v in summarise_nodes(nodes).items()}
    measured["accuracy/consensus"] = measure_model(consensus, store, "test", samples)
    if any(len(held_out) for held_out in store.split.validation):
        held_out = measure_accuracies(stack, network, store, "validation", validation, stop)
        measured["validation/node_mean"] = held_out.mean().item()
        measured["validation/consensus"] = measure_model(consensus, store, "validation", validation)
    measured["consensus_distance"] = metrics.consensus_distance(network.report(stack.X))
    return measured, nodes.tolist()


def compute_heterogeneity(network: Network, store: Store) -> dict[str, float]:
    """How far the nodes' label masses are from the label mass of all private training samples; see
    :func:`metrics.heterogeneity`."""
    reference = store.labels[torch.cat([torch.from_numpy(t) for t in store.split.train]).to(store.device)]
    return metrics.heterogeneity(network.report(store.mass()), reference.bincount(minlength=store.k).cpu())
