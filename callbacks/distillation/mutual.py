"""Mutual distillation: neighbours' models label a node's private samples, without a public set."""

from __future__ import annotations

import math

from lightning_idkd.callback import Distillation, Run
from lightning_idkd.errors import require
from lightning_idkd.labels import Labels


class MutualKD(Distillation):
    """Neighbours exchange models, and each node learns its private samples from their answers too: mutual distillation
    without a public set, after Def-KT (Li, Li & Varshney, 2021).

    In Def-KT a pair of nodes trains both models on a batch of one of them. Here both ends of every edge learn, from
    models as they were at the exchange. Models are sent (counted as parameters); labels of private samples are not.

    Args:
        start: Epoch before which the first exchange takes place; a number below 1 is a fraction of all epochs.
        every: Epochs between exchanges; null for a single exchange.
        temperature: Softmax temperature of the neighbours' answers, above 0.
        weight: Weight of the neighbours' answers in a sample's label, 0 to 1.
    """

    public = False
    label = aggregate = None

    def __init__(self, start: int | float = 0.6, every: int | None = 4, temperature: float = 1.0, weight: float = 0.5):
        super().__init__(start, every)
        require(0 < temperature < math.inf, "distillation.temperature", temperature, "above 0")
        require(0 <= weight <= 1, "distillation.weight", weight, "0 to 1")
        self.temperature, self.weight = temperature, weight

    def exchange(self, run: Run) -> list[Labels]:
        import torch
        import torch.nn.functional as F

        from lightning_idkd.nodes.stack import run_network

        models = run.network.share(run.stack.X, run.step, kind="parameter")
        mixing, soft = run.network.mixing(run.step), []
        for i, node in enumerate(run.network.rows):
            answers = []
            for j in mixing.neighbours(node):
                teacher = run.stack.model(models[j].to(run.stack.X), {k: b[i] for k, b in run.stack.buffers.items()})
                logits = run_network(teacher, run.store.private_batches(run.store.own[i].cpu())).logits
                answers.append((logits / self.temperature).softmax(1))
            labels = F.one_hot(run.store.labels[run.store.own[i]], run.store.k)  # for a node without neighbours
            soft.append(torch.stack(answers).mean(0) if answers else labels)
        run.soften(soft, self.weight)
        return []
