"""Further partitions: by shards, by classes, by sizes, by the look of images, and as a file says."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import IID, TRANSFORM, Concentrated, Partition, Split, generator
from lightning_idkd.errors import UserError, require

if TYPE_CHECKING:
    from lightning_idkd.data.samples import Samples


@dataclass
class Shards(Partition):
    """Samples sorted by class are cut into equal shards, and every node gets the same number of shards at random: nodes
    have few classes and equal sizes (McMahan et al., AISTATS 2017, section 3, with two shards).

    Args:
        shards_per_node: number of shards of each node, 1 or more.
    """

    shards_per_node: int = 2

    def __post_init__(self):
        require(self.shards_per_node >= 1, "data.partition.shards_per_node", self.shards_per_node, "1 or more")

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        s, most = self.shards_per_node, len(labels) // nodes
        allowed = f"1 to {most}, for {len(labels)} samples on {nodes} nodes"
        require(s <= most, "data.partition.shards_per_node", s, allowed)
        order = rng.permutation(len(labels))
        shards = np.array_split(order[np.argsort(labels[order], kind="stable")], nodes * s)
        parts = []
        for chosen in rng.permutation(len(shards)).reshape(nodes, -1):
            parts.append(np.concatenate([shards[i] for i in chosen]))
        return parts


@dataclass
class ClassesPerNode(Partition):
    """Every node has the same number of classes, drawn at random. A class is divided equally among its nodes, whose
    numbers differ by at most one between classes (quantity-based label skew, #C = k, in Li et al., ICDE 2022).

    Args:
        classes: number of classes of each node; multiplied by graph.nodes it is at least the number of all classes.
    """

    classes: int = 2

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        occurring = np.unique(labels)
        least, most = -(-len(occurring) // nodes), len(occurring)
        allowed = f"{least} to {most}, for {most} classes on {nodes} nodes"
        require(least <= self.classes <= most, "data.partition.classes", self.classes, allowed)
        held = np.zeros((nodes, len(occurring)), int)
        for node in held:
            node[np.argsort(held.sum(0) + rng.random(len(occurring)))[: self.classes]] = 1
        parts: list[list[np.ndarray]] = [[] for _ in range(nodes)]
        for c, label in enumerate(occurring):
            holders = rng.permutation(np.flatnonzero(held[:, c]))  # the first ones may get one sample more
            samples = rng.permutation(np.flatnonzero(labels == label))
            for node, piece in zip(holders, np.array_split(samples, len(holders)), strict=True):
                parts[node].append(piece)
        return [np.concatenate(part) for part in parts]


@dataclass
class Regions(Partition):
    """Nodes next to each other share classes: nodes and classes are cut into ``regions`` in the order of their numbers,
    and the samples of a region's classes are divided among its nodes at random. With two regions on two cliques
    (a dumbbell), information crosses the link between them only (He, Karimireddy and Jaggi, arXiv 2202.01545).

    Args:
        regions: number of regions, 1 to the number of classes, at most graph.nodes.
    """

    regions: int = 2

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        occurring = np.unique(labels)
        most = min(nodes, len(occurring))
        allowed = f"1 to {most}, for {len(occurring)} classes on {nodes} nodes"
        require(1 <= self.regions <= most, "data.partition.regions", self.regions, allowed)
        parts = []
        members = np.array_split(np.arange(nodes), self.regions)
        for classes, here in zip(np.array_split(occurring, self.regions), members, strict=True):
            samples = rng.permutation(np.flatnonzero(np.isin(labels, classes)))
            parts += np.array_split(samples, len(here))
        return parts


@dataclass
class QuantitySkew(Concentrated):
    """Node sizes are drawn from a Dirichlet distribution, and labels are divided uniformly at random (quantity skew in
    Li et al., ICDE 2022).

    Args:
        alpha: concentration, above 0; a smaller one gives more skew.
    """

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        cuts = np.cumsum(rng.dirichlet(np.full(nodes, self.alpha)))[:-1] * len(labels)
        return np.split(rng.permutation(len(labels)), cuts.astype(int))


@dataclass
class FeatureSkew(IID):
    """Nodes have equal sizes and similar labels, but their images look different: each node has its own angle, by which
    its images are rotated, and its own brightness factor. Angles and factors are spread evenly over the nodes, in
    random orders. They apply once to a node's training and validation images; test images belong to no node and stay as
    they are. Source of the rotations: Ghosh et al., NeurIPS 2020.

    Args:
        brightness: largest deviation of the brightness factor from 1, from 0 to below 1.
        rotation: largest angle in degrees in either direction, 0 to 180; pixels from outside the image are black.
    """

    brightness: float = 0.5
    rotation: float = 30.0

    def __post_init__(self):
        require(0 <= self.brightness < 1, "data.partition.brightness", self.brightness, "0 to below 1")
        require(0 <= self.rotation <= 180, "data.partition.rotation", self.rotation, "0 to 180 degrees")

    def looks(self, nodes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Brightness factor and angle in degrees of every node, [nodes] each."""
        rng, levels = generator(seed, TRANSFORM), np.linspace(-1, 1, nodes) if nodes > 1 else np.zeros(1)
        return 1 + self.brightness * rng.permutation(levels), self.rotation * rng.permutation(levels)

    def check(self, samples: Samples) -> None:
        if not isinstance(samples, Images):
            what = samples.inputs.plural
            raise UserError(f"data.partition: FeatureSkew rotates images; allowed for {what}: the other partitions")

    def transform(self, samples: Samples, split: Split, seed: int) -> Samples:
        import torch
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import adjust_brightness, rotate

        pixels = samples.values.clone()
        factors, angles = self.looks(len(split.train), seed)
        for node, (train, validation) in enumerate(zip(split.train, split.validation, strict=True)):
            for part in torch.from_numpy(np.concatenate([train, validation])).split(1024):
                rotated = rotate(pixels[part], float(angles[node]), InterpolationMode.BILINEAR)
                pixels[part] = adjust_brightness(rotated, float(factors[node]))
        return replace(samples, values=pixels)


@dataclass
class FromFile(Partition):
    """The partition of another run, or one of your own.

    A run's partition.json also fixes the samples that are held out, whatever data.validation is, and the images it is
    for: other images, or the same in another order, are refused. A list with one list of indices into the training set
    per node fixes neither. The images stay as they are, even where the file comes from a run with FeatureSkew.

    Args:
        path: JSON file, either a run's partition.json or a list of lists.
    """

    path: str

    def check(self, samples: Samples) -> None:
        """Refuse samples other than those that a run's file was made for.

        They are compared by their values or, where their form differs, by the classes of all samples.
        """
        content = self._content()
        data = content.get("data") if isinstance(content, dict) else None
        if data is None:  # a list of lists, or an old run's file
            return
        try:
            classes, before = data["classes"], data["train"]
            same = (samples.renumber(classes) if set(classes) == set(samples.classes) else samples).identity
            part = "pixels" if all(before[k] == value for k, value in samples.inputs.facts().items()) else "labels"
            equal = same["images"] == before["images"] and same[part] == before[part]
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"data.partition.path: '{self.path}' is damaged where it describes its data") from e
        if not equal:
            what, others = samples.inputs.plural, f"{before['images']:,}"
            if same["images"] == before["images"]:
                others = f"other {what}, or the same in another order"
            raise UserError(
                f"data.partition.path: '{self.path}' was made for {others}, so its indices mean nothing for these "
                f"{same['images']:,} training {what}; a plain list of lists of indices is not compared"
            )

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        train, validation = self._read()
        parts = [np.concatenate(pair) for pair in zip(train, validation, strict=True)] if validation else train
        if len(parts) != nodes:
            raise UserError(f"data.partition.path: '{self.path}' is for {len(parts)} nodes, but graph.nodes is {nodes}")
        for node, own in enumerate(train):
            if not len(own):
                raise UserError(f"data.partition.path: node {node} has no training samples in '{self.path}'")
        index = np.concatenate(parts)
        if index.min() < 0 or index.max() >= len(labels):
            wrong = index[(index < 0) | (index >= len(labels))][0]
            allowed = f"0 to {len(labels) - 1}, the training set"
            raise UserError(f"data.partition.path: index {wrong} in '{self.path}'; allowed: {allowed}")
        count = np.bincount(index, minlength=len(labels))
        if (count != 1).any():
            which = int(np.argmax(count != 1))
            often = "twice or more" if count[which] else "in no list"
            where = f"sample {which} is {often} in '{self.path}'"
            raise UserError(f"data.partition.path: {where}; every sample must be in one list")
        return parts

    def held_out(self) -> list[np.ndarray] | None:
        return self._read()[1]

    def _content(self) -> dict | list:
        try:
            return json.loads(Path(self.path).read_text(encoding="utf-8"))
        except OSError as e:
            raise UserError(f"data.partition.path: cannot read '{self.path}' ({e.strerror})") from e
        except ValueError as e:
            raise UserError(f"data.partition.path: '{self.path}' is not JSON ({e})") from e

    def _read(self) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        content = self._content()
        try:
            if not isinstance(content, dict):
                return to_arrays(content), None
            train, validation = (to_arrays(content["indices"][part]) for part in ("train", "validation"))
            if len(train) != len(validation):
                raise ValueError
            return train, validation
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            allowed = "neither a run's partition nor a list with one list of indices per node"
            raise UserError(f"data.partition.path: '{self.path}' holds {allowed}") from e


def to_arrays(lists: list[list[int]]) -> list[np.ndarray]:
    """The indices of every node, int64; a ValueError where they are not lists of integers."""
    if not isinstance(lists, list) or not lists:
        raise ValueError
    for part in lists:
        if not all(type(index) is int for index in part):
            raise ValueError
    return [np.array(part, dtype=np.int64) for part in lists]
