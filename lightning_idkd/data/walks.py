"""The order in which every node walks its samples: in permutations, or by draws that are balanced over classes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.labels import Labels


@dataclass(frozen=True)
class Part:
    """Samples of one node's set that are walked on their own."""

    node: int
    offset: int
    """Position of the first sample in the node's set."""
    size: int
    """Number of samples."""
    batch: int
    """How many of these samples every batch has."""


class Walks:
    """Each node's order through its own set, from the step at which it got the set.

    A node walks its set in one permutation after the other. With private ``shares`` every batch begins with private
    samples, and the private and the distilled samples are walked on their own. All orders are hashed from seed,
    generation and node, so they do not depend on the number of processes.

    Args:
        sizes: per node: its number of private samples, followed after an exchange by that of distilled ones.
        nodes: the nodes, in the order of ``sizes``.
        batch: samples in a batch.
        shares: per node: the share of a batch that is private, above 0 and below 1; None walks all samples as one part.
        seed: seed of the run.
        generation: number of exchanges so far; each changes the orders.
        start: step from which on the sets are walked.
        targets: per node: the target distributions [size, k] of its samples. Where they are given, samples are drawn
            with replacement, every class (the most probable one of a target) with the same probability.
    """

    def __init__(self, sizes: list[list[int]], nodes: range, *, batch: int, shares: list[float] | list[None],
                 seed: int, generation: int, start: int, targets: list[Tensor] | None = None):  # fmt: skip
        self.seed, self.generation, self.start = seed, generation, start
        self.parts = [divide(own, node, batch, share) for own, node, share in zip(sizes, nodes, shares, strict=True)]
        self.targets = None if targets is None else dict(zip(nodes, targets, strict=True))
        self._cumulative: dict[Part, Tensor] = {}

    def order(self, step: int, steps: int, missed: Tensor | None = None) -> Tensor:
        """Positions [rows, steps * batch] in the nodes' sets for ``steps`` steps from ``step`` on, int64 on the CPU.

        ``missed`` [rows] counts the earlier steps in which a node took no batch; None: it took all.
        """
        every_part = list(chain.from_iterable(self.parts))
        walk = self._permute if self.targets is None else self._draw
        behind = [0] * len(self.parts) if missed is None else missed.tolist()
        starts = [step - self.start - m for parts, m in zip(self.parts, behind, strict=True) for _ in parts]
        walks = iter(walk(every_part, starts, steps))
        orders = []
        for parts in self.parts:
            batches = [next(walks).view(steps, part.batch) for part in parts]
            orders.append(torch.cat(batches, dim=1).flatten())
        return torch.stack(orders)

    def _permute(self, parts: list[Part], starts: list[int], steps: int) -> list[Tensor]:
        """Per part: its positions [steps * batch] from its step of ``starts`` on; each pass is a permutation."""
        passes = []
        for part, start in zip(parts, starts, strict=True):
            first, last = start * part.batch // part.size, ((start + steps) * part.batch - 1) // part.size
            passes.append(range(first, last + 1))
        permutations: dict[tuple[int, int], Tensor] = {}
        for begins_at_zero in (True, False):  # parts that do not begin at 0 hash their offset too
            wanted = []
            for k, part in enumerate(parts):
                if (part.offset == 0) == begins_at_zero:
                    wanted += [(k, count) for count in passes[k]]
            if wanted:
                which, count = torch.tensor(wanted).T
                node, offset, size = torch.tensor([(p.node, p.offset, p.size) for p in parts])[which].T
                counters = (node, count) if begins_at_zero else (node, offset, count)
                generation = torch.full_like(node, self.generation)
                drawn = randomness.permutations(size, self.seed, "order", generation, *counters)
                permutations.update(zip(wanted, drawn, strict=True))
        walks = []
        for k, (part, start) in enumerate(zip(parts, starts, strict=True)):
            walk = torch.cat([permutations[k, count] for count in passes[k]])
            before = start * part.batch % part.size  # samples of the first pass that earlier steps have taken
            walks.append(part.offset + walk[before : before + steps * part.batch])
        return walks

    def _draw(self, parts: list[Part], starts: list[int], steps: int) -> list[Tensor]:
        """Per part: positions [steps * batch] that are drawn with replacement, all classes equally often."""
        walks = []
        for part, start in zip(parts, starts, strict=True):
            count = torch.arange(start * part.batch, (start + steps) * part.batch)
            draws = randomness.uniform(self.seed, "draw", self.generation, part.node, part.offset, count)
            place = torch.searchsorted(self._probabilities(part), draws.double(), right=True)
            walks.append(part.offset + place.clamp_max(part.size - 1))
        return walks

    def _probabilities(self, part: Part) -> Tensor:
        """Cumulative probability [size] of a part's samples; every class that occurs has the same sum."""
        if part not in self._cumulative:
            classes = self.targets[part.node][part.offset : part.offset + part.size].argmax(1).cpu()
            probability = 1.0 / classes.bincount()[classes].double()
            self._cumulative[part] = (probability / probability.sum()).cumsum(0)
        return self._cumulative[part]


def divide(sizes: list[int], node: int, batch: int, share: float | None) -> list[Part]:
    """The parts of a node's set: all of it, or its private and its distilled samples where a ``share`` is private."""
    if share is None or len(sizes) == 1 or sizes[1] == 0:
        return [Part(node, 0, sum(sizes), batch)]
    private = min(max(1, round(share * batch)), batch - 1)  # at least one sample of either kind
    return [Part(node, 0, sizes[0], private), Part(node, sizes[0], sizes[1], batch - private)]


def cap_classes(labels: Labels, k: int, seed: int, generation: int, node: int) -> Labels:
    """The labels without the surplus of large classes: at most the median count of those of the k classes that occur.

    A sample counts for its most probable class. Which samples of a class stay is drawn by seed, generation and node.
    """
    if not len(labels):
        return labels
    classes = labels.probabilities.argmax(1).cpu()
    count = classes.bincount(minlength=k)
    most = count[count > 0].median()
    order = randomness.permutation(len(classes), seed, "cap", generation, node)
    shuffled = classes[order]
    rank_by_class = torch.stack([(shuffled == c).cumsum(0) for c in range(k)])
    rank = rank_by_class[shuffled, torch.arange(len(classes))]
    return labels[order[rank <= most].sort().values.to(labels.index.device)]
