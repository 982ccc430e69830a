"""Neighbours' models as teachers on a node's own samples: no public set."""

from __future__ import annotations

import math

from lightning_idkd.callback import Distillation
from lightning_idkd.errors import require


class MutualKD(Distillation):
    """Neighbours trade models, and each learns its own samples from the neighbours' answers too: mutual distillation without a
    public set, after Def-KT (Li, Li & Varshney, 2021).

    There a pair trains both models on one node's batch at once; here both ends of every edge learn, from models as they were
    at the exchange. Models cross (counted as parameters), labels of private samples do not.

    Args:
        start: First exchange: a fraction of the epochs below 1, else an epoch; it takes place before that epoch.
        every: Epochs between exchanges; null for one exchange only.
        temperature: Softmax temperature of the neighbours' answers, above 0.
        weight: Share of the neighbours' answers in a sample's label, 0 to 1.
    """

    public = False
    label = aggregate = None

    def __init__(self, start: int | float = 0.6, every: int | None = 4, temperature: float = 1.0, weight: float = 0.5):
        super().__init__(start, every)
        require(0 < temperature < math.inf, "distillation.temperature", temperature, "above 0")
        require(0 <= weight <= 1, "distillation.weight", weight, "0 to 1")
        self.temperature, self.weight = temperature, weight

    def exchange(self, run):
        import torch
        import torch.nn.functional as F

        from lightning_idkd.nodes.stack import run_network

        known = run.network.share(run.stack.X, run.step, kind="parameter")
        mixing, soft = run.network.graph.mixing(run.step), []
        for i, node in enumerate(run.network.rows):
            answers = []
            for j in mixing.neighbours(node):
                teacher = run.stack.model(known[j].to(run.stack.X), {k: b[i] for k, b in run.stack.buffers.items()})
                logits = run_network(teacher, run.store.private_batches(run.store.own[i].cpu())).logits
                answers.append((logits / self.temperature).softmax(1))
            alone = F.one_hot(run.store.labels[run.store.own[i]], run.store.k)  # no neighbours at this step
            soft.append(torch.stack(answers).mean(0) if answers else alone)
        run.store.soften(soft, self.weight)
        run.phase = "distil"
        return []
