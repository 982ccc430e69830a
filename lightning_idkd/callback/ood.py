"""The bases of out-of-distribution scores and of the calibrations that choose their thresholds."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypeVar

from lightning_idkd.callback.hooks import Callback
from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_idkd.labels import Outputs
    from lightning_idkd.nodes.node import NodeModule

T = TypeVar("T")


def format_probability(p: float) -> str:
    """Writes a probability with three digits, or as ``below 0.001`` or ``above 0.999`` near 0 and 1."""
    if p < 0.0005:
        return "below 0.001"
    return "above 0.999" if p >= 0.9995 else f"{p:.3f}"


class OodScore(ABC):
    """Measures how much a sample resembles a node's own data: larger = more in-distribution."""

    unit: str = ""
    """What the numbers are, such as ``log-odds``, for tables and pictures."""

    @property
    def title(self) -> str:
        """Name and unit, for pictures; the name of a user's class is its import path."""
        cls = type(self)
        name = cls.__name__ if cls.__module__.startswith("lightning_idkd.") else f"{cls.__module__}.{cls.__name__}"
        return name + (f", {self.unit}" if self.unit else "")

    @property
    def fitted(self) -> bool:
        """Whether the score must learn from a node's data first."""
        return type(self).fit is not OodScore.fit

    def fit(self, outputs: "Outputs", labels: "Tensor") -> None:  # noqa: B027 (most scores need nothing)
        """Learns from the outputs of a node's training samples and their ``labels`` [N]; every call starts afresh."""

    @abstractmethod
    def __call__(self, outputs: "Outputs") -> "Tensor":
        """Returns scores, float32 [N], from ``outputs``: ``logits`` [N, classes], ``features`` [N, F] and ``head``.

        One call scores a node's own, the public and the noise samples together.
        """

    def perturb(self, module: "NodeModule", x: "Tensor") -> "Tensor":
        """Returns the samples to score instead of ``x`` [B, ...]; overriding it costs extra forward passes."""
        return x

    def from_probability(self, p: float) -> float:
        """Returns the score at which the top class has probability ``p``; a UserError if ``p`` does not determine
        it."""
        raise UserError(
            f"calibration.probability: {type(self).__name__} is not a function of a probability; "
            "give calibration.threshold instead"
        )

    def probability(self, score: float) -> float | None:
        """Returns the inverse of :meth:`from_probability`; None if the score does not determine the probability."""
        return None

    def written(self, threshold: float) -> str:
        """Writes a threshold for people: in the score's unit and, where it is defined, as a probability."""
        p = self.probability(threshold)
        return f"threshold {threshold:.4g}" + ("" if p is None else f", probability {format_probability(p)}")

    def features(self, outputs: "Outputs") -> "Tensor":
        """Returns ``outputs.features`` [N, F]; raises a UserError if the network offers none."""
        return self._require(outputs.features, "features(x) [B, F]")

    def head(self, outputs: "Outputs") -> "nn.Linear":
        """Returns the classifier that follows the features; raises a UserError if the network offers none."""
        return self._require(outputs.head, "head (nn.Linear)")

    def _require(self, part: T | None, name: str) -> T:
        if part is None:
            raise UserError(f"calibration.score: {type(self).__name__} needs {name}, which this network does not offer")
        return part


class Calibration(Callback, ABC):
    """Chooses each node's threshold from the scores of its held-out samples and of samples that are not its own.

    Args:
        score: The out-of-distribution score; null in a config means MSP.
        against: The samples that are not a node's own: the ``public`` set, or uniform ``noise``.
        pooled: Average the threshold with those of the neighbours, which requires sending it to them.
    """

    fallback_below = 8
    """With fewer held-out samples than this, the threshold is the 5 % quantile of their scores."""

    def __init__(self, score: OodScore | None = None, against: str = "public", pooled: bool = False):
        if score is None:
            raise UserError("calibration.score: none given; allowed: a score, such as MSP()")
        if against not in ("public", "noise"):
            hint = did_you_mean(against, ("public", "noise"))
            raise UserError(f"calibration.against: '{against}' is neither public nor noise.{hint}")
        self.score, self.against, self.pooled = score, against, pooled

    @property
    def shares(self) -> str:
        """What nodes send to their neighbours for the calibration."""
        return "thresholds" if self.pooled else ""

    @abstractmethod
    def threshold(self, private: "Tensor", others: "Tensor") -> float:
        """Returns the threshold; public samples with at least this score are kept.

        Args:
            private: Scores [a] of the node's held-out samples.
            others: Scores [m] of the samples that :attr:`against` names.
        """
