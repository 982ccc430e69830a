"""The n nodes of a process as the rows of one matrix: training steps, gradients at other parameters, and prediction."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_idkd.labels import Outputs
from lightning_idkd.nodes.engines import BATCHED, Engines, training_loss
from lightning_idkd.nodes.layout import evaluation_mode, use_tensors
from lightning_idkd.nodes.node import NodeModule

T = TypeVar("T")
NODES_PER_PASS = 64  # nodes that a CUDA device runs together in prediction


class NodeStack(Engines):
    """The nodes of one process: their rows and the engine that runs them.

    :class:`~lightning_idkd.nodes.rows.Rows` describes the arguments ``make`` to ``dtype``,
    :class:`~lightning_idkd.nodes.engines.Engines` the arguments ``engine``, ``nodes_per_call`` and ``autocast``.
    """

    def step(self, x: Tensor, y: Tensor, step: int, *more: Tensor) -> Tensor:
        """Compute every node's loss [n] on its batch; the gradients land in ``G``.

        The batch is ``x`` [n, b, C, H, W], ``y`` [n, b, k] and whatever ``more`` [n, b] the node's loss takes.
        """
        return self.run(training_loss, step, x, y, *more)

    def gradient(self, X: Tensor, x: Tensor, y: Tensor, step: int, *more: Tensor) -> Tensor:
        """Gradients [n, P] of a batch at other parameters ``X``; rows, ``G`` and norm buffers stay as they are."""
        with self.preserve_state(), self.use_parameters(X):
            self.step(x, y, step, *more)
            return self.G.clone()

    def loss(self, X: Tensor, x: Tensor, y: Tensor, step: int, *more: Tensor) -> Tensor:
        """Losses [n] of a batch at other parameters ``X``, in training mode; all else stays as it is."""
        with self.preserve_state(), self.use_parameters(X), torch.no_grad():
            return self.step(x, y, step, *more)

    def features(self, X: Tensor, x: Tensor, step: int) -> Tensor:
        """Features [n, b, F] of ``x`` at ``X``, in training mode; rows, ``G`` and norm buffers stay as they are."""
        with self.preserve_state(), self.use_parameters(X), torch.no_grad():
            return self.run(_features, step, x)

    def pull_back(self, X: Tensor, V: Tensor, x: Tensor, step: int) -> Tensor:
        """Gradients [n, P] at ``X`` of the sum of ``V`` [n, b, F] times :meth:`features`.

        This is the gradient of a loss whose derivative by the features is ``V``. Rows, ``G`` and norm buffers stay as
        they are.
        """
        with self.preserve_state(), self.use_parameters(X):
            self.run(_weighted_features, step, x, V)
            return self.G.clone()

    # ------------------------------------------------------------------ prediction

    @property
    def passes(self) -> int:
        """Number of times that :meth:`answers` goes through the batches."""
        return math.ceil(self.n / NODES_PER_PASS) if self._predicts_together else self.n

    def answers(self, batches: Callable[[], Iterable[Tensor]], use: Callable[[Outputs], T]) -> list[T]:
        """``use`` of every node's outputs in evaluation mode over the same ``batches``, concatenated in order."""
        if not self._predicts_together:
            return self.each(lambda i: use(run_network(self.modules[i], batches())))
        results = []
        for start in range(0, self.n, NODES_PER_PASS):
            rows = range(start, min(start + NODES_PER_PASS, self.n))
            results += [use(outputs) for outputs in self._predict(rows, batches())]
        return results

    @property
    def _predicts_together(self) -> bool:
        """Whether many nodes predict in one call."""
        return self.device.type != "cpu" and self.engine in BATCHED

    @torch.no_grad()
    def _predict(self, rows: range, batches: Iterable[Tensor]) -> Iterator[Outputs]:
        """Outputs of some nodes, all of which see every batch in one call."""
        block, module, heads = slice(rows.start, rows.stop), self.modules[rows.start], []

        def forward(parameters: list[Tensor], buffers: list[Tensor], x: Tensor) -> list[Tensor]:
            with use_tensors(module, self._places, parameters + buffers):
                outputs = module.outputs(x)
            heads[:] = [name for name, part in module.named_modules() if part is outputs.head]
            return [outputs.logits] if outputs.features is None else [outputs.logits, outputs.features]

        parameters = [slot.view(self.X[block]) for slot in self.layout]
        buffers = [b[block] for b in self.buffers.values()]
        with evaluation_mode(module), sdpa_kernel(SDPBackend.MATH):
            parts = [torch.vmap(forward)(parameters, buffers, x.expand(len(rows), *x.shape)) for x in batches]
        logits, *features = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
        for k, i in enumerate(rows):
            head = self.modules[i].get_submodule(heads[0]) if heads else None
            yield Outputs(logits[k], features[0][k] if features else None, head)

    def model(self, row: Tensor, buffers: dict[str, Tensor]) -> NodeModule:
        """A separate node with parameters ``row`` [P] and ``buffers``, such as the consensus model."""
        return self._bind(copy.deepcopy(self.modules[0]), row, buffers).eval()


def _features(node: NodeModule, x: Tensor) -> Tensor:
    return node.network.features(x)


def _weighted_features(node: NodeModule, x: Tensor, V: Tensor) -> Tensor:
    return (V * node.network.features(x)).sum()


@torch.no_grad()
def run_network(module: NodeModule, batches: Iterable[Tensor]) -> Outputs:
    """Outputs of one node in evaluation mode over ``batches`` [B, C, H, W], concatenated in order."""
    with evaluation_mode(module):
        return Outputs.cat([module.outputs(x) for x in batches])


def mean_buffers(stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """Buffers of the consensus model: floating-point ones averaged over the nodes, counters taken from the first."""
    return {name: b.mean(0) if b.is_floating_point() else b[0].clone() for name, b in stacked.items()}
