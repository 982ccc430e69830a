"""Which messages arrive and which nodes are present at a step, and the weights W that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph
from lightning_idkd.mixing import Kind, Mixing


@dataclass(frozen=True)
class Moment:
    """A step at which a fault acts, and its random numbers: pure functions of seed, fault, purpose and counters."""

    step: int
    """Number of the step, from 0."""
    epoch: float
    """Epochs finished at the beginning of the step, with their fraction."""
    seconds: float
    """Simulated time at the beginning of the step; nan without a clock."""
    nodes: int
    """Number n of nodes."""
    seed: int = 0
    fault: int = 0
    """Place of the fault in the list ``faults``, so that two faults of one class draw different numbers."""

    def uniform(self, purpose: str, *counters: int | np.ndarray, step: int | np.ndarray | None = None) -> np.ndarray:
        """Numbers in [0, 1) for all broadcast counters (nodes, or senders and receivers), new ones in each step.

        Args:
            step: steps whose numbers to draw, which broadcast with the counters; None: this step.
        """
        import torch

        from lightning_idkd import randomness

        each = [torch.as_tensor(c) for c in (self.fault, self.step if step is None else step, *counters)]
        return randomness.uniform(self.seed, f"fault {purpose}", *each).numpy()


class Fault(Protocol):
    """What links need from a fault; :class:`lightning_idkd.callback.Fault` documents it."""

    told: bool
    forget: bool
    max_age: int | None
    attack: Any
    labels: Any
    flip: bool

    def lying(self, moment: Moment) -> np.ndarray | None: ...
    def lost(self, moment: Moment, edges: np.ndarray) -> np.ndarray | None: ...
    def absent(self, moment: Moment) -> np.ndarray | None: ...


@dataclass(frozen=True, eq=False)
class Condition:
    """The links at one step."""

    mixing: Mixing
    """Weights and edges of the messages that arrive."""
    sent: np.ndarray | None = None
    """bool [E] over the graph's edges: those that carry a message, which may be lost; None: all."""
    arrived: np.ndarray | None = None
    """bool [E] over the graph's edges: those whose message arrives; None: all."""
    present: np.ndarray | None = None
    """bool [n]: nodes that train and talk; None: all."""


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes that lie in the same way."""

    fault: Fault
    place: int
    """Place of the fault in the list ``faults``."""
    nodes: np.ndarray
    """bool [n], which nodes they are."""


class Links:
    """The links of a graph under faults; without faults they are the graph's.

    Args:
        faults: what may go wrong, in the order of the config.
        seed: seed of the faults' random numbers.
        takes: kinds of W that the rule accepts, which decide how W is rebuilt on a directed graph.

    Raises:
        UserError: no node is honest, or a node lies in two ways.
    """

    when: Callable[[int], tuple[float, float]]
    """Finished epochs and simulated seconds at the beginning of a step; the run sets it."""

    def __init__(self, graph: Graph, faults: Sequence[Fault] = (), seed: int = 0, takes: Sequence[str] = ("doubly",)):
        self.graph, self.faults, self.seed, self.takes = graph, list(faults), seed, tuple(takes)
        self.max_age = max((f.max_age for f in self.faults if f.max_age is not None), default=None)
        self.when = lambda step: (0.0, float("nan"))
        self._last: tuple[Moment, Condition] | None = None
        self.liars = self._find_liars()
        self.honest = ~np.any([group.nodes for group in self.liars], 0) if self.liars else np.ones(graph.nodes, bool)
        if not self.honest.any():
            raise UserError(f"faults: all {graph.nodes} nodes lie; allowed: {graph.nodes - 1} at most")

    @property
    def pushes(self) -> bool:
        """Whether only the columns of some W sum to 1, so that rows are mixed with their mass, as in push-sum."""
        return self.graph.kind == "column" or bool(self.faults and "column" in self.takes)

    def at(self, step: int) -> Condition:
        """The links at ``step``; the same object while nothing changes."""
        if not self.faults:
            return Condition(self.graph.mixing(step))
        moment = self.moment(step)
        if self._last is None or repr(self._last[0]) != repr(moment):  # by repr: nan equals nan
            self._last = moment, self._draw(moment)
        return self._last[1]

    def moment(self, step: int, fault: int = 0) -> Moment:
        """``step`` with its time, for the fault at this place in the list."""
        return Moment(step, *self.when(step), self.graph.nodes, self.seed, fault)

    def flipped(self) -> list[int]:
        """The nodes that train on flipped labels."""
        return sorted(i for group in self.liars if group.fault.flip for i in np.flatnonzero(group.nodes).tolist())

    def _find_liars(self) -> list[Group]:
        """The groups of nodes that lie, which are the same in all steps."""
        groups, n, twice = [], self.graph.nodes, np.zeros(self.graph.nodes, int)
        for place, fault in enumerate(self.faults):
            lying = fault.lying(Moment(0, 0.0, float("nan"), n, self.seed, place))
            if lying is not None:
                groups.append(Group(fault, place, require_mask(lying, n, fault, "lying")))
                twice += groups[-1].nodes
        if (twice > 1).any():
            raise UserError(f"faults: node {int(twice.argmax())} lies by two of them; allowed: one for each node")
        return groups

    def _draw(self, moment: Moment) -> Condition:
        mixing = self.graph.mixing(moment.step)
        E, n = mixing.edges, self.graph.nodes
        absent, silent, lost = np.zeros(n, bool), np.zeros(len(E), bool), np.zeros(len(E), bool)
        for place, fault in enumerate(self.faults):
            moment = replace(moment, fault=place)
            away, fails = fault.absent(moment), fault.lost(moment, E)
            if away is not None:
                absent |= require_mask(away, n, fault, "absent")
            if fails is not None:
                failing = silent if fault.told else lost
                failing |= require_mask(fails, len(E), fault, "lost")
        silent |= absent[E].any(1)
        if not self.graph.topology.directed:
            silent |= silent[reverse_edges(E)]
        if not (silent | lost).any():
            return Condition(mixing, present=~absent if absent.any() else None)
        arrived = ~(silent | lost)
        W = rebuild(mixing, silent, lost, rebuilt_kind(self.graph, self.takes), pushes="column" in self.takes)
        return Condition(W, ~silent, arrived, ~absent if absent.any() else None)

    def returning(self, step: int) -> np.ndarray | None:
        """bool [n]: nodes that are back at ``step`` from an absence that made them forget; None: no node."""
        forgetting = [(place, fault) for place, fault in enumerate(self.faults) if fault.forget]
        if not forgetting or step == 0:
            return None
        before, present = self.moment(step - 1), self.at(step).present
        back = np.zeros(self.graph.nodes, bool)
        for place, fault in forgetting:
            back |= fault.absent(replace(before, fault=place))
        if present is not None:
            back &= present
        return back if back.any() else None


def require_mask(mask: np.ndarray, length: int, fault: Fault, method: str) -> np.ndarray:
    """Return what a fault's method gave as bool [length]."""
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != (length,):
        given, name = f"{mask.dtype} {list(mask.shape)}", type(fault).__name__
        raise UserError(f"faults: {name}.{method} returns {given}; allowed: a bool array of shape [{length}]")
    return mask


