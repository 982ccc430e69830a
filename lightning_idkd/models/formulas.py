"""The formulas of the norms in torch operations: the reference for the kernels, and for gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def differentiate(
    formula: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], g: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of ``formula(*inputs)`` that can be differentiated again, given the gradient ``g`` by its result.

    An input that is None or requires no gradient gets None.
    """
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    gradients = iter(torch.autograd.grad(formula(*inputs), leaves, g, create_graph=True))
    return tuple(next(gradients) if t is not None and t.requires_grad else None for t in inputs)


def evonorm_s0(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
    """EvoNorm-S0 of images [B, C, H, W] with parameters [C], see :class:`~lightning_idkd.models.norms.EvoNormS0`."""
    mean = add_pixel_axes(mean_over_group(x.mean((2, 3)), groups))
    variance = mean_over_group((x - mean).square().mean((2, 3)), groups)
    y = x * (x * add_pixel_axes(v)).sigmoid()
    return y * add_pixel_axes((variance + eps).rsqrt() * gamma) + add_pixel_axes(beta)


def group_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, shortcut: Tensor | None, groups: int, relu: bool,
               eps: float) -> Tensor:  # fmt: skip
    """GroupNorm of images [B, C, H, W], then ``shortcut`` of that shape added, then ReLU if ``relu``."""
    y = F.group_norm(x, groups, gamma, beta, eps)
    y = y if shortcut is None else y + shortcut
    return y.relu() if relu else y


def mean_over_group(t: Tensor, groups: int) -> Tensor:
    """Replace every channel by the mean of its group: ``[B, C] -> [B, C]``."""
    grouped = t.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def add_pixel_axes(t: Tensor) -> Tensor:
    """``[C]`` or ``[B, C]`` with two further axes, so that it broadcasts over the pixels of images."""
    return t[..., None, None]
