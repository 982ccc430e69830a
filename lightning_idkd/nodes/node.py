"""One node: its network and its loss. It knows nothing of the graph and of other nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_idkd.labels import Outputs


class NodeModule(LightningModule):
    """A network with the cross-entropy of soft labels as its loss; subclass it for another loss.

    ``training_step`` has no side effects: it reads a batch and returns the loss. Only a plain ``lightning.Trainer``
    uses ``configure_optimizers`` and the four optimizer arguments; in a decentralised run the gossip rule updates the
    parameters.
    """

    network: Any
    """The network, an nn.Module. Some have ``features`` and ``head`` too, which the types of torch do not know."""

    def __init__(self, network: nn.Module, lr: float = 0.1, momentum: float = 0.9, nesterov: bool = True,
                 weight_decay: float = 0.0):  # fmt: skip
        super().__init__()
        self.network = network
        self.optimizer: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, k] of samples [N, ...]."""
        return self.network(x)

    @property
    def has_features(self) -> bool:
        """Whether the network has ``features`` and ``head``."""
        return hasattr(self.network, "features") and hasattr(self.network, "head")

    def outputs(self, x: Tensor) -> Outputs:
        """Logits [N, k] of samples [N, ...] and, if the network has them, the features [N, F] before its head."""
        if self.has_features:
            features = self.network.features(x)
            return Outputs(self.network.head(features).float(), features.float(), self.network.head)
        return Outputs(self(x).float())

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int = 0) -> Tensor:
        """Mean cross-entropy of a batch: samples [N, ...], targets, and optionally temperatures and logit offsets.

        Targets are class indices [N] or distributions [N, k]; a sample's weight is multiplied into its distribution.
        With temperatures T [N] a sample's logits are divided by T and its loss is multiplied by T^2 (Hinton et al.,
        2015); the gradient equals that of KL(target || softmax). Offsets [N, k] are added to the logits after the
        division.
        """
        x, y, *more = batch
        if not more:
            return F.cross_entropy(self(x), y)
        t, *offset = more
        logits = self(x) / t[:, None]
        return (t**2 * F.cross_entropy(logits + offset[0] if offset else logits, y, reduction="none")).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Log the loss and accuracy of a batch with class indices; only a plain ``lightning.Trainer`` calls this."""
        x, y = batch
        logits = self(x)
        self.log("validation/loss", F.cross_entropy(logits, y))
        self.log("validation/accuracy", multiclass_accuracy(logits, y, logits.shape[1], average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.optimizer)
