"""Networks as two parts: the features and the head, their last linear layer."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn


class Split(nn.Sequential):
    """A network split into ``features`` and ``head``, the layer at the path ``place``, such as ``fc`` or
    ``classifier.1``.

    It maps images ``[B, C, S, S]`` to logits ``[B, classes]`` through ``features`` ``[B, F]``. Its state dict has the
    names of the original network (``fc.weight``, not ``head.weight``), for saving and loading; its parameters have the
    new names.
    """

    def __init__(self, network: nn.Module, place: str) -> None:
        parent, _, name = place.rpartition(".")
        head = network.get_submodule(place)
        setattr(network.get_submodule(parent), name, nn.Identity())
        super().__init__(OrderedDict(features=network, head=head))
        self.place = place

    def state_dict(self, *, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict:
        state = OrderedDict() if destination is None else destination
        for key, value in super().state_dict(prefix=prefix, keep_vars=keep_vars).items():
            part, _, name = key.removeprefix(prefix).partition(".")
            state[f"{prefix}{self.place}.{name}" if part == "head" else f"{prefix}{name}"] = value
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        head = f"{prefix}{self.place}."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            part = "head." + key.removeprefix(head) if key.startswith(head) else "features." + key.removeprefix(prefix)
            state_dict[prefix + part] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def split_at_last_linear(module: nn.Module, classes: int) -> Split | None:
    """Split ``module`` at its last linear layer with ``classes`` outputs; None if there is no such layer in it."""
    paths = [path for path, m in module.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    return Split(module, paths[-1]) if paths and paths[-1] else None


def is_split(module: nn.Module, images: Tensor, logits: Tensor) -> bool:
    """Whether the module has a linear head, and ``head(features(images))`` equals its ``logits`` of these images."""
    head, features = getattr(module, "head", None), getattr(module, "features", None)
    if not isinstance(head, nn.Linear) or not callable(features):
        return False
    pooled = features(images)
    if not isinstance(pooled, Tensor) or pooled.shape != (len(images), head.in_features):
        return False
    return torch.allclose(head(pooled), logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
