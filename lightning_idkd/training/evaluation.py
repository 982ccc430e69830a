"""What is measured of the nodes: accuracy of each and of their mean, distance between them, heterogeneity of their data."""

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


def accuracy(outputs: Outputs, labels: Tensor) -> Tensor:
    """Share of samples that one model classifies rightly, a float64 scalar."""
    return (outputs.logits.argmax(1) == labels).double().mean()


class Stopped(Exception):
    """A process was asked to stop, and all do."""


def accuracies(stack: NodeStack, network: Network, store: Store, split: str, samples: int | None,
               stop: Callable[[], bool]) -> Tensor:  # fmt: skip
    """Accuracy of every node [n] on ``samples`` (None: all) of the ``test`` or the pooled ``validation`` samples.

    Raises:
        Stopped: on all processes, where on any of them ``stop`` said so before a batch.
    """
    batches, labels = store.examined(split, samples)

    def going_on() -> Iterator[Tensor]:
        for x in batches():
            if stop():
                raise Stopped
            yield x

    try:
        here = torch.stack(stack.answers(going_on, lambda outputs: accuracy(outputs, labels)))
    except Stopped:
        here = torch.full((stack.n,), -1.0, dtype=torch.float64, device=labels.device)
    found = network.report(here[:, None])[:, 0].cpu()
    if (found < 0).any():
        raise Stopped
    return found


def over_nodes(values: Tensor) -> dict[str, float]:
    """Mean, standard deviation (over n), least and most of one value a node [n]."""
    return {
        "node_mean": values.mean().item(),
        "node_std": values.std(correction=0).item(),
        "node_min": values.min().item(),
        "node_max": values.max().item(),
    }


def consensus(stack: NodeStack, network: Network) -> NodeModule:
    """The mean of all nodes, with averaged norm buffers."""
    buffers = {k: network.report(b) for k, b in stack.buffers.items()}
    return stack.model(network.report(stack.X).mean(0), mean_buffers(buffers))


def of_one(module: NodeModule, store: Store, split: str, samples: int | None) -> float:
    """Accuracy of a single model, as :func:`accuracies` has it."""
    batches, labels = store.examined(split, samples)
    return accuracy(run_network(module, batches()), labels).item()


def measure(stack: NodeStack, network: Network, store: Store, samples: int | None, validation: int,
            stop: Callable[[], bool]) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """Metrics of the nodes as they are, on so many test (None: all) and validation samples, and every node's test accuracy."""
    mean, found = consensus(stack, network), {}
    nodes = accuracies(stack, network, store, "test", samples, stop)
    found |= {f"accuracy/{k}": v for k, v in over_nodes(nodes).items()}
    found["accuracy/consensus"] = of_one(mean, store, "test", samples)
    if any(len(held_out) for held_out in store.split.validation):
        found["validation/node_mean"] = accuracies(stack, network, store, "validation", validation, stop).mean().item()
        found["validation/consensus"] = of_one(mean, store, "validation", validation)
    found["consensus_distance"] = metrics.consensus_distance(network.report(stack.X))
    return found, nodes.tolist()


def compute_heterogeneity(network: Network, store: Store) -> dict[str, float]:
    """How far the nodes' label masses are from that of all private training samples; see :func:`metrics.heterogeneity`."""
    reference = store.labels[torch.cat([torch.from_numpy(t) for t in store.split.train]).to(store.device)]
    return metrics.heterogeneity(network.report(store.mass()), reference.bincount(minlength=store.k).cpu())
