"""The hooks of a run, what they may use of it, and the base class of everything that has hooks."""

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from lightning_idkd.data.store import Store
    from lightning_idkd.labels import Labels, Outputs, Selection
    from lightning_idkd.network import Network
    from lightning_idkd.nodes.stack import NodeStack

HOOKS = {
    "on_check": ("run",),
    "on_fit_start": ("run",),
    "on_epoch_start": ("run", "epoch"),
    "on_calibration_end": ("run", "epoch", "selections"),
    "on_exchange_end": ("run", "epoch", "distilled"),
    "on_step_end": ("run", "step", "losses"),
    "on_epoch_end": ("run", "epoch"),
    "on_training_end": ("run",),
    "on_evaluation_end": ("run", "metrics"),
    "on_fit_end": ("run", "summary"),
}
"""Every hook with its keyword payload, in the order of a run; a method names the parts of the payload that it uses.

``on_check`` comes before the run writes any file: a callback raises a :class:`UserError` there if it cannot work on
this run. ``run`` is a :class:`Run`; ``losses`` is a tensor [rows]; ``selections`` and ``distilled`` are lists with a
:class:`Selection` or :class:`Labels` for each node of this process; ``metrics`` and ``summary`` are dicts.
"""


class Run(Protocol):
    """The part of a run that hooks may use."""

    stack: "NodeStack"
    """The nodes of this process: parameters ``X`` [rows, P], gradients ``G`` [rows, P] and modules."""
    network: "Network"
    """The graph, the messages over its edges, and reports from the nodes of all processes."""
    store: "Store"
    """The data: private, public, distilled, held-out and test samples."""
    seed: int
    """The seed of all randomness."""
    epoch: int
    """Number of finished epochs."""
    epochs: int
    """Number of epochs of the whole run."""
    step: int
    """Number of finished steps, over all epochs."""
    phase: str
    """``train``, ``distil`` after the first exchange, or ``final`` after the last step."""
    lines: list[dict]
    """The metrics of every evaluation so far."""

    def answers(self) -> "list[Outputs]":
        """Returns the outputs of each node of this process on the public set, in the order of the set."""

    def calibrate(self, public: "list[Outputs]", offsets: "list[Tensor] | None" = None) -> "list[Selection]":
        """Returns what each node of this process selects, given its outputs on the public set.

        Args:
            public: The outputs of every node.
            offsets: What to add to the logits [k] of every node before they are scored; None for nothing.
        """

    def exchanging(self) -> AbstractContextManager[None]:
        """Counts the bytes that nodes send inside this context as part of an exchange."""

    def distil(self, labels: "list[Labels]") -> None:
        """Makes the nodes of this process train on ``labels`` from now on."""

    def soften(self, targets: "list[Tensor]", weight: float) -> None:
        """Let the nodes of this process train on soft ``targets`` [samples, k] of their own samples from now on.

        Args:
            weight: of these targets against the samples' own labels.
        """

    def draw(self, name: str, figure: "Figure") -> None:
        """Writes a matplotlib figure to ``plots/NAME.png`` and logs it, in the first process only."""

    def call(self, hook: str, **payload: Any) -> None:
        """Calls a hook of all callbacks."""

    def say(self, text: str) -> None:
        """Prints a line, in the first process only."""


class Callback:
    """Watches or steers a run by defining hooks, methods named in :data:`HOOKS`."""

    at_the_end: float = 0.0
    """Seconds that the callback takes at the end of a run, roughly; the printed time left includes them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in [m for m in vars(cls) if m.startswith("on_")]:
            method = f"{cls.__name__}.{name}"
            if name not in HOOKS:
                raise UserError(f"{method} is not a hook.{did_you_mean(name, HOOKS)} Hooks: {', '.join(HOOKS)}")
            for parameter in list(inspect.signature(vars(cls)[name]).parameters)[1:]:
                if parameter not in HOOKS[name]:
                    raise UserError(f"{method} has no payload '{parameter}'; it gets {', '.join(HOOKS[name])}")

    def state_dict(self) -> dict:
        """Returns what a resumed run needs (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restores what :meth:`state_dict` returned."""