def rebuilt_kind(graph: Graph, takes: Sequence[str]) -> Kind:
    """The kind of W without some edges: on a directed graph rows and columns cannot both sum to 1 again."""
    if graph.kind != "doubly" or not graph.topology.directed:
        return graph.kind
    return "column" if "column" in takes else "row"


def reverse_edges(edges: np.ndarray) -> np.ndarray:
    """For every edge of an undirected graph [E, 2], in lexicographic order, the index of its reverse edge."""
    return np.lexsort((edges[:, 0], edges[:, 1]))


def rebuild(mixing: Mixing, silent: np.ndarray, lost: np.ndarray, kind: Kind, pushes: bool = False) -> Mixing:
    """The weights without the messages that do not arrive.

    Both ends know of a ``silent`` edge, and W keeps its kind: in a doubly stochastic W, the weight of an undirected
    edge goes to the diagonal at both ends; else a column (what a sender divides) or a row (what a receiver averages) is
    scaled to sum to 1 again. Only the receiver knows of a ``lost`` message, and puts its own row in the message's
    place. Where the rule ``pushes``, as push-sum does, the receiver sums what arrives, and the message's mass is lost.

    Args:
        silent: bool [E], over the edges of ``mixing``, with every edge its reverse one where W is doubly stochastic.
        lost: bool [E].
        kind: kind of the result if edges are only silent.
    """
    weights, own, (sender, receiver) = mixing.weights.copy(), mixing.own.copy(), mixing.edges.T
    if silent.any():
        taken, weights[silent] = weights[silent], 0.0
        if kind == "doubly":
            np.add.at(own, receiver[silent], taken)
        else:
            ends = sender if kind == "column" else receiver
            total = own + np.bincount(ends, weights, len(own))
            weights, own = weights / total[ends], own / total
    fails = lost & ~silent
    if fails.any():
        if pushes:
            kind = "column"
        else:
            np.add.at(own, receiver[fails], weights[fails])
            kind = "row"
    arrives = ~(silent | lost)
    return Mixing(mixing.edges[arrives], weights[arrives], own, kind)


def explain_swaps(attack: str, rule: str) -> str:
    """Sentence that refuses an omniscient attack on messages that differ by edge."""
    return (
        f"faults.attack: {attack} compares the messages of several nodes, but {rule} sends a different message over "
        f"every edge; allowed: SignFlip, Noise, or a rule that mixes, such as DSGD or QGDSGDm"
    )
