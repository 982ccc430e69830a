"""The bases of faults, which no rule knows of: what goes wrong with messages and nodes, and what liars send."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lightning_idkd.callback.gossip import ASSUMPTIONS, Asynchronous
from lightning_idkd.callback.hooks import Callback
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from lightning_idkd.callback.gossip import Gossip
    from lightning_idkd.callback.hooks import Run
    from lightning_idkd.graph import Graph
    from lightning_idkd.labels import Labels
    from lightning_idkd.lies import Sight
    from lightning_idkd.links import Moment


class Attack(ABC):
    """What a lying node sends in place of a row: of its parameters, of a rule's messages, or of other statistics."""

    omniscient: bool = False
    """Whether the attack reads ``sight.targets``, which have the true rows of other nodes. Rules that send a different
    message over every edge (RelaySGD, NGC, CCL) refuse it."""

    @abstractmethod
    def __call__(self, T: "Tensor", sight: "Sight") -> "Tensor":
        """Returns what l messages contain, [l, C], in place of the senders' true rows ``T`` [l, C].

        C may be any number. Random numbers come from ``sight.uniform``.
        """

    def check(self, honest: "np.ndarray") -> None:  # noqa: B027 (most need nothing)
        """Raises a UserError if the attack cannot work among these nodes; ``honest`` is bool [n]."""


class LabelAttack(ABC):
    """What a lying node sends in place of its labels of public samples."""

    @abstractmethod
    def __call__(self, labels: "Labels", sight: "Sight") -> "Labels":
        """Returns the labels that a node sends, given its true ones, which it keeps; their samples are ascending."""

    def on_check(self, run: "Run") -> None:  # noqa: B027 (most need nothing)
        """Reads what it needs of a run, or refuses it, before any file is written."""


class Fault(Callback):
    """Takes messages or nodes out of a step, or makes nodes lie.

    Whatever a fault draws comes from :meth:`~lightning_idkd.links.Moment.uniform`, so that it is the same whatever the
    engine, the number of processes and the step at which a run is resumed.
    """

    told: bool = True
    """Whether both ends of an edge know before they mix that its message does not arrive. If so the edge is out of
    W(t), which keeps its kind, and nothing is sent. Else the message counts as sent, and its receiver puts its own row
    in its place."""
    forget: bool = False
    """Whether a node that was absent returns with the mean of its neighbours' rows, and new buffers."""
    max_age: int | None = None
    """Most steps by which a row of a neighbour may be late; None: nodes wait for those of the same step."""
    needs_clock: bool = False
    """Whether this happens in simulated time."""
    breaks: tuple[str, ...] = ("static",)
    """What this takes from a rule, of :data:`ASSUMPTIONS`; rules that assume it are refused."""

    attack: Attack | None = None
    """What lying nodes send in place of rows; None: their true rows."""
    labels: LabelAttack | None = None
    """What they send in place of their labels of public samples; None: their true labels."""
    flip: bool = False
    """Whether they train on flipped labels, k - 1 - y, of their private samples."""

    def lying(self, moment: "Moment") -> "np.ndarray | None":
        """Returns which nodes lie during the whole run, bool [n]; None: none does. ``moment`` is the first step."""

    def lost(self, moment: "Moment", edges: "np.ndarray") -> "np.ndarray | None":
        """Returns which messages of a step do not arrive, bool [E], over directed ``edges`` [E, 2] (sender, receiver);
        None: all arrive. All messages of a step over an edge share their fate."""

    def absent(self, moment: "Moment") -> "np.ndarray | None":
        """Returns which nodes neither train nor talk in a step, bool [n]; None: all do. Their rows, buffers and batches
        stand still."""

    def check(self, graph: "Graph") -> None:
        """Raises a UserError if this cannot happen on ``graph``."""


def check_faults(faults: "Sequence[Fault]", rule: "Gossip", graph: "Graph") -> None:
    """Raises a UserError if a fault breaks what ``rule`` relies on, or does not suit ``graph``."""
    from lightning_idkd.links import Links, explain_swaps, rebuilt_kind

    name = type(rule).__name__
    late = [fault for fault in faults if fault.max_age is not None]
    others = [f for f in faults if type(f).lost is not Fault.lost or type(f).absent is not Fault.absent or f.attack]
    if late and (len(late) > 1 or others):
        what = type((late[1:] or others)[0]).__name__
        raise UserError(f"faults: {type(late[0]).__name__} does not go together with {what}")
    if late and (rule.sends != ("mix",) or rule.every_step or "column" in rule.takes):
        raise UserError(
            f"faults: {type(late[0]).__name__} takes rules that mix in every step and do no more, such as DSGD and "
            f"QGDSGDm, but gossip is {name}"
        )
    if faults and isinstance(rule, Asynchronous):
        raise UserError(f"faults: gossip {name} is asynchronous, and takes no faults; allowed: []")
    for fault in faults:
        what = type(fault).__name__
        fault.check(graph)
        for assumption in set(rule.assumes) & set(fault.breaks):
            raise UserError(
                f"faults: {what} is given, but gossip {name} relies on {ASSUMPTIONS[assumption]}; DSGD and QGDSGDm "
                f"do not"
            )
        if "static" in fault.breaks and rebuilt_kind(graph, rule.takes) not in rule.takes:
            raise UserError(
                f"faults: without some messages, rows and columns of the weights of directed edges cannot both sum to "
                f"1, which gossip {name} needs; with {what}, take an undirected graph, or SGP"
            )
    links = Links(graph, faults, graph.seed)
    for group in links.liars:
        attack = group.fault.attack
        if attack is not None:
            attack.check(links.honest)
            if attack.omniscient and "swap" in rule.sends:
                raise UserError(explain_swaps(type(attack).__name__, f"gossip {name}"))
