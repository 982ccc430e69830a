"""How a node's parameters lie in a row, and where they stand in its network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in a row; convolution weights lie channels-last."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, rows: Tensor) -> Tensor:
        """This parameter in ``rows`` [..., P], as a view [..., *shape]."""
        return self.shaped(rows[..., self.offset : self.offset + self.size])

    def shaped(self, flat: Tensor) -> Tensor:
        """Its columns [..., size] as a view [..., *shape]."""
        if len(self.shape) == 4:
            out, into, *kernel = self.shape
            return flat.unflatten(-1, (out, *kernel, into)).movedim(-1, -3)
        return flat.unflatten(-1, self.shape) if self.shape else flat[..., 0]

    def copy(self, rows: Tensor) -> Tensor:
        """The same apart from the rows."""
        return self.shaped(rows[..., self.offset : self.offset + self.size].clone())

    def flat(self, t: Tensor) -> Tensor:
        """Its columns [..., size] of ``t`` [..., *shape]."""
        if not self.shape:
            return t[..., None]
        return (t.movedim(-3, -1) if len(self.shape) == 4 else t).flatten(t.dim() - len(self.shape))


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a row holds, by name: those that are not frozen (``requires_grad = False``)."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def places(module: nn.Module) -> list[list[tuple[str, str, str]]]:
    """Where every trained parameter and then every buffer stands: submodule, kind and name there; shared ones in several."""
    found: dict[int, list] = {}
    for kind in ("_parameters", "_buffers"):
        for path, owner in module.named_modules():
            for leaf, t in getattr(owner, kind).items():
                if t is not None:
                    found.setdefault(id(t), []).append((path, kind, leaf))
    return [found[id(t)] for t in (*trained(module).values(), *module.buffers())]


@contextmanager
def holding(module: nn.Module, places: list[list[tuple[str, str, str]]], tensors: list[Tensor]) -> Iterator[None]:
    """Inside, ``module`` has these parameters and buffers at those :func:`places`."""
    kept = []
    for here, t in zip(places, tensors, strict=True):
        for path, kind, leaf in here:
            held = getattr(module.get_submodule(path), kind)
            kept.append((held, leaf, held[leaf]))
            held[leaf] = t
    try:
        yield
    finally:
        for held, leaf, t in kept:
            held[leaf] = t


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, in evaluation mode; afterwards every part is in its own again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def begin_training(module: nn.Module) -> None:
    """Set training mode, but leave parts of frozen parameters alone in the mode they were built in."""
    kept = {}
    for part in module.modules():
        own = list(part.parameters())
        if own and not any(p.requires_grad for p in own):
            kept |= {below: below.training for below in part.modules()}
    module.train()
    for part, training in kept.items():
        part.training = training
