"""The bases of out-of-distribution scores and of the calibrations that fix their thresholds."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lightning_idkd.callback.hooks import Callback
from lightning_idkd.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightning_idkd.labels import Outputs
    from lightning_idkd.nodes.node import NodeModule


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
