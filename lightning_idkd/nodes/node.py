"""One node: its network and its loss. It knows nothing of the graph and of other nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs


class NodeModule(LightningModule):
    """A network with the cross-entropy of soft labels as its loss, or another ``loss`` of private samples.

    ``training_step`` has no side effects: it reads a batch and returns the loss. Only a plain ``lightning.Trainer``
    uses ``configure_optimizers`` and the four optimizer arguments; in a decentralised run the gossip rule updates the
    parameters.
    """

    network: Any
    """The network, an nn.Module. Some have ``features`` and ``head`` too, which the types of torch do not know."""

    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
    """The loss [b] of private samples by logits [b, k], targets [b, k], label counts [k] and a mask [b] of private
    samples; None: cross-entropy."""
    counts: Tensor | None = None
    """Label counts [k] where a batch brings none, which is so in a plain ``lightning.Trainer``."""

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
        """Mean loss of a batch: samples [N, ...], targets, and optionally counts, a mask and temperatures.

        Targets are class indices [N] or distributions [N, k]; a distilled sample's weight is multiplied into its
        distribution. The counts [k] are those of the node's labels, and the mask [N] says which samples are private.
        The others have the cross-entropy, with logits divided by their temperatures T [N] and a loss multiplied by T^2
        (Hinton et al., 2015); its gradient equals that of KL(target || softmax).
        """
        x, y, *more = batch
        logits = self(x)
        if not more:
            loss = self.loss
            if loss is None:
                return F.cross_entropy(logits, y)
            every = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
            return private_loss(loss, logits, y, self.counts, every).mean()
        counts, private, t = more
        distilled = t**2 * F.cross_entropy(logits / t[:, None], y, reduction="none")
        if self.loss is None:
            return distilled.mean()  # the temperatures of private samples are 1
        return private_loss(self.loss, logits, y, counts, private).where(private, distilled).mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int = 0) -> None:
        """Log the loss and accuracy of a batch with class indices; only a plain ``lightning.Trainer`` calls this."""
        x, y = batch
        logits = self(x)
        self.log("validation/loss", F.cross_entropy(logits, y))
        self.log("validation/accuracy", multiclass_accuracy(logits, y, logits.shape[1], average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), **self.optimizer)


def private_loss(
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    logits: Tensor,
    y: Tensor,
    counts: Tensor | None,
    private: Tensor,
) -> Tensor:
    """The ``loss`` [N] of private samples, given logits [N, k], class indices [N] or distributions [N, k], label counts
    [k] and a mask [N].

    Raises:
        UserError: there are no counts, or the loss returns anything but a number for every sample.
    """
    name = type(loss).__name__
    if counts is None:
        raise UserError(f"node.loss: {name} needs the node's label counts; set the attribute counts [k] of the node")
    if not y.is_floating_point():
        y = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    losses = loss(logits, y, counts, private)
    if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1]:
        given = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(f"node.loss: {name} returns {given}; allowed: one number a sample, [{len(logits)}]")
    return losses
