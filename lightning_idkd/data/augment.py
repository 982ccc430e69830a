"""Random crops and flips of the training images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_idkd import randomness

DRAWS = 2**16  # random crops are drawn for about this many samples at once


class Augmentation:
    """Crops square training images at random and, where ``flip`` says so, mirrors each with probability one half.

    An image is padded with black by an eighth of its side (at least one pixel) and cropped to its own size. Offsets and
    flips are hashed from seed, node, step and place in the batch, so they do not depend on the number of processes.

    Args:
        size: side of the images in pixels.
        flip: whether to mirror images as well.
        nodes: the nodes whose images these are, in the order of the rows.
        seed: seed of the run.
        device: device of the images.
    """

    def __init__(self, size: int, flip: bool, nodes: range, seed: int, device: torch.device):
        self.size, self.pad, self.flip = size, max(1, size // 8), flip
        self.nodes, self.seed, self.device = nodes, seed, device
        self._block: tuple[int, int] | None = None  # block of steps and size of a batch that `_draws` belongs to

    def apply(self, pixels: Tensor, step: int, only: Tensor) -> Tensor:
        """The ``pixels`` [rows * b, S, S, C] of a step, augmented where the mask ``only`` [rows, b] is True."""
        dy, dx, flip = self._draw(step, only.shape[1])
        dy, dx, flip = dy.where(only, self.pad), dx.where(only, self.pad), flip & only
        line = torch.arange(self.size, device=self.device)
        ys = dy.flatten()[:, None] + line
        xs = dx.flatten()[:, None] + torch.where(flip.flatten()[:, None], self.size - 1 - line, line)
        padded = F.pad(pixels, (0, 0, self.pad, self.pad, self.pad, self.pad))
        sample = torch.arange(len(pixels), device=self.device)[:, None, None]
        return padded[sample, ys[:, :, None], xs[:, None, :]]

    def _draw(self, step: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets and flips [rows, batch] of a step; many steps are drawn at once and kept."""
        steps_at_once = max(1, DRAWS // (len(self.nodes) * batch))
        block = step // steps_at_once, batch
        if self._block != block:
            first = step // steps_at_once * steps_at_once
            steps = torch.arange(first, first + steps_at_once, device=self.device)[:, None, None]
            node = torch.tensor(self.nodes, device=self.device)[:, None]
            place = torch.arange(batch, device=self.device)
            draws = []
            for high, purpose in ((2 * self.pad + 1, "dy"), (2 * self.pad + 1, "dx"), (2, "flip")):
                draws.append(randomness.randint(high, self.seed, purpose, node, steps, place, device=self.device))
            dy, dx, flip = draws
            self._block, self._draws = block, (dy, dx, (flip == 1) & self.flip)
        dy, dx, flip = self._draws
        place = step % steps_at_once
        return dy[place], dx[place], flip[place]
