"""What a researcher swaps: the bases of gossip rules, scores, thresholds and distillation, and the hooks they may use.

Importable without torch, since the command line reads these signatures before anything heavy is loaded. For the same reason
no postponed annotations here: to resolve them jsonargparse would execute the TYPE_CHECKING block.
"""

import inspect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from lightning_idkd.errors import UserError, did_you_mean, require, shaped

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import SimpleNamespace

    import numpy as np
    from torch import Tensor, nn

    from lightning_idkd.network import Labels
    from lightning_idkd.node import NodeModule, Outputs
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


def chance(p: float) -> str:
    """A probability in three digits; in words where these would be 0 or 1."""
    if p < 0.0005:
        return "below 0.001"
    return "above 0.999" if p >= 0.9995 else f"{p:.3f}"


class OodScore(ABC):
    """How much a sample resembles a node's own data: larger = more in-distribution.

    ``unit`` says what its numbers are, for tables and pictures, such as ``log-odds``.
    """

    unit: str = ""

    @property
    def title(self) -> str:
        """Name and unit, as pictures show them."""
        return type(self).__name__ + (f", {self.unit}" if self.unit else "")

    @property
    def fitted(self) -> bool:
        """Whether it learns from a node's data first."""
        return type(self).fit is not OodScore.fit

    def fit(self, outputs: "Outputs", labels: "Tensor") -> None:  # noqa: B027 (most scores need nothing)
        """Learn from the outputs of a node's training samples and their ``labels`` [N], anew for every node."""

    @abstractmethod
    def __call__(self, outputs: "Outputs") -> "Tensor":
        """Scores float32 [N] from ``outputs.logits`` [N, classes], ``outputs.features`` [N, F] and ``outputs.head``.

        Own and public samples are judged in one call.
        """

    def perturb(self, module: "NodeModule", x: "Tensor") -> "Tensor":
        """The images that the score wants instead of ``x`` [B, C, H, W]; another than this one costs passes of its own."""
        return x

    def from_probability(self, p: float) -> float:
        """The score at which the top class has probability ``p``; only scores that are a function of it have one."""
        raise UserError(
            f"calibration.probability: {type(self).__name__} is no function of a probability; give calibration.threshold"
        )

    def probability(self, score: float) -> float | None:
        """The probability of the top class at a score, the reverse of :meth:`from_probability`; None where there is none."""
        return None

    def written(self, threshold: float) -> str:
        """A threshold for people: in the score's unit and, where there is one, as a probability."""
        p = self.probability(threshold)
        return f"threshold {threshold:.4g}" + ("" if p is None else f", probability {chance(p)}")

    def features(self, outputs: "Outputs") -> "Tensor":
        """``outputs.features`` [N, F], or a UserError where the network offers none."""
        return self._offered(outputs.features, "features(x) [B, F]")

    def head(self, outputs: "Outputs") -> "nn.Linear":
        """The classifier behind the features, or a UserError where the network offers none."""
        return self._offered(outputs.head, "head (nn.Linear)")

    def _offered(self, found, what: str):
        if found is None:
            raise UserError(f"calibration.score: {type(self).__name__} needs {what}, which this network does not offer")
        return found


@dataclass
class Selection:
    """What one node's detector decided.

    ``kept`` bool [m]; its ``threshold`` in the score's unit; the score vectors of its held-out samples (of its training
    samples where it has none), of the public set and of noise; ``measures`` of how good the selection is.
    """

    kept: "Tensor"
    threshold: float
    private: "Tensor"
    public: "Tensor"
    noise: "Tensor"
    measures: dict[str, float] = field(default_factory=dict)


