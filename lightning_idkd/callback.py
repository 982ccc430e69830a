"""What a researcher swaps: the bases of gossip rules, scores, thresholds and distillation, and the hooks they may use.

Importable without torch, since the command line reads these signatures before anything heavy is loaded. For the same reason
no postponed annotations here: to resolve them jsonargparse would execute the TYPE_CHECKING block.
"""

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    import numpy as np
    from torch import Tensor

    from lightning_idkd.network import Labels
    from lightning_idkd.node import Outputs
    from lightning_idkd.orchestrator import Orchestrator

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

``run`` is the :class:`~lightning_idkd.orchestrator.Orchestrator`; ``losses`` [rows]; ``selections`` and ``distilled`` are
lists with a :class:`Selection` or ``Labels`` for every node held in this process; ``metrics`` and ``summary`` are dicts.
"""


class Callback:
    """Something that watches or steers a run through the hooks in :data:`HOOKS`."""

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


@dataclass
class Context:
    """What a gossip rule sees besides its matrices.

    ``mix(T)`` is ``W(step) @ T``; ``mean(T)`` an all-reduce; ``swap(M)`` trades one message per directed edge, in the
    order of ``edges`` [e, 2] (row of the sender here, receiver); ``gradient(X)`` [rows, P] is another gradient on the
    same batch, for rules with ``columnwise = False``.
    """

    step: int
    lr: float
    mix: "Callable[[Tensor], Tensor]"
    mean: "Callable[[Tensor], Tensor]"
    swap: "Callable[[Tensor], Tensor]"
    edges: "np.ndarray"
    gradient: "Callable[[Tensor], Tensor]"


class Gossip(Callback, ABC):
    """A decentralised optimiser: how the rows move, given their gradients.

    ``buffers`` names matrices [n, P], ``edge_buffers`` matrices with one row per directed edge and the given width (None:
    P); both start at zero, live in ``state`` and are checkpointed. A ``columnwise`` rule treats every column alike, so it
    may be called on blocks of columns.
    """

    buffers: tuple[str, ...] = ()
    edge_buffers: ClassVar[dict[str, int | None]] = {}
    columnwise: bool = True

    @abstractmethod
    def update(self, X: "Tensor", G: "Tensor", state: "SimpleNamespace", ctx: Context) -> "Tensor":
        """The next ``X`` [n, P] after gradients ``G`` [n, P]; assigns new values to the buffers in ``state``."""

    def combine(self, X: "Tensor", ctx: Context) -> "Tensor":
        """One mixing without a gradient: the final gossip steps."""
        return ctx.mix(X)

    def check(self, graph) -> None:
        """Raise a UserError where the rule cannot run on ``graph``."""


class OodScore(ABC):
    """How much a sample resembles a node's own data: larger = more in-distribution."""

    @property
    def fitted(self) -> bool:
        """Whether it learns from a node's data first."""
        return type(self).fit is not OodScore.fit

    def fit(self, outputs: "Outputs", labels: "Tensor") -> None:  # noqa: B027 (most scores need nothing)
        """Learn from the outputs of a node's training samples and their ``labels`` [N], anew for every node."""

    @abstractmethod
    def __call__(self, outputs: "Outputs") -> "Tensor":
        """Scores float32 [N] from ``outputs.logits`` [N, k] and ``outputs.features`` [N, F]."""

    def from_probability(self, p: float) -> float:
        """The score at which the top class has probability ``p``; only scores that are a function of it have one."""
        raise UserError(
            f"calibration.probability: {type(self).__name__} is no function of a probability; give calibration.threshold"
        )


@dataclass
class Selection:
    """What one node's detector decided: ``kept`` bool [m], its ``threshold`` in the score's unit, the ``auroc`` of its
    held-out against the public samples (nan without both), and the two score vectors, for pictures."""

    kept: "Tensor"
    threshold: float
    auroc: float
    private: "Tensor"
    public: "Tensor"


