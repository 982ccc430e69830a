"""Carries tensors and objects between the processes of a run.

All messages of an exchange are posted before the first one is waited for, and two processes send each other at most one
message each, so that its duration does not grow with the number of processes. Tensors stay on their device: gloo
carries those of a CPU, and NCCL those of a CUDA device. Objects travel as bytes in tensors on the CPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**24  # bytes of a message on the way to the first process, which bounds the other processes' buffers
TOGETHER = 16  # nodes whose objects are one such message


def assign_rows(rows: int, world: int) -> list[range]:
    """The contiguous block of rows that every process holds; their sizes differ by at most 1."""
    sizes = [len(part) for part in np.array_split(np.arange(rows), world)]
    ends = np.cumsum(sizes)
    return [range(int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True)]


class Transport:
    """The messages of process ``rank``; process q holds the rows ``blocks[q]`` of every matrix of the run."""

    def __init__(self, rank: int, blocks: list[range]):
        self.rank, self.blocks, self.world = rank, blocks, len(blocks)
        self.others = [q for q in range(self.world) if q != rank]

    def post(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> Callable[[], None]:
        """Begin to send the tensors ``sent`` to other processes and to fill the tensors ``received``, both by process.

        Tensors are contiguous. Both ends know the shapes, and none of them posts an empty message.

        Returns:
            a function that waits until the tensors have been sent and filled.
        """
        posts = [dist.P2POp(dist.irecv, T, q) for q, T in received.items() if T.numel()]
        posts += [dist.P2POp(dist.isend, T, q) for q, T in sent.items() if T.numel()]
        requests = dist.batch_isend_irecv(posts) if posts else []

        def wait() -> None:
            for request in requests:
                request.wait()
            posts.clear()  # until here, the tensors that are sent must live

        return wait

    def exchange(self, sent: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """Send the tensors ``sent`` and fill the tensors ``received``, see :meth:`post`."""
        self.post(sent, received)()

    def exchange_objects(self, sent: dict[int, Any], senders: Collection[int]) -> dict[int, Any]:
        """Send objects to other processes, by process, and return one object of each process in ``senders``.

        Tensors in the objects are on the CPU. The sizes are exchanged first, then the objects.
        """
        messages = {q: pack(content) for q, content in sent.items()}
        sizes = {q: torch.empty(1, dtype=torch.int64) for q in senders}
        self.exchange({q: torch.tensor([len(message)]) for q, message in messages.items()}, sizes)
        received = {q: torch.empty(int(size), dtype=torch.uint8) for q, size in sizes.items()}
        self.exchange(messages, received)
        return {q: unpack(message) for q, message in received.items()}

    # ------------------------------------------------------------------ to all processes

    def gather(self, T: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, in every process."""
        if self.world == 1:
            return T
        largest = max(len(block) for block in self.blocks)
        padded = torch.zeros((largest, *T.shape[1:]), dtype=T.dtype, device=T.device)
        padded[: len(T)] = T
        parts = [torch.empty_like(padded) for _ in self.blocks]
        dist.all_gather(parts, padded)
        return torch.cat([part[: len(block)] for part, block in zip(parts, self.blocks, strict=True)])

    def reduce(self, T: Tensor, reduction: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduce the rows of all processes to one row [C], which every process gets.

        Each process reduces the rows of all nodes in its share of the columns, and then sends the result to the others.
        So no process holds more values of other nodes than it has in its own rows (rounded up to a column).

        Args:
            T: the rows [rows, C] of this process.
            reduction: computes one value for every column, [c], of the rows [n, c] of all nodes. A value does not
                depend on the other columns.
        """
        if self.world == 1:
            return reduction(T)
        shares = [slice(share.start, share.stop) for share in assign_rows(T.shape[1], self.world)]
        rows = T.new_empty(self.blocks[-1].stop, T[:, shares[self.rank]].shape[1])
        parts = {q: rows[block.start : block.stop] for q, block in enumerate(self.blocks)}
        parts.pop(self.rank).copy_(T[:, shares[self.rank]])
        self.exchange({q: T[:, shares[q]].contiguous() for q in self.others}, parts)
        mine = reduction(rows).contiguous()
        whole = mine.new_empty(T.shape[1])
        whole[shares[self.rank]] = mine
        self.exchange(dict.fromkeys(self.others, mine), {q: whole[shares[q]] for q in self.others})
        return whole

    def sum(self, counts: Tensor) -> Tensor:
        """The sum of a tensor of integers on the CPU over all processes, in every process."""
        if self.world > 1:
            dist.all_reduce(counts)
        return counts

    # ------------------------------------------------------------------ to the first process

    def collect(self, T: Tensor, counts: Sequence[int] | None = None) -> Tensor | None:
        """The rows of all processes in the first process, on the CPU; None in the others.

        The rows travel in pieces of at most 16 MiB, straight to their place.

        Args:
            T: the rows [rows, ...] of this process. A single process gets T itself back.
            counts: number of rows of every process; None: those of the blocks.
        """
        if self.world == 1:
            return T
        if self.rank:
            for piece in split(T.contiguous()):
                dist.send(piece.cpu(), 0)
            return None
        counts = [len(block) for block in self.blocks] if counts is None else counts
        whole = torch.empty((sum(counts), *T.shape[1:]), dtype=T.dtype)
        parts = whole.split(list(counts))
        parts[0].copy_(T)
        for q in self.others:
            for piece in split(parts[q]):
                dist.recv(piece, q)
        return whole

    def collect_objects(self, objects: list) -> list | None:
        """One Python object of every node, in the order of the nodes, in the first process; None in the others.

        Tensors in the objects are on the CPU.
        """
        if self.world == 1:
            return objects
        if self.rank:
            for start in range(0, len(objects), TOGETHER):
                self.exchange_objects({0: objects[start : start + TOGETHER]}, [])
            return None
        collected = list(objects)
        for q in self.others:
            for _start in range(0, len(self.blocks[q]), TOGETHER):
                collected += self.exchange_objects({}, [q])[q]
        return collected


def split(T: Tensor) -> tuple[Tensor, ...]:
    """Views of a contiguous tensor, in order, of at most :data:`PIECE` bytes each; none of an empty tensor."""
    return T.view(-1).split(PIECE // T.element_size()) if T.numel() else ()


def pack(content: Any) -> Tensor:
    """The bytes of an object, uint8 [length]."""
    return torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)


def unpack(message: Tensor) -> Any:
    """The object of which :func:`pack` made a message."""
    return pickle.loads(message.numpy().data)
