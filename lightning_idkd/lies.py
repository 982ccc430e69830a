"""What lying nodes send in place of their messages, and what they know of other nodes for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.errors import UserError, require_shape
from lightning_idkd.labels import Labels
from lightning_idkd.links import Group, Links, Moment, explain_swaps
from lightning_idkd.mixing import Mixing

Terms = tuple[list[int], list[float]]
"""The nodes from which a node receives, itself included, and the weights that it gives to their rows."""
EVERYONE = -1
"""The receiver of a message that is for all nodes at once."""


@dataclass(frozen=True)
class Target:
    """A receiver, and what an omniscient liar knows of the messages that it gets."""

    own: Tensor
    """[C], the receiver's own row. A message for all nodes has the mean of the honest rows here."""
    rows: Tensor
    """[h, C], its own row and those of its honest in-neighbours, by ascending node. A message for all nodes has the
    honest rows of all nodes here."""
    weights: Tensor
    """[h], the weights that it gives to ``rows``."""
    lying: float
    """Sum of the weights that it gives to lying in-neighbours."""


@dataclass(frozen=True)
class Sight:
    """What liars see when they send l messages."""

    moment: Moment
    senders: np.ndarray
    """int64 [l]."""
    receivers: np.ndarray
    """int64 [l]; :data:`EVERYONE` for a message that all nodes get alike."""
    honest: np.ndarray
    """bool [n]: which nodes are honest."""
    message: int = 0
    """Number of earlier messages in this step."""
    targets: dict[int, Target] = field(default_factory=dict)
    """What is known of every receiver; empty unless the attack is omniscient."""

    def uniform(self, purpose: str, columns: int, device: torch.device | str = "cpu") -> Tensor:
        """Random numbers in [0, 1) [l, columns]; a sender has the same ones for all receivers of a message."""
        nodes, which = np.unique(self.senders, return_inverse=True)
        moment, column = self.moment, torch.arange(columns, device=device)
        counters = moment.fault, moment.step, self.message, torch.from_numpy(nodes)[:, None].to(device), column
        return randomness.uniform(moment.seed, f"fault {purpose}", *counters, device=device)[torch.from_numpy(which)]


class Attack(Protocol):
    """What a network needs from an attack; :class:`lightning_idkd.callback.Attack` documents it."""

    omniscient: bool

    def __call__(self, T: Tensor, sight: Sight) -> Tensor: ...


