"""Self-training: a node labels public samples for itself, and sends nothing."""

from __future__ import annotations

from lightning_idkd.callback import Distillation, Run
from lightning_idkd.errors import require
from lightning_idkd.labels import FineTuning, Labels

from .idkd import compute_uniform_offset

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class SelfTraining(Distillation):
    """Every node trains on public samples whose class it predicts with confidence, and sends no labels: pseudo-labels
    as in FixMatch (Sohn et al., NeurIPS 2020), which are drawn anew at every exchange instead of in every batch.

    The labels are of images as they are. With ``data.augment_public`` a node learns them on augmented images, which is
    FixMatch's consistency.

    Args:
        start: Epoch before which the first labels are drawn; a number below 1 is a fraction of all epochs.
        every: Epochs between draws; null for a single one.
        confidence: Smallest probability of the most probable class with which a sample is kept, 0 to 1.
        flexible: Lower this threshold for classes that few samples are sure of (FlexMatch, Zhang et al., NeurIPS 2021,
            with its warm-up and its convex map x / (2 - x), over the samples of one draw).
        align: Add an offset to the logits of each class, with which the answers to all public samples are uniform on
            average, before they are compared with the threshold.
        tuning: How nodes train on private and public samples together; null for its defaults.
    """

    label = aggregate = None
    selective = True

    def __init__(self, start: int | float = 0.6, every: int | None = 1, confidence: float = 0.95,
                 flexible: bool = False, align: bool = True, tuning: FineTuning | None = None):  # fmt: skip
        super().__init__(start, every, tuning=tuning)
        require(0 <= confidence <= 1, "distillation.confidence", confidence, "0 to 1")
        self.confidence, self.flexible, self.align = confidence, flexible, align

    def exchange(self, run: Run) -> list[Labels]:
        labels = [self.draw(outputs.logits) for outputs in run.answers()]
        run.distil(labels)
        return labels

    def draw(self, logits: Tensor) -> Labels:
        """Returns the one-hot labels of the samples that are kept, given logits [m, k]."""
        import torch.nn.functional as F

        if self.align:
            logits = logits + compute_uniform_offset(logits)
        k = logits.shape[1]
        sure, classes = logits.softmax(1).max(1)
        threshold = sure.new_full((k,), self.confidence)
        if self.flexible:
            learned = classes[sure >= self.confidence].bincount(minlength=k).to(sure)
            share = learned / learned.max().clamp(min=1).maximum(len(sure) - learned.sum())
            threshold = threshold * share / (2 - share)
        index = (sure >= threshold[classes]).nonzero()[:, 0]
        return Labels(index, F.one_hot(classes[index], k).to(sure))
