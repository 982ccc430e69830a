"""The bases of decentralised optimisers (gossip rules) and of the compression of their messages."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_idkd.callback.hooks import Callback, Run
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    import numpy as np
    from torch import Tensor

    from lightning_idkd.graph import Graph


@dataclass
class Context:
    """What a gossip rule may use besides its matrices, for the nodes of this process (``rows``) and their ``e`` edges.

    Only rules with ``columnwise = False`` may call ``gradient``, ``loss``, ``features``, ``pull_back`` and ``uniform``.
    """

    step: int
    """Number of the step, from 0."""
    lr: float
    """Learning rate of the step, never 0."""
    mix: "Callable[..., Tensor]"
    """``mix(T)`` returns ``W(step) @ T``; ``size=`` is the bytes of a message that is shorter than a row of ``T``."""
    mean: "Callable[[Tensor], Tensor]"
    """``mean(T)`` gives every node the mean of all rows of ``T``, by an all-reduce."""
    receive: "Callable[[Tensor], tuple[Tensor, Tensor]]"
    """``receive(T)`` returns what every node has before it averages: V [rows, D, C], its own row of ``T``, what it
    received, and its own row again up to D; and their weights w [rows, D] in W(step), 0 for the repetitions."""
    swap: "Callable[..., Tensor]"
    """``swap(M)`` sends row e of ``M`` over edge e of ``edges``, and returns in row e what came back over that edge.
    Where nothing arrived it returns the row of ``instead=``, or of ``M`` without one."""
    edges: "np.ndarray"
    """Directed edges [e, 2]: the sender, as a row of this process, and the receiver, as a node."""
    weights: "np.ndarray"
    """Weight [e] that the sender of each edge gives to what it receives from the other end, without faults."""
    gradient: "Callable[[Tensor], Tensor]"
    """``gradient(X)`` returns the gradient [rows, P] at other parameters ``X`` on the same batch."""
    loss: "Callable[[Tensor], Tensor]"
    """``loss(X)`` returns the loss [rows] of the same batch at other parameters ``X``."""
    targets: "Tensor | None"
    """Labels [rows, B, k] of the batch."""
    features: "Callable[[Tensor], Tensor]"
    """``features(X)`` returns the features [rows, B, F] of the batch at parameters ``X``, in training mode."""
    pull_back: "Callable[[Tensor, Tensor], Tensor]"
    """``pull_back(X, V)`` returns the gradient [rows, P] of a loss whose derivative by the features is
    ``V`` [rows, B, F]."""
    uniform: "Callable[[str, int], Tensor]"
    """``uniform(purpose, columns)`` returns random numbers [rows, columns] in [0, 1), new ones at each step."""


ASSUMPTIONS = {
    "static": "the same weights in every step",
    "sums": "sums over all nodes that no node leaves",
    "everyone": "every node taking every step",
}
"""What a rule may rely on, and a fault may break."""


class Gossip(Callback, ABC):
    """A decentralised optimiser: it computes how the rows of ``X`` move, given their gradients."""

    buffers: tuple[str, ...] | dict[str, int | None] = ()
    """Names of the rule's matrices [n, P], or their width by name (None: P). They start at zero, are attributes of
    ``state`` and are checkpointed."""
    edge_buffers: dict[str, int | None] = {}  # noqa: RUF012 (a rule replaces it, and does not change it)
    """Width by name (None: P) of matrices that have one row per directed edge, otherwise like ``buffers``."""
    columnwise: bool = True
    """Whether the rule treats every column alike. Then it may be called on blocks of columns, unless it has a buffer of
    a given width, which belongs to all columns."""
    every_step: bool = False
    """Whether the rule must mix in every step, so that LocalSteps cannot skip some."""
    mixes_first: bool = False
    """Whether ``update`` first of all mixes ``X`` itself. Then rows travel to other processes while the gradients are
    computed."""
    needs_features: bool = False
    """Whether the rule uses features, so that a network without them is refused before the start."""
    shares: str = ""
    """What nodes send besides parameters and the rule's state; printed at the start, and counted as other bytes."""
    takes: ClassVar[tuple[str, ...]] = ("doubly",)
    """Weights W that the rule accepts, by what sums to 1: rows and columns (doubly), columns (column) or rows (row)."""

    assumes: ClassVar[tuple[str, ...]] = ()
    """What the rule relies on, of :data:`ASSUMPTIONS`, so that a fault that breaks it is refused."""
    sends: ClassVar[tuple[str, ...]] = ("mix",)
    """The functions of the context by which the rule sends parameters: mix, mean, swap or receive; act, if it has no
    context. Robust takes rules that only mix."""

    @abstractmethod
    def update(self, X: "Tensor", G: "Tensor", state: "SimpleNamespace", ctx: Context) -> "Tensor":
        """Returns the next ``X`` [n, P], given gradients ``G`` [n, P]; assigns new values to buffers in ``state``."""

    def combine(self, X: "Tensor", state: "SimpleNamespace", ctx: Context) -> "Tensor":
        """Mixes once without a gradient, as the final gossip steps do."""
        return ctx.mix(X)

    def widths(self) -> dict[str, int | None]:
        """Returns the width of every buffer (None: P) by name."""
        return dict(self.buffers) if isinstance(self.buffers, dict) else dict.fromkeys(self.buffers)

    @property
    def in_blocks(self) -> bool:
        """Whether the rule is called on blocks of columns; not if they would share a narrow buffer."""
        return self.columnwise and not any((self.widths() | self.edge_buffers).values())

    def check(self, graph: "Graph") -> None:
        """Raises a UserError if the rule cannot run on ``graph``; this base checks the weights."""
        if graph.kind not in self.takes:
            sums = {"doubly": "rows and columns", "column": "columns", "row": "rows"}
            needed = " or whose ".join(sums[kind] for kind in self.takes)
            raise UserError(
                f"gossip: {type(self).__name__} needs weights whose {needed} sum to 1; those of graph.topology "
                f"{graph.name} with graph.weights {graph.weights} do so in {sums[graph.kind]} only"
            )


