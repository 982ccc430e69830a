"""In-distribution knowledge distillation (IDKD), and vanilla knowledge distillation, which has no filter."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning_idkd.callback import Aggregation, Distillation, Encoding, Run, Teacher
from lightning_idkd.errors import require
from lightning_idkd.labels import FineTuning, Labels, Outputs

from .aggregation import Mean

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


def draw(run: Run, node: int, labels: Labels, columns: int) -> Tensor:
    """Returns numbers in [0, 1) of 48 random bits, float64 [s, columns], for the noise of a node's labels in this
    step."""
    import torch

    from lightning_idkd import randomness

    def draw_half(part: int) -> Tensor:
        counters = part, node, run.step, labels.index[:, None], torch.arange(columns)
        return randomness.uniform(run.seed, "noise of labels", *counters).double()

    return draw_half(0) + draw_half(1) * 2.0**-24


def compute_uniform_offset(logits: Tensor) -> Tensor:
    """Returns the offsets [k] of the classes with which the softmax of ``logits`` [m, k] is uniform on average."""
    import torch

    z = logits.double()
    offset = torch.zeros_like(z[0])
    for _ in range(100):
        error = (z + offset).softmax(1).mean(0).clamp_min(1e-30).log() + math.log(z.shape[1])
        offset -= error
        if error.abs().max() < 1e-4:
            break
    return (offset - offset.mean()).to(logits)


class VanillaKD(Distillation):
    """Exchanges and averages the soft labels of all public samples, without a filter.

    Args:
        start: Epoch before which the first exchange takes place; a number below 1 is a fraction of all epochs.
        every: Epochs between exchanges; null for a single exchange.
        temperature: Softmax temperature of the labels, above 0; a value below 1 sharpens them.
        hard: Send one-hot labels of the most probable class.
        prior: Factor of the log of the node's (add-one) label frequencies, which is subtracted from the logits to
            remove the node's label prior; 0 removes nothing, 1 all of it.
        align: Add an offset to the logits of each class, with which a node's labels of all public samples are uniform
            on average (distribution alignment, Berthelot et al., ICLR 2020, with a uniform target). This removes a bias
            of any origin.
        labels: What later exchanges send: ``fresh`` labels of a new selection; the last averages, ``relayed`` one hop
            further; or fresh labels, ``accumulated`` with older ones of other samples.
        hops: Number of hops that labels travel per exchange; with 1 a node averages only its own and its neighbours'
            labels.
        lacking: Train only on labels whose most probable class the node lacks: less than 1/k of its private samples
            have it.
        agreement: Weigh the loss of a distilled sample by how far the senders of its label agree, from 0 to 1; 1 where
            a single sender labelled it.
        min_confidence: Drop averaged labels whose largest probability is below this, 0 to 1 (the ensemble's selector of
            Selective-FD).
        steps: ``equal`` keeps the number of steps per epoch; ``grow`` computes it from the mean size of the nodes'
            private and distilled sets together.
        aggregation: How several labels of a sample become one; null for Mean.
        teacher: Which parameters label the public set; null for the node's own.
        encoding: How labels become bytes on an edge; null for 4-byte indices and float32 probabilities.
        tuning: How nodes train on private and distilled samples together; null for its defaults.
    """

    def __init__(self, start: int | float = 0.6, every: int | None = None, temperature: float = 1.0, hard: bool = False,
                 prior: float = 0.0, align: bool = False, labels: Literal["fresh", "relayed", "accumulated"] = "fresh",
                 hops: int = 1, lacking: bool = False, agreement: bool = False, min_confidence: float = 0.0,
                 steps: Literal["equal", "grow"] = "equal", aggregation: Aggregation | None = None,
                 teacher: Teacher | None = None, encoding: Encoding | None = None,
                 tuning: FineTuning | None = None):  # fmt: skip
        super().__init__(start, every, steps, tuning)
        require(0 < temperature < math.inf, "distillation.temperature", temperature, "above 0")
        require(0 <= prior < math.inf, "distillation.prior", prior, "0 or more")
        require(hops >= 1, "distillation.hops", hops, "1 or more")
        relays = lacking and labels == "relayed"
        require(not relays, "distillation.lacking", lacking, "only with fresh or accumulated labels")
        require(0 <= min_confidence <= 1, "distillation.min_confidence", min_confidence, "0 to 1")
        self.temperature, self.hard, self.prior, self.align = temperature, hard, prior, align
        self.labels, self.hops, self.lacking, self.agreement = labels, hops, lacking, agreement
        self.min_confidence, self.teacher, self.encoding = min_confidence, teacher or Teacher(), encoding
        self.aggregation = aggregation or Mean()
        self.declare(self.aggregation.shares)
        self.declare(self.teacher.shares)

    def select(self, run: Run, public: list[Outputs]) -> list[tuple[Tensor, Tensor | None]]:
        """Returns the index [s] of the samples that each node of this process sends, with weights [s] or None.

        ``public`` are each node's outputs on the public set.
        """
        import torch

        return [(torch.arange(len(outputs), device=outputs.logits.device), None) for outputs in public]

    def correct(self, run: Run, i: int, logits: Tensor) -> Tensor:
        """Returns what ``prior`` and ``align`` add to the logits of row ``i``, [k], given those of public samples."""
        import torch

        offset = torch.zeros_like(logits[0])
        if self.prior:
            offset = offset - self.prior * run.store.log_prior[i].to(logits)
        if self.align:
            offset = offset + self.temperature * compute_uniform_offset((logits + offset) / self.temperature)
        return offset

    def soft(self, run: Run, i: int, logits: Tensor) -> Tensor:
        """Returns the labels [m, k] that row ``i`` gives to public samples with these ``logits`` [m, k]."""
        import torch.nn.functional as F

        if self.prior or self.align:
            logits = logits + self.correct(run, i, logits)
        if self.hard:
            return F.one_hot(logits.argmax(1), logits.shape[1]).to(logits)
        return (logits / self.temperature).softmax(1)

    def label(self, run: Run) -> list[Labels]:
        if self.labels == "relayed" and run.store.distilled is not None:
            unweighted = [Labels(labels.index, labels.probabilities) for labels in run.store.distilled]
            return [self.encode(run, labels) for labels in unweighted]
        with run.stack.use_parameters(self.teacher.rows(run)):
            public = run.answers()
            selected = self.select(run, public)
        sent = []
        for i, (outputs, (index, weights)) in enumerate(zip(public, selected, strict=True)):
            labels = Labels(index, self.soft(run, i, outputs.logits)[index], weights)
            sent.append(self.encode(run, labels, run.network.rows[i]))
        return sent

    def encode(self, run: Run, labels: Labels, node: int | None = None) -> Labels:
        """Returns ``labels`` as a receiver reads them, with the size of the message.

        ``node`` is the one that has made the labels; None: they are averages of labels that had their noise before.
        """
        if self.encoding is None:
            return labels
        if node is not None:
            of_node = labels.to("cpu")
            labels = self.encoding.perturb(of_node, lambda columns: draw(run, node, of_node, columns))
        message = self.encoding.encode(labels, run.store.public)
        weighted = labels.weights is not None
        return self.encoding.decode(message, run.store.public, run.store.k, weighted).to(labels.index.device)

    def aggregate(self, run: Run, received: list[dict[int, Labels]]) -> list[Labels]:
        self.aggregation.prepare(run, run.step)
        averages: list[Labels] = []
        for hop in range(self.hops):
            if hop > 0:
                if run.network.graph.period != 1 or run.network.links.faults:  # the neighbours change
                    self.aggregation.prepare(run, run.step + hop)
                received = run.network.exchange([self.encode(run, labels) for labels in averages], run.step + hop)
            last = hop == self.hops - 1
            averages = [self.aggregation(labels, agreement=self.agreement and last) for labels in received]
        averages = [labels[labels.probabilities.amax(1) >= self.min_confidence] for labels in averages]
        if self.lacking:
            from lightning_idkd.metrics import lacks

            lacking = lacks(run.store.counts()).to(averages[0].index.device)
            averages = [labels[lacking[i, labels.probabilities.argmax(1)]] for i, labels in enumerate(averages)]
        if self.labels == "accumulated" and run.store.distilled is not None:
            averages = [new.over(old) for new, old in zip(averages, run.store.distilled, strict=True)]
        return averages

    def on_check(self, run: Run) -> None:
        self.teacher.on_check(run)
        self.aggregation.on_check(run)

    def on_step_end(self, run: Run) -> None:
        self.teacher.on_step_end(run)


class IDKD(VanillaKD):
    """Exchanges and averages the soft labels of those public samples that a node's detector calls in-distribution
    (Ravikumar et al., TMLR 2024).

    It also takes the arguments of :class:`VanillaKD`. The detector scores outputs before ``prior`` and ``align``
    correct them, unless ``corrected``.

    Args:
        corrected: Score outputs after ``prior`` and ``align`` have corrected them, private and public ones alike.
            Scores that change the samples (ODIN) do so by the gradients of the uncorrected outputs.
        weighted: Send with each label the rank of its score among the kept samples, above 0 to 1, as the label's weight
            in averages.
    """

    calibrated = True

    def __init__(self, *args: Any, corrected: bool = False, weighted: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        fits = not corrected or self.prior > 0 or self.align
        require(fits, "distillation.corrected", corrected, "only with prior or align, which correct")
        self.corrected, self.weighted = corrected, weighted
        if weighted:
            noisy = self.encoding is not None and self.encoding.epsilon < math.inf
            require(not noisy, "distillation.weighted", weighted, "only without noise of labels, which weights lack")
            self.declare("ranks of the kept samples' scores")

    def select(self, run: Run, public: list[Outputs]) -> list[tuple[Tensor, Tensor | None]]:
        import torch

        selected, offsets = [], None
        if self.corrected:
            offsets = [self.correct(run, i, outputs.logits) for i, outputs in enumerate(public)]
        for selection in run.calibrate(public, offsets):
            index, weights = selection.kept.nonzero()[:, 0], None
            if self.weighted:
                rank = torch.argsort(torch.argsort(selection.public[index], stable=True), stable=True)
                weights = (rank + 1) / max(len(index), 1)
            selected.append((index, weights))
        return selected
