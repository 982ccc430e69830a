"""The hooks of a run, and the base of everything that uses them."""

import inspect
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from lightning_idkd.data.store import Store
    from lightning_idkd.labels import Labels, Outputs, Selection
    from lightning_idkd.network import Network
    from lightning_idkd.nodes.stack import NodeStack

HOOKS = {
    "on_fit_start": ("run",),
    "on_epoch_start": ("run", "epoch"),
    "on_calibration_end": ("run", "epoch", "selections"),
    "on_exchange_end": ("run", "epoch", "distilled"),
    "on_step_end": ("run", "step", "losses"),
    "on_epoch_end": ("run", "epoch"),
    "on_evaluation_end": ("run", "metrics"),
    "on_fit_end": ("run", "summary"),
}
"""Every hook with its keyword payload, in the order of a run. A method takes those it wants.

``run`` is a :class:`Run`; ``losses`` [rows]; ``selections`` and ``distilled`` are
lists with a :class:`Selection` or ``Labels`` for every node held in this process; ``metrics`` and ``summary`` are dicts.
"""


class Run(Protocol):
    """What hooks may use of a run."""

    stack: "NodeStack"
    """The nodes of this process: parameters ``X`` [rows, P], their gradients, their modules."""
    network: "Network"
    """The graph and its messages, and reports from all nodes."""
    store: "Store"
    """The data: private, public and distilled samples, held-out and test samples."""
    seed: int
    epoch: int
    """Epochs that are finished."""
    epochs: int
    """Epochs of the whole run."""
    step: int
    """Steps that are finished, over all epochs."""
    phase: str
    """``train``, ``distil`` after the first exchange, or ``final`` after the last step."""
    lines: list[dict]
    """The metrics of every evaluation so far."""

    def answers(self) -> "list[Outputs]":
        """Outputs of every node of this process on the public set, in the order of the set."""

    def calibrate(self, public: "list[Outputs]") -> "list[Selection]":
        """What every node of this process selects, given its outputs on the public set."""

    def exchanging(self) -> AbstractContextManager[None]:
        """Inside, the bytes that nodes send are counted as those of an exchange of labels."""

    def distil(self, labels: "list[Labels]") -> None:
        """Let the nodes of this process train on ``labels`` from now on."""

    def call(self, hook: str, **payload) -> None:
        """Call a hook of all callbacks."""

    def say(self, text: str) -> None:
        """Print a line, from the first process only."""


class Callback:
    """Something that watches or steers a run through the hooks in :data:`HOOKS`."""

    at_the_end: float = 0.0
    """Seconds that it takes about when a run ends, which count as time left."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in [m for m in vars(cls) if m.startswith("on_")]:
            if name not in HOOKS:
                raise UserError(f"{cls.__name__}.{name} is no hook.{did_you_mean(name, HOOKS)} Hooks: {', '.join(HOOKS)}")
            for parameter in list(inspect.signature(vars(cls)[name]).parameters)[1:]:
                if parameter not in HOOKS[name]:
                    raise UserError(f"{cls.__name__}.{name} has no payload '{parameter}'; it gets {', '.join(HOOKS[name])}")

    def state_dict(self) -> dict:
        """What a resumed run must know (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """The reverse of :meth:`state_dict`."""
