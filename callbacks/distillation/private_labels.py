"""Encodings that add noise to every label, with a bound on what it reveals: local differential privacy.

A label y has noise with bound epsilon if no message is more than e^epsilon times as probable for y as for any other
label of the same sample. Bounds add up: m labels have m epsilon together (basic composition; Dwork and Roth 2014,
Theorem 3.16), and so have the labels of several exchanges. What a receiver computes from a message keeps its bound.

The indices of the labelled samples, which say what a node's detector keeps, and the parameters that nodes gossip have
no such bound; :class:`VanillaKD` labels all samples, so that its indices say nothing. The noise follows from the run's
seed, so that a run can be repeated, and is no secret to whoever knows that seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning_idkd.callback import Encoding
from lightning_idkd.errors import require
from lightning_idkd.labels import Labels

from .payload import Packed, read_index, write_index

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor

MOST = 20.0  # e^-20 is 60,000 steps of the 48-bit numbers from which noise is drawn


class RandomizedResponse(Encoding):
    """Sends one class per label: the most probable one with probability p = e^epsilon / (e^epsilon + k - 1), else each
    of the k - 1 others with q = 1 / (e^epsilon + k - 1) (Warner 1965; Kairouz, Oh and Viswanath, NeurIPS 2014).

    The receiver's label gives the reported class the probability p and every other one q, which is what it knows of
    the true class if all are equally probable. This label z follows from the one-hot report r as z = q + (p - q) r. The
    unbiased estimate of the true class, (r - q) / (p - q), has negative entries, so it cannot be a label; it is the
    same information.

    Args:
        epsilon: Bound of the privacy loss of each label, above 0 to 20; a smaller one means more noise.
        index: ``bitmap`` of the public set, ``list`` of 4-byte indices, or the ``shorter`` of the two.
    """

    def __init__(self, epsilon: float, index: Literal["shorter", "bitmap", "list"] = "shorter"):
        require(0 < epsilon <= MOST, "distillation.encoding.epsilon", epsilon, f"above 0 to {MOST:g}")
        self.epsilon, self.index = epsilon, index

    def probabilities(self, classes: int) -> tuple[float, float]:
        """Returns p and q, the probabilities of reporting the true class and any one other class."""
        import math

        total = math.exp(self.epsilon) + classes - 1
        return math.exp(self.epsilon) / total, 1 / total

    def perturb(self, labels: Labels, uniform: Callable[[int], Tensor]) -> Labels:
        import torch.nn.functional as F

        k = labels.probabilities.shape[1]
        p, q = self.probabilities(k)
        true, u = labels.probabilities.argmax(1), uniform(1)[:, 0]
        other = ((u - p) / q).long().clamp(0, max(k - 2, 0))  # one of the k - 1 others, where u >= p
        other = other + (other >= true)
        reported = true.where((u < p) | (k == 1), other)
        return Labels(labels.index, F.one_hot(reported, k).to(labels.probabilities), labels.weights)

    def encode(self, labels: Labels, public: int) -> bytes:
        k = labels.probabilities.shape[1]
        reported = labels.probabilities.argmax(1).cpu().numpy()
        return write_index(labels.index, public, self.index) + reported.astype(self._width(k)).tobytes()

    def decode(self, message: bytes, public: int, classes: int, weighted: bool) -> Labels:
        import numpy as np
        import torch
        import torch.nn.functional as F

        index, position = read_index(message, public)
        reported = np.frombuffer(message, self._width(classes), len(index), position).astype(np.int64)
        p, q = self.probabilities(classes)
        soft = q + (p - q) * F.one_hot(torch.from_numpy(reported), classes).float()
        return Labels(index, soft, None, len(message))

    @staticmethod
    def _width(classes: int) -> str:
        """Number format of a class."""
        return "<u1" if classes <= 256 else "<u2"


class LaplaceLabels(Packed):
    """Adds Laplace noise of scale 2 / epsilon to every probability, then takes the nearest distribution (Dwork et al.,
    TCC 2006). The scale is that of a bound epsilon per label, since two distributions differ by at most 2 in the sum of
    absolute differences.

    Args:
        epsilon: Bound of the privacy loss of each label, above 0 to 20; a smaller one means more noise.
        values: Number format: ``float32``, ``float16``, or ``uint8`` in steps of 1/255.
        index: ``bitmap`` of the public set, ``list`` of 4-byte indices, or the ``shorter`` of the two.
    """

    def __init__(self, epsilon: float, values: Literal["float32", "float16", "uint8"] = "float16",
                 index: Literal["shorter", "bitmap", "list"] = "shorter"):  # fmt: skip
        super().__init__(values, None, index)
        require(0 < epsilon <= MOST, "distillation.encoding.epsilon", epsilon, f"above 0 to {MOST:g}")
        self.epsilon = epsilon

    def perturb(self, labels: Labels, uniform: Callable[[int], Tensor]) -> Labels:
        u = uniform(labels.probabilities.shape[1]) - 0.5 + 2.0**-49  # -1/2 to 1/2, without either
        noise = -2 / self.epsilon * u.sign() * (-2 * u.abs()).log1p()  # the inverse of the Laplace distribution
        noisy = project(labels.probabilities.double() + noise)
        return Labels(labels.index, noisy.to(labels.probabilities), labels.weights)


def project(y: Tensor) -> Tensor:
    """Returns the distributions [s, k] that are nearest to the rows of ``y`` [s, k] in Euclidean distance (Duchi et
    al., ICML 2008, Figure 1)."""
    import torch

    descending = y.sort(1, descending=True).values
    excess = descending.cumsum(1) - 1
    rank = torch.arange(1, y.shape[1] + 1, device=y.device)
    positive = (descending * rank > excess).sum(1, keepdim=True)
    return (y - excess.gather(1, positive - 1) / positive).clamp_min(0)