class Calibration(Callback, ABC):
    """Fixes every node's threshold from scores of its own held-out data and of the public set.

    Args:
        score: The out-of-distribution score.
    """

    fallback_below = 8
    """Fewer held-out samples than this do not carry a threshold of their own; see :meth:`select`."""

    def __init__(self, score: OodScore):
        self.score = score
        self._told: set[int] = set()

    @abstractmethod
    def threshold(self, private: "Tensor", public: "Tensor") -> float:
        """The threshold from held-out scores [a] and public scores [m]; a sample is kept at or above it."""

    def select(self, private: "Outputs", public: "Outputs", held_out: int, say: "Callable[[str], None]", node: int) -> Selection:
        """Calibrate one node and select its in-distribution public samples.

        ``private`` are outputs of its ``held_out`` validation samples (of its training samples where it has none). With
        fewer than ``fallback_below`` the threshold is their 5 % quantile, which is said once a node.
        """
        from lightning_idkd.metrics import auroc, quantile

        a, m = self.score(private), self.score(public)
        if held_out < self.fallback_below:
            threshold = quantile(a, 0.05)
            if node not in self._told:
                say(f"node {node} has {held_out} held-out samples: its threshold is the 5 % quantile of its own scores")
                self._told.add(node)
        else:
            threshold = self.threshold(a, m)
        return Selection(m >= threshold, threshold, auroc(a, m) if held_out else math.nan, a, m)


class Aggregation(ABC):
    """How a node makes one label of those that it and its neighbours have for a public sample."""

    shares: str = ""
    """What nodes tell their neighbours for it besides labels: said at the start, and counted as other bytes."""

    def prepare(self, run: "Orchestrator") -> None:  # noqa: B027 (most need nothing)
        """Exchange what the labels alone do not tell, before every exchange of labels."""

    @abstractmethod
    def combine(self, probabilities: "Tensor", kept: "Tensor", senders: list[int]) -> "Tensor":
        """Labels [s, k] from ``probabilities`` [v, s, k] of v ``senders``, which count where ``kept`` [v, s]; each sample
        was kept by one of them at least."""

    def __call__(self, received: "dict[int, Labels]") -> "Labels":
        """One node's distilled set from what it has of whom."""
        import torch

        from lightning_idkd.network import Labels

        index = torch.cat([labels.index for labels in received.values()]).unique()
        first = next(iter(received.values())).probabilities
        probabilities = first.new_zeros(len(received), len(index), first.shape[1])
        kept = torch.zeros(len(received), len(index), dtype=torch.bool, device=index.device)
        for v, labels in enumerate(received.values()):
            at = torch.searchsorted(index, labels.index)
            probabilities[v, at], kept[v, at] = labels.probabilities, True
        return Labels(index, self.combine(probabilities, kept, list(received)))


class Distillation(Callback, ABC):
    """When nodes label the public set, what they send, how they average, and how long they train on it.

    Args:
        start: First exchange: a fraction of the epochs below 1, else an epoch; it takes place before that epoch.
        every: Epochs between exchanges; null for one exchange only.
        steps: ``equal`` keeps the number of steps an epoch; ``grow`` uses the mean size of private + distilled sets.
    """

    shares: str = ""
    """What nodes tell their neighbours besides labels of public samples: said at the start, and counted as other bytes."""

    calibrated: bool = False
    """Whether it selects samples by a threshold, so that ``calibration`` cannot be null."""

    def __init__(self, start: int | float = 0.6, every: int | None = None, steps: str = "equal"):
        if steps not in ("equal", "grow"):
            raise UserError(f"distillation.steps: '{steps}' is neither equal nor grow.{did_you_mean(steps, ('equal', 'grow'))}")
        if every is not None and every < 1:
            raise UserError(f"distillation.every: {every} is not positive; give a number of epochs, or null for one exchange")
        self.start, self.every, self.steps = start, every, steps

    @abstractmethod
    def label(self, run: "Orchestrator") -> "list[Labels]":
        """What every node held here sends."""

    @abstractmethod
    def aggregate(self, run: "Orchestrator", received: "list[dict[int, Labels]]") -> "list[Labels]":
        """Every node's distilled set, from what each has from itself and its neighbours."""

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether an exchange takes place before ``epoch``."""
        from lightning_idkd.schedule import epoch_of

        first = epoch_of(self.start, epochs, "distillation.start")
        return epoch == first or (self.every is not None and epoch > first and (epoch - first) % self.every == 0)

    def on_epoch_start(self, run: "Orchestrator", epoch: int) -> None:
        if self.due(epoch, run.epochs):
            distilled = self.aggregate(run, run.network.exchange(self.label(run), run.step))
            run.distil(distilled)
            run.call("on_exchange_end", epoch=epoch, distilled=distilled)
