"""Normalisation layers: EvoNorm and GroupNorm, whose statistics stay within a sample, and BatchNorm for comparison."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_idkd.models import cpu_norms
from lightning_idkd.models.formulas import add_pixel_axes, differentiate, evonorm_s0, group_norm, mean_over_group
from lightning_idkd.models.vmap_ops import call_channelwise, call_nodewise, find_kernels

SMALL = 2**17  # number of values in a tensor below which torch's GroupNorm is faster than the C library


def group_count(channels: int) -> int:
    """Number of groups of GroupNorm and EvoNorm-S0: 8, or the largest of 4, 2, 1 that divides ``channels``."""
    return math.gcd(8, channels)


class EvoNormS0(nn.Module):
    """EvoNorm-S0, a normalisation and activation in one: ``x sigmoid(v x) / sqrt(var_group(x) + eps) * gamma + beta``.

    ``[B, C, H, W] -> [B, C, H, W]``. The (biased) variance is that of a group of channels in one sample; the mean is
    not subtracted. ``v`` (initially 1), ``gamma`` and ``beta`` are trained, one value per channel. Source: Liu et al.,
    NeurIPS 2020 (arXiv 2004.02967).
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = group_count(channels), eps
        self.v = nn.Parameter(torch.ones(channels))
        self.weight = nn.Parameter(torch.ones(channels))  # gamma
        self.bias = nn.Parameter(torch.zeros(channels))  # beta

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.v, self.weight, self.eps)

    def _norm(self, x: Tensor, v: Tensor, gamma: Tensor, eps: float) -> Tensor:
        if kernel := _find_kernel(x, self.groups, False, eps, (v, gamma, self.bias)):
            return call_nodewise(lambda x, v, gamma, beta: kernel(x, gamma, beta, v, None), x, v, gamma, self.bias)
        return call_channelwise(functools.partial(self._run, eps=eps), x, v, gamma, self.bias)

    def _run(self, nodes: int, x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, *, eps: float) -> Tensor:
        groups = nodes * self.groups
        if x.dtype == torch.bfloat16 and not cpu_norms.supports(x, groups, v, gamma, beta):
            x = x.float()  # under autocast, torch's operations compute norms in float32
        run = evonorm_s0 if cpu_norms.is_traced() else _EvoNormS0.apply
        return run(x, v, gamma, beta, groups, eps)


