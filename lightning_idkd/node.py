"""One node: its network and its loss. It knows nothing of graphs and other nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy


@dataclass
class Outputs:
    """What one forward pass gives to every score and label: ``logits`` [N, k], ``features`` [N, F] or None; float32."""

    logits: Tensor
    features: Tensor | None = None


class NodeModule(LightningModule):
    """A network with soft cross-entropy; subclass it for another loss.

    ``training_step`` is pure: it reads a batch and returns the loss. ``configure_optimizers`` counts only in a plain
    ``lightning.Trainer``; among other nodes the gossip rule moves the parameters.
    """

    def __init__(self, network: nn.Module, lr: float = 0.1, momentum: float = 0.9, nesterov: bool = True,
                 weight_decay: float = 0.0):  # fmt: skip
        super().__init__()
        self.network = network
        self.optimizer = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, k] of images [N, C, H, W]."""
        return self.network(x)

    def outputs(self, x: Tensor) -> Outputs:
        """Logits and, where the network offers ``features`` and ``head``, the features they come from."""
        if hasattr(self.network, "features") and hasattr(self.network, "head"):
            features = self.network.features(x)
            return Outputs(self.network.head(features).float(), features.float())
        return Outputs(self(x).float())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> Tensor:
        """Mean cross-entropy; targets are class indices [N] or distributions [N, k]."""
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Log the loss and accuracy of a batch with class indices (plain ``lightning.Trainer`` only)."""
        x, y = batch
        logits = self(x)
        self.log("validation/loss", F.cross_entropy(logits, y))
        self.log("validation/accuracy", multiclass_accuracy(logits, y, logits.shape[1], average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.optimizer)
