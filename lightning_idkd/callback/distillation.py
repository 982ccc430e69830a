"""The bases of distillation: who labels the public set, how labels are encoded and averaged, and when they are sent."""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lightning_idkd.callback.hooks import Callback
from lightning_idkd.errors import UserError, did_you_mean, require_shape
from lightning_idkd.labels import FineTuning

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from lightning_idkd.callback.hooks import Run
    from lightning_idkd.labels import Labels


class Teacher:
    """Gives the parameters with which a node labels the public set; this base gives the node's own parameters."""

    shares: str = ""
    """What nodes send for it besides parameters; it is printed at the start and counted as other bytes."""

    def on_check(self, run: "Run") -> None:
        """Refuses a run whose network it cannot use, before any file is written."""

    def rows(self, run: "Run") -> "Tensor":
        """Returns the parameters [rows, P] that label the public set."""
        return run.stack.X

    def on_step_end(self, run: "Run") -> None:
        """Runs after every training step."""

    def state_dict(self, run: "Run") -> dict:
        """Returns what a resumed run needs, for the nodes of all processes."""
        return {}

    def load_state_dict(self, state: dict, run: "Run") -> None:
        """Restores what :meth:`state_dict` returned."""


class Encoding(ABC):
    """Converts labels to the bytes that an edge carries, and back; it may add noise to them first."""

    epsilon: float = math.inf
    """Bound of the local differential privacy of each label; infinite for an encoding that adds no noise."""

    def perturb(self, labels: "Labels", uniform: "Callable[[int], Tensor]") -> "Labels":
        """Returns ``labels`` with noise; the base adds none. It is called once for the labels that a node makes, and
        not for averages of labels, which have their noise already.

        Args:
            labels: The labels of one node, on the CPU.
            uniform: ``uniform(columns)`` returns random numbers in [0, 1), float64 [s, columns], which are the same
                with every engine, with any number of processes, and in a resumed run.
        """
        return labels

    @abstractmethod
    def encode(self, labels: "Labels", public: int) -> bytes:
        """Returns the message that carries ``labels``, given the size of the public set."""

    @abstractmethod
    def decode(self, message: bytes, public: int, classes: int, weighted: bool) -> "Labels":
        """Returns the labels that a receiver reads from ``message``, on the CPU; their ``size`` is the message's.

        Args:
            message: The bytes that :meth:`encode` returned.
            public: Number of samples in the public set.
            classes: Number of classes k.
            weighted: Whether the message holds a weight per label.
        """


class Aggregation(ABC):
    """Combines the labels that a node and its neighbours have for a public sample into one label."""

    shares: str = ""
    """What nodes send for it besides labels; it is printed at the start and counted as other bytes."""

    def on_check(self, run: "Run") -> None:  # noqa: B027 (most need nothing)
        """Refuses a run whose graph it cannot work on, before any file is written."""

    def bears(self, received: int) -> int | None:
        """Returns how many of the labels of a sample that a node receives may be lies; None if no bound is known.

        Args:
            received: Number of labels that the node receives, without its own.
        """
        return None

    def prepare(self, run: "Run", step: int) -> None:  # noqa: B027 (most need nothing)
        """Exchanges what :meth:`combine` needs besides labels; it runs before labels of an exchange are combined."""

    @abstractmethod
    def combine(self, probabilities: "Tensor", votes: "Tensor", senders: list[int]) -> "Tensor":
        """Returns one label [s, k] per sample from the labels of v senders.

        Args:
            probabilities: The senders' labels [v, s, k].
            votes: [v, s]; 0 where the sender did not keep the sample, else the weight sent with the label, or 1 without
                weights. At least one sender kept each sample.
            senders: The node number of each sender.
        """

    def __call__(self, received: "dict[int, Labels]", agreement: bool = False) -> "Labels":
        """Returns the distilled set of one node, given the labels it has by sender (itself included).

        Args:
            received: The labels by sender.
            agreement: Weigh every label by how far its senders agree (:func:`~lightning_idkd.metrics.agreement`).
        """
        import torch

        from lightning_idkd import metrics
        from lightning_idkd.labels import Labels

        index = torch.cat([labels.index for labels in received.values()]).unique()
        first = next(iter(received.values())).probabilities
        probabilities = first.new_zeros(len(received), len(index), first.shape[1])
        votes = first.new_zeros(len(received), len(index))
        for v, labels in enumerate(received.values()):
            position = torch.searchsorted(index, labels.index)
            probabilities[v, position] = labels.probabilities
            votes[v, position] = 1.0 if labels.weights is None else labels.weights.to(votes)
        method = f"distillation.aggregation: {type(self).__name__}.combine"
        combined = self.combine(probabilities, votes, list(received))
        combined = require_shape(combined, probabilities.shape[1:], f"{method} returns")
        if not (combined >= 0).all():
            raise UserError(f"{method} returns labels that are negative or not numbers; allowed: probabilities")
        return Labels(index, combined, metrics.agreement(probabilities, votes) if agreement else None)


