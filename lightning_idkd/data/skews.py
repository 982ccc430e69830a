"""Further ways to deal samples out: by shards, by classes, by sizes, by how images look, and as written in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lightning_idkd.data.partition import IID, TRANSFORM, Concentrated, Partition, Split, generator
from lightning_idkd.errors import UserError, require

if TYPE_CHECKING:
    from lightning_idkd.data.images import Images


@dataclass
class Shards(Partition):
    """Samples sorted by class are cut into equal shards, and every node is dealt some of these: few classes a node, equal sizes
    (McMahan et al., AISTATS 2017, section 3; two shards there).

    Args:
        shards_per_node: shards of each node, 1 or more.
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
        return [np.concatenate([shards[i] for i in dealt]) for dealt in rng.permutation(len(shards)).reshape(nodes, -1)]


@dataclass
class ClassesPerNode(Partition):
    """Every node holds the same number of classes, drawn at random; a class is split equally among the nodes that hold it, which
    are as many for each class, give or take one (quantity-based label skew, #C = k, in Li et al., ICDE 2022).

    Args:
        classes: classes of each node; times graph.nodes at least the number of classes.
    """

    classes: int = 2

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        there = np.unique(labels)
        least, most = -(-len(there) // nodes), len(there)
        allowed = f"{least} to {most}, for {most} classes on {nodes} nodes"
        require(least <= self.classes <= most, "data.partition.classes", self.classes, allowed)
        held = np.zeros((nodes, len(there)), int)
        for node in held:
            node[np.argsort(held.sum(0) + rng.random(len(there)))[: self.classes]] = 1
        parts: list[list[np.ndarray]] = [[] for _ in range(nodes)]
        for c, label in enumerate(there):
            holders = rng.permutation(np.flatnonzero(held[:, c]))  # some get one sample more
            samples = rng.permutation(np.flatnonzero(labels == label))
            for node, piece in zip(holders, np.array_split(samples, len(holders)), strict=True):
                parts[node].append(piece)
        return [np.concatenate(part) for part in parts]


@dataclass
class QuantitySkew(Concentrated):
    """Node sizes drawn from a Dirichlet distribution, labels alike (quantity skew in Li et al., ICDE 2022).

    Args:
        alpha: concentration, above 0; smaller is more skewed.
    """

    def split(self, labels: np.ndarray, nodes: int, rng: np.random.Generator) -> list[np.ndarray]:
        cuts = np.cumsum(rng.dirichlet(np.full(nodes, self.alpha)))[:-1] * len(labels)
        return np.split(rng.permutation(len(labels)), cuts.astype(int))


@dataclass
class FeatureSkew(IID):
    """Labels and sizes alike, images not: those of a node are rotated by an angle and multiplied by a brightness of its own, each
    spread evenly over the nodes in a random order. This is done once to its training and validation images; the test images,
    which belong to no node, stay as they are. Source of the rotations: Ghosh et al., NeurIPS 2020.

    Args:
        brightness: largest deviation of the factor from 1, from 0 to below 1.
        rotation: largest angle in degrees, either way, 0 to 180; what comes in from outside the image is black.
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

    def transform(self, images: Images, split: Split, seed: int) -> Images:
        import torch
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import adjust_brightness, rotate

        pixels = images.pixels.clone()
        for train, validation, *look in zip(split.train, split.validation, *self.looks(len(split.train), seed), strict=True):
            factor, angle = map(float, look)
            for part in torch.from_numpy(np.concatenate([train, validation])).split(1024):
                turned = rotate(pixels[part], angle, InterpolationMode.BILINEAR)
                pixels[part] = adjust_brightness(turned, factor)
        return replace(images, pixels=pixels)


@dataclass
class FromFile(Partition):
    """The partition of another run, or one of your own.

    A run's partition.json also says which samples are held out, whatever data.validation is, and for which images it was made:
    the same in another order are refused. A list of one list of indices into the training set a node leaves all that open.
    Images stay as they are, also where FeatureSkew made the file.

    Args:
        path: JSON file, a run's partition.json or a list of lists.
    """

    path: str

    def check(self, images: Images) -> None:
        """Compare the images with those that a run's file was made for: by their pixels or, where these were brought to another
        size or to grey, by the classes of all rows."""
        made = self._content()
        data = made.get("data") if isinstance(made, dict) else None
        if data is None:  # a list of lists, or a run's file from before it said so
            return
        try:
            classes, before = data["classes"], data["train"]
            same = images.named(classes).identity if set(classes) == set(images.classes) else images.identity
            part = "pixels" if all(same[k] == before[k] for k in ("channels", "size")) else "labels"
            known = same["images"] == before["images"] and same[part] == before[part]
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(f"data.partition.path: '{self.path}' is damaged where it describes its data") from e
        if not known:
            how = "other images, or the same in another order" if same["images"] == before["images"] else f"{before['images']:,}"
            rows = f"{same['images']:,} training images"
            raise UserError(
                f"data.partition.path: '{self.path}' was made for {how}, so its indices mean nothing for these {rows}; a plain "
                "list of lists of indices is not compared"
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
            raise UserError(f"data.partition.path: sample {which} is {often} in '{self.path}'; every one must be in one list")
        return parts

    def held_out(self) -> list[np.ndarray] | None:
        return self._read()[1]

    def _content(self) -> dict | list:
        try:
            return json.loads(Path(self.path).read_text(encoding="utf-8"))
        except OSError as e:
            raise UserError(f"data.partition.path: cannot read '{self.path}' ({e.strerror})") from e
        except ValueError as e:
            raise UserError(f"data.partition.path: '{self.path}' is no JSON ({e})") from e

    def _read(self) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        found = self._content()
        try:
            if not isinstance(found, dict):
                return arrays(found), None
            train, validation = (arrays(found["indices"][part]) for part in ("train", "validation"))
            if len(train) != len(validation):
                raise ValueError
            return train, validation
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise UserError(
                f"data.partition.path: '{self.path}' holds neither a run's partition nor a list of one list of indices a node"
            ) from e


def arrays(lists: list[list[int]]) -> list[np.ndarray]:
    """A node's indices each; a ValueError where they are none."""
    if not isinstance(lists, list) or not lists or not all(type(i) is int for part in lists for i in part):
        raise ValueError
    return [np.array(part, dtype=np.int64) for part in lists]
