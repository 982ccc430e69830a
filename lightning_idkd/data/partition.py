"""Partitions: which private samples each node has, and which of them it holds out for validation."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd.errors import UserError, require

if TYPE_CHECKING:
    from lightning_idkd.data.samples import Samples

STREAM = 0x5B117  # separates these draws from others made with the same seed
ATTEMPTS = 50  # draws of a partition before it is refused
TRANSFORM = 2**32  # takes the place of an attempt's number in draws that are not a partition
TRIES = 1024  # rounds of the authors' retry loop within one attempt; alpha 0.01 on 16 nodes needs about 400


class Unsplittable(Exception):
    """A rule cannot divide the samples with these draws; `partition` continues with others."""


class Partition(ABC):
    """Base of the rules that divide the samples among the nodes."""

    @abstractmethod
    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        """One array of indices per node; the arrays are disjoint and have all samples together.

        ``labels`` int [N] are the samples' classes. The method may raise `Unsplittable` to be called with other draws.
        """

    def held_out(self) -> list[np.ndarray] | None:
        """Indices of the samples that each node holds out, where the rule decides it; None: data.validation does."""
        return None

    def check(self, samples: Samples) -> None:  # noqa: B027 (most rules accept any samples)
        """Raise a UserError where the rule was not made for these private training samples."""

    def transform(self, samples: Samples, split: Split, seed: int) -> Samples:
        """The private training samples as the nodes have them, for rules that change the samples themselves."""
        return samples


@dataclass
class IID(Partition):
    """All nodes get equally many samples, drawn uniformly at random."""

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        return np.array_split(rng.permutation(len(labels)), nodes)


@dataclass
class Concentrated(Partition):
    """Base of the rules that draw from a Dirichlet distribution.

    Args:
        alpha: concentration of the distribution, above 0.
    """

    alpha: float

    def __post_init__(self):
        if not 0 < self.alpha < math.inf:
            raise UserError(f"data.partition.alpha: {self.alpha} given; allowed: above 0 (smaller is more skewed)")


@dataclass
class Dirichlet(Concentrated):
    """Each class is divided among the nodes in proportions drawn from a Dirichlet distribution; node sizes differ.

    Source: Hsu, Qi and Brown, arXiv 1909.06335, in the form common since Li et al., ICDE 2022 (proportions per class).

    Args:
        alpha: concentration, above 0; a smaller one gives more skew, and with 0.1 a node has few classes.
    """

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        parts: list[list[np.ndarray]] = [[] for _ in range(nodes)]
        for label in np.unique(labels):
            samples = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(rng.dirichlet(np.full(nodes, self.alpha)))[:-1] * len(samples)
            for part, piece in zip(parts, np.split(samples, cuts.astype(int)), strict=True):
                part.append(piece)
        return [np.concatenate(part) for part in parts]


@dataclass
class QGMDirichlet(Concentrated):
    """The partition of the QG-DSGDm and IDKD code: nodes have equal sizes, and less skew than by `Dirichlet` with the
    same alpha.

    Samples are divided among groups of at most 10 nodes. In a group each class is divided in Dirichlet proportions, but
    nodes that already have the average number of samples get none; this is redrawn until the smallest node has half the
    average. Finally the samples of all nodes are laid end to end and cut into equal parts, so that adjacent nodes share
    classes.

    Source: Lin et al., ICML 2021, as implemented there.

    Args:
        alpha: concentration, above 0; a smaller one gives more skew.
    """

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        order, classes = rng.permutation(len(labels)), np.unique(labels)
        line = []  # pieces of one node and class, end to end
        for first in range(0, nodes, 10):
            group = min(10, nodes - first)
            members = order[len(order) * first // nodes : len(order) * (first + group) // nodes]
            by_class = [members[labels[members] == label] for label in classes]
            counts = self._counts(np.array([len(samples) for samples in by_class]), group, rng)
            pieces = [np.split(samples, np.cumsum(c)[:-1]) for samples, c in zip(by_class, counts, strict=True)]
            for of_node in zip(*pieces, strict=True):
                line += of_node
        return np.array_split(np.concatenate(line), nodes)

    def _counts(self, sizes: np.ndarray, group: int, rng: np.random.Generator) -> np.ndarray:
        """Number of samples of each class and node, [classes, group], of the first try that is balanced enough."""
        average = sizes.sum() / group
        for _ in range(TRIES // 64):  # 64 tries at once
            proportions = rng.dirichlet(np.full(group, self.alpha), size=(len(sizes), 64))
            held, counts = np.zeros((64, group), int), np.zeros((len(sizes), 64, group), int)
            for size, p, count in zip(sizes, proportions, counts, strict=True):
                p = p * (held < average)
                total = p.sum(1, keepdims=True)  # 0 if the whole class fell to full nodes, which makes the try fail
                ends = (np.cumsum(p / np.where(total > 0, total, 1), axis=1) * size).astype(int)
                ends[:, -1] = np.where(total[:, 0] > 0, size, 0)
                count[:] = np.diff(ends, axis=1, prepend=0)
                held += count
            good = (held.min(1) >= 0.5 * average) & (held.sum(1) == sizes.sum())
            if good.any():
                return counts[:, good.argmax()]
        raise Unsplittable


@dataclass
class Split:
    """The samples of each node, as sorted indices into the private training set."""

    train: list[np.ndarray]
    """n arrays int64: the samples that each node trains on."""
    validation: list[np.ndarray]
    """n arrays int64: the samples that each node holds out for calibration and tuning."""
    hash: str
    """16 hex digits that identify the indices above."""
    histogram: np.ndarray
    """int64 [n, k]: samples of each class that a node has, training and validation together."""
    rule: str
    """Name of the partition's class."""
    alpha: float | None
    """Concentration of the partition, where it has one."""
    data: dict | None = None
    """The samples and classes it was made for; see :func:`lightning_idkd.data.identity.record`."""

    def to_dict(self) -> dict:
        """The split in plain types, for JSON."""
        return {
            "hash": self.hash,
            "rule": self.rule,
            "alpha": self.alpha,
            "data": self.data,
            "sizes": {"train": [len(i) for i in self.train], "validation": [len(i) for i in self.validation]},
            "histogram": self.histogram.tolist(),
            "indices": {"train": [i.tolist() for i in self.train], "validation": [i.tolist() for i in self.validation]},
        }