class EvoNormQGM(EvoNormS0):
    """EvoNorm-S0 of the code of QG-DSGDm (Lin et al., ICML 2021), which IDKD's code took over.

    It has 32 groups (one per channel if there are fewer channels), the variance of N values divided by N - 1, ``v``
    fixed at 1, and a ReLU after it. That code refuses a number of channels above 32 that 32 does not divide; here such
    a number has the largest number of groups below 32 that divides it.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps)
        self.groups = max(g for g in range(1, min(32, channels) + 1) if channels % g == 0)
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        values = x.shape[1:].numel() // self.groups
        ratio = (values - 1) / values  # var / ratio + eps = (var + ratio eps) / ratio, var divided by N
        return self._norm(x, torch.ones_like(self.weight), math.sqrt(ratio) * self.weight, ratio * self.eps).relu()


class GroupNorm(nn.GroupNorm):
    """``[B, C, H, W] -> [B, C, H, W]``: GroupNorm, then ``shortcut`` of that shape added, then ReLU if ``relu``."""

    relu = False

    @classmethod
    def over(cls, channels: int, relu: bool = False) -> GroupNorm:
        """Build the layer with :func:`group_count` groups."""
        layer = cls(group_count(channels), channels)
        layer.relu = relu
        return layer

    def forward(self, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
        parameters = self.weight, self.bias
        if kernel := self.affine and _find_kernel(input, self.num_groups, self.relu, self.eps, parameters, shortcut):
            op = lambda x, gamma, beta, add: kernel(x, gamma, beta, None, add)  # noqa: E731
            return call_nodewise(op, input, self.weight, self.bias, shortcut)
        return call_channelwise(self._run, input, self.weight, self.bias, shortcut)

    def _run(self, nodes: int, x: Tensor, gamma: Tensor, beta: Tensor, shortcut: Tensor | None) -> Tensor:
        groups = nodes * self.num_groups
        # torch.export must not look at the size, which would limit the batches that its program takes
        large = not cpu_norms.is_traced() and x.numel() >= SMALL
        if self.affine and large and cpu_norms.supports(x, groups, gamma, beta, shortcut=shortcut):
            return _GroupNorm.apply(x, gamma, beta, shortcut, groups, self.relu, self.eps)
        return group_norm(x, gamma, beta, shortcut, groups, self.relu, self.eps)


def _find_kernel(x: Tensor, groups: int, relu: bool, eps: float, parameters: tuple[Tensor, ...],
            shortcut: Tensor | None = None) -> Callable[..., Tensor] | None:  # fmt: skip
    """The CUDA kernel for a norm of all nodes' images, as a function of its tensors; None if there is none."""
    kernels = find_kernels(x)
    if kernels is None or any(t.dtype != torch.float32 or t.shape != x.shape[1:2] for t in parameters):
        return None
    if shortcut is not None and shortcut.shape != x.shape:
        return None
    channels, height, width = x.shape[1:]
    if not kernels.slice_of(height * width, channels, channels // groups):
        return None
    return lambda x, gamma, beta, v, shortcut: kernels.Norm.apply(x, gamma, beta, v, shortcut, groups, relu, eps)


class _EvoNormS0(torch.autograd.Function):
    """EvoNorm-S0 with a hand-written backward pass.

    The passes that autograd derives from the formula read and write the images so often that they take as long as the
    convolutions on a CPU.
    """

    @staticmethod
    def forward(ctx, x: Tensor, v: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
        if cpu_norms.supports(x, groups, v, gamma, beta):
            y, mean, rstd = cpu_norms.evonorm_forward(x, v, gamma, beta, groups, eps)
        else:
            mean = mean_over_group(x.mean((2, 3)), groups)
            rstd = (mean_over_group((x - add_pixel_axes(mean)).square_().mean((2, 3)), groups) + eps).rsqrt()
            gated = (x * add_pixel_axes(v)).sigmoid_().mul_(x)
            y = torch.addcmul(add_pixel_axes(beta), gated, add_pixel_axes(gamma * rstd))
        ctx.save_for_backward(x, v, gamma, beta, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, v, gamma, beta, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiate(lambda *t: evonorm_s0(*t, ctx.groups, ctx.eps), (x, v, gamma, beta), g), None, None
        if cpu_norms.supports(x, ctx.groups, v, gamma):
            return *cpu_norms.evonorm_backward(g, x, v, gamma, mean, rstd, ctx.groups), None, None
        gate = (x * add_pixel_axes(v)).sigmoid_()
        gated = x * gate
        slope = torch.addcmul(gated, gated, gate, value=-1)  # x gate', gate' = gate (1 - gate)
        along = (g * gated).sum((2, 3))  # [B, C]
        d_v = ((g * slope).mul_(x).sum((2, 3)) * gamma * rstd).sum(0)
        # gradient by the variance, times 2 / (values of a group), a factor of the variance's derivative by x - mean
        d_var = mean_over_group(along * gamma, ctx.groups) * rstd**3 / -(x.shape[2] * x.shape[3])
        d_x = (slope * add_pixel_axes(v)).add_(gate).mul_(g).mul_(add_pixel_axes(gamma * rstd))
        d_x.add_((x - add_pixel_axes(mean)).mul_(add_pixel_axes(d_var)))
        return d_x, d_v, (along * rstd).sum(0), g.sum((0, 2, 3)), None, None


class _GroupNorm(torch.autograd.Function):
    """GroupNorm, shortcut and ReLU in one pass of the C library."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, shortcut: Tensor | None, groups: int, relu: bool,
                eps: float) -> Tensor:  # fmt: skip
        y, mean, rstd = cpu_norms.group_norm_forward(x, gamma, beta, shortcut, groups, relu, eps)
        ctx.save_for_backward(x, gamma, beta, shortcut, mean, rstd, y if relu else None)
        ctx.settings = groups, relu, eps
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, shortcut, mean, rstd, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = differentiate(lambda *t: group_norm(*t, *ctx.settings), (x, gamma, beta, shortcut), g)
            return *gradients, None, None, None
        *gradients, through = cpu_norms.group_norm_backward(g, x, y, gamma, mean, rstd, ctx.settings[0])
        return *gradients, None if shortcut is None else through, None, None, None


def norm_layer(norm: str, channels: int) -> nn.Module:
    """Build a normalisation without activation.

    It is the identity for "none", GroupNorm for "group" and "evonorm", and BatchNorm for all others, with running
    statistics for "batch" only.
    """
    if norm == "none":
        return nn.Identity()
    if norm in ("group", "evonorm"):
        return GroupNorm.over(channels)
    return nn.BatchNorm2d(channels, track_running_stats=norm == "batch")


def norm_activation(norm: str, channels: int) -> nn.Module:
    """Build a normalisation and its activation: EvoNorm-S0 is both; ReLU follows all others."""
    if norm.startswith("evonorm"):
        return (EvoNormQGM if norm == "evonorm_qgm" else EvoNormS0)(channels)
    if norm == "group":
        return GroupNorm.over(channels, relu=True)
    return nn.Sequential(norm_layer(norm, channels), nn.ReLU())


class _NormShortcut(nn.Sequential):
    """A normalisation, then ``shortcut`` added, then ReLU."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.relu(super().forward(x) + shortcut)


def norm_shortcut(norm: str, channels: int) -> nn.Module:
    """Build a layer that normalises its first argument, adds the second and applies ReLU."""
    if norm in ("group", "evonorm"):
        return GroupNorm.over(channels, relu=True)
    return _NormShortcut(norm_layer(norm, channels))
