"""The nodes' samples as uint8 tensors on the device: who trains on what, in which order, and batched augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_idkd import metrics, randomness
from lightning_idkd.data.identity import notes
from lightning_idkd.data.partition import Split
from lightning_idkd.data.source import Images
from lightning_idkd.errors import require
from lightning_idkd.labels import FineTuning, Labels

T = TypeVar("T")
NOISE = 256  # images, to see what a detector makes of them
DRAWS = 2**16  # samples whose augmentation is drawn at once
EVALUATION_BATCH = 256  # fixed: a network whose output depends on the batch gives the same number every time


def same_named(public: Images | None, classes: tuple[str, ...]) -> Tensor:
    """The private class [m] whose name a public sample's own class has, -1 where none: for diagnosis, never for training."""
    if public is None:
        return torch.empty(0, dtype=torch.int64)
    known = {name: c for c, name in enumerate(classes)}
    to = torch.tensor([*(known.get(name, -1) for name in public.classes), -1])  # label -1 finds the last
    return to[public.labels.clamp(-1, len(public.classes))]


class Store:
    """Private, public and test images and the sets that the nodes ``rows`` train on.

    Private and public images share one pool, so a distilled sample is an index like any other. Pixels are scaled to zero
    mean and unit deviation a channel over the private training set.

    Args:
        augment: ``none``, ``crop`` (pad by an eighth of the side, random crop) or ``crop_flip``; private samples only,
            unless ``augment_public``.
    """

    def __init__(self, private: Images, test: Images, public: Images | None, split: Split, rows: range, *, batch: int,
                 augment: str = "none", augment_public: bool = False, tuning: FineTuning | None = None, seed: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):  # fmt: skip
        self.rows, self.seed, self.device, self.dtype = rows, seed, torch.device(device), dtype
        self.batch_size, self.augment, self.augment_public = batch, augment, augment_public
        self.tuning = tuning or FineTuning()
        share = self.tuning.private_share
        require(share is None or batch > 1, "distillation.tuning.private_share", share, "null where train.batch_size is 1")
        self.split, self.classes, self.channels, self.size = split, private.classes, private.channels, private.size
        pixels = private.pixels if public is None else torch.cat([private.pixels, public.pixels])
        self.pool = pixels.permute(0, 2, 3, 1).contiguous().to(self.device)  # [N + m, H, W, C]
        self.private, self.public = len(private), 0 if public is None else len(public)
        self.labels = private.labels.to(self.device)
        self.truth = same_named(public, private.classes)
        self.public_stored = "" if public is None else public.stored
        self.notes = notes(("data.private", private), ("data.private", test), ("data.public", public))
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
        self.answers: tuple[list[Tensor], float] | None = None
        self.generation, self.generation_start = 0, 0
        self._drawn: tuple[int, int] | None = None  # which of the steps `_crops` has
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

    def soften(self, answers: list[Tensor], weight: float) -> None:
        """From now on a share ``weight`` of the labels of every node's own samples are these ``answers`` [a, k]."""
        self.answers = [soft.to(self.device, self.dtype) for soft in answers], weight
        self._union()

    def restore(
        self, labels: list[Labels] | None, answers: tuple[list[Tensor], float] | None, generation: int, start: int
    ) -> None:
        """The sets of a run that is resumed."""
        self.distilled, self.generation, self.generation_start = labels, generation, start
        self.answers = None if answers is None else ([soft.to(self.device) for soft in answers[0]], answers[1])
        self._union()

    def _union(self) -> None:
        index, targets, self.parts = [], [], []
        answers, weight = self.answers or ([None] * len(self.own), 0.0)
        for i, own in enumerate(self.own):
            label = F.one_hot(self.labels[own], self.k).to(self.dtype)
            parts = [(own, label if answers[i] is None else (1 - weight) * label + weight * answers[i])]
            if self.distilled is not None:
                distilled = self._tuned(i, self.distilled[i])
                parts.append(
                    (distilled.index.to(self.device) + self.private, distilled.probabilities.to(self.device, self.dtype))
                )
            index += [where for where, _ in parts]
            targets += [what for _, what in parts]
            self.parts.append([len(where) for where, _ in parts])
        self.sizes = [sum(sizes) for sizes in self.parts]
        self._index, self._targets = torch.cat(index), torch.cat(targets)
        self._weights = self._weigh() if self.distilled is not None else None
        self._offset = torch.tensor([0, *self.sizes]).cumsum(0)[:-1].to(self.device)
        self._chances: dict[tuple[int, int], Tensor] = {}

    def _tuned(self, i: int, labels: Labels) -> Labels:
        """Without the surplus of classes that have more samples than the median of those that occur."""
        if self.tuning.balance != "cap" or not len(labels):
            return labels
        classes = labels.probabilities.argmax(1).cpu()
        count = classes.bincount(minlength=self.k)
        most = count[count > 0].median()
        place = randomness.permutation(len(classes), self.seed, "cap", self.generation, self.rows[i])
        shuffled = classes[place]
        rank = torch.stack([(shuffled == c).cumsum(0) for c in range(self.k)])[shuffled, torch.arange(len(classes))]
        return labels[place[rank <= most].sort().values.to(labels.index.device)]

    def _weigh(self) -> Tensor | None:
        """Weight of every sample's loss; None where all are 1."""
        tuning = self.tuning
        if tuning.weight == 1 and not tuning.confidence:
            return None
        weights = torch.full((len(self._index),), tuning.weight, device=self.device, dtype=self.dtype)
        if tuning.confidence:
            weights *= metrics.confidence(self._targets)
        return weights.where(self._index >= self.private, 1)

    def describe(self) -> dict:
        """Shape and scaling of the images, which is what a network needs to know of the data, and which data these are."""
        scaling = {"mean": self.mean.cpu(), "std": self.std.cpu()}
        return {"channels": self.channels, "size": self.size, "classes": self.k, **scaling, "data": self.split.data}

    def duplicates(self) -> int:
        """How many public images equal a test image, pixel by pixel."""
        test = {image.tobytes() for image in self.test.cpu().numpy()}
        return sum(image.tobytes() in test for image in self.pool[self.private :].cpu().numpy())

    def mass(self) -> Tensor:
        """Label mass [rows, k] of the samples every node here trains on; soft labels count by their probabilities."""
        return torch.stack([t.double().sum(0) for t in self._targets.split(self.sizes)]).cpu()

    def counts(self) -> Tensor:
        """Private training samples of each class that every node here holds, int32 [rows, k]."""
        return self._counts

    @cached_property
    def _counts(self) -> Tensor:
        return torch.stack([self.labels[own].bincount(minlength=self.k) for own in self.own]).int().cpu()

    @cached_property
    def log_prior(self) -> Tensor:
        """Log of the (add-one) frequency of every class among each node's private training samples, [rows, k]."""
        held = self._counts.to(self.device, self.dtype) + 1
        return (held / held.sum(1, keepdim=True)).log()

    def steps(self, mean_size: float | None = None) -> int:
        """Steps an epoch: over the private samples, or over ``mean_size`` samples a node."""
        per_node = self.samples / self.nodes if mean_size is None else mean_size
        return math.ceil(round(per_node / self.batch_size, 9))

    def order(self, step: int, steps: int) -> Tensor:
        """Positions [rows, steps * batch] in the nodes' sets from ``step`` on; each walks its own permutations.

        With a ``private_share`` every batch begins with private samples, and both sets are walked on their own.
        """
        parts, walks = [], []  # of every node: row, offset, size and samples in a batch
        for i, sizes in enumerate(self.parts):
            share, b = self.tuning.private_share, self.batch_size
            if share is None or len(sizes) == 1 or not sizes[1]:
                parts.append([(i, 0, self.sizes[i], b)])
                continue
            private = min(max(1, round(share * b)), b - 1)
            parts.append([(i, 0, sizes[0], private), (i, sizes[0], sizes[1], b - private)])
        found = iter(self._walks(list(chain(*parts)), step - self.generation_start, steps))
        for of_node in parts:
            walks.append(torch.cat([next(found).view(steps, batch) for *_, batch in of_node], dim=1).flatten())
        return torch.stack(walks).to(self.device)

    def _walks(self, parts: list[tuple[int, int, int, int]], start: int, steps: int) -> list[Tensor]:
        """Positions [steps * batch] from step ``start`` of this set on in every part of it (row, offset, size, batch)."""
        if self.tuning.balance == "draw" and self.distilled is not None:
            return [self._draw(*part, start, steps) for part in parts]
        passes = [range(start * b // size, ((start + steps) * b - 1) // size + 1) for *_, size, b in parts]
        found: dict[tuple[int, int], Tensor] = {}
        for at_start in (True, False):  # what begins elsewhere has the place as a further counter
            wanted = [(k, p) for k, part in enumerate(parts) if (part[1] == 0) == at_start for p in passes[k]]
            if wanted:
                which, count = torch.tensor(wanted).T
                row, offset, size, _ = torch.tensor(parts)[which].T
                counters = row + self.rows.start, *(() if at_start else (offset,)), count
                drawn = randomness.permutations(size, self.seed, "order", torch.full_like(row, self.generation), *counters)
                found |= dict(zip(wanted, drawn, strict=True))
        walks = [torch.cat([found[k, p] for p in passes[k]]) for k in range(len(parts))]
        return [offset + walk[start * b % size :][: steps * b] for (_, offset, size, b), walk in zip(parts, walks, strict=True)]

    def _draw(self, i: int, offset: int, size: int, batch: int, start: int, steps: int) -> Tensor:
        """The same with draws in which every class has the same chance."""
        count = torch.arange(start * batch, (start + steps) * batch)
        draws = randomness.uniform(self.seed, "draw", self.generation, self.rows[i], offset, count)
        return offset + torch.searchsorted(self._chance(i, offset, size), draws.double(), right=True).clamp_max(size - 1)

    def _chance(self, i: int, offset: int, size: int) -> Tensor:
        """Cumulative chance [size] of the samples of that part, every class that occurs having the same in all."""
        if (i, offset) not in self._chances:
            first = int(self._offset[i]) + offset
            classes = self._targets[first : first + size].argmax(1).cpu()
            count = classes.bincount(minlength=self.k)
            chance = 1.0 / count[classes].double()
            self._chances[i, offset] = (chance / chance.sum()).cumsum(0)
        return self._chances[i, offset]

    def batch(self, positions: Tensor, step: int) -> tuple[Tensor, ...]:
        """Images [rows, b, C, H, W], channels-last, and target distributions [rows, b, k], times a sample's weight, at
        ``positions`` [rows, b]; where fine-tuning asks for them temperatures [rows, b], and offsets of the logits
        [rows, b, k]."""
        flat = self._offset[:, None] + positions
        index, targets = self._index[flat], self._targets[flat]
        if self._weights is not None:
            targets = targets * self._weights[flat][..., None]
        pixels = self.pool[index.flatten()]
        if self.augment != "none":
            pixels = self._crop(pixels, index, step)
        found = self._normal(pixels).unflatten(0, positions.shape), targets
        tuning, private = self.tuning, index < self.private
        if self.distilled is None or (tuning.temperature == 1 and not tuning.logit_adjustment):
            return found
        temperature = torch.ones_like(index, dtype=self.dtype).where(private, tuning.temperature)
        if not tuning.logit_adjustment:
            return *found, temperature
        return *found, temperature, tuning.logit_adjustment * self.log_prior[:, None] * private[..., None]

    def _crop(self, pixels: Tensor, index: Tensor, step: int) -> Tensor:
        pad, size = self._pad, self.size
        dy, dx, flip = self._crops(step, index.shape[1])
        if not self.augment_public:
            private = index < self.private
            dy, dx, flip = torch.where(private, dy, pad), torch.where(private, dx, pad), flip & private
        line = torch.arange(size, device=self.device)
        ys = dy.flatten()[:, None] + line
        xs = dx.flatten()[:, None] + torch.where(flip.flatten()[:, None], size - 1 - line, line)
        padded = F.pad(pixels, (0, 0, pad, pad, pad, pad))
        sample = torch.arange(len(pixels), device=self.device)[:, None, None]
        return padded[sample, ys[:, :, None], xs[:, None, :]]

    @property
    def _pad(self) -> int:
        return max(1, self.size // 8)

    def _crops(self, step: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets and flips [rows, batch] of a step, drawn for many steps at once."""
        count = max(1, DRAWS // (len(self.rows) * batch))
        drawn = step // count, batch
        if self._drawn != drawn:
            steps = torch.arange(step // count * count, (step // count + 1) * count, device=self.device)[:, None, None]
            node, place = torch.tensor(self.rows, device=self.device)[:, None], torch.arange(batch, device=self.device)
            ranges = (2 * self._pad + 1, "dy"), (2 * self._pad + 1, "dx"), (2, "flip")
            dy, dx, flip = (
                randomness.randint(high, self.seed, purpose, node, steps, place, device=self.device) for high, purpose in ranges
            )
            self._drawn, self._draws = drawn, (dy, dx, (flip == 1) & (self.augment == "crop_flip"))
        return tuple(draws[step % count] for draws in self._draws)

    def _normal(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.dtype).sub_(self.mean).div_(self.std).permute(0, 3, 1, 2)

    # ------------------------------------------------------------------ what they are asked about

    def _batches(self, pixels: Tensor, index: Tensor | None = None) -> Iterator[Tensor]:
        for part in torch.arange(len(pixels)).split(EVALUATION_BATCH) if index is None else index.split(EVALUATION_BATCH):
            yield self._normal(pixels[part.to(self.device)])

    @property
    def batches(self) -> int:
        """Batches of the whole test set."""
        return math.ceil(len(self.test) / EVALUATION_BATCH)

    def noise_batches(self) -> Iterator[Tensor]:
        """Images of uniform noise, which no set resembles."""
        return self._batches(self._noise)

    @cached_property
    def _noise(self) -> Tensor:
        noise = randomness.randint(256, 0, "noise", torch.arange(NOISE * self.pool[0].numel()))
        return noise.to(torch.uint8).view(NOISE, *self.pool.shape[1:]).to(self.device)

    def public_batches(self) -> Iterator[Tensor]:
        """The public set in one fixed shuffled order; see :meth:`public_order`."""
        return self._batches(self.pool, self.public_order() + self.private)

    def public_order(self) -> Tensor:
        """The order [m] of :meth:`public_batches`: shuffled, since a class-sorted set would skew batch statistics."""
        return randomness.permutation(self.public, 0, "public")

    def unshuffled(self, outputs: T) -> T:
        """What a network made of :meth:`public_batches`, in the set's own order."""
        return outputs[torch.argsort(self.public_order()).to(self.device)]

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
