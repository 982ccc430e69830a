"""A public set of noise, as a baseline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightning_idkd.data.images import Images
from lightning_idkd.data.source import Subset
from lightning_idkd.errors import UserError, require


@dataclass
class Noise(Subset):
    """Images of independent random pixels: a public set that resembles no private data.

    Image i is the same for every number of samples.

    Args:
        kind: ``uniform`` over 0..255, or ``gaussian`` with mean 127.5 and standard deviation 64, clipped to 0..255.
        samples: number of images.
    """

    kind: Literal["uniform", "gaussian"] = "uniform"
    samples: int = 10000

    def load(
        self, split: str, size: int | None = None, channels: int | None = None, *, key: str = "data.private"
    ) -> Images:
        """As :meth:`Subset.load`; grey noise is the first channel, since the luma of three has a smaller deviation."""
        images = super().load(split, size, 3, key=key)
        if channels != 1:
            return images
        return replace(images, pixels=images.pixels[:, :1].contiguous(), stored=images.stored.replace("RGB", "grey"))

    def check(self, key: str) -> None:
        super().check(key)
        require(self.samples >= 1, f"{key}.samples", self.samples, "1 or more")
        require(self.kind in ("uniform", "gaussian"), f"{key}.kind", self.kind, "uniform or gaussian")

    def identity(self, split: str, size: int | None, key: str) -> None:
        return None  # drawing is faster than reading a cache file

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        if split == "test":
            raise UserError(f"{key}: Noise is a public set without test images and classes")
        rng, shape = np.random.default_rng([8, self.kind == "gaussian"]), (size or 32, size or 32, 3)

        def draw() -> np.ndarray:
            if self.kind == "uniform":
                return rng.integers(0, 256, shape, dtype=np.uint8)
            return np.clip(np.rint(127.5 + 64 * rng.standard_normal(shape)), 0, 255).astype(np.uint8)

        return (), ((draw(), -1) for _ in range(self.samples))
