"""The work that every script of this folder does: digits, a small CNN, plain SGD. No program under comparison is used.

Environment variables shorten it: ``PEERS_STEPS`` (steps of a node on the ring) and ``PEERS_ROUNDS`` (of FedAvg).
"""

from __future__ import annotations

import json
import os
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

NODES, STEPS = 16, int(os.environ.get("PEERS_STEPS", 300))
CLIENTS, ROUNDS, EPOCHS = 100, int(os.environ.get("PEERS_ROUNDS", 10)), 5
BATCH, LR = 16, 0.1
SAMPLES = 1438  # for training; 359 are for the test, as in lightning-idkd's Digits


@cache
def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1438, 1, 8, 8] and labels, test images [359, 1, 8, 8] and labels."""
    images, labels = load_digits(return_X_y=True)
    arrays = train_test_split(images, labels, train_size=SAMPLES, stratify=labels, random_state=0)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in arrays[:2])
    mean, std = train.mean(), train.std()
    return (train - mean) / std, torch.tensor(arrays[2]), (test - mean) / std, torch.tensor(arrays[3])


def share(node: int, nodes: int) -> tuple[Tensor, Tensor]:
    """The training images and labels of a node; they are in random order already."""
    images, labels, _, _ = load()
    return images[node::nodes], labels[node::nodes]


def network(seed: int | None = None) -> nn.Module:
    """The CNN, with 14,458 parameters."""
    if seed is not None:
        torch.manual_seed(seed)

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return [conv, nn.GroupNorm(8, outputs), nn.ReLU()]

    features = nn.Sequential(*layer(1, 16), *layer(16, 32), nn.MaxPool2d(2), *layer(32, 32))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def accuracy(model: nn.Module) -> float:
    """Share of the test images that the model gets right."""
    _, _, images, labels = load()
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).double().mean().item()


def report(samples: int, seconds: float, accuracies: list[float]) -> None:
    """Print the line that run.py reads: trained samples, seconds of steady training, mean test accuracy."""
    mean = sum(accuracies) / len(accuracies)
    print(json.dumps({"samples": samples, "seconds": seconds, "accuracy": mean}), flush=True)
