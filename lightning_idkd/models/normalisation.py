"""Normalisation layers that keep their statistics within a sample, and BatchNorm for comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def group_count(channels: int) -> int:
    """Groups of every GroupNorm and EvoNorm here: 8, or the largest of 4, 2, 1 that divides ``channels``."""
    return math.gcd(8, channels)


class EvoNormS0(nn.Module):
    """EvoNorm-S0, a normalisation and activation in one: ``x sigmoid(v x) / sqrt(var_group(x) + eps) * gamma + beta``.

    ``[B, C, H, W] -> [B, C, H, W]``; the variance (biased) is that of one sample's group of channels, the mean is kept.
    ``v`` (from 1), ``gamma`` and ``beta`` are learned, one a channel. Liu et al., NeurIPS 2020 (arXiv 2004.02967).
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = group_count(channels), eps
        self.v = nn.Parameter(torch.ones(channels))
        self.weight = nn.Parameter(torch.ones(channels))  # gamma
        self.bias = nn.Parameter(torch.zeros(channels))  # beta

    def forward(self, x: Tensor) -> Tensor:
        return _EvoNormS0.apply(x, self.v, self.weight, self.bias, self.groups, self.eps)[0]


class _EvoNormS0(torch.autograd.Function):
    """Both passes by hand: what autograd makes of the formula reads and writes the images twice as often, which on a CPU costs as
    much as the convolutions."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean = _over_group(x.mean((2, 3)), groups)
        rstd = (_over_group((x - _channels(mean)).square().mean((2, 3)), groups) + eps).rsqrt()
        gated = (x * _channels(v)).sigmoid_().mul_(x)
        return torch.addcmul(_channels(beta), gated, _channels(gamma * rstd)), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, v, gamma, _, ctx.groups, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, v, gamma, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, *_) -> tuple[Tensor | None, ...]:
        x, v, gamma, mean, rstd = ctx.saved_tensors
        gate = (x * _channels(v)).sigmoid_()
        gated = x * gate
        slope = torch.addcmul(gated, gated, gate, value=-1)  # x gate', gate' = gate (1 - gate)
        along = (g * gated).sum((2, 3))  # [B, C]
        d_v = ((g * slope).mul_(x).sum((2, 3)) * gamma * rstd).sum(0)
        # of the variance, times the 2 / (a group's pixels) of its own derivative by x - mean
        d_var = _over_group(along * gamma, ctx.groups) * rstd**3 / -(x.shape[2] * x.shape[3])
        d_x = (slope * _channels(v)).add_(gate).mul_(g).mul_(_channels(gamma * rstd))
        d_x.add_((x - _channels(mean)).mul_(_channels(d_var)))
        return d_x, d_v, (along * rstd).sum(0), g.sum((0, 2, 3)), None, None


def _over_group(t: Tensor, groups: int) -> Tensor:
    """Mean of a group's channels, at each of them: ``[B, C] -> [B, C]``."""
    grouped = t.unflatten(1, (groups, -1))
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def _channels(t: Tensor) -> Tensor:
    """``[C]`` or ``[B, C]`` beside images."""
    return t[..., None, None]


def norm_layer(norm: str, channels: int) -> nn.Module:
    """A normalisation without activation: nothing for "none", GroupNorm for "group" and "evonorm", else BatchNorm, with
    running statistics for "batch" only."""
    if norm == "none":
        return nn.Identity()
    if norm in ("group", "evonorm"):
        return nn.GroupNorm(group_count(channels), channels)
    return nn.BatchNorm2d(channels, track_running_stats=norm == "batch")


def norm_activation(norm: str, channels: int) -> nn.Module:
    """A normalisation and its activation: EvoNorm-S0 is both, the others are followed by ReLU."""
    return EvoNormS0(channels) if norm.startswith("evonorm") else nn.Sequential(norm_layer(norm, channels), nn.ReLU())
