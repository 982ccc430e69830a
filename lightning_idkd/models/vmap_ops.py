"""Layers that know what is fast under ``vmap``.

On a CPU the nodes' channels lie side by side, as torch.nn's convolutions have them there: so nothing is copied in between.
torch batches a grouped convolution along its channels, but norms and poolings along its images: every change of layout copies
the batch, and leaves it in one for which these are slow. On a CUDA device the nodes lie one after the other, as
:mod:`~lightning_idkd.models.cuda_kernels` has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from lightning_idkd.models import cpu_norms


def call_channelwise(op: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``op(nodes, *tensors)``, which treats groups of channels alone: images [B, C, H, W] and parameters [C], ``nodes`` being 1.
    Under ``vmap`` those of all nodes in one call: [B, n C, H, W] and [n C]."""

    def of_all(n: int, *tensors: Tensor | None) -> tuple[Tensor, int]:
        return op(n, *(t if t is None else _abreast(t) for t in tensors)).unflatten(1, (n, -1)), 1

    return _OfAll.apply(of_all, *tensors) if is_batched(tensors[0]) else op(1, *tensors)


def call_nodewise(op: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """``op(*tensors)`` of images [n, B, C, H, W] and parameters [n, ...]: under ``vmap`` of all nodes at once, else of one."""
    if is_batched(tensors[0]):
        return _OfAll.apply(lambda n, *tensors: (op(*tensors), 0), *tensors)
    return op(*(t if t is None else t[None] for t in tensors))[0]


def is_batched(x: Tensor) -> bool:
    """Whether this is seen from inside ``vmap``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)


def find_kernels(x: Tensor) -> ModuleType | None:
    """The kernels for such images; None where there are none, and where tensors are not what they seem."""
    if not x.is_cuda or x.dim() != 4 or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _kernels() if is_batched(x) or (type(x) is Tensor and not cpu_norms.is_traced()) else None


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        found = import_module("lightning_idkd.models.cuda_kernels")
        found.try_out()
    except (ImportError, RuntimeError):  # no Triton, or no C compiler for what it makes besides
        return None
    return found


class _OfAll(torch.autograd.Function):
    """``op(n, *tensors)`` with the nodes in front of every tensor; returns the result and where they are in it. Its gradients
    are those of what ``vmap`` calls."""

    @staticmethod
    def forward(op: Callable, *tensors: Tensor | None) -> Tensor:
        raise NotImplementedError  # outside vmap it is not called

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(info, in_dims, op, *tensors):
        n = info.batch_size

        def in_front(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)

        return op(n, *(t if t is None else in_front(t, dim) for t, dim in zip(tensors, in_dims[1:], strict=True)))


def _abreast(t: Tensor) -> Tensor:
    """Images [n, B, C, H, W] or parameters [n, C], the nodes' channels side by side."""
    return t.movedim(0, 1).flatten(1, 2) if t.dim() > 2 else t.flatten()
