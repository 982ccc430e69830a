"""Applies a gossip rule to the rows, in blocks of columns if the rule allows it, and builds the rule's context."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.callback import Context, Gossip
from lightning_idkd.errors import UserError, require_shape
from lightning_idkd.network import Network, block_columns
from lightning_idkd.nodes.stack import NodeStack


def overwrite(matrix: Tensor, new: Tensor, rows: np.ndarray | None = None) -> None:
    """Set some rows (a mask; None: all) of ``matrix`` to those of ``new``."""
    if rows is None:
        matrix.copy_(new)
    else:
        mask = torch.from_numpy(rows).to(matrix.device)
        matrix[mask] = new[mask]


class GossipStep:
    """A gossip rule with its buffers, for the rows of one process.

    Args:
        seed: seed of the random numbers that a rule may draw.

    Raises:
        UserError: the rule needs features, and the network has none.
    """

    buffers: dict[str, Tensor]
    """The rule's matrices [rows, P] or [rows, width]."""
    edge_buffers: dict[str, Tensor]
    """The rule's matrices with a row for each directed edge that starts at a node of this process."""

    def __init__(self, rule: Gossip, stack: NodeStack, network: Network, seed: int = 0):
        if rule.needs_features and not stack.modules[0].has_features:
            raise UserError(
                f"gossip: {type(rule).__name__} needs features(x) [B, F], which this network does not offer"
            )
        self.rule, self.stack, self.network, self.seed = rule, stack, network, seed
        P, edges = stack.parameters, len(network.edges(0))
        self.buffers = {k: stack.X.new_zeros(len(stack.X), width or P) for k, width in rule.widths().items()}
        self.edge_buffers = {k: stack.X.new_zeros(edges, width or P) for k, width in rule.edge_buffers.items()}

    def begin(self, step: int) -> None:
        """Send rows to other processes before the gradients are computed, if the rule mixes them as they are.

        Where rows may be late, the clock first has to say which are.
        """
        if self.rule.mixes_first and self.network.world > 1 and self.network.links.max_age is None:
            self.network.send_early(self.stack.X, step)

    def update(self, step: int, lr: float, batch: tuple[Tensor, ...]) -> None:
        """Replace the rows by the rule's update, given the gradients of ``batch`` in ``stack.G``."""
        P = self.stack.parameters
        # a lie is about a whole row, and every block would be a message of its own between processes
        in_blocks = self.rule.in_blocks and not self.network.lies.in_rows and self.network.world == 1
        size = block_columns(self.network.graph.nodes, self.stack.X.device) if in_blocks else P
        for start in range(0, P, size):
            if start in (0, size):  # only the first block counts messages: the others are parts of the same messages
                ctx = self.context(step, lr, start == 0, batch)
            columns = slice(start, start + size)
            G = self.stack.G[:, columns]
            self._replace(step, columns, lambda X, state, G=G, ctx=ctx: self.rule.update(X, G, state, ctx))

    def combine(self, step: int, lr: float) -> None:
        """Mix the rows once without a gradient."""
        self._replace(step, slice(None), functools.partial(self.rule.combine, ctx=self.context(step, lr)))

    def welcome(self, step: int) -> None:
        """Give nodes that return at ``step`` without a memory the mean of their neighbours' rows, and new buffers."""
        returning = self.network.returning(step)
        if returning is None:
            return
        self.stack.X.copy_(self.network.welcome(self.stack.X, step))
        mine = returning[self.network.rows.start : self.network.rows.stop]
        for matrix in self.buffers.values():
            matrix[torch.from_numpy(mine)] = 0
        by_edge = mine[self.network.edges(0)[:, 0] - self.network.rows.start]
        for matrix in self.edge_buffers.values():
            matrix[torch.from_numpy(by_edge)] = 0

    def _replace(self, step: int, columns: slice, rule_step: Callable[[Tensor, SimpleNamespace], Tensor]) -> None:
        """Set these columns of the rows to the result of ``rule_step``, and buffers to what it assigns to ``state``.

        Rows of nodes that are absent at ``step``, and their edges' rows, stay as they are.
        """
        P, X = self.stack.parameters, self.stack.X[:, columns]
        blocks = {k: v[:, columns] if v.shape[1] == P else v for k, v in (self.buffers | self.edge_buffers).items()}
        state = SimpleNamespace(**blocks)
        rule = f"gossip: {type(self.rule).__name__}"
        present = self.network.present(step)
        overwrite(X, require_shape(rule_step(X, state), X.shape, f"{rule}.update returns"), present)
        if present is not None:
            by_edge = present[self.network.edges(0)[:, 0] - self.network.rows.start]
        for name, matrix in blocks.items():
            if getattr(state, name) is not matrix:
                new = require_shape(getattr(state, name), matrix.shape, f"{rule} sets its buffer {name} to")
                overwrite(matrix, new, by_edge if present is not None and name in self.edge_buffers else present)

    # ------------------------------------------------------------------ the context of a rule

    def context(self, step: int, lr: float, first: bool = True, batch: tuple[Tensor, ...] = ()) -> Context:
        """Build what the rule sees besides its matrices; ``first`` says whether messages are counted."""
        edges = self.network.edges(step)
        return Context(
            step,
            lr,
            mix=functools.partial(self.network.mix, step=step, messages=first),
            mean=functools.partial(self.network.all_reduce, step=step, messages=first),
            receive=functools.partial(self.network.receive, step=step, messages=first),
            swap=functools.partial(self.network.swap, step=step, messages=first),
            edges=edges - [[self.network.rows.start, 0]] if len(edges) else edges,
            weights=self.network.graph.mixing(step).entries(*edges.T),
            gradient=functools.partial(self._gradient, step=step, batch=batch),
            loss=functools.partial(self._loss, step=step, batch=batch),
            targets=batch[1] if batch else None,
            features=functools.partial(self._features, step=step, batch=batch),
            pull_back=functools.partial(self._pull_back, step=step, batch=batch),
            uniform=functools.partial(self._uniform, step=step),
        )

    def _gradient(self, X: Tensor, step: int, batch: tuple[Tensor, ...]) -> Tensor:
        """Gradients [rows, P] of the batch at other parameters."""
        self._require_whole_rows("asks for another gradient")
        return self.stack.gradient(X, *batch[:2], step, *batch[2:])

    def _loss(self, X: Tensor, step: int, batch: tuple[Tensor, ...]) -> Tensor:
        """Losses [rows] of the batch at other parameters."""
        self._require_whole_rows("asks for the loss")
        return self.stack.loss(X, *batch[:2], step, *batch[2:])

    def _features(self, X: Tensor, step: int, batch: tuple[Tensor, ...]) -> Tensor:
        """Features [rows, B, F] of the batch at other parameters."""
        self._require_whole_rows("asks for features")
        return self.stack.features(X, batch[0], step)

    def _pull_back(self, X: Tensor, V: Tensor, step: int, batch: tuple[Tensor, ...]) -> Tensor:
        """Gradients [rows, P] of a loss whose derivative by the features is ``V`` [rows, B, F]."""
        return self.stack.pull_back(X, V, batch[0], step)

    def _uniform(self, purpose: str, columns: int, step: int) -> Tensor:
        """Random numbers in [0, 1) [rows, columns]; a node gets the same ones whichever process holds it."""
        self._require_whole_rows("draws random numbers")
        device = self.stack.X.device
        nodes, index = torch.tensor(self.network.rows)[:, None].to(device), torch.arange(columns, device=device)
        return randomness.uniform(self.seed, purpose, nodes, step, index, device=device)

    def _require_whole_rows(self, action: str) -> None:
        """Refuse an ``action`` that makes sense on whole rows only, in a rule that is called on blocks of columns."""
        if self.rule.columnwise:
            raise UserError(f"gossip: {type(self.rule).__name__} {action}, so it must set columnwise = False")