class Calibration(Callback, ABC):
    """Fixes every node's threshold from the scores of its held-out data and of samples that are not its own.

    Args:
        score: The out-of-distribution score; null in a config for MSP.
        against: What is not a node's own: the ``public`` set, or uniform ``noise`` images.
        pooled: Average the threshold with those of the neighbours, which are told it.
    """

    fallback_below = 8
    """With fewer held-out samples than this, which do not carry a threshold, it is the 5 % quantile of their scores."""

    def __init__(self, score: OodScore | None = None, against: str = "public", pooled: bool = False):
        if score is None:
            raise UserError("calibration.score: none given; allowed: a score, such as MSP()")
        if against not in ("public", "noise"):
            hint = did_you_mean(against, ("public", "noise"))
            raise UserError(f"calibration.against: '{against}' is neither public nor noise.{hint}")
        self.score, self.against, self.pooled = score, against, pooled

    @property
    def shares(self) -> str:
        """What nodes tell their neighbours for it."""
        return "thresholds" if self.pooled else ""

    @abstractmethod
    def threshold(self, private: "Tensor", others: "Tensor") -> float:
        """The threshold from held-out scores [a] and scores [m] of what it is ``against``; at or above it samples are kept."""


class Teacher:
    """Whose answers a node sends to its neighbours: its own."""

    def rows(self, run: "Orchestrator") -> "Tensor":
        """The parameters [rows, P] that label the public set."""
        return run.stack.X

    def on_step_end(self, run: "Orchestrator") -> None:
        """Called after every training step."""

    def state_dict(self, run: "Orchestrator") -> dict:
        """What a resumed run must know, of the nodes of all processes."""
        return {}

    def load_state_dict(self, state: dict, run: "Orchestrator") -> None:
        """The reverse of :meth:`state_dict`."""


class Encoding(ABC):
    """How labels are written on an edge."""

    @abstractmethod
    def encode(self, labels: "Labels", public: int) -> bytes:
        """The message that carries ``labels`` of a public set of that many samples."""

    @abstractmethod
    def decode(self, message: bytes, public: int, classes: int, weighted: bool) -> "Labels":
        """The labels, on the CPU, as the receiver has them, with the message's ``size``."""


@dataclass
class FineTuning:
    """How nodes train on private and distilled samples together."""

    private_share: float | None = None
    """Share of every batch that is private, above 0 and below 1; null: by the sizes of the two sets."""
    balance: Literal["none", "cap", "draw"] = "none"
    """``cap`` leaves at most the median number of distilled samples of a class, by their labels; ``draw`` draws all classes
    equally often, with replacement."""
    weight: float = 1.0
    """Weight of a distilled sample's loss against a private one's, above 0."""
    confidence: bool = False
    """Multiply the weight by how sure the label is, 1 - entropy / log k."""
    temperature: float = 1.0
    """Temperature T of a node's answers to distilled samples; their loss is multiplied by T^2."""
    logit_adjustment: float = 0.0
    """In the loss of private samples, logits get the log of the node's own (add-one) label frequencies times this (Menon et al.,
    ICLR 2021), so that classes it lacks are not unlearnt; 0 for none, 1 for all."""

    def __post_init__(self):
        share = self.private_share
        require(share is None or 0 < share < 1, "distillation.tuning.private_share", share, "between 0 and 1, or null")
        require(0 < self.weight < math.inf, "distillation.tuning.weight", self.weight, "above 0")
        require(0 < self.temperature < math.inf, "distillation.tuning.temperature", self.temperature, "above 0")
        given = self.logit_adjustment
        require(0 <= given < math.inf, "distillation.tuning.logit_adjustment", given, "0 or more")