class Distillation(Callback, ABC):
    """Decides when nodes label the public set, what they send, how they average it, and how long they train on it.

    A subclass that sends something other than labels overrides :meth:`exchange` and sets ``label = aggregate = None``.

    Args:
        start: Epoch before which the first exchange takes place; a number below 1 is a fraction of all epochs.
        every: Epochs between exchanges; null for a single exchange.
        steps: ``equal`` keeps the number of steps per epoch; ``grow`` computes it from the mean size of the nodes'
            private and distilled sets together.
        tuning: How nodes train on private and distilled samples together; null for its defaults.
    """

    public: bool = True
    """Whether the method needs a public set."""

    shares: str = ""
    """What nodes send besides labels of public samples; it is printed at the start and counted as other bytes."""

    calibrated: bool = False
    """Whether the method selects samples by a threshold; if so, ``calibration`` cannot be null."""

    selective: bool = False
    """Whether nodes keep a part of the public set without ``calibration``; the share that they train on is reported."""

    teacher = Teacher()

    def __init__(self, start: int | float = 0.6, every: int | None = None, steps: str = "equal",
                 tuning: FineTuning | None = None):  # fmt: skip
        if steps not in ("equal", "grow"):
            hint = did_you_mean(steps, ("equal", "grow"))
            raise UserError(f"distillation.steps: '{steps}' is neither equal nor grow.{hint}")
        if every is not None and every < 1:
            raise UserError(
                f"distillation.every: {every} is not positive; give a number of epochs, or null for a single exchange"
            )
        self.start, self.every, self.steps, self.tuning = start, every, steps, tuning or FineTuning()
        if steps == "grow":
            self.declare("sizes of the nodes' sets")

    def declare(self, shared: str) -> None:
        """Adds to :attr:`shares`, what nodes send besides labels."""
        self.shares = ", ".join(filter(None, [self.shares, shared]))

    @abstractmethod
    def label(self, run: "Run") -> "list[Labels]":
        """Returns the labels that each node of this process sends."""

    @abstractmethod
    def aggregate(self, run: "Run", received: "list[dict[int, Labels]]") -> "list[Labels]":
        """Returns the distilled set of each node of this process, given its labels by sender (itself included)."""

    def exchange(self, run: "Run") -> "list[Labels]":
        """Exchanges labels, lets the nodes train on the result, and returns their distilled sets, if any."""
        distilled = self.aggregate(run, run.network.exchange(self.label(run), run.step))
        run.distil(distilled)
        return distilled

    def count_exchanges(self, epochs: int) -> int:
        """Returns the number of exchanges in a run of ``epochs``."""
        return sum(self.due(epoch, epochs) for epoch in range(epochs))

    def due(self, epoch: int, epochs: int) -> bool:
        """Returns whether an exchange takes place before ``epoch``."""
        from lightning_idkd.schedule import epoch_of

        first = epoch_of(self.start, epochs, "distillation.start")
        return epoch == first or (self.every is not None and epoch > first and (epoch - first) % self.every == 0)

    def on_epoch_start(self, run: "Run", epoch: int) -> None:
        if self.due(epoch, run.epochs):
            with run.exchanging():
                distilled = self.exchange(run)
            run.call("on_exchange_end", epoch=epoch, distilled=distilled)
