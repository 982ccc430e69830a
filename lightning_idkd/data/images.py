"""Images: sets of images, and how a network takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.samples import Samples

if TYPE_CHECKING:
    from typing_extensions import Self

    from lightning_idkd.data.augment import Augmentation

Tensor = Any  # torch's; jsonargparse would run an import under TYPE_CHECKING, which takes seconds


@dataclass
class Images(Samples):
    """A set of square images of one size: ``values`` are uint8 [N, C, S, S]."""

    def __post_init__(self) -> None:
        self.inputs = ImageInputs(*self.values.shape[1:3])

    @property
    def pixels(self) -> Tensor:
        """The values, uint8 [N, C, S, S]."""
        return self.values

    @property
    def channels(self) -> int:
        return self.values.shape[1]

    @property
    def size(self) -> int:
        return self.values.shape[2]


@dataclass(eq=False)
class ImageInputs(Inputs):
    """Square images: values are uint8 [N, C, S, S], pools uint8 [N, S, S, C], inputs [N, C, S, S] channels-last.

    Args:
        channels: 1 or 3.
        size: side in pixels.
    """

    channels: int
    size: int

    plural = "images"
    augmentations = ("none", "crop", "crop_flip")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def sizes(self) -> dict[str, int]:
        return {"channels": self.channels, "size": self.size, "features": self.channels * self.size**2}

    @property
    def form(self) -> str:
        return f"{self.size}x{self.size} {'grey' if self.channels == 1 else 'RGB'}"

    def facts(self) -> dict[str, Any]:
        return {"channels": self.channels, "size": self.size}

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> Inputs:
        return cls(facts["channels"], facts["size"])

    @classmethod
    def join(cls, sets: Sequence[tuple[Self, Tensor]]) -> tuple[Self, Tensor]:
        """As :meth:`Inputs.join`; if one set is in colour, all become so."""
        import torch

        if len({inputs.size for inputs, _ in sets}) > 1:
            sizes = ", ".join(f"{inputs.size}x{inputs.size}" for inputs, _ in sets)
            raise ValueError(f"images differ in size ({sizes}); set data.image_size")
        joined = cls(max(inputs.channels for inputs, _ in sets), sets[0][0].size)
        return joined, torch.cat([pixels.expand(-1, joined.channels, -1, -1) for _, pixels in sets])

    def measure(self, values: Tensor, samples: Tensor, device: Any, dtype: Any) -> Inputs:
        """As :meth:`Inputs.measure`, per channel.

        Mean and deviation are computed from the counts of the 256 levels, so that they do not depend on an order of
        summation. A constant channel gets a deviation of 0.001, to avoid a division by 0.
        """
        import torch

        channels = range(values.shape[1])
        counts = torch.stack([values[samples, c].flatten().bincount(minlength=256) for c in channels]).double()
        frequency, level = counts / counts.sum(1, keepdim=True), torch.arange(256).double()
        mean = frequency @ level
        std = (frequency @ level.square() - mean.square()).sqrt().clamp(min=1e-3)
        return self._scaled_by(mean.to(device, dtype), std.to(device, dtype), dtype)

    def scale(self, pool: Tensor) -> Tensor:
        return pool.to(self.dtype).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)

    def draw_noise(self, count: int) -> Tensor:
        import torch

        from lightning_idkd import randomness

        shape = torch.Size((count, self.size, self.size, self.channels))
        levels = randomness.randint(256, 0, "noise", torch.arange(shape.numel()))
        return levels.to(torch.uint8).view(shape).permute(0, 3, 1, 2)

    def arrange(self, values: Tensor) -> Tensor:
        pool = values.permute(0, 2, 3, 1)
        # new strides: with those of another layout, torch's kernels do not take a single channel for channels-last
        return pool.reshape(-1).view(pool.shape)

    def augmentation(self, name: str, nodes: range, seed: int, device: Any) -> Augmentation | None:
        from lightning_idkd.data.augment import Augmentation

        super().augmentation(name, nodes, seed, device)
        return None if name == "none" else Augmentation(self.size, name == "crop_flip", nodes, seed, device)
