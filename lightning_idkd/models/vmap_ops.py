"""Operations on the images of all nodes at once, for layers that are fast under ``vmap``.

On a CPU the channels of all nodes lie side by side. torch's ``vmap`` does that for convolutions, which it runs as one
grouped convolution, but it batches norms and poolings along the images; every change between the two layouts copies the
batch, and norms and poolings are slow in the layout that results. With :func:`call_channelwise` nothing is copied. On a
CUDA device the nodes lie one after the other, as the kernels of :mod:`~lightning_idkd.models.cuda_kernels` need them:
:func:`call_nodewise`.
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
    """Call ``op(nodes, *tensors)``, an operation whose groups of channels do not depend on each other.

    Outside ``vmap`` the tensors are images [B, C, H, W] or parameters [C] of one node, and ``nodes`` is 1. Under
    ``vmap`` one call gets the tensors of all n nodes: [B, n C, H, W] and [n C].
    """

    def merge(n: int, *tensors: Tensor | None) -> tuple[Tensor, int]:
        return op(n, *(t if t is None else _merge_nodes(t) for t in tensors)).unflatten(1, (n, -1)), 1

    return _AllNodes.apply(merge, *tensors) if is_batched(tensors[0]) else op(1, *tensors)


def call_nodewise(op: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Call ``op(*tensors)`` on images [n, B, C, H, W] and parameters [n, ...]; n is 1 outside ``vmap``."""
    if is_batched(tensors[0]):
        return _AllNodes.apply(lambda n, *tensors: (op(*tensors), 0), *tensors)
    return op(*(t if t is None else t[None] for t in tensors))[0]


def is_batched(x: Tensor) -> bool:
    """Whether ``x`` is a tensor inside ``vmap``."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)


def find_kernels(x: Tensor) -> ModuleType | None:
    """The CUDA kernels for images like ``x``; None if there are none, or while ``torch.compile`` traces."""
    if not x.is_cuda or x.dim() != 4 or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _load_kernels() if is_batched(x) or (type(x) is Tensor and not cpu_norms.is_traced()) else None


@functools.cache
def _load_kernels() -> ModuleType | None:
    try:
        kernels = import_module("lightning_idkd.models.cuda_kernels")
        kernels.try_out()
    except (ImportError, RuntimeError):  # there is no Triton, or no C compiler, which Triton needs too
        return None
    return kernels


class _AllNodes(torch.autograd.Function):
    """Calls ``op(n, *tensors)`` under ``vmap`` with the tensors of all n nodes, the node axis in front.

    ``op`` returns its result and the node axis in it. ``vmap`` differentiates what ``op`` calls, so this needs no
    backward pass.
    """

    @staticmethod
    def forward(op: Callable, *tensors: Tensor | None) -> Tensor:
        raise NotImplementedError  # this function is called under vmap only

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        raise NotImplementedError

    @staticmethod
    def vmap(info, in_dims, op, *tensors):
        n = info.batch_size

        def nodes_first(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            return t.expand(n, *t.shape) if dim is None else t.movedim(dim, 0)

        return op(n, *map(nodes_first, tensors, in_dims[1:]))


def _merge_nodes(t: Tensor) -> Tensor:
    """Images [n, B, C, H, W] as [B, n C, H, W], or parameters [n, C] as [n C]."""
    return t.movedim(0, 1).flatten(1, 2) if t.dim() > 2 else t.flatten()
