"""Processes as threads of a test: messages go through queues, which is faster than starting processes."""

from __future__ import annotations

import threading
from itertools import product
from queue import SimpleQueue
from types import SimpleNamespace

from lightning_idkd import transport

PATIENCE = 30  # seconds that a thread waits for a message


class Threads:
    """Stands in for ``torch.distributed``; ``posted`` lists sender, receiver and bytes of the messages of exchanges."""

    isend, irecv = "isend", "irecv"

    def __init__(self):
        self.messages, self.posted, self.thread = {}, [], threading.local()

    def P2POp(self, op, tensor, peer):
        assert tensor.is_contiguous()
        return op, tensor, peer

    def batch_isend_irecv(self, posts):
        for op, tensor, peer in posts:
            if op == self.isend:
                self.posted.append((self.thread.rank, peer, tensor.nbytes))
                self.send(tensor, peer)
        receives = [(tensor, peer) for op, tensor, peer in posts if op == self.irecv]
        assert len({peer for _, peer in receives}) == len(receives)
        return [SimpleNamespace(wait=lambda r=receive: self.recv(*r)) for receive in receives]

    def send(self, tensor, peer):
        self.messages[self.thread.rank, peer].put(tensor.clone())

    def recv(self, tensor, peer):
        tensor.copy_(self.messages[peer, self.thread.rank].get(timeout=PATIENCE))

    def all_gather(self, parts, tensor):
        for q in range(len(parts)):
            self.send(tensor, q)
        for q, part in enumerate(parts):
            self.recv(part, q)

    def all_reduce(self, tensor):
        parts = [tensor.clone() for _ in range(self.thread.world)]
        self.all_gather(parts, tensor)
        tensor.copy_(sum(parts))

    def run(self, works):
        """What each of the functions returns; the one in place r is process r."""
        results, errors = [None] * len(works), []
        self.messages = {pair: SimpleQueue() for pair in product(range(len(works)), repeat=2)}

        def call(rank, work):
            self.thread.rank, self.thread.world = rank, len(works)
            try:
                results[rank] = work()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=call, args=given, daemon=True) for given in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "the threads wait for each other"
        return results


def in_threads(monkeypatch):
    """The stand-in, in the place of ``torch.distributed``."""
    threads = Threads()
    monkeypatch.setattr(transport, "dist", threads)
    return threads
