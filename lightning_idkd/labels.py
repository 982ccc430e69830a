"""The plain values that packages exchange: labels that nodes send, outputs of a network, the selection of a detector,
and the settings of fine-tuning.

This module imports no torch, since the command line reads :class:`FineTuning`.
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
    """Soft labels of public samples: the only data that distillation may send."""

    index: "Tensor"
    """int64 [s], the samples' places in the public set, ascending."""
    probabilities: "Tensor"
    """[s, k]."""
    weights: "Tensor | None" = None
    """[s], if their sender weights them; of a distilled set, the weights of the samples' losses."""
    size: int | None = None
    """Bytes of the encoded message; None if it is not encoded."""

    @property
    def nbytes(self) -> int:
        """Bytes on an edge: the encoded size, else a 4-byte index and float32 probabilities (and weight) per sample."""
        if self.size is not None:
            return self.size
        weights = 0 if self.weights is None else self.weights.numel()
        return 4 * (self.index.numel() + self.probabilities.numel() + weights)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: "Tensor") -> "Labels":
        """Labels of some samples, by a mask or by ascending indices."""
        weights = None if self.weights is None else self.weights[which]
        return Labels(self.index[which], self.probabilities[which], weights)

    def over(self, old: "Labels") -> "Labels":
        """These labels, and those of ``old`` for samples that these do not have."""
        import torch

        new = torch.isin(old.index, self.index, invert=True)
        index = torch.cat([self.index, old.index[new]])
        order = index.argsort()
        weights = None
        if self.weights is not None and old.weights is not None:
            weights = torch.cat([self.weights, old.weights[new]])[order]
        return Labels(index[order], torch.cat([self.probabilities, old.probabilities[new]])[order], weights)

    def to(self, device: "torch.device | str") -> "Labels":
        weights = None if self.weights is None else self.weights.to(device)
        return Labels(self.index.to(device), self.probabilities.to(device), weights, self.size)


@dataclass
class Outputs:
    """Outputs of one forward pass in float32, from which scores and labels are computed. Indexing selects samples."""

    logits: "Tensor"
    """[N, k]."""
    features: "Tensor | None" = None
    """[N, F], the input of ``head``; None if the network has no ``features``."""
    head: "nn.Linear | None" = None
    """The layer that maps features to logits."""

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, index: "Tensor | slice") -> "Outputs":
        return Outputs(self.logits[index], None if self.features is None else self.features[index], self.head)

    def shift(self, offset: "Tensor") -> "Outputs":
        """The outputs of the same network with ``offset`` [k] added to its logits."""
        import copy

        from torch.nn import Parameter

        head = self.head
        if head is not None:
            bias = offset.to(head.weight) if head.bias is None else head.bias.detach() + offset.to(head.bias)
            head = copy.deepcopy(head).requires_grad_(False)
            head.bias = Parameter(bias, requires_grad=False)
        return Outputs(self.logits + offset, self.features, head)

    @staticmethod
    def cat(parts: "list[Outputs]") -> "Outputs":
        """Concatenate the outputs of one network for several batches."""
        import torch

        features = [p.features for p in parts if p.features is not None]
        return Outputs(torch.cat([p.logits for p in parts]), torch.cat(features) if features else None, parts[0].head)


MEASURES = (
    "auroc", "threshold", "kept_fraction", "own_kept", "auroc_noise", "noise_kept", "known_fraction", "label_accuracy",
    "keeps_none",
)  # fmt: skip
"""Measures of a node's detector; nan where there is nothing to measure.

- ``auroc``: AUROC of held-out private samples against public ones. ``auroc_noise``: the same against noise.
- ``threshold``, in the score's unit.
- ``kept_fraction``, ``own_kept``, ``noise_kept``: shares of the public set, of held-out private samples and of noise
  that score at or above the threshold. Kept public samples of foreign classes are false accepts.
- ``known_fraction``, ``label_accuracy``: if public classes have names of private ones, the share of the kept samples
  whose class the node holds, and the share that it labels correctly. They are for diagnosis alone; nothing trains on
  them.
- ``keeps_none``: whether the node keeps no public sample.
"""


@dataclass
class Selection:
    """The decision of one node's detector."""

    kept: "Tensor"
    """bool [m], the public samples at or above the threshold."""
    threshold: float
    """In the score's unit."""
    private: "Tensor"
    """Scores of the node's held-out samples, or of its training samples if it holds none out."""
    public: "Tensor"
    """Scores of the public set [m]."""
    noise: "Tensor"
    """Scores of samples of noise."""
    measures: dict[str, float] = field(default_factory=dict)
    """Values of :data:`MEASURES`."""


@dataclass
class FineTuning:
    """Settings of fine-tuning on private and distilled samples."""

    private_share: float | Literal["skew"] | None = None
    """Share of private samples in every batch, above 0 and below 1; ``skew``: 1 - TV/2, with the total variation TV
    between a node's labels and the uniform distribution, so 0.5 to 1 (every batch has a distilled sample at least);
    null: in proportion to the two sets' sizes."""
    count_distilled: bool = False
    """Count distilled samples too in the label counts that ``node.loss`` gets, by their soft labels and their share of
    a batch."""
    balance: Literal["none", "cap", "draw"] = "none"
    """Balance of the distilled samples' classes, by their labels: ``cap`` keeps at most the median number of samples
    per class; ``draw`` draws all classes equally often, with replacement."""
    weight: float = 1.0
    """Weight of a distilled sample's loss, above 0; a private sample has weight 1."""
    confidence: bool = False
    """Multiply the weight by the label's confidence, 1 - entropy / log k."""
    temperature: float = 1.0
    """Temperature T that divides a node's logits of distilled samples, above 0; their loss is multiplied by T^2."""

    def __post_init__(self) -> None:
        share, allowed = self.private_share, "between 0 and 1, skew, or null"
        valid = share in (None, "skew") or (not isinstance(share, str) and 0 < share < 1)
        require(valid, "distillation.tuning.private_share", share, allowed)
        fits = not (self.count_distilled and self.balance == "draw")
        require(fits, "distillation.tuning.count_distilled", True, "only where balance is none or cap")
        require(0 < self.weight < math.inf, "distillation.tuning.weight", self.weight, "above 0")
        require(0 < self.temperature < math.inf, "distillation.tuning.temperature", self.temperature, "above 0")
