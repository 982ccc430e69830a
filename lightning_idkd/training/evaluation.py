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
    """A process was asked to stop, so that all processes stop their evaluation."""


def compute_accuracy(outputs: Outputs, labels: Tensor) -> Tensor:
    """Share of samples that one model classifies correctly, a float64 scalar."""
    return (outputs.logits.argmax(1) == labels).double().mean()


def measure_accuracies(stack: NodeStack, network: Network, store: Store, split: str, samples: int | None,
                       stop: Callable[[], bool]) -> Tensor:  # fmt: skip
    """Accuracy of every node [n] on ``samples`` (None: all) of the ``test`` or the pooled ``validation`` samples.

    Raises:
        Stopped: in all processes, if ``stop`` returned True before a batch in one of them.
    """
    batches, labels = store.evaluation_set(split, samples)

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


def build_consensus(stack: NodeStack, network: Network, mean: Tensor) -> NodeModule:
    """The consensus model: the ``mean`` [P] of all honest nodes, with their averaged norm buffers."""
    buffers = {k: network.honest(network.report(b)) for k, b in stack.buffers.items()}
    return stack.model(mean, mean_buffers(buffers))


def measure_model(module: NodeModule, store: Store, split: str, samples: int | None) -> float:
    """Accuracy of a single model on the samples that :func:`measure_accuracies` takes."""
    batches, labels = store.evaluation_set(split, samples)
    return compute_accuracy(run_network(module, batches()), labels).item()


def compute_heterogeneity(network: Network, store: Store) -> dict[str, float]:
    """How far the honest nodes' label masses are from the label mass of all private training samples; see
    :func:`metrics.heterogeneity`. Flipped labels count as they are trained on."""
    reference = store.labels[torch.cat([torch.from_numpy(t) for t in store.split.train]).to(store.device)]
    mass = network.honest(network.report(store.mass()))
    return metrics.heterogeneity(mass, reference.bincount(minlength=store.k).cpu())
