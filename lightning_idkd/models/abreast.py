"""Under ``vmap`` the nodes' channels side by side, as torch.nn's convolutions have them there: so nothing is copied in between.

torch batches a grouped convolution along its channels, but norms and poolings along its images: every change of layout copies
the batch, and leaves it in one for which these are slow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def channelwise(op: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``op(nodes, *tensors)``, which treats groups of channels alone: images [B, C, H, W] and parameters [C], ``nodes`` being 1.
    Under ``vmap`` those of all nodes in one call: [B, n C, H, W] and [n C]."""
    return _Abreast.apply(op, *tensors) if batched(tensors[0]) else op(1, *tensors)


def batched(x: Tensor) -> bool:
    """Whether this is seen from inside ``vmap``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)


class _Abreast(torch.autograd.Function):
    """Its gradients are those of what ``vmap`` calls."""

    @staticmethod
    def forward(op: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return op(1, *tensors)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        raise NotImplementedError  # outside vmap it is not called

    @staticmethod
    def vmap(info, in_dims, op, *tensors):
        n = info.batch_size
        y = op(n, *(t if t is None else _abreast(t, dim, n) for t, dim in zip(tensors, in_dims[1:], strict=True)))
        return y.unflatten(1, (n, -1)), 1


def _abreast(t: Tensor, dim: int | None, n: int) -> Tensor:
    """Images or parameters that are batched along ``dim``, or are those of all."""
    at = 1 if t.dim() - (dim is not None) > 1 else 0
    apart = t.unsqueeze(at).expand(*t.shape[:at], n, *t.shape[at:]) if dim is None else t.movedim(dim, at)
    return apart.flatten(at, at + 1)


class MaxPool2d(nn.MaxPool2d):
    """The same."""

    def forward(self, x: Tensor) -> Tensor:
        if self.return_indices:
            return super().forward(x)
        return channelwise(lambda _, x: super(MaxPool2d, self).forward(x), x)
