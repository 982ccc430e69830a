"""The plain values that cross packages: labels that nodes send, outputs of a network,
what a detector selects, and how nodes train on distilled samples.

Importable without torch, since the command line reads :class:`FineTuning`.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_idkd.errors import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass
class Labels:
    """Soft labels of public samples, all that distillation may send: ``index`` int64 [s] into the public set, ascending,
    ``probabilities`` [s, k], and ``weights`` [s] where their sender weighs them. ``size`` in bytes, where they were encoded."""

    index: "Tensor"
    probabilities: "Tensor"
    weights: "Tensor | None" = None
    size: int | None = None

    @property
    def nbytes(self) -> int:
        """Size on an edge: as encoded, else a 4-byte index and float32 probabilities (and weight) for every sample."""
        if self.size is not None:
            return self.size
        return 4 * (self.index.numel() + self.probabilities.numel() + (0 if self.weights is None else self.weights.numel()))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: "Tensor") -> "Labels":
        """Some of them, by a mask or indices in ascending order."""
        return Labels(self.index[which], self.probabilities[which], None if self.weights is None else self.weights[which])

    def over(self, old: "Labels") -> "Labels":
        """These, and ``old`` ones of other samples."""
        import torch

        new = torch.isin(old.index, self.index, invert=True)
        index = torch.cat([self.index, old.index[new]])
        order = index.argsort()
        return Labels(index[order], torch.cat([self.probabilities, old.probabilities[new]])[order])

    def to(self, device: "torch.device | str") -> "Labels":
        weights = None if self.weights is None else self.weights.to(device)
        return Labels(self.index.to(device), self.probabilities.to(device), weights, self.size)


@dataclass
class Outputs:
    """What one forward pass gives to every score and label: ``logits`` [N, k], ``features`` [N, F] and the ``head`` that
    makes the logits of them, where the network offers these; float32. Indexing gives some of the samples."""

    logits: "Tensor"
    features: "Tensor | None" = None
    head: "nn.Linear | None" = None

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: "Tensor | slice") -> "Outputs":
        return Outputs(self.logits[index], None if self.features is None else self.features[index], self.head)

    @staticmethod
    def cat(parts: "list[Outputs]") -> "Outputs":
        """Those of one network, one after the other."""
        import torch

        features = [p.features for p in parts if p.features is not None]
        return Outputs(torch.cat([p.logits for p in parts]), torch.cat(features) if features else None, parts[0].head)


MEASURES = (
    "auroc", "threshold", "kept_fraction", "own_kept", "auroc_noise", "noise_kept", "known_fraction", "label_accuracy",
    "keeps_none",
)  # fmt: skip
"""Of every node: AUROC of held-out against public samples; the threshold; shares of the public set (the false accepts, as far as
it is foreign), of held-out samples and of noise at or above it; AUROC against noise. Where a public sample's class has the name
of a private one: which share of the kept ones is of a class that the node holds, and of how many its answer is right (diagnosis
alone: nothing trains on it). nan where there is nothing to measure."""


@dataclass
class Selection:
    """What one node's detector decided.

    ``kept`` bool [m]; its ``threshold`` in the score's unit; the score vectors of its held-out samples (of its training
    samples where it has none), of the public set and of noise; ``measures`` of how good the selection is.
    """

    kept: "Tensor"
    threshold: float
    private: "Tensor"
    public: "Tensor"
    noise: "Tensor"
    measures: dict[str, float] = field(default_factory=dict)


@dataclass
class FineTuning:
    """How nodes train on private and distilled samples together."""

    private_share: float | None = None
    """Share of every batch that is private, above 0 and below 1; null: by the sizes of the two sets."""
    balance: Literal["none", "cap", "draw"] = "none"
    """``cap`` leaves at most the median number of distilled samples of a class, by their labels; ``draw`` draws all classes
    equally often, with replacement."""
    weight: float = 1.0
    """Weight of a distilled sample's loss against a private one's, above 0."""
    confidence: bool = False
    """Multiply the weight by how sure the label is, 1 - entropy / log k."""
    temperature: float = 1.0
    """Temperature T of a node's answers to distilled samples; their loss is multiplied by T^2."""
    logit_adjustment: float = 0.0
    """In the loss of private samples, logits get the log of the node's own (add-one) label frequencies times this (Menon et al.,
    ICLR 2021), so that classes it lacks are not unlearnt; 0 for none, 1 for all."""

    def __post_init__(self) -> None:
        share = self.private_share
        require(share is None or 0 < share < 1, "distillation.tuning.private_share", share, "between 0 and 1, or null")
        require(0 < self.weight < math.inf, "distillation.tuning.weight", self.weight, "above 0")
        require(0 < self.temperature < math.inf, "distillation.tuning.temperature", self.temperature, "above 0")
        given = self.logit_adjustment
        require(0 <= given < math.inf, "distillation.tuning.logit_adjustment", given, "0 or more")
