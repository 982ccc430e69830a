"""Convolutions and norms of all nodes at once on a CUDA device, in Triton; every node has its own weights.

Images lie as [n, b, H, W, C]. cuDNN treats the nodes of a batched convolution as groups of channels, which it computes
slowly; torch's norms read and write the images several times. Every sum has a fixed order, so a result is the same
every time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightning_idkd.models.formulas import differentiate, evonorm_s0, group_norm

PIXELS, CHANNELS = 128, 64  # upper limits of a convolution's tile
VALUES = 2**14  # largest number of values of an image in a norm's program
STAGE = 48 * 2**10  # bytes of shared memory for each pipeline stage of the largest tiles
SPLITS = 1024  # approximate number of programs that compute the gradient by the weights


@triton.jit
def _convolve(x, w, y, images, H, W, HO, WO, CI: tl.constexpr, CO: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
              P: tl.constexpr, BACK: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Convolve ``x`` [n, images, H, W, CI] with ``w`` [n, CO, K, K, CI] to ``y`` [n, images, HO, WO, CO].

    With BACK, ``x`` is the gradient by the result, ``w`` [n, CI, K, K, CO] and ``y`` the gradient by the input.
    """
    node = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(2) * BO + tl.arange(0, BO)
    valid = m < images * HO * WO
    image, oy, ox = m // (HO * WO), m // WO % HO, m % WO
    x += node * images * H * W * CI
    w += node * CO * K * K * CI
    sums = tl.zeros([BM, BO], tl.float32)
    for k in range(K * K):
        if BACK:
            ty, tx = oy + P - k // K, ox + P - k % K
            iy, ix = ty // S, tx // S
            inside = valid & (ty >= 0) & (tx >= 0) & (ty % S == 0) & (tx % S == 0) & (iy < H) & (ix < W)
        else:
            iy, ix = oy * S - P + k // K, ox * S - P + k % K
            inside = valid & (iy >= 0) & (ix >= 0) & (iy < H) & (ix < W)
        offset = ((image * H + iy) * W + ix) * CI
        for start in range(0, CI, BI):
            i = start + tl.arange(0, BI)
            weight = (
                i[:, None] * (K * K * CO) + k * CO + o[None, :]
                if BACK
                else o[None, :] * (K * K * CI) + k * CI + i[:, None]
            )
            xs = tl.load(x + offset[:, None] + i[None, :], inside[:, None] & (i < CI)[None, :], 0.0)
            ws = tl.load(w + weight, (i < CI)[:, None] & (o < CO)[None, :], 0.0)
            sums += tl.dot(xs, ws, input_precision=PRECISION)
    y += (node * images * HO * WO + m)[:, None] * CO + o[None, :]
    tl.store(y, sums.to(y.dtype.element_ty), valid[:, None] & (o < CO)[None, :])


