"""In-distribution knowledge distillation, and distillation without its filter."""

from __future__ import annotations

import math
from typing import Literal

from callbacks.distillation.aggregation import Mean
from lightning_idkd.callback import Aggregation, Distillation, Encoding, Teacher
from lightning_idkd.errors import require
from lightning_idkd.labels import FineTuning


def uniform_offset(logits):
    """Offsets [k] of the classes with which softmax of ``logits`` [m, k] is uniform on average, in float64 inside."""
    import torch

    z = logits.double()
    offset = torch.zeros_like(z[0])
    for _ in range(100):
        off = (z + offset).softmax(1).mean(0).clamp_min(1e-30).log() + math.log(z.shape[1])
        offset -= off
        if off.abs().max() < 1e-4:
            break
    return (offset - offset.mean()).to(logits)


class VanillaKD(Distillation):
    """Exchange and average the soft labels of all public samples, without a filter.

    Args:
        start: First exchange: a fraction of the epochs below 1, else an epoch; it takes place before that epoch.
        every: Epochs between exchanges; null for one exchange only.
        temperature: Softmax temperature of the labels, above 0; below 1 sharpens them.
        hard: Send the most probable class alone, as a label of zeros and a one.
        prior: How much of a node's own label prior its labels leave out: log of its (add-one) label frequencies times this is
            taken off the logits; 0 for none, 1 for all.
        align: Add to each class's logits what makes a node's labels of all public samples uniform on average (distribution
            alignment, Berthelot et al., ICLR 2020, with a uniform target): undoes a bias whatever it comes from.
        labels: At later exchanges ``fresh`` labels and selections, the last averages ``relayed`` one hop further, or fresh
            ones ``accumulated`` with older ones of other samples.
        hops: Times that an exchange passes the averages on to neighbours; 1 for neighbours' own labels alone.
        min_confidence: Averaged labels whose largest probability is below are dropped, 0 to 1 (the ensemble's selector of
            Selective-FD).
        steps: ``equal`` keeps the number of steps an epoch; ``grow`` uses the mean size of private + distilled sets.
        aggregation: How labels of one sample become one; null for Mean.
        teacher: Whose answers are sent; null for the node's own.
        encoding: How labels are written on an edge; null for 4-byte indices and float32 probabilities.
        tuning: How nodes train on private and distilled samples together.
    """

    def __init__(self, start: int | float = 0.6, every: int | None = None, temperature: float = 1.0, hard: bool = False,
                 prior: float = 0.0, align: bool = False, labels: Literal["fresh", "relayed", "accumulated"] = "fresh",
                 hops: int = 1, min_confidence: float = 0.0, steps: Literal["equal", "grow"] = "equal",
                 aggregation: Aggregation | None = None, teacher: Teacher | None = None, encoding: Encoding | None = None,
                 tuning: FineTuning | None = None):  # fmt: skip
        super().__init__(start, every, steps, tuning)
        require(0 < temperature < math.inf, "distillation.temperature", temperature, "above 0")
        require(0 <= prior < math.inf, "distillation.prior", prior, "0 or more")
        require(hops >= 1, "distillation.hops", hops, "1 or more")
        require(0 <= min_confidence <= 1, "distillation.min_confidence", min_confidence, "0 to 1")
        self.temperature, self.hard, self.prior, self.align = temperature, hard, prior, align
        self.labels, self.hops = labels, hops
        self.min_confidence, self.teacher, self.encoding = min_confidence, teacher or Teacher(), encoding
        self.aggregation = aggregation or Mean()
        self.declare(self.aggregation.shares)

    def select(self, run, public):
        """(index [s], weights [s] or None) of what every node here sends; ``public`` are its outputs on the public set."""
        import torch

        return [(torch.arange(len(outputs), device=outputs.logits.device), None) for outputs in public]

    def soft(self, run, i, logits):
        """Labels [m, k] that row ``i`` gives to the public samples with these ``logits`` [m, k]."""
        import torch.nn.functional as F

        if self.prior:
            logits = logits - self.prior * run.store.log_prior[i].to(logits)
        if self.align:
            logits = logits + self.temperature * uniform_offset(logits / self.temperature)
        if self.hard:
            return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        return (logits / self.temperature).softmax(1)

    def label(self, run):
        from lightning_idkd.labels import Labels

        if self.labels == "relayed" and run.store.distilled is not None:
            return [self.encoded(run, labels) for labels in run.store.distilled]
        with run.stack.use_parameters(self.teacher.rows(run)):
            public = run.answers()
            chosen = self.select(run, public)
        return [
            self.encoded(run, Labels(index, self.soft(run, i, outputs.logits)[index], weights))
            for i, (outputs, (index, weights)) in enumerate(zip(public, chosen, strict=True))
        ]

    def encoded(self, run, labels):
        """What arrives of ``labels``, with the size of what was sent."""
        if self.encoding is None:
            return labels
        message = self.encoding.encode(labels, run.store.public)
        weighted = labels.weights is not None
        return self.encoding.decode(message, run.store.public, run.store.k, weighted).to(labels.index.device)

    def aggregate(self, run, received):
        self.aggregation.prepare(run, run.step)
        found = [self.aggregation(labels) for labels in received]
        for step in range(run.step + 1, run.step + self.hops):
            if run.network.graph.period != 1:  # other neighbours
                self.aggregation.prepare(run, step)
            passed_on = run.network.exchange([self.encoded(run, labels) for labels in found], step)
            found = [self.aggregation(labels) for labels in passed_on]
        found = [labels[labels.probabilities.amax(1) >= self.min_confidence] for labels in found]
        if self.labels == "accumulated" and run.store.distilled is not None:
            found = [new.over(old) for new, old in zip(found, run.store.distilled, strict=True)]
        return found

    def on_step_end(self, run):
        self.teacher.on_step_end(run)


class IDKD(VanillaKD):
    """Exchange and average the soft labels of those public samples that a node's detector calls in-distribution
    (Ravikumar et al., TMLR 2024).

    Takes the arguments of :class:`VanillaKD` too; the detector looks at answers that ``prior`` and ``align`` did not correct.

    Args:
        weighted: Send with every label the rank of its score among those kept, from 0 to 1, by which averages weigh it.
    """

    calibrated = True

    def __init__(self, *args, weighted: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.weighted = weighted
        if weighted:
            self.declare("ranks of the kept samples' scores")

    def select(self, run, public):
        import torch

        chosen = []
        for selection in run.calibrate(public):
            index, weights = selection.kept.nonzero()[:, 0], None
            if self.weighted:
                rank = torch.argsort(torch.argsort(selection.public[index], stable=True), stable=True)
                weights = (rank + 1) / max(len(index), 1)
            chosen.append((index, weights))
        return chosen