class Event(ABC):
    """What an asynchronous rule may use when a node acts."""

    node: int
    """The node that has its gradient."""
    lr: float
    """Learning rate, never 0."""
    time: float
    """Simulated seconds."""
    count: int
    """Number of gradients that the node has had before."""

    @abstractmethod
    def uniform(self, purpose: str) -> float:
        """Returns a random number in [0, 1), another one at each event."""

    @abstractmethod
    def peer(self) -> int:
        """Returns a neighbour of the node, drawn uniformly; the same one whenever it is asked in this event."""

    @abstractmethod
    def exchange(self, peer: int) -> None:
        """Counts that the node and ``peer`` send each other their rows, and lets the node's next gradient take at least
        as long as that."""

    @abstractmethod
    def send(self, row: "Tensor") -> None:
        """Sends a row [1, P] to all neighbours, where it arrives after its transfer; the node does not wait."""

    @abstractmethod
    def inbox(self) -> "tuple[Tensor, Tensor]":
        """Returns the last row that has arrived from each neighbour [d, P], of those that have sent one, and the
        weights [d] that W gives to them. A rule that asks has the edge buffers ``inbox`` and ``arrived`` (width 1)."""


class Asynchronous(Gossip):
    """A rule whose nodes act one by one, each when it has its gradient, in simulated time.

    n actions count as a step. Such a rule needs a clock, and runs in one process.
    """

    every_step = True
    columnwise = False
    sends: ClassVar = ("act",)

    def widths(self) -> dict[str, int | None]:
        return super().widths() | {"S": None, "D": None}  # rows at the begin of each gradient, and the gradients

    def update(self, X: "Tensor", G: "Tensor", state: "SimpleNamespace", ctx: Context) -> "Tensor":
        raise NotImplementedError(f"{type(self).__name__} acts node by node")

    @abstractmethod
    def act(self, X: "Tensor", G: "Tensor", state: "SimpleNamespace", event: Event) -> None:
        """Changes ``X`` [n, P] in place, the row of the node that acts and possibly others.

        Args:
            X: The rows of all nodes as they are now.
            G: The node's gradient [1, P], at the row with which it began.
            state: The node's rows [1, ...] of the buffers; assigns new values to them.
            event: Who acts, and how it talks to its neighbours.
        """


class Compression(ABC):
    """Replaces the vector that a node sends by a shorter message."""

    @abstractmethod
    def __call__(self, T: "Tensor", ctx: Context) -> "Tensor":
        """Returns the rows [n, P] that receivers read from the messages for the rows of ``T`` [n, P]."""

    @abstractmethod
    def size(self, T: "Tensor") -> int:
        """Returns the bytes of the message for one row of ``T``."""


class Aggregator(ABC):
    """Combines the rows that a node has after a gossip step, in place of their sum weighted by W."""

    columnwise: bool = False
    """Whether the aggregator treats every column alike, so that it may be called on blocks of columns."""

    @abstractmethod
    def __call__(self, V: "Tensor", w: "Tensor", ctx: Context) -> "Tensor":
        """Returns one row per node [r, C].

        Args:
            V: The rows [r, D, C] of every node: its own, then those that it received by ascending sender, then its own
                again up to D. All values are finite.
            w: Their weights [r, D] in W(step); 0 for the repetitions and for rows that were dropped.
            ctx: The context of the rule, for example for ``ctx.loss``.
        """

    def bears(self, received: int) -> int | None:
        """Returns how many of the rows that a node receives may be lies; None if no bound is known.

        Args:
            received: Number of rows that the node receives, without its own.
        """
        return None

    def check(self, graph: "Graph") -> None:  # noqa: B027 (most need nothing)
        """Raises a UserError if the aggregator cannot work on ``graph``."""

    def on_check(self, run: Run) -> None:  # noqa: B027 (most need nothing)
        """Reads what it needs of a run, or refuses it, before any file is written."""
