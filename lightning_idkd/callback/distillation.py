"""The bases of distillation: what nodes send of the public set, how they average it, and when."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lightning_idkd.callback.hooks import Callback
from lightning_idkd.errors import UserError, did_you_mean, shaped
from lightning_idkd.labels import FineTuning

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_idkd.callback.hooks import Run
    from lightning_idkd.labels import Labels


class Teacher:
    """Whose answers a node sends to its neighbours: its own."""

    def rows(self, run: "Run") -> "Tensor":
        """The parameters [rows, P] that label the public set."""
        return run.stack.X

    def on_step_end(self, run: "Run") -> None:
        """Called after every training step."""

    def state_dict(self, run: "Run") -> dict:
        """What a resumed run must know, of the nodes of all processes."""
        return {}

    def load_state_dict(self, state: dict, run: "Run") -> None:
        """The reverse of :meth:`state_dict`."""


class Encoding(ABC):
    """How labels are written on an edge."""

    @abstractmethod
    def encode(self, labels: "Labels", public: int) -> bytes:
        """The message that carries ``labels`` of a public set of that many samples."""

    @abstractmethod
    def decode(self, message: bytes, public: int, classes: int, weighted: bool) -> "Labels":
        """The labels, on the CPU, as the receiver has them, with the message's ``size``."""


class Aggregation(ABC):
    """How a node makes one label of those that it and its neighbours have for a public sample."""

    shares: str = ""
    """What nodes tell their neighbours for it besides labels: said at the start, and counted as other bytes."""

    def prepare(self, run: "Run", step: int) -> None:  # noqa: B027 (most need nothing)
        """Exchange what the labels alone do not tell, before every exchange of labels."""

    @abstractmethod
    def combine(self, probabilities: "Tensor", votes: "Tensor", senders: list[int]) -> "Tensor":
        """Labels [s, k] from ``probabilities`` [v, s, k] of v ``senders`` with ``votes`` [v, s]: 0 where one did not keep the
        sample, else 1 or the weight it was sent with; each sample was kept by one of them at least."""

    def __call__(self, received: "dict[int, Labels]") -> "Labels":
        """One node's distilled set from what it has of whom."""
        import torch

        from lightning_idkd.labels import Labels

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
    def label(self, run: "Run") -> "list[Labels]":
        """What every node held here sends."""

    @abstractmethod
    def aggregate(self, run: "Run", received: "list[dict[int, Labels]]") -> "list[Labels]":
        """Every node's distilled set, from what each has from itself and its neighbours."""

    def exchange(self, run: "Run") -> "list[Labels]":
        """Send, receive, and set what the nodes here train on from now on; returns their distilled sets, if any."""
        distilled = self.aggregate(run, run.network.exchange(self.label(run), run.step))
        run.distil(distilled)
        return distilled

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether an exchange takes place before ``epoch``."""
        from lightning_idkd.schedule import epoch_of

        first = epoch_of(self.start, epochs, "distillation.start")
        return epoch == first or (self.every is not None and epoch > first and (epoch - first) % self.every == 0)

    def on_epoch_start(self, run: "Run", epoch: int) -> None:
        if self.due(epoch, run.epochs):
            with run.exchanging():
                distilled = self.exchange(run)
            run.call("on_exchange_end", epoch=epoch, distilled=distilled)