@triton.jit
def _convolve_weight(x, g, out, images, part, H, W, HO, WO, CI: tl.constexpr, CO: tl.constexpr, K: tl.constexpr,
                     S: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, BO: tl.constexpr,
                     PRECISION: tl.constexpr):  # fmt: skip
    """The gradient by the weights, ``out`` [splits, n, CO, K, K, CI]; each split sums over a ``part`` of all pixels.

    A program computes a row of the kernel, whose K * CI values ``j`` are adjacent in an image too.
    """
    node, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    nodes = tl.num_programs(1)
    JS: tl.constexpr = (K * CI + BJ - 1) // BJ
    OS: tl.constexpr = (CO + BO - 1) // BO
    block = tl.program_id(0)
    ky, j, o = block // (JS * OS), block // OS % JS * BJ + tl.arange(0, BJ), block % OS * BO + tl.arange(0, BO)
    kx = j // CI
    x += node * images * H * W * CI
    g += node * images * HO * WO * CO
    sums = tl.zeros([BO, BJ], tl.float32)
    for start in range(split * part, min((split + 1) * part, images * HO * WO), BM):
        m = start + tl.arange(0, BM)
        valid = m < images * HO * WO
        iy, ix = m // WO % HO * S - P + ky, m % WO * S - P
        inside = (valid & (iy >= 0) & (iy < H))[:, None] & (j < K * CI)[None, :]
        column = ix[:, None] + kx[None, :]
        offset = ((m // (HO * WO) * H + iy) * W + ix) * CI
        gs = tl.load(g + m[:, None] * CO + o[None, :], valid[:, None] & (o < CO)[None, :], 0.0)
        xs = tl.load(x + offset[:, None] + j[None, :], inside & (column >= 0) & (column < W), 0.0)
        sums += tl.dot(tl.trans(gs), xs, input_precision=PRECISION)
    out += (((split * nodes + node) * CO + o)[:, None] * K + ky) * (K * CI) + j[None, :]
    tl.store(out, sums, (o < CO)[:, None] & (j < K * CI)[None, :])


@triton.jit
def _over_group(t, CB: tl.constexpr, GROUP: tl.constexpr):
    """Replace every channel by the sum of its group."""
    sums = tl.sum(tl.reshape(t, [CB // GROUP, GROUP]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [CB // GROUP, GROUP]), [CB])


@triton.jit
def _tile(of_node, PIXELS: tl.constexpr, C: tl.constexpr, CB: tl.constexpr, BM: tl.constexpr):
    """The tile of a program: image, node, channels, offsets of the values, and a mask of the image's pixels."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    m = tl.arange(0, BM)
    return image, image // of_node, c, (image * PIXELS + m)[:, None] * C + c[None, :], (m < PIXELS)[:, None]


@triton.jit
def _norm(x, gamma, beta, v, shortcut, y, mean, rstd, of_node, w_node, eps, PIXELS: tl.constexpr, C: tl.constexpr,
          GROUP: tl.constexpr, CB: tl.constexpr, BM: tl.constexpr, EVO: tl.constexpr, ADD: tl.constexpr,
          RELU: tl.constexpr):  # fmt: skip
    """EvoNorm-S0, or GroupNorm with a shortcut and ReLU, of some groups of one image."""
    image, node, c, offsets, inside = _tile(of_node, PIXELS, C, CB, BM)
    xs = tl.load(x + offsets, inside, 0.0).to(tl.float32)
    mu = _over_group(tl.sum(xs, 0), CB, GROUP) / (PIXELS * GROUP)
    centred = tl.where(inside, xs - mu[None, :], 0.0)
    r = 1.0 / tl.sqrt(_over_group(tl.sum(centred * centred, 0), CB, GROUP) / (PIXELS * GROUP) + eps)
    scale = (r * tl.load(gamma + node * w_node + c))[None, :]
    shift = tl.load(beta + node * w_node + c)[None, :]
    base = centred
    if EVO:
        base = xs * tl.sigmoid(xs * tl.load(v + node * w_node + c)[None, :])
    out = base * scale + shift
    if ADD:
        out += tl.load(shortcut + offsets, inside, 0.0).to(tl.float32)
    if RELU:
        out = tl.where(out < 0, 0.0, out)  # nan stays nan
    tl.store(y + offsets, out.to(y.dtype.element_ty), inside)
    tl.store(mean + image * C + c, mu)
    tl.store(rstd + image * C + c, r)


@triton.jit
def _norm_back(g, x, y, gamma, v, mean, rstd, dx, through, sums, of_node, w_node, PIXELS: tl.constexpr, C: tl.constexpr,
               GROUP: tl.constexpr, CB: tl.constexpr, BM: tl.constexpr, EVO: tl.constexpr, ADD: tl.constexpr,
               RELU: tl.constexpr):  # fmt: skip
    """The gradients of :func:`_norm`; those by the parameters are ``sums`` [3, images, C], one row per image."""
    image, node, c, offsets, inside = _tile(of_node, PIXELS, C, CB, BM)
    images = tl.num_programs(0).to(tl.int64)
    xs, gs = tl.load(x + offsets, inside, 0.0).to(tl.float32), tl.load(g + offsets, inside, 0.0).to(tl.float32)
    mu, r = tl.load(mean + image * C + c), tl.load(rstd + image * C + c)
    weight = tl.load(gamma + node * w_node + c)
    if RELU:
        gs = tl.where(tl.load(y + offsets, inside, 0.0) <= 0, 0.0, gs)
    if ADD:
        tl.store(through + offsets, gs.to(through.dtype.element_ty), inside)
    if EVO:
        slope = tl.load(v + node * w_node + c)[None, :]
        gate = tl.sigmoid(xs * slope)
        bent = xs * gate * (1.0 - gate)  # x times the gate's derivative
        along = tl.sum(gs * xs * gate, 0)
        # gradient by the variance, times 2 / (values of a group)
        variance = _over_group(along * weight, CB, GROUP) * r * r * r / (-PIXELS * GROUP)
        out = (bent * slope + gate) * gs * (weight * r)[None, :] + (xs - mu[None, :]) * variance[None, :]
        tl.store(sums + (2 * images + image) * C + c, tl.sum(gs * bent * xs, 0) * weight * r)
    else:
        normal = (xs - mu[None, :]) * r[None, :]
        along = tl.sum(gs * normal, 0)
        level = _over_group(tl.sum(gs, 0) * weight, CB, GROUP) / (PIXELS * GROUP)
        tilt = _over_group(along * weight, CB, GROUP) / (PIXELS * GROUP)
        out = (gs * weight[None, :] - level[None, :] - normal * tilt[None, :]) * r[None, :]
        r = tl.full([CB], 1.0, tl.float32)
    tl.store(dx + offsets, out.to(dx.dtype.element_ty), inside)
    tl.store(sums + image * C + c, along * r)
    tl.store(sums + (images + image) * C + c, tl.sum(gs, 0))


@triton.jit
def _one(x):
    tl.store(x, 1.0)


def try_out() -> None:
    """Compile and run a small kernel.

    Raises:
        RuntimeError: Triton cannot compile kernels, for example without a C compiler.
    """
    _one[(1,)](torch.empty(1, device="cuda"))


def _tile_size(count: int, most: int) -> int:
    """The smallest power of 2 that is at least ``count``, limited to 16 to ``most``."""
    return min(most, max(16, triton.next_power_of_2(count)))


def _channels_last(x: Tensor) -> Tensor:
    """Images [n, b, C, H, W] as contiguous [n, b, H, W, C]."""
    return x.movedim(-3, -1).contiguous()


@functools.cache
def _stages() -> int:
    """Number of pipeline stages, as many as this device has shared memory for, at most 3."""
    if not torch.cuda.is_available():
        return 1
    return max(1, min(3, torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin // STAGE))


def _precision(x: Tensor) -> str:
    """Triton's precision of products: three products of tf32 parts are as exact as one of float32, and faster."""
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def _run_convolution(x: Tensor, w: Tensor, shape: tuple[int, int], stride: int, padding: int, back: bool) -> Tensor:
    """Convolve images [n, b, H, W, CI] with weights [n, CO, K, K, CI]; ``back`` as BACK in the kernel."""
    (n, b, height, width, inputs), (outputs, k) = x.shape, (w.shape[4 if back else 1], w.shape[2])
    y = x.new_empty(n, b, *shape, outputs)
    bi, bo = _tile_size(inputs, CHANNELS), _tile_size(outputs, CHANNELS)
    grid = triton.cdiv(b * shape[0] * shape[1], PIXELS), n, triton.cdiv(outputs, bo)
    _convolve[grid](x, w, y, b, height, width, *shape, inputs, outputs, k, stride, padding, back, PIXELS, bi, bo,
                    _precision(x), num_warps=8 if max(bi, bo) == CHANNELS else 4, num_stages=_stages())  # fmt: skip
    return y


class Convolution(torch.autograd.Function):
    """A convolution of images [n, b, C, H, W] with weights [n, C', C, K, K], without bias."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, stride: int, padding: int) -> Tensor:
        packed = w.movedim(2, -1).to(x.dtype).contiguous()
        size = [(s + 2 * padding - w.shape[-1]) // stride + 1 for s in x.shape[3:]]
        ctx.save_for_backward(x, w, packed)
        ctx.stride, ctx.padding = stride, padding
        return _run_convolution(_channels_last(x), packed, size, stride, padding, False).movedim(-1, -3)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, packed = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = lambda x, w: torch.stack(  # noqa: E731
                [F.conv2d(a, b.to(a.dtype), stride=ctx.stride, padding=ctx.padding) for a, b in zip(x, w, strict=True)]
            )
            return *differentiate(formula, (x, w), g), None, None
        x, w, g, d_x, d_w = _channels_last(x), packed, _channels_last(g), None, None
        if ctx.needs_input_grad[0]:
            d_x = _run_convolution(g, w, x.shape[2:4], ctx.stride, ctx.padding, True).movedim(-1, -3)
        if ctx.needs_input_grad[1]:
            (n, b, height, width, inputs), (*_, high, wide, outputs) = x.shape, g.shape
            k = w.shape[2]
            bj = _tile_size(k * inputs, 2 * CHANNELS if inputs < CHANNELS else CHANNELS)
            bo = _tile_size(outputs, CHANNELS)
            bm = 64 if x.dtype == torch.bfloat16 else 32
            tiles = k * triton.cdiv(k * inputs, bj) * triton.cdiv(outputs, bo)
            splits = max(1, min(SPLITS // (tiles * n), b * high * wide // (4 * bm)))
            part = triton.cdiv(b * high * wide, splits * bm) * bm
            sums = torch.empty(splits, *w.shape, dtype=torch.float32, device=x.device)
            _convolve_weight[tiles, n, splits](x, g, sums, b, part, height, width, high, wide, inputs, outputs, k,
                                               ctx.stride, ctx.padding, bm, bj, bo, _precision(x),
                                               num_stages=_stages())  # fmt: skip
            d_w = (sums.sum(0) if splits > 1 else sums[0]).movedim(-1, 2)
        return d_x, d_w, None, None


class Tile(NamedTuple):
    """The constants that a norm's program is compiled for."""

    pixels: int
    channels: int
    group: int
    """Channels per group."""
    slice: int
    """Channels of the program."""
    rows: int
    """``pixels`` rounded up to a power of 2."""
    evo: bool
    """EvoNorm-S0 instead of GroupNorm."""
    add: bool
    """A shortcut is added."""
    relu: bool


class Norm(torch.autograd.Function):
    """A norm of images [n, b, C, H, W] with parameters [n, C], whose rows may be any distance apart.

    It is EvoNorm-S0 if ``v`` is given, else GroupNorm. ``shortcut`` is added unless it is None, then ReLU applies if
    ``relu``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, v: Tensor | None, shortcut: Tensor | None,
                groups: int, relu: bool, eps: float) -> Tensor:  # fmt: skip
        inputs = x, gamma, beta, v, shortcut
        x, shortcut = _channels_last(x), None if shortcut is None else _channels_last(shortcut)
        if len({t.stride() for t in (gamma, beta, v) if t is not None}) > 1 or gamma.stride(1) != 1:
            gamma, beta, v = (None if t is None else t.contiguous() for t in (gamma, beta, v))
        n, b, height, width, channels = x.shape
        y, (mean, rstd) = torch.empty_like(x), torch.empty(2, n * b, channels, device=x.device)
        ctx.shape = b, gamma.stride(0)
        pixels, group = height * width, channels // groups
        tile = slice_of(pixels, channels, group), triton.next_power_of_2(pixels)
        ctx.tile = Tile(pixels, channels, group, *tile, v is not None, shortcut is not None, relu)
        _norm[n * b, channels // ctx.tile.slice](x, gamma, beta, v, shortcut, y, mean, rstd, *ctx.shape, eps, *ctx.tile)
        ctx.save_for_backward(*inputs, gamma, v, mean, rstd, y if relu else None)
        ctx.formula = groups, relu, eps
        return y.movedim(-1, -3)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, gamma, v, mean, rstd, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiate(functools.partial(_formula, *ctx.formula), inputs, g), None, None, None
        x, g, tile = _channels_last(inputs[0]), _channels_last(g), ctx.tile
        d_x, through = torch.empty_like(x), torch.empty_like(x) if tile.add else None
        sums = torch.empty(2 + tile.evo, *mean.shape, device=x.device)
        warps = 8 if tile.slice * tile.rows > VALUES // 2 else 4  # so that the values fit the registers
        _norm_back[len(mean), tile.channels // tile.slice](g, x, y, gamma, v, mean, rstd, d_x, through, sums,
                                                           *ctx.shape, *tile, num_warps=warps)  # fmt: skip
        d_gamma, d_beta, *d_v = sums.unflatten(1, x.shape[:2]).sum(2)
        through = None if through is None else through.movedim(-1, -3)
        return d_x.movedim(-1, -3), d_gamma, d_beta, *(d_v or [None]), through, None, None, None


def _formula(groups: int, relu: bool, eps: float, x: Tensor, gamma: Tensor, beta: Tensor, v: Tensor | None,
             shortcut: Tensor | None) -> Tensor:  # fmt: skip
    """The formula of :class:`Norm`, node by node."""
    if v is not None:
        return torch.stack([evonorm_s0(x[i], v[i], gamma[i], beta[i], groups, eps) for i in range(len(x))])
    shortcuts = [None] * len(x) if shortcut is None else shortcut
    return torch.stack([group_norm(x[i], gamma[i], beta[i], shortcuts[i], groups, relu, eps) for i in range(len(x))])


def slice_of(pixels: int, channels: int, group: int) -> int:
    """Number of channels of a norm's program, in whole groups; 0 if a group is too large or not a power of 2."""
    if group & (group - 1):
        return 0
    pixels = triton.next_power_of_2(pixels)
    sizes = [group * 2**k for k in range(20) if group * 2**k * pixels <= VALUES and channels % (group * 2**k) == 0]
    return max(sizes, default=0)
