"""The layout of a node's parameters in a row, and the places and modes of the parts of its network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_idkd.errors import UserError

Place = tuple[str, str, str]
"""A place of a tensor in a network: path of the submodule, ``_parameters`` or ``_buffers``, and the name there."""


@dataclass(frozen=True)
class Slot:
    """The columns of one parameter in a row; convolution weights lie channels-last."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, rows: Tensor) -> Tensor:
        """This parameter in ``rows`` [..., P], as a view [..., *shape]."""
        return self.unflatten(rows[..., self.offset : self.offset + self.size])

    def copy(self, rows: Tensor) -> Tensor:
        """This parameter in ``rows`` [..., P], as a copy [..., *shape]."""
        return self.unflatten(rows[..., self.offset : self.offset + self.size].clone())

    def unflatten(self, columns: Tensor) -> Tensor:
        """View this parameter's ``columns`` [..., size] as [..., *shape]."""
        if len(self.shape) == 4:
            outputs, inputs, *kernel = self.shape
            return columns.unflatten(-1, (outputs, *kernel, inputs)).movedim(-1, -3)
        return columns.unflatten(-1, self.shape) if self.shape else columns[..., 0]

    def flatten(self, t: Tensor) -> Tensor:
        """Lay ``t`` [..., *shape] out as columns [..., size]; the inverse of :meth:`unflatten`."""
        if not self.shape:
            return t[..., None]
        return (t.movedim(-3, -1) if len(self.shape) == 4 else t).flatten(t.dim() - len(self.shape))


def lay_out(module: nn.Module) -> list[Slot]:
    """Give every trained parameter its columns, in the order of ``named_parameters``.

    Raises:
        UserError: all parameters are frozen.
    """
    slots, offset = [], 0
    for name, p in trained_parameters(module).items():
        slots.append(Slot(name, tuple(p.shape), offset))
        offset += p.numel()
    if not offset:
        count = sum(p.numel() for p in module.parameters())
        raise UserError(
            f"node.network: all {count:,} parameters are frozen (requires_grad is False); leave some to train"
        )
    return slots


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a row holds, by name: those that are not frozen (``requires_grad = False``)."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def locate_tensors(module: nn.Module) -> list[list[Place]]:
    """Find all places of every trained parameter and then of every buffer; a shared tensor has several."""
    places: dict[int, list[Place]] = {}
    for kind in ("_parameters", "_buffers"):
        for path, owner in module.named_modules():
            for name, t in getattr(owner, kind).items():
                if t is not None:
                    places.setdefault(id(t), []).append((path, kind, name))
    return [places[id(t)] for t in (*trained_parameters(module).values(), *module.buffers())]


@contextmanager
def use_tensors(module: nn.Module, places: list[list[Place]], tensors: list[Tensor]) -> Iterator[None]:
    """Within the context ``module`` has these ``tensors`` in the places that :func:`locate_tensors` lists."""
    replaced = []
    for places_of_one, t in zip(places, tensors, strict=True):
        for path, kind, name in places_of_one:
            members = getattr(module.get_submodule(path), kind)
            replaced.append((members, name, members[name]))
            members[name] = t
    try:
        yield
    finally:
        for members, name, t in replaced:
            members[name] = t


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Within the context ``module`` is in evaluation mode; afterwards every part returns to its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def set_training_mode(module: nn.Module) -> None:
    """Set training mode, except in parts whose parameters are all frozen: these keep the mode they were built in."""
    modes = {}
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            modes |= {inner: inner.training for inner in part.modules()}
    module.train()
    for part, training in modes.items():
        part.training = training
