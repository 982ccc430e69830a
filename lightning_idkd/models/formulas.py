"""The formulas of norms in torch's operations, which autograd can differentiate, and on which the kernels are checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def differentiate(formula: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], g: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of ``formula(*inputs)`` that can be differentiated once more."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, g, create_graph=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


def evonorm_s0(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
    """The formula as it stands, for autograd."""
    variance = mean_over_group((x - add_pixel_axes(mean_over_group(x.mean((2, 3)), groups))).square().mean((2, 3)), groups)
    return x * (x * add_pixel_axes(v)).sigmoid() * add_pixel_axes((variance + eps).rsqrt() * gamma) + add_pixel_axes(beta)


def group_norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None, shortcut: Tensor | None, groups: int, relu: bool,
               eps: float) -> Tensor:  # fmt: skip
    """The same of GroupNorm and what follows it."""
    y = F.group_norm(x, groups, gamma, beta, eps)
    y = y if shortcut is None else y + shortcut
    return y.relu() if relu else y


def mean_over_group(t: Tensor, groups: int) -> Tensor:
    """Mean of a group's channels, at each of them: ``[B, C] -> [B, C]``."""
    grouped = t.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def add_pixel_axes(t: Tensor) -> Tensor:
    """``[C]`` or ``[B, C]`` beside images."""
    return t[..., None, None]
