"""The nodes' samples on the device: the sets that nodes train on, and the samples that they predict on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_idkd import metrics, randomness
from lightning_idkd.data.identity import collect_notes
from lightning_idkd.data.partition import Split
from lightning_idkd.data.samples import Samples
from lightning_idkd.data.walks import Walks, cap_classes
from lightning_idkd.errors import require
from lightning_idkd.labels import FineTuning, Labels

T = TypeVar("T")
NOISE = 256  # samples of noise that a detector is tried on
EVALUATION_BATCH = 256  # fixed, so that a network whose output depends on the batch always gives the same number


def match_classes(public: Samples | None, classes: tuple[str, ...]) -> Tensor:
    """Per public sample: the private class [m] with the same name as its own class, or -1 if there is none.

    It serves diagnosis only and never enters training.
    """
    if public is None:
        return torch.empty(0, dtype=torch.int64)
    number = {name: c for c, name in enumerate(classes)}
    to = torch.tensor([*(number.get(name, -1) for name in public.classes), -1])  # label -1 takes the last entry
    return to[public.labels.clamp(-1, len(public.classes))]


class Store:
    """Private, public and test samples, and the sets that the nodes ``rows`` train on.

    Private and public samples share one pool, so that a distilled sample is an index like any other. ``inputs`` says
    what they are, and scales them to zero mean and unit standard deviation over the private training samples of all
    nodes.

    Args:
        private: the private training samples.
        test: the test samples, of the same form and classes.
        public: the public samples, of the same form; None for a run without them.
        split: which private samples each of the n nodes has.
        rows: the nodes of this process.
        batch: samples in a node's batch.
        augment: one of ``inputs.augmentations``.
        augment_public: whether distilled samples are augmented too; else only private ones are.
        tuning: how nodes train on private and distilled samples together.
        plain_loss: whether private samples have the loss of distilled ones.
        flipped: nodes whose training samples have the label k - 1 - y in place of y.
        seed: seed of the run.
        device: device of all samples.
        dtype: type of the scaled samples and of the targets.

    Raises:
        UserError: ``tuning`` sets a private share of a batch of one sample, or these samples have no such augmentation.
    """

    missed: Tensor
    """Batches that each node of ``rows`` did not take, int64 [2, rows]: since it got its set, without those of this
    epoch; and in this epoch."""

    def __init__(self, private: Samples, test: Samples, public: Samples | None, split: Split, rows: range, *,
                 batch: int, augment: str = "none", augment_public: bool = False, tuning: FineTuning | None = None,
                 plain_loss: bool = True, flipped: Sequence[int] = (), seed: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):  # fmt: skip
        self.rows, self.seed, self.device, self.dtype = rows, seed, torch.device(device), dtype
        self.batch_size, self.augment_public, self.plain_loss = batch, augment_public, plain_loss
        self.tuning = tuning or FineTuning()
        share, allowed = self.tuning.private_share, "null where train.batch_size is 1"
        require(share is None or batch > 1, "distillation.tuning.private_share", share, allowed)

        self.split, self.classes = split, private.classes
        self.private, self.public = len(private), 0 if public is None else len(public)
        values = private.values if public is None else torch.cat([private.values, public.values])
        self.pool = private.inputs.arrange(values).to(self.device)
        labels = private.labels.clone()
        for node in flipped:
            labels[split.train[node]] = self.k - 1 - labels[split.train[node]]
        self.labels = labels.to(self.device)
        self.test = private.inputs.arrange(test.values).to(self.device)
        self.test_labels = test.labels.to(self.device)
        self.truth = match_classes(public, private.classes)
        self.public_stored = "" if public is None else public.stored
        self.notes = collect_notes(("data.private", private), ("data.private", test), ("data.public", public))

        train = torch.cat([torch.from_numpy(indices) for indices in split.train])
        self.nodes, self.samples = len(split.train), len(train)
        self.inputs = private.inputs.measure(private.values, train, self.device, dtype)
        self.augmentation = self.inputs.augmentation(augment, rows, seed, self.device)

        self.own = [torch.from_numpy(split.train[node]).to(self.device) for node in rows]
        self.distilled: list[Labels] | None = None
        self.soft_targets: tuple[list[Tensor], float] | None = None
        self.generation, self.generation_start = 0, 0
        self.missed = torch.zeros(2, len(rows), dtype=torch.int64)
        self._concatenate_sets()

    @property
    def k(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def describe(self) -> dict:
        """What a network needs to know of the data (their form, scaling and classes), and which data these are."""
        return {**self.inputs.describe(), "classes": self.k, "data": self.split.data}

    # ------------------------------------------------------------------ the set that each node trains on

    def distil(self, labels: list[Labels], step: int) -> None:
        """Let the nodes of this process train on labelled public samples too, from ``step`` on."""
        self.distilled = labels
        self.generation, self.generation_start = self.generation + 1, step
        self.missed.zero_()
        self._concatenate_sets()

    def soften(self, soft_targets: list[Tensor], weight: float) -> None:
        """Mix the labels of the nodes' own samples with soft targets, from now on.

        Args:
            soft_targets: per node, distributions over the classes [a, k] for its own samples.
            weight: weight of the soft targets in the mixture; the labels have 1 - ``weight``.
        """
        self.soft_targets = [soft.to(self.device, self.dtype) for soft in soft_targets], weight
        self._concatenate_sets()

    def restore(
        self, labels: list[Labels] | None, soft_targets: tuple[list[Tensor], float] | None, generation: int, start: int
    ) -> None:
        """Restore the sets of a resumed run."""
        self.distilled, self.generation, self.generation_start = labels, generation, start
        self.soft_targets = None
        if soft_targets is not None:
            distributions, weight = soft_targets
            self.soft_targets = [soft.to(self.device) for soft in distributions], weight
        self._concatenate_sets()

    def _concatenate_sets(self) -> None:
        """Concatenate the sets of all nodes: indices into the pool, targets and weights of the samples."""
        index, targets, weights, weighted, self.parts = [], [], [], False, []
        soft_targets, weight = self.soft_targets or ([None] * len(self.own), 0.0)
        for i, own in enumerate(self.own):
            target = F.one_hot(self.labels[own], self.k).to(self.dtype)
            index.append(own)
            targets.append(target if soft_targets[i] is None else (1 - weight) * target + weight * soft_targets[i])
            self.parts.append([len(own)])
            if self.distilled is not None:
                distilled = self.distilled[i]
                if self.tuning.balance == "cap":
                    distilled = cap_classes(distilled, self.k, self.seed, self.generation, self.rows[i])
                index.append(distilled.index.to(self.device) + self.private)
                targets.append(distilled.probabilities.to(self.device, self.dtype))
                weighted |= distilled.weights is not None
                weights += [torch.ones(len(own)), torch.ones(len(distilled))]
                if distilled.weights is not None:
                    weights[-1] = distilled.weights
                self.parts[i].append(len(distilled))
        self.sizes = [sum(sizes) for sizes in self.parts]
        self._index, self._targets = torch.cat(index), torch.cat(targets)
        given = torch.cat([w.to(self.device, self.dtype) for w in weights]) if weighted else None
        self._weights = None if self.distilled is None else self._weigh(given)
        self._offset = torch.tensor([0, *self.sizes]).cumsum(0)[:-1].to(self.device)
        drawn = self.tuning.balance == "draw" and self.distilled is not None
        self._walks = Walks(
            self.parts,
            self.rows,
            batch=self.batch_size,
            shares=self.private_shares(),
            seed=self.seed,
            generation=self.generation,
            start=self.generation_start,
            targets=list(self._targets.split(self.sizes)) if drawn else None,
        )
        self.loss_counts = self.count_labels()

    def _weigh(self, given: Tensor | None) -> Tensor | None:
        """Weight of every sample's loss, from the weights ``given`` with the samples; None where all are 1."""
        tuning = self.tuning
        if given is None and tuning.weight == 1 and not tuning.confidence:
            return None
        weights = torch.full((len(self._index),), tuning.weight, device=self.device, dtype=self.dtype)
        if given is not None:
            weights *= given
        if tuning.confidence:
            weights *= metrics.confidence(self._targets)
        return weights.where(self._index >= self.private, 1)

    def private_shares(self) -> list[float] | list[None]:
        """Share of every node's batches that is private; None where it follows from the sizes of its sets."""
        share = self.tuning.private_share
        if share != "skew":
            return [share] * len(self.own)
        frequencies = self._counts.double() / self._counts.sum(1, keepdim=True)
        total_variation = 0.5 * (frequencies - 1 / self.k).abs().sum(1)
        return (1 - total_variation / 2).tolist()

    # ------------------------------------------------------------------ batches

    def steps(self, mean_size: float | None = None) -> int:
        """Steps of an epoch: over the private training samples, or over ``mean_size`` samples per node."""
        per_node = self.samples / self.nodes if mean_size is None else mean_size
        return math.ceil(round(per_node / self.batch_size, 9))

    def order(self, step: int, steps: int) -> Tensor:
        """Positions [rows, steps * batch] in the nodes' sets for ``steps`` steps from ``step`` on (:class:`Walks`)."""
        return self._walks.order(step, steps, self.missed[0]).to(self.device)

    def positions(self, order: Tensor, epoch_step: int) -> Tensor:
        """Positions [rows, b] of the next batch, from the epoch's ``order``; a node has missed some of its steps."""
        b = self.batch_size
        if not self.missed[1].any():
            return order[:, epoch_step * b : (epoch_step + 1) * b]
        return order.unflatten(1, (-1, b))[torch.arange(len(order)), epoch_step - self.missed[1]]

    def next_positions(self, taken: Tensor) -> Tensor:
        """Positions [rows, b] of the next batch of every node, which has ``taken`` [rows] batches of its present
        set."""
        return self._walks.order(self.generation_start, 1, -taken).to(self.device)

    def end_epoch(self) -> None:
        """Count the steps that nodes missed in this epoch as earlier ones."""
        self.missed = torch.stack([self.missed.sum(0), torch.zeros_like(self.missed[1])])

    def batch(self, positions: Tensor, step: int) -> tuple[Tensor, ...]:
        """A batch of every node, of the samples at ``positions`` [rows, b] in its set.

        Inputs are [rows, b, ...], images channels-last; target distributions [rows, b, k] are multiplied by the weight
        of the sample. Where the loss needs them, the nodes' label counts [rows, k], which samples are private [rows, b]
        and temperatures [rows, b] follow.
        """
        flat = self._offset[:, None] + positions
        index, targets = self._index[flat], self._targets[flat]
        if self._weights is not None:
            targets = targets * self._weights[flat][..., None]
        private = index < self.private
        samples = self.pool[index.flatten()]
        if self.augmentation is not None:
            only = torch.ones_like(private) if self.augment_public else private
            samples = self.augmentation.apply(samples, step, only)
        batch = self.inputs.scale(samples).unflatten(0, positions.shape), targets
        tuning = self.tuning
        if self.plain_loss and (self.distilled is None or tuning.temperature == 1):
            return batch
        temperature = torch.ones_like(index, dtype=self.dtype).where(private, tuning.temperature)
        return *batch, self.loss_counts, private, temperature

    # ------------------------------------------------------------------ counts of labels

    def mass(self) -> Tensor:
        """Label mass [rows, k] of the samples that each node trains on; soft labels count by their probabilities."""
        return torch.stack([targets.double().sum(0) for targets in self._targets.split(self.sizes)]).cpu()

    def counts(self) -> Tensor:
        """Number of private training samples of each node and class, int32 [rows, k]."""
        return self._counts

    @cached_property
    def _counts(self) -> Tensor:
        return torch.stack([self.labels[own].bincount(minlength=self.k) for own in self.own]).int().cpu()

    @cached_property
    def log_prior(self) -> Tensor:
        """Log of the (add-one) frequency of every class among each node's private training samples, [rows, k]."""
        count = self._counts.to(self.device, self.dtype) + 1
        return (count / count.sum(1, keepdim=True)).log()

    def count_labels(self) -> Tensor:
        """Label counts [rows, k] for the loss: :meth:`counts` or, if ``tuning`` asks for it, with distilled labels.

        A private sample counts 1. Distilled samples count by their soft labels; where they are walked on their own, all
        of them together count as much as the private ones, times the ratio in which a batch has them.
        """
        counts = self._counts.to(self.device, self.dtype)
        if self.distilled is None or not self.tuning.count_distilled:
            return counts
        rows = []
        for own, targets, parts in zip(counts, self._targets.split(self.sizes), self._walks.parts, strict=True):
            mass = targets[int(own.sum()) :].sum(0)
            if len(parts) == 2:
                private, distilled = parts
                mass = mass * (distilled.batch / private.batch * own.sum() / mass.sum())
            rows.append(own + mass)
        return torch.stack(rows)

    def duplicates(self) -> int:
        """How many public samples equal a test sample in every value."""
        test = {sample.tobytes() for sample in self.test.cpu().numpy()}
        return sum(sample.tobytes() in test for sample in self.pool[self.private :].cpu().numpy())

    # ------------------------------------------------------------------ samples that nodes predict on

    def _batches(self, pool: Tensor, index: Tensor | None = None) -> Iterator[Tensor]:
        """Scaled samples in batches of fixed size: the whole ``pool``, or those at ``index``."""
        index = torch.arange(len(pool)) if index is None else index
        for part in index.split(EVALUATION_BATCH):
            yield self.inputs.scale(pool[part.to(self.device)])

    @property
    def batches(self) -> int:
        """Number of batches of the whole test set."""
        return math.ceil(len(self.test) / EVALUATION_BATCH)

    def noise_batches(self) -> Iterator[Tensor]:
        """Samples of uniform noise, which no data set resembles."""
        return self._batches(self._noise)

    @cached_property
    def _noise(self) -> Tensor:
        return self.inputs.arrange(self.inputs.draw_noise(NOISE)).to(self.device)

    def public_batches(self) -> Iterator[Tensor]:
        """The public set in one fixed shuffled order; see :meth:`public_order`."""
        return self._batches(self.pool, self.public_order() + self.private)

    def public_order(self) -> Tensor:
        """The order [m] of :meth:`public_batches`: shuffled, since a class-sorted set would skew batch statistics."""
        return randomness.permutation(self.public, 0, "public")

    def restore_order(self, outputs: T) -> T:
        """Reorder a network's outputs for :meth:`public_batches` to the order of the public set."""
        return outputs[torch.argsort(self.public_order()).to(self.device)]

    def private_batches(self, index: Tensor) -> Iterator[Tensor]:
        """The samples at ``index`` of the private set."""
        return self._batches(self.pool, index)

    def labelled_batches(self, i: int, distilled: bool) -> tuple[Iterator[Tensor], Tensor]:
        """Batches of the samples of row ``i``, its distilled ones too if asked, and their label distributions."""
        index, targets = self.own[i], F.one_hot(self.labels[self.own[i]], self.k).to(self.dtype)
        if distilled:
            start = len(index)
            index = torch.cat([index, self._index.split(self.sizes)[i][start:]])
            targets = torch.cat([targets, self._targets.split(self.sizes)[i][start:]])
        return self._batches(self.pool, index.cpu()), targets

    def held_out(self, node: int) -> Tensor:
        """Indices of the private validation samples of ``node``, int64."""
        return torch.from_numpy(self.split.validation[node])

    def evaluation_set(self, split: str, samples: int | None) -> tuple[Callable[[], Iterator[Tensor]], Tensor]:
        """Batches and labels of a fixed random choice of ``samples`` (None: of all) of a ``split``.

        The split is ``test``, the test set, or ``validation``, the validation samples of all nodes. The batches come
        from a function, so that several nodes can be evaluated on them.
        """
        if split == "test":
            pool, labels, index = self.test, self.test_labels, torch.arange(len(self.test))
        else:
            pool, labels = self.pool, self.labels
            index = torch.cat([torch.from_numpy(indices) for indices in self.split.validation])
        index = index[randomness.permutation(len(index), 0, "examined")[:samples]]
        return lambda: self._batches(pool, index), labels[index.to(self.device)]
