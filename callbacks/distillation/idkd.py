"""In-distribution knowledge distillation, and distillation without its filter."""

from __future__ import annotations

import math
from typing import Literal

from callbacks.distillation.aggregation import Mean
from lightning_idkd.callback import Aggregation, Distillation
from lightning_idkd.errors import require


class IDKD(Distillation):
    """Exchange and average the soft labels of those public samples that a node's detector calls in-distribution
    (Ravikumar et al., TMLR 2024).

    Args:
        start: First exchange: a fraction of the epochs below 1, else an epoch; it takes place before that epoch.
        every: Epochs between exchanges; null for one exchange only.
        temperature: Softmax temperature of the soft labels, above 0.
        labels: At later exchanges, ``fresh`` labels and selections, or the last averages ``relayed`` one hop further.
        steps: ``equal`` keeps the number of steps an epoch; ``grow`` uses the mean size of private + distilled sets.
        aggregation: How labels of one sample become one: Mean, ClassCount; null for Mean.
    """

    calibrated = True

    def __init__(self, start: int | float = 0.6, every: int | None = None, temperature: float = 1.0,
                 labels: Literal["fresh", "relayed"] = "fresh", steps: Literal["equal", "grow"] = "equal",
                 aggregation: Aggregation | None = None):  # fmt: skip
        super().__init__(start, every, steps)
        require(0 < temperature < math.inf, "distillation.temperature", temperature, "above 0")
        self.temperature, self.labels = temperature, labels
        self.aggregation = aggregation or Mean()
        self.shares = self.aggregation.shares

    def select(self, run, public):
        """Indices [s] into the public set, for every node here; ``public`` are the nodes' outputs on it."""
        return [selection.kept.nonzero()[:, 0] for selection in run.calibrate(public)]

    def label(self, run):
        from lightning_idkd.network import Labels

        if self.labels == "relayed" and run.store.distilled is not None:
            return run.store.distilled
        public = [run.predict_public(i) for i in range(run.stack.n)]
        return [
            Labels(kept, (outputs.logits[kept] / self.temperature).softmax(1))
            for outputs, kept in zip(public, self.select(run, public), strict=True)
        ]

    def aggregate(self, run, received):
        self.aggregation.prepare(run)
        return [self.aggregation(labels) for labels in received]


class VanillaKD(IDKD):
    """Distillation on every public sample, without a filter.

    Args:
        start: First exchange: a fraction of the epochs below 1, else an epoch; it takes place before that epoch.
        every: Epochs between exchanges; null for one exchange only.
        temperature: Softmax temperature of the soft labels, above 0.
        labels: At later exchanges, ``fresh`` labels, or the last averages ``relayed`` one hop further.
        steps: ``equal`` keeps the number of steps an epoch; ``grow`` uses the mean size of private + distilled sets.
        aggregation: How labels of one sample become one: Mean, ClassCount; null for Mean.
    """

    calibrated = False

    def select(self, run, public):
        import torch

        return [torch.arange(len(outputs.logits), device=outputs.logits.device) for outputs in public]
