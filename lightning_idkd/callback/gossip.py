"""The base of decentralised optimisers, and of what compresses their messages."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_idkd.callback.hooks import Callback
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    import numpy as np
    from torch import Tensor


@dataclass
class Context:
    """What a gossip rule sees besides its matrices.

    ``mix(T)`` is ``W(step) @ T``, with ``size=`` the bytes of a message that is written shorter than a row of ``T``;
    ``mean(T)`` an all-reduce; ``swap(M)`` trades one message per directed edge, in the order of ``edges`` [e, 2] (row of
    the sender here, receiver), whose ``weights`` [e] are what the sender puts on what comes back. Rules with ``columnwise =
    False`` also have ``gradient(X)`` [rows, P], another gradient on the same batch, whose ``targets`` are [rows, B, k];
    ``features(X)`` [rows, B, F] of its samples at parameters ``X``, in training mode; ``pull_back(X, V)`` [rows, P], the
    gradient of a loss whose derivative by these features is ``V`` [rows, B, F]; and ``uniform(purpose, columns)`` [rows,
    columns], random numbers in [0, 1) of every node and step.
    """

    step: int
    lr: float
    mix: "Callable[..., Tensor]"
    mean: "Callable[[Tensor], Tensor]"
    swap: "Callable[..., Tensor]"
    edges: "np.ndarray"
    weights: "np.ndarray"
    gradient: "Callable[[Tensor], Tensor]"
    targets: "Tensor | None"
    features: "Callable[[Tensor], Tensor]"
    pull_back: "Callable[[Tensor, Tensor], Tensor]"
    uniform: "Callable[[str, int], Tensor]"


class Gossip(Callback, ABC):
    """A decentralised optimiser: how the rows move, given their gradients.

    ``buffers`` names matrices [n, P], or gives a width by name (None: P); ``edge_buffers`` have one row per directed edge.
    Both start at zero, live in ``state`` and are checkpointed. A ``columnwise`` rule treats every column alike, so it may
    be called on blocks of columns, unless buffers of a given width tie these together.
    """

    buffers: tuple[str, ...] | dict[str, int | None] = ()
    edge_buffers: ClassVar[dict[str, int | None]] = {}
    columnwise: bool = True
    every_step: bool = False
    """Whether it needs its mixing in every step, so that LocalSteps cannot leave some out."""
    needs_features: bool = False
    """Whether it asks for features, so that a network without them is refused before the start."""
    shares: str = ""
    """What nodes tell their neighbours besides parameters and the rule's own state: said at the start, counted as other
    bytes."""
    takes: ClassVar[tuple[str, ...]] = ("doubly",)
    """What may sum to 1 in W: rows and columns (doubly), columns only (column), rows only (row)."""

    @abstractmethod
    def update(self, X: "Tensor", G: "Tensor", state: "SimpleNamespace", ctx: Context) -> "Tensor":
        """The next ``X`` [n, P] after gradients ``G`` [n, P]; assigns new values to the buffers in ``state``."""

    def combine(self, X: "Tensor", state: "SimpleNamespace", ctx: Context) -> "Tensor":
        """One mixing without a gradient: the final gossip steps."""
        return ctx.mix(X)

    def widths(self) -> dict[str, int | None]:
        """Width of every buffer (None: P) by name."""
        return dict(self.buffers) if isinstance(self.buffers, dict) else dict.fromkeys(self.buffers)

    @property
    def in_blocks(self) -> bool:
        """Whether it is called on blocks of columns: not where all columns share a narrow buffer, which may move once a step."""
        return self.columnwise and not any((self.widths() | self.edge_buffers).values())

    def check(self, graph) -> None:
        """Raise a UserError where the rule cannot run on ``graph``; the base's is about its weights."""
        if graph.kind not in self.takes:
            means = {"doubly": "rows and columns", "column": "columns", "row": "rows"}
            raise UserError(
                f"gossip: {type(self).__name__} needs weights whose {' or whose '.join(means[k] for k in self.takes)} sum to 1; "
                f"those of graph.topology {graph.name} with graph.weights {graph.weights} do so in {means[graph.kind]} only"
            )


class Compression(ABC):
    """What a node sends instead of a vector."""

    @abstractmethod
    def __call__(self, T: "Tensor", ctx: Context) -> "Tensor":
        """What arrives of the rows of ``T`` [n, P]."""

    @abstractmethod
    def size(self, T: "Tensor") -> int:
        """Bytes of the message for one row of ``T``."""
