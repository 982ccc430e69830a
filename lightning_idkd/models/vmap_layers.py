"""Layers of torch in versions that are fast under ``vmap``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_idkd.models.norms import GroupNorm
from lightning_idkd.models.vmap_ops import call_channelwise, call_nodewise, find_kernels


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that pools the channels of all nodes side by side under ``vmap``."""

    def forward(self, input: Tensor) -> Tensor:
        if self.return_indices or input.dim() != 4:
            return super().forward(input)
        return call_channelwise(lambda _, x: super(MaxPool2d, self).forward(x), input)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` without cuDNN, which does not support ``vmap`` and needs a larger alignment than a row has."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_cuda:
            return super().forward(input)
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(input)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` by one kernel for all nodes on a CUDA device, and with autocast under ``vmap`` too."""

    def forward(self, input: Tensor) -> Tensor:
        x, w, bias, device = input, self.weight, self.bias, input.device.type
        if torch.is_autocast_enabled(device):  # torch's own does not reach the convolution that vmap calls
            x, w, bias = (t if t is None else t.to(torch.get_autocast_dtype(device)) for t in (x, w, bias))
        kernels = find_kernels(x)
        if kernels is None or not self._has_kernel or x.shape[1:2] != (self.in_channels,):
            return self._conv_forward(x, w, bias)
        convolve = lambda x, w: kernels.Convolution.apply(x, w, self.stride[0], self.padding[0])  # noqa: E731
        y = call_nodewise(convolve, x, self.weight)  # the kernel reads float32 weights
        return y if bias is None else y + bias[:, None, None]

    @property
    def _has_kernel(self) -> bool:
        """Whether the kernel computes this: square kernels, no groups, no dilation, padding with zeros."""
        return (
            (self.groups, self.dilation, self.padding_mode) == (1, (1, 1), "zeros")
            and isinstance(self.padding, tuple)
            and all(len(set(pair)) == 1 for pair in (self.kernel_size, self.stride, self.padding))
        )


REPLACEMENTS = {nn.Conv2d: Conv2d, nn.MaxPool2d: MaxPool2d, nn.GroupNorm: GroupNorm, nn.BatchNorm2d: BatchNorm2d}
"""Maps torch layers to versions that are fast under ``vmap``."""


def replace_layers(module: nn.Module) -> None:
    """Turn all torch layers in ``module`` into versions that are fast under ``vmap``, in place."""
    for layer in module.modules():
        layer.__class__ = REPLACEMENTS.get(type(layer), type(layer))
