"""A network taken apart at its classifier, under the names that it had as a whole."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn


class Split(nn.Sequential):
    """A network as ``features`` and ``head``, the layer that stood at ``place`` in it, such as ``fc`` or ``classifier.1``.

    Images ``[B, C, S, S]`` to logits ``[B, classes]`` through ``features`` ``[B, F]``. Its state dict has the names of the
    network itself (``fc.weight``, not ``head.weight``), in both directions; its parameters are named after its two parts.
    """

    def __init__(self, network: nn.Module, place: str) -> None:
        parent, _, name = place.rpartition(".")
        head = network.get_submodule(place)
        setattr(network.get_submodule(parent), name, nn.Identity())
        super().__init__(OrderedDict(features=network, head=head))
        self.place = place

    def state_dict(self, *, destination: dict | None = None, prefix: str = "", keep_vars: bool = False) -> dict:
        found = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        whole = OrderedDict() if destination is None else destination
        for key, value in found.items():
            part, _, name = key.removeprefix(prefix).partition(".")
            whole[f"{prefix}{self.place}.{name}" if part == "head" else f"{prefix}{name}"] = value
        return whole

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        head = f"{prefix}{self.place}."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            part = "head." + key.removeprefix(head) if key.startswith(head) else "features." + key.removeprefix(prefix)
            state_dict[prefix + part] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)
