"""A public set of noise, as a baseline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightning_idkd.data.images import Images
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.samples import Samples
from lightning_idkd.data.source import Subset
from lightning_idkd.data.vectors import VectorInputs
from lightning_idkd.errors import UserError, require


@dataclass
class Noise(Subset):
    """Images of independent random pixels, or vectors of independent random features where the private samples are
    vectors: a public set that resembles no private data.

    Sample i is the same for every number of samples.

    Args:
        kind: ``uniform`` over 0..255, or ``gaussian`` with mean 127.5 and standard deviation 64, clipped to 0..255. A
            feature has the range of its private values in place of 0..255, and as deviation a quarter of that range.
        samples: number of samples.
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
        return replace(images, values=images.values[:, :1].contiguous(), stored=images.stored.replace("RGB", "grey"))

    def load_like(self, split: str, inputs: Inputs, *, key: str = "data.private") -> Samples:
        """As :meth:`Source.load_like`; vectors have noise over the range of every feature in the private set."""
        if not isinstance(inputs, VectorInputs):
            return super().load_like(split, inputs, key=key)
        self.check(key)
        self._require_public(split, key)
        values = inputs.draw_noise(self.samples, self.kind)
        unlabelled = values.new_full((len(values),), -1).long()
        return self._cut(Samples(values, unlabelled, (), inputs.form, inputs=inputs), split, key)

    def check(self, key: str) -> None:
        super().check(key)
        require(self.samples >= 1, f"{key}.samples", self.samples, "1 or more")
        require(self.kind in ("uniform", "gaussian"), f"{key}.kind", self.kind, "uniform or gaussian")

    def identity(self, split: str, size: int | None, key: str) -> None:
        return None  # drawing is faster than reading a cache file

    def read(self, split: str, size: int | None, key: str) -> tuple[tuple[str, ...], Iterable[tuple]]:
        self._require_public(split, key)
        rng, shape = np.random.default_rng([8, self.kind == "gaussian"]), (size or 32, size or 32, 3)

        def draw() -> np.ndarray:
            if self.kind == "uniform":
                return rng.integers(0, 256, shape, dtype=np.uint8)
            return np.clip(np.rint(127.5 + 64 * rng.standard_normal(shape)), 0, 255).astype(np.uint8)

        return (), ((draw(), -1) for _ in range(self.samples))

    @staticmethod
    def _require_public(split: str, key: str) -> None:
        if split == "test":
            raise UserError(f"{key}: Noise is a public set without test samples and classes")
