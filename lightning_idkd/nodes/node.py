"""One node: its network and its loss. It knows nothing of graphs and other nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_idkd.labels import Outputs


class NodeModule(LightningModule):
    """A network with soft cross-entropy; subclass it for another loss.

    ``training_step`` is pure: it reads a batch and returns the loss. ``configure_optimizers`` counts only in a plain
    ``lightning.Trainer``; among other nodes the gossip rule moves the parameters.
    """

    network: Any
    """The network, an nn.Module. Some have ``features`` and ``head`` too, which the types of torch do not know."""

    def __init__(self, network: nn.Module, lr: float = 0.1, momentum: float = 0.9, nesterov: bool = True,
                 weight_decay: float = 0.0):  # fmt: skip
        super().__init__()
        self.network = network
        self.optimizer: dict[str, Any] = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, k] of images [N, C, H, W]."""
        return self.network(x)

    @property
    def has_features(self) -> bool:
        """Whether the network offers ``features`` and ``head``."""
        return hasattr(self.network, "features") and hasattr(self.network, "head")

    def outputs(self, x: Tensor) -> Outputs:
        """Logits and, where the network offers them, the features they come from."""
        if self.has_features:
            features = self.network.features(x)
            return Outputs(self.network.head(features).float(), features.float(), self.network.head)
        return Outputs(self(x).float())

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int = 0) -> Tensor:
        """Mean cross-entropy; targets are class indices [N] or distributions [N, k], times a weight where a sample has one.

        A third part of the batch is every sample's temperature T [N]: its logits are divided by T and its loss multiplied by
        T^2 (Hinton et al., 2015); the gradient is that of KL(target || softmax). A fourth [N, k] is added to the logits then.
        """
        x, y, *more = batch
        if not more:
            return F.cross_entropy(self(x), y)
        t, *offset = more
        logits = self(x) / t[:, None]
        return (t**2 * F.cross_entropy(logits + offset[0] if offset else logits, y, reduction="none")).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Log the loss and accuracy of a batch with class indices (plain ``lightning.Trainer`` only)."""
        x, y = batch
        logits = self(x)
        self.log("validation/loss", F.cross_entropy(logits, y))
        self.log("validation/accuracy", multiclass_accuracy(logits, y, logits.shape[1], average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.optimizer)
