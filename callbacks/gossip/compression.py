"""Compressions of the vector that a node sends."""

from __future__ import annotations

import math
from abc import abstractmethod

from lightning_idkd.callback import Compression, Context
from lightning_idkd.errors import require

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class _Sparse(Compression):
    def __init__(self, ratio: float = 0.01):
        require(0 < ratio <= 1, "gossip.compression.ratio", ratio, "above 0 to 1, the share of the values that is sent")
        self.ratio = ratio

    def count(self, T: Tensor) -> int:
        """Returns k, the number of values that are sent per row."""
        return max(1, math.ceil(self.ratio * T.shape[1] - 1e-9))  # in floating point 0.1 * 30 is more than 3

    @abstractmethod
    def rank(self, T: Tensor, ctx: Context) -> Tensor:
        """Returns [n, P]; the values of ``T`` are sent where it is largest."""

    def __call__(self, T: Tensor, ctx: Context) -> Tensor:
        import torch

        index = self.rank(T, ctx).topk(self.count(T), dim=1).indices
        return torch.zeros_like(T).scatter_(1, index, T.gather(1, index))


class TopK(_Sparse):
    """Sends the k values of largest magnitude, each with a 4-byte index (Alistarh et al., NeurIPS 2018).

    Args:
        ratio: Share of the values that is sent, above 0 to 1; k is rounded up.
    """

    def rank(self, T: Tensor, ctx: Context) -> Tensor:
        return T.abs()

    def size(self, T: Tensor) -> int:
        return self.count(T) * (T.element_size() + 4)


class RandomK(_Sparse):
    """Sends k values at random positions, without scaling them up (Stich et al., NeurIPS 2018). No index is sent, since
    the receiver draws the same positions.

    Args:
        ratio: Share of the values that is sent, above 0 to 1; k is rounded up.
    """

    def rank(self, T: Tensor, ctx: Context) -> Tensor:
        return ctx.uniform("random k", T.shape[1])

    def size(self, T: Tensor) -> int:
        return self.count(T) * T.element_size()


class Sign(Compression):
    """Sends one bit per value, its sign, and the mean magnitude of the values (Karimireddy et al., ICML 2019)."""

    def __call__(self, T: Tensor, ctx: Context) -> Tensor:
        scale = T.abs().mean(1, keepdim=True)
        return scale.where(T >= 0, -scale)

    def size(self, T: Tensor) -> int:
        return math.ceil(T.shape[1] / 8) + T.element_size()


class QSGD(Compression):
    """Rounds values at random to multiples of norm / s (Alistarh et al., NeurIPS 2017), and scales them down so that
    the error is smaller than the vector (by the factor of Koloskova et al., ICML 2019, Sec. 3.5). A value takes
    ceil(log2(2 s + 1)) bits.

    Args:
        levels: s, the number of levels above zero; 1 or more.
    """

    def __init__(self, levels: int = 15):
        require(levels >= 1, "gossip.compression.levels", levels, "1 or more")
        self.levels = levels

    def __call__(self, T: Tensor, ctx: Context) -> Tensor:
        s, d = self.levels, T.shape[1]
        norm = T.norm(dim=1, keepdim=True)
        level = (s * T.abs() / norm.where(norm > 0, 1) + ctx.uniform("qsgd", d)).floor()
        return T.sign() * norm * level / (s * (1 + min(d / s**2, math.sqrt(d) / s)))

    def size(self, T: Tensor) -> int:
        return math.ceil(T.shape[1] * math.ceil(math.log2(2 * self.levels + 1)) / 8) + T.element_size()
