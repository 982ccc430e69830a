"""Measures the nodes: accuracy of each and of their mean, distance between them, heterogeneity of their data."""

from __future__ import annotations

import itertools
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


def compute_accuracies(outputs: Outputs, parts: list[Tensor]) -> Tensor:
    """Shares of samples that one model classifies correctly, float64 [S]; ``parts`` are the labels of S sets, whose
    samples follow each other in ``outputs``."""
    right = (outputs.logits.argmax(1) == torch.cat(parts)).double()
    return torch.stack([part.mean() for part in right.split([len(labels) for labels in parts])])


def evaluation_sets(
    store: Store, samples: dict[str, int | None]
) -> tuple[Callable[[], Iterator[Tensor]], list[Tensor]]:
    """Batches of the sets of :meth:`Store.evaluation_set`, one set after the other, and the labels of each.

    Args:
        samples: per split the number of samples; None for all.
    """
    sets = [store.evaluation_set(split, count) for split, count in samples.items()]
    return lambda: itertools.chain.from_iterable(batches() for batches, _ in sets), [labels for _, labels in sets]


def measure_accuracies(stack: NodeStack, network: Network, store: Store, samples: dict[str, int | None],
                       stop: Callable[[], bool]) -> dict[str, Tensor]:  # fmt: skip
    """Accuracy of every node [n] on every split, in one pass over all their samples.

    Args:
        samples: per split (``test``, or ``validation`` for the pooled samples) the number of samples; None for all.
        stop: whether to stop, asked before every batch.

    Raises:
        Stopped: in all processes, if ``stop`` returned True in one of them.
    """
    batches, labels = evaluation_sets(store, samples)

    def batches_until_stop() -> Iterator[Tensor]:
        for x in batches():
            if stop():
                raise Stopped
            yield x

    try:
        mine = torch.stack(stack.answers(batches_until_stop, lambda outputs: compute_accuracies(outputs, labels)))
    except Stopped:
        mine = torch.full((stack.n, len(labels)), -1.0, dtype=torch.float64, device=store.device)
    accuracies = network.report(mine).cpu()
    if (accuracies < 0).any():
        raise Stopped
    return dict(zip(samples, accuracies.T, strict=True))


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


def measure_model(module: NodeModule, store: Store, samples: dict[str, int | None]) -> dict[str, float]:
    """Accuracy of a single model on every split, on the samples that :func:`measure_accuracies` takes."""
    batches, labels = evaluation_sets(store, samples)
    accuracies = compute_accuracies(run_network(module, batches()), labels)
    return dict(zip(samples, accuracies.tolist(), strict=True))


def compute_heterogeneity(network: Network, store: Store) -> dict[str, float]:
    """How far the honest nodes' label masses are from the label mass of all private training samples; see
    :func:`metrics.heterogeneity`. Flipped labels count as they are trained on."""
    reference = store.labels[torch.cat([torch.from_numpy(t) for t in store.split.train]).to(store.device)]
    mass = network.honest(network.report(store.mass()))
    return metrics.heterogeneity(mass, reference.bincount(minlength=store.k).cpu())