class Aggregation(ABC):
    """How a node makes one label of those that it and its neighbours have for a public sample."""

    shares: str = ""
    """What nodes tell their neighbours for it besides labels: said at the start, and counted as other bytes."""

    def prepare(self, run: "Orchestrator", step: int) -> None:  # noqa: B027 (most need nothing)
        """Exchange what the labels alone do not tell, before every exchange of labels."""

    @abstractmethod
    def combine(self, probabilities: "Tensor", votes: "Tensor", senders: list[int]) -> "Tensor":
        """Labels [s, k] from ``probabilities`` [v, s, k] of v ``senders`` with ``votes`` [v, s]: 0 where one did not keep the
        sample, else 1 or the weight it was sent with; each sample was kept by one of them at least."""

    def __call__(self, received: "dict[int, Labels]") -> "Labels":
        """One node's distilled set from what it has of whom."""
        import torch

        from lightning_idkd.network import Labels

        index = torch.cat([labels.index for labels in received.values()]).unique()
        first = next(iter(received.values())).probabilities
        probabilities = first.new_zeros(len(received), len(index), first.shape[1])
        votes = first.new_zeros(len(received), len(index))
        for v, labels in enumerate(received.values()):
            at = torch.searchsorted(index, labels.index)
            probabilities[v, at] = labels.probabilities
            votes[v, at] = 1.0 if labels.weights is None else labels.weights.to(votes)
        whose = f"distillation.aggregation: {type(self).__name__}.combine"
        found = shaped(self.combine(probabilities, votes, list(received)), probabilities.shape[1:], f"{whose} returns")
        if not (found >= 0).all():
            raise UserError(f"{whose} returns labels that are negative or no numbers; allowed: probabilities")
        return Labels(index, found)


class Distillation(Callback, ABC):
    """When nodes label the public set, what they send, how they average, and how long they train on it.

    A method that sends something else overrides :meth:`exchange` and sets ``label = aggregate = None``.

    Args:
        start: First exchange: a fraction of the epochs below 1, else an epoch; it takes place before that epoch.
        every: Epochs between exchanges; null for one exchange only.
        steps: ``equal`` keeps the number of steps an epoch; ``grow`` uses the mean size of private + distilled sets.
        tuning: How nodes train on private and distilled samples together.
    """

    public: bool = True
    """Whether it needs a public set."""

    shares: str = ""
    """What nodes tell their neighbours besides labels of public samples: said at the start, and counted as other bytes."""

    calibrated: bool = False
    """Whether it selects samples by a threshold, so that ``calibration`` cannot be null."""

    teacher = Teacher()

    def __init__(self, start: int | float = 0.6, every: int | None = None, steps: str = "equal",
                 tuning: FineTuning | None = None):  # fmt: skip
        if steps not in ("equal", "grow"):
            raise UserError(f"distillation.steps: '{steps}' is neither equal nor grow.{did_you_mean(steps, ('equal', 'grow'))}")
        if every is not None and every < 1:
            raise UserError(f"distillation.every: {every} is not positive; give a number of epochs, or null for one exchange")
        self.start, self.every, self.steps, self.tuning = start, every, steps, tuning or FineTuning()
        if steps == "grow":
            self.declare("sizes of the nodes' sets")

    def declare(self, shared: str) -> None:
        """Add to what nodes tell their neighbours besides labels."""
        self.shares = ", ".join(filter(None, [self.shares, shared]))

    @abstractmethod
    def label(self, run: "Orchestrator") -> "list[Labels]":
        """What every node held here sends."""

    @abstractmethod
    def aggregate(self, run: "Orchestrator", received: "list[dict[int, Labels]]") -> "list[Labels]":
        """Every node's distilled set, from what each has from itself and its neighbours."""

    def exchange(self, run: "Orchestrator") -> "list[Labels]":
        """Send, receive, and set what the nodes here train on from now on; returns their distilled sets, if any."""
        distilled = self.aggregate(run, run.network.exchange(self.label(run), run.step))
        run.distil(distilled)
        return distilled

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether an exchange takes place before ``epoch``."""
        from lightning_idkd.schedule import epoch_of

        first = epoch_of(self.start, epochs, "distillation.start")
        return epoch == first or (self.every is not None and epoch > first and (epoch - first) % self.every == 0)

    def on_epoch_start(self, run: "Orchestrator", epoch: int) -> None:
        if self.due(epoch, run.epochs):
            with run.exchanging():
                distilled = self.exchange(run)
            run.call("on_exchange_end", epoch=epoch, distilled=distilled)