def generator(seed: int, attempt: int) -> np.random.Generator:
    """The random generator of one draw."""
    return np.random.default_rng([seed, STREAM, attempt])


def digest(arrays: list[np.ndarray]) -> str:
    """The first 16 hex digits of SHA-256 over each array's length and entries, as little-endian int64."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.array([len(array), *array], dtype="<i8").tobytes())
    return sha.hexdigest()[:16]


def check_share(validation: float) -> None:
    """Refuse a share of held-out samples that is out of range."""
    require(0 <= validation < 1, "data.validation", validation, "0 (none held out) to below 1 (a share)")


def validation_size(samples: int, share: float) -> int:
    """How many of a node's samples are held out: ``share`` of them, and at least 16 where it has 32 or more.

    A share of 0 holds none out, and one sample is always left to train on.
    """
    least = 16 if samples >= 32 and share > 0 else 0
    return max(0, min(max(round(share * samples), least), samples - 1))


def draw(rule: Partition, labels: np.ndarray, nodes: int, seed: int) -> list[np.ndarray] | None:
    """The first of 50 draws that leaves no node empty, with each node's samples shuffled; None if there is none."""
    for attempt in range(ATTEMPTS):
        rng = generator(seed, attempt)
        try:
            parts = rule.split(labels, nodes, rng)
        except Unsplittable:
            continue
        if len(parts) != nodes or not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels))):
            name = type(rule).__name__
            raise UserError(f"data.partition: {name} must give {nodes} nodes every sample exactly once, and did not")
        if all(len(part) for part in parts):
            return [rng.permutation(part) for part in parts]
    return None


def find_alpha(rule: Partition, labels: np.ndarray, nodes: int, seed: int) -> float | None:
    """The smallest alpha, in steps of a factor 1.5 above the rule's own, for which a draw succeeds; None above 1000."""
    rule = copy.copy(rule)
    start = rule.alpha
    for power in range(1, 61):
        rule.alpha = float(f"{start * 1.5**power:.3g}")  # rounded as the message prints it
        if rule.alpha > 1000:
            return None
        if draw(rule, labels, nodes, seed):
            return rule.alpha
    return None


def partition(
    rule: Partition, labels: np.ndarray, nodes: int, seed: int, validation: float = 0.2, classes: int | None = None
) -> Split:
    """Divide the samples among the nodes and hold out each node's validation part.

    A draw that leaves a node without training samples is repeated, up to 50 times. The validation share changes how
    many of its samples a node holds out, but not which samples it has.

    Args:
        rule: how samples are divided.
        labels: int [N], the class of each private training sample.
        nodes: number of nodes.
        seed: seed of the run; with the number of the attempt it fixes all draws.
        validation: share of a node's samples to hold out, from 0 to below 1; at least 16 where it has 32 or more.
        classes: number of classes k, of which some may have no samples; None: largest label + 1.

    Raises:
        UserError: more nodes than samples, a share out of range, or no draw that gives every node a training sample;
            the message names the smallest alpha that worked.
    """
    check_share(validation)
    labels = np.asarray(labels)
    if nodes > len(labels):
        raise UserError(f"graph.nodes: {nodes} given; allowed: at most {len(labels)}, the number of training samples")
    alpha = getattr(rule, "alpha", None)
    parts = draw(rule, labels, nodes, seed)
    if parts is None:
        given = f"data.partition: {type(rule).__name__}" if alpha is None else f"data.partition.alpha: {alpha}"
        works = alpha and find_alpha(rule, labels, nodes, seed)
        advice = f"the smallest alpha that worked is {works}" if works else "lower graph.nodes"
        leaves = f"leaves some of {nodes} nodes without training samples in each of {ATTEMPTS} draws"
        raise UserError(f"{given} {leaves}; {advice}")
    held_out = rule.held_out() or [part[: validation_size(len(part), validation)] for part in parts]
    held_out = [np.sort(indices).astype(np.int64) for indices in held_out]
    train = [np.setdiff1d(part, indices).astype(np.int64) for part, indices in zip(parts, held_out, strict=True)]
    k = labels.max() + 1 if classes is None else classes
    histogram = np.stack([np.bincount(labels[part], minlength=k) for part in parts]).astype(np.int64)
    return Split(train, held_out, digest(train + held_out), histogram, type(rule).__name__, alpha)
