"""The nodes' samples as uint8 tensors on the device: who trains on what, in which order, and batched augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.data.partition import Split
from lightning_idkd.data.source import Images
from lightning_idkd.network import Labels

EVALUATION_BATCH = 256  # fixed: a network whose output depends on the batch gives the same number every time


class Store:
    """Private, public and test images and the sets that the nodes ``rows`` train on.

    Private and public images share one pool, so a distilled sample is an index like any other. Pixels are scaled to zero
    mean and unit deviation a channel over the private training set.

    Args:
        augment: ``none``, ``crop`` (pad by an eighth of the side, random crop) or ``crop_flip``; private samples only,
            unless ``augment_public``.
    """

    def __init__(self, private: Images, test: Images, public: Images | None, split: Split, rows: range, *, batch: int,
                 augment: str = "none", augment_public: bool = False, seed: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):  # fmt: skip
        self.rows, self.seed, self.device, self.dtype = rows, seed, torch.device(device), dtype
        self.batch_size, self.augment, self.augment_public = batch, augment, augment_public
        self.split, self.classes, self.channels, self.size = split, private.classes, private.channels, private.size
        pixels = private.pixels if public is None else torch.cat([private.pixels, public.pixels])
        self.pool = pixels.permute(0, 2, 3, 1).contiguous().to(self.device)  # [N + m, H, W, C]
        self.private, self.public = len(private), 0 if public is None else len(public)
        self.labels = private.labels.to(self.device)
        self.public_stored = "" if public is None else public.stored
        self.test = test.pixels.permute(0, 2, 3, 1).contiguous().to(self.device)
        self.test_labels = test.labels.to(self.device)
        train = torch.cat([torch.from_numpy(t) for t in split.train])
        levels = torch.stack([private.pixels[train, c].flatten().bincount(minlength=256) for c in range(self.channels)]).double()
        levels, value = levels / levels.sum(1, keepdim=True), torch.arange(256).double()
        mean = levels @ value
        self.mean = mean.to(self.device, dtype)
        self.std = ((levels @ value.square()) - mean.square()).sqrt().clamp(min=1e-3).to(self.device, dtype)
        self.nodes, self.samples = len(split.train), len(train)
        self.own = [torch.from_numpy(split.train[i]).to(self.device) for i in rows]
        self.distilled: list[Labels] | None = None
        self.generation, self.generation_start = 0, 0
        self._union()

    # ------------------------------------------------------------------ what the nodes train on

    @property
    def k(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def distil(self, labels: list[Labels], step: int) -> None:
        """From ``step`` on every node here trains on its own samples and these labels of public ones."""
        self.distilled = labels
        self.generation, self.generation_start = self.generation + 1, step
        self._union()

    def _union(self) -> None:
        index, targets = [], []
        for i, own in enumerate(self.own):
            index.append(own)
            targets.append(F.one_hot(self.labels[own], self.k).to(self.dtype))
            if self.distilled is not None:
                index.append(self.distilled[i].index.to(self.device) + self.private)
                targets.append(self.distilled[i].probabilities.to(self.device, self.dtype))
        per_node = 1 if self.distilled is None else 2
        self.sizes = [sum(map(len, index[i * per_node : (i + 1) * per_node])) for i in range(len(self.own))]
        self._index, self._targets = torch.cat(index), torch.cat(targets)
        self._offset = torch.tensor([0, *self.sizes]).cumsum(0)[:-1].to(self.device)

    def describe(self) -> dict:
        """Shape and scaling of the images, which is what a network needs to know of the data."""
        scaling = {"mean": self.mean.cpu(), "std": self.std.cpu()}
        return {"channels": self.channels, "size": self.size, "classes": self.k, **scaling}

    def duplicates(self) -> int:
        """How many public images equal a test image, pixel by pixel."""
        test = {image.tobytes() for image in self.test.cpu().numpy()}
        return sum(image.tobytes() in test for image in self.pool[self.private :].cpu().numpy())

    def mass(self) -> Tensor:
        """Label mass [rows, k] of the samples every node here trains on; soft labels count by their probabilities."""
        return torch.stack([t.double().sum(0) for t in self._targets.split(self.sizes)]).cpu()

    def counts(self) -> Tensor:
        """Private training samples of each class that every node here holds, int32 [rows, k]."""
        return torch.stack([self.labels[own].bincount(minlength=self.k) for own in self.own]).int().cpu()

    def steps(self, mean_size: float | None = None) -> int:
        """Steps an epoch: over the private samples, or over ``mean_size`` samples a node."""
        per_node = self.samples / self.nodes if mean_size is None else mean_size
        return math.ceil(round(per_node / self.batch_size, 9))

    def order(self, step: int, steps: int) -> Tensor:
        """Positions [rows, steps * batch] in the nodes' sets from ``step`` on; each walks its own permutations."""
        start = (step - self.generation_start) * self.batch_size
        stop = start + steps * self.batch_size
        walks = []
        for node, size in zip(self.rows, self.sizes, strict=True):
            passes = range(start // size, (stop - 1) // size + 1)
            walk = torch.cat([randomness.permutation(size, self.seed, "order", self.generation, node, p) for p in passes])
            walks.append(walk[start % size :][: stop - start])
        return torch.stack(walks).to(self.device)

    def batch(self, positions: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images [rows, b, C, H, W], channels-last, and target distributions [rows, b, k] at ``positions`` [rows, b]."""
        flat = self._offset[:, None] + positions
        index = self._index[flat]
        pixels = self.pool[index.flatten()]
        if self.augment != "none":
            pixels = self._crop(pixels, index, step)
        return self._normal(pixels).unflatten(0, positions.shape), self._targets[flat]

    def _crop(self, pixels: Tensor, index: Tensor, step: int) -> Tensor:
        pad, size = max(1, self.size // 8), self.size
        node = torch.tensor(self.rows)[:, None]
        place = torch.arange(index.shape[1])
        dy, dx = (randomness.randint(2 * pad + 1, self.seed, p, node, step, place).to(self.device) for p in ("dy", "dx"))
        flip = (randomness.randint(2, self.seed, "flip", node, step, place).to(self.device) == 1) & (self.augment == "crop_flip")
        if not self.augment_public:
            private = index < self.private
            dy, dx, flip = torch.where(private, dy, pad), torch.where(private, dx, pad), flip & private
        line = torch.arange(size, device=self.device)
        ys = dy.flatten()[:, None] + line
        xs = dx.flatten()[:, None] + torch.where(flip.flatten()[:, None], size - 1 - line, line)
        padded = F.pad(pixels, (0, 0, pad, pad, pad, pad))
        sample = torch.arange(len(pixels), device=self.device)[:, None, None]
        return padded[sample, ys[:, :, None], xs[:, None, :]]

    def _normal(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.dtype).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)

    # ------------------------------------------------------------------ what they are asked about

    def _batches(self, pixels: Tensor, index: Tensor | None = None) -> Iterator[Tensor]:
        for part in torch.arange(len(pixels)).split(EVALUATION_BATCH) if index is None else index.split(EVALUATION_BATCH):
            yield self._normal(pixels[part.to(self.device)])

    def public_batches(self) -> Iterator[Tensor]:
        """The public set in one fixed shuffled order; see :meth:`public_order`."""
        return self._batches(self.pool, self.public_order() + self.private)

    def public_order(self) -> Tensor:
        """The order [m] of :meth:`public_batches`: shuffled, since a class-sorted set would skew batch statistics."""
        return randomness.permutation(self.public, 0, "public")

    def private_batches(self, index: Tensor) -> Iterator[Tensor]:
        """Images of the private set."""
        return self._batches(self.pool, index)

    def held_out(self, node: int) -> Tensor:
        """Private validation samples of ``node``."""
        return torch.from_numpy(self.split.validation[node])

    def examined(self, split: str, samples: int | None) -> tuple[Callable[[], Iterator[Tensor]], Tensor]:
        """Batches and labels of ``samples`` (None: all) of the test set, or of all nodes' validation samples."""
        if split == "test":
            pixels, labels, index = self.test, self.test_labels, torch.arange(len(self.test))
        else:
            pixels, labels = self.pool, self.labels
            index = torch.cat([torch.from_numpy(v) for v in self.split.validation])
        index = index[randomness.permutation(len(index), 0, "examined")[:samples]]
        return lambda: self._batches(pixels, index), labels[index.to(self.device)]
