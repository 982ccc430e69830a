"""The base of local losses: what a node minimises on its private samples."""

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Loss(ABC):
    """The loss of a node's private samples; distilled samples keep the cross-entropy with their soft labels.

    It depends on nothing but the node's own outputs and label counts, so nothing crosses an edge.
    """

    plain: bool = False
    """Whether private samples have the loss of the distilled ones, so that nobody needs to tell them apart."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        given = list(inspect.signature(cls.__call__).parameters)[1:]
        if given != ["logits", "targets", "counts", "private"]:
            said = f"{cls.__name__}.__call__ takes ({', '.join(given)})"
            raise UserError(f"node.loss: {said}; allowed: (logits, targets, counts, private)")

    def remark(self, counts: "Tensor") -> str:
        """What is odd at a node with these label counts [k], said once before training; empty for most."""
        return ""

    @abstractmethod
    def __call__(self, logits: "Tensor", targets: "Tensor", counts: "Tensor", private: "Tensor") -> "Tensor":
        """The loss [b] of every sample of a batch; those of distilled samples are dropped.

        Args:
            logits: the node's, [b, k].
            targets: distributions over the classes, [b, k]: one-hot, or mixtures where a method softens labels.
            counts: numbers of the node's private training samples of every class, [k], in the type of ``targets``.
            private: which samples are private, [b].
        """
