"""The memory of n nodes: one row of ``X`` for the parameters of each, one row of ``G`` for their gradients.

The parameters of every node's ``NodeModule`` are views into its row, so a rule may rewrite ``X`` in place and the
networks follow. Norm buffers are stacked in the same way. ``.to()``, ``.double()`` and similar calls cut these views
silently: never call them on a node.

Frozen parameters (``requires_grad = False`` when the nodes are made) lie outside the rows, in one copy that all nodes
share. So no rule moves them, and no message carries them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from lightning_idkd import randomness
from lightning_idkd.errors import UserError
from lightning_idkd.models.vmap_layers import replace_layers
from lightning_idkd.nodes.layout import lay_out, set_training_mode, trained_parameters
from lightning_idkd.nodes.node import NodeModule

ALIGNMENT = 64  # bytes: of the widest vectors of a CPU, and of torch's allocations


def align_rows(count: int, row: Tensor) -> Tensor:
    """A matrix [count, P] of the kind of ``row`` [P], each of whose rows begins at a multiple of :data:`ALIGNMENT`.

    MKL rounds the product of a single sample and a weight matrix by the addresses. Without this, a result would depend
    on the place of a node among the rows of its process.
    """
    step = ALIGNMENT // row.element_size()
    return row.new_empty(count, -(-len(row) // step) * step)[:, : len(row)]


class Rows:
    """The nodes of one process as rows.

    Args:
        make: builds one node. It is called once, inside a generator fork seeded from ``seed``, so all nodes start
        equal.
        nodes: the nodes' numbers in the graph, ascending.
        dtype: float32 or float64, for all floating-point tensors.

    Raises:
        UserError: all parameters are frozen.
    """

    X: Tensor
    """Trained parameters [n, P]."""
    G: Tensor
    """Gradients [n, P] of the last training step."""
    buffers: dict[str, Tensor]
    """Norm buffers [n, ...] by name."""
    frozen: dict[str, Tensor]
    """Frozen parameters by name, the same for all nodes."""
    modules: list[NodeModule]
    """The nodes, whose parameters, gradients and buffers are views into these tensors."""

    def __init__(self, make: Callable[[], NodeModule], nodes: Sequence[int], seed: int = 0,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):  # fmt: skip
        self.nodes, self.seed, self.device = list(nodes), seed, torch.device(device)
        with randomness.fork_generators(seed, "initialisation"):
            first = randomness.replace_dropout(make()).to(self.device, dtype)
        replace_layers(first)
        set_training_mode(first)
        self.layout = lay_out(first)
        row = torch.empty(sum(slot.size for slot in self.layout), dtype=dtype, device=self.device)
        for slot, p in zip(self.layout, trained_parameters(first).values(), strict=True):
            slot.view(row).copy_(p.detach())
        self.X, self.G = (align_rows(len(self.nodes), row).copy_(values) for values in (row, torch.zeros_like(row)))
        frozen = {name: p for name, p in first.named_parameters() if not p.requires_grad}
        for p in frozen.values():
            if p.dim() == 4:  # channels-last, as in the rows
                p.data = p.data.contiguous(memory_format=torch.channels_last)
        self.frozen = {name: p.detach() for name, p in frozen.items()}
        self.buffers = {name: torch.stack([b] * len(self.nodes)) for name, b in first.named_buffers()}
        self.modules = [first]
        for _ in self.nodes[1:]:
            shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in frozen.values()}
            self.modules.append(copy.deepcopy(first, shared))
        for i, module in enumerate(self.modules):
            self._bind(module, self.X[i], {name: b[i] for name, b in self.buffers.items()}, self.G[i])

    def _bind(
        self, module: NodeModule, row: Tensor, buffers: dict[str, Tensor], grad: Tensor | None = None
    ) -> NodeModule:
        """Make ``module``'s parameters views of ``row`` [P], its gradients views of ``grad`` [P]; set its buffers."""
        for slot in self.layout:
            p = module.get_parameter(slot.name)
            p.data = slot.view(row)
            p.grad = None if grad is None else slot.view(grad)
        for path, b in buffers.items():
            owner, _, name = path.rpartition(".")
            module.get_submodule(owner)._buffers[name] = b
        return module

    def views_intact(self) -> bool:
        """Whether every parameter and buffer of every node still lies in its row, and frozen ones in their one copy."""
        for i, module in enumerate(self.modules):
            for name, t in ({slot.name: slot.view(self.X[i]) for slot in self.layout} | self.frozen).items():
                p = module.get_parameter(name)
                if p.data_ptr() != t.data_ptr() or p.stride() != t.stride():
                    return False
            for name, b in module.named_buffers():
                if b.data_ptr() != self.buffers[name][i].data_ptr():
                    return False
        return True

    @property
    def n(self) -> int:
        """Number of rows: the nodes of this process."""
        return len(self.nodes)

    @property
    def parameters(self) -> int:
        """P, the number of trained parameters per node."""
        return self.X.shape[1]

    @property
    def frozen_parameters(self) -> int:
        """Number of frozen parameters per node."""
        return sum(t.numel() for t in self.frozen.values())

    def describe(self) -> list[dict]:
        """Describe the row layout (name, shape, offset) for the checkpoint."""
        return [asdict(slot) | {"shape": list(slot.shape)} for slot in self.layout]

    def restore(self, state: dict, rows: slice = slice(None)) -> None:
        """Load rows, norm buffers and frozen parameters from a checkpoint, in which these nodes are the ``rows``.

        Raises:
            UserError: the checkpoint is of another network.
        """
        frozen = state.get("frozen", {})
        saved_shapes = {name: t.shape for name, t in frozen.items()}
        if state["layout"] != self.describe() or saved_shapes != {name: t.shape for name, t in self.frozen.items()}:
            raise UserError(
                "the checkpoint holds another network: parameters have other names or shapes, or others are frozen"
            )
        self.X.copy_(state["X"][rows])
        for name, buffer in self.buffers.items():
            buffer.copy_(state["buffers"][name][rows])
        for name, t in self.frozen.items():
            t.copy_(frozen[name])

    @contextmanager
    def use_parameters(self, X: Tensor) -> Iterator[None]:
        """Within the context the nodes' parameters are ``X`` [n, P]; afterwards they are as before."""
        if X is self.X:
            yield
            return
        kept = self.X.clone()
        self.X.copy_(X)
        try:
            yield
        finally:
            self.X.copy_(kept)

    @contextmanager
    def keep_buffers(self, present: np.ndarray | None) -> Iterator[None]:
        """After the context the norm buffers of nodes that are not ``present`` (bool [n]; None: all are) are as before
        it."""
        if present is None:
            yield
            return
        absent = torch.from_numpy(~present).to(self.device)
        kept = {name: b[absent] for name, b in self.buffers.items()}
        yield
        for name, b in self.buffers.items():
            b[absent] = kept[name]

    @contextmanager
    def preserve_state(self) -> Iterator[None]:
        """After the context ``G`` and the norm buffers are as before it, even if the code inside fails half way."""
        kept_G, kept_buffers = self.G.clone(), {name: b.clone() for name, b in self.buffers.items()}
        try:
            yield
        finally:
            self.G.copy_(kept_G)
            for name, b in self.buffers.items():
                b.copy_(kept_buffers[name])