class Lies:
    """Replaces the messages of lying nodes.

    Args:
        links: the links of the run, which name the liars.
    """

    def __init__(self, links: Links):
        self.links = links
        self._sent = -1, 0  # step, number of messages in it

    @property
    def in_rows(self) -> bool:
        """Whether some node sends other rows than its own."""
        return any(group.fault.attack is not None for group in self.links.liars)

    def edges(self, edges: np.ndarray, receivers: range) -> np.ndarray:
        """The ``edges`` [E, 2] that carry a lie to one of the ``receivers``, sorted by receiver, then by sender."""
        lying = np.zeros(self.links.graph.nodes, bool)
        for group in self.links.liars:
            lying |= group.nodes & (group.fault.attack is not None)
        mine = (receivers.start <= edges[:, 1]) & (edges[:, 1] < receivers.stop)
        chosen = edges[lying[edges[:, 0]] & mine]
        return chosen[np.lexsort(chosen.T)]

    def to_neighbours(self, T: Tensor, rows: Mapping[int, Tensor], mixing: Mixing, edges: np.ndarray,
                      step: int) -> Tensor:  # fmt: skip
        """What is sent over ``edges`` [l, 2] in place of the true ``T`` [l, C].

        Args:
            rows: the true rows [C] of the receivers and of all nodes from which they receive, by node.
            mixing: the weights that receivers give to the rows.
        """
        return self._replace(T, rows, mixing.terms, edges, step)

    def to_everyone(self, rows: Tensor, step: int | None, present: np.ndarray) -> Tensor:
        """The ``rows`` [n, C] as they are received if every node that is ``present`` (bool [n]) sends its row to all
        alike."""
        n, taking = len(rows), np.flatnonzero(present).tolist()
        edges = np.stack([np.arange(n), np.full(n, EVERYONE)], 1)
        heard = {EVERYONE: (taking, [1 / max(len(taking), 1)] * len(taking))}
        return self._replace(rows, rows, heard, edges, step)

    def over_edges(self, M: Tensor, edges: np.ndarray, step: int) -> Tensor:
        """What is sent over ``edges`` [e, 2] in place of the true ``M`` [e, C].

        Raises:
            UserError: an attack is omniscient; it would compare messages that mean something else on every edge.
        """
        for group in self.links.liars:
            if group.fault.attack is not None and group.fault.attack.omniscient:
                raise UserError(explain_swaps(type(group.fault.attack).__name__, "this rule"))
        return self._replace(M, None, {}, edges, step)

    def _replace(self, T: Tensor, rows: Mapping[int, Tensor] | Tensor | None, heard: Mapping[int, Terms] | list[Terms],
                 edges: np.ndarray, step: int | None) -> Tensor:  # fmt: skip
        """``T`` [e, C] with the messages of liars replaced.

        Args:
            rows: the true rows [C], by node; None: the attacks do not read them.
            heard: by receiver, the nodes whose rows it gets, and the weights that it gives to them.
        """
        step = EVERYONE if step is None else step
        self._sent = step, self._sent[1] + 1 if self._sent[0] == step else 0
        sent = T.clone() if T.is_floating_point() else T.double()
        for group in self.links.liars:
            attack, chosen = group.fault.attack, np.flatnonzero(group.nodes[edges[:, 0]])
            if attack is None or not len(chosen):
                continue
            sight = self._look(group, edges[chosen], step)
            if attack.omniscient:
                targets = {i: self._aim(i, rows, sent, *heard[i]) for i in np.unique(edges[chosen, 1]).tolist()}
                sight = Sight(**vars(sight) | {"targets": targets})
            which = torch.from_numpy(chosen).to(T.device)
            lies = attack(sent[which], sight)
            sent[which] = require_shape(lies, [len(chosen), T.shape[1]], f"faults: {type(attack).__name__} returns")
        return sent if T.is_floating_point() else sent.round().to(T.dtype)

    def _look(self, group: Group, edges: np.ndarray, step: int) -> Sight:
        return Sight(self.links.moment(step, group.place), *edges.T, self.links.honest, self._sent[1])

    def _aim(self, receiver: int, rows: Mapping[int, Tensor] | Tensor, like: Tensor, senders: list[int],
             weights: list[float]) -> Target:  # fmt: skip
        """What an omniscient liar knows of the messages that a receiver gets from ``senders``, to which it gives
        ``weights``; in the type of ``like``."""
        weight, honest = dict(zip(senders, weights, strict=True)), self.links.honest
        known = [j for j in senders if honest[j] or j == receiver] or senders  # all: where all that are present lie
        of_known = torch.stack([rows[j] for j in known]).to(like)
        own = of_known.mean(0) if receiver == EVERYONE else rows[receiver].to(like)
        lying = [weight[j] for j in senders if not honest[j] and j != receiver]
        return Target(own, of_known, of_known.new_tensor([weight[j] for j in known]), float(np.sum(lying)))

    def about(self, labels: Sequence[Labels], nodes: range, step: int) -> list[Labels]:
        """What ``nodes`` send in place of their ``labels``."""
        sent = list(labels)
        for group in self.links.liars:
            for i, node in enumerate(nodes):
                if group.fault.labels is not None and group.nodes[node]:
                    sight = self._look(group, np.array([[node, EVERYONE]]), step)
                    sent[i] = group.fault.labels(labels[i], sight)
                    if type(sent[i]) is not Labels:
                        name, given = type(group.fault.labels).__name__, type(sent[i]).__name__
                        raise UserError(f"faults.labels: {name} returns {given}; allowed: Labels")
        return sent
