"""The form of a sample, and how a network takes it: the base class of all kinds of data.

The store, the memory prediction, the architectures, the evaluation and the benchmark use the methods of `Inputs`, so
that none of them depends on a kind. To add a kind, write a subclass of `Inputs` and a source of its samples, as in
:mod:`lightning_idkd.data.vectors`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

    from lightning_idkd.data.augment import Augmentation

Tensor = Any  # torch's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds


class Inputs(ABC):
    """Form of one sample, and how stored values become a network's input: layout, scaling, augmentation and noise.

    *Values* are the tensor [N, ...] of a set. A *pool* has the same values in the layout that batches are taken from.
    """

    kinds: ClassVar[dict[str, type[Inputs]]] = {}
    """All kinds by their ``plural``."""
    plural: ClassVar[str]
    """The word for several samples of this kind, in messages and in ``facts``, which checkpoints store."""
    augmentations: ClassVar[tuple[str, ...]] = ("none",)
    """Allowed values of ``data.augment``."""
    mean: Tensor | None = None
    """Mean by which inputs are scaled; None before :meth:`measure`."""
    std: Tensor | None = None
    """Standard deviation by which inputs are scaled."""
    dtype: Any = None
    """Type of a network's input."""

    def __init_subclass__(cls) -> None:
        if "plural" in vars(cls):
            if cls.plural in Inputs.kinds:
                raise TypeError(f"{cls.__name__}: another kind of data is called {cls.plural}")
            Inputs.kinds[cls.plural] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample as a network takes it."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes that ``Architecture.build`` may ask for, by the names of its arguments."""

    @property
    @abstractmethod
    def form(self) -> str:
        """Text for this form, such as 28x28 grey; it equals ``Samples.stored`` if nothing was converted."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Plain values that distinguish this form from others.

        They must contain ``kind``, the value of ``plural``, by which :func:`restore` finds the class. Only images have
        none.
        """

    @classmethod
    @abstractmethod
    def from_facts(cls, facts: dict[str, Any]) -> Inputs:
        """The inputs that :meth:`facts` or :meth:`describe` describes, without their scaling."""

    @classmethod
    @abstractmethod
    def join(cls, sets: Sequence[tuple[Self, Tensor]]) -> tuple[Self, Tensor]:
        """Join the values of several sets; raises a ValueError that says how they differ, and what to do."""

    @abstractmethod
    def measure(self, values: Tensor, samples: Tensor, device: Any, dtype: Any) -> Inputs:
        """A copy that scales to the mean 0 and the standard deviation 1 over the ``samples`` [s] of ``values``.

        ``device`` is that of the pool, and ``dtype`` the type of a network's input.
        """

    @abstractmethod
    def scale(self, pool: Tensor) -> Tensor:
        """Part of a pool as a network's input [N, *shape]."""

    @abstractmethod
    def draw_noise(self, count: int) -> Tensor:
        """Values of ``count`` samples of noise, uniform over the range of possible values; always the same ones."""

    def arrange(self, values: Tensor) -> Tensor:
        """The values as a pool: contiguous, so that a sample is one piece of memory."""
        return values.contiguous()

    def augmentation(self, name: str, nodes: range, seed: int, device: Any) -> Augmentation | None:
        """The random changes of the training samples of ``nodes``, for a value of ``data.augment``; None for none.

        Raises:
            UserError: samples of this kind have no such augmentation.
        """
        if name not in self.augmentations:
            allowed, hint = " or ".join(self.augmentations), did_you_mean(name, self.augmentations)
            raise UserError(f"data.augment: {name} given; allowed for {self.plural}: {allowed}.{hint}".rstrip("."))
        return None

    def describe(self) -> dict[str, Any]:
        """The facts and the scaling, as they go into checkpoints."""
        return {**self.facts(), "mean": self.mean.cpu(), "std": self.std.cpu()}

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))

    def _scaled_by(self, mean: Tensor, std: Tensor, dtype: Any) -> Inputs:
        inputs = copy.copy(self)
        inputs.mean, inputs.std, inputs.dtype = mean, std, dtype
        return inputs


def restore(facts: dict[str, Any], dtype: Any = None) -> Inputs:
    """Build inputs from what :meth:`Inputs.facts` or :meth:`Inputs.describe` returned.

    The latter includes the scaling, here for networks of ``dtype``.

    Raises:
        UserError: no imported class is of this kind.
    """
    name = facts.get("kind", "images")
    if name not in Inputs.kinds:
        raise UserError(
            f"data: {name} are a kind of data that no imported class describes; import the module of their class"
        )
    inputs = Inputs.kinds[name].from_facts(facts)
    return inputs._scaled_by(facts["mean"], facts["std"], dtype) if "mean" in facts else inputs
