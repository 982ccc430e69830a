"""Watches over the processes of a run, so that one that dies is reported by the name of its host.

Every process beats in a store beside the process group. Collectives have no short timeout: a process may well wait for
minutes while another one draws pictures or times engines, and goes on beating meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from torch import distributed

PERIOD = 1.0
"""Seconds between two beats."""
SILENCE = 30.0
"""Seconds without a beat after which a process counts as lost."""
SUSPECT = 4.0
"""The same, once a connection between processes has broken."""
ENDED = b"ended"
MISTAKE = 2
"""The exit status after a user's mistake, which the process itself has reported."""


class Heartbeat(threading.Thread):
    """Beats for this process, and ends it with status 1 and a message when another one is lost.

    Args:
        names: The host of every process; each has begun to beat before any of them starts this thread.
        children: The exit status of every process that this one started (None: it runs), by rank.
    """

    def __init__(self, rank: int, names: Sequence[str], children: Callable[[], dict[int, int | None]]):
        super().__init__(daemon=True, name="heartbeat")
        self.rank, self.names, self.children = rank, names, children
        self.checkpoint: Path | None = None  # for the message
        self.silence = SILENCE
        self.stopping = threading.Event()
        self.store = connect_to_store()
        self.beat()

    def beat(self, content: bytes | None = None) -> None:
        self.store.set(f"beat/{self.rank}", content or repr(time.time()))

    def run(self) -> None:
        others = [rank for rank in range(len(self.names)) if rank != self.rank]
        latest, changed = dict.fromkeys(others, b""), dict.fromkeys(others, time.monotonic())
        while not self.stopping.wait(PERIOD):
            try:
                self.beat()
                beats = dict(zip(others, self.store.multi_get([f"beat/{rank}" for rank in others]), strict=True))
                told = json.loads(self.store.get("lost")) if self.store.check(["lost"]) else []
            except distributed.DistError:
                if not self.stopping.wait(PERIOD):  # the store ends with process 0
                    self.end([0])
                return
            now = time.monotonic()
            for rank, content in beats.items():
                if content != latest[rank]:
                    latest[rank], changed[rank] = content, now
            dead = [rank for rank, status in self.children().items() if status not in (None, 0, MISTAKE)]
            silent = [r for r in others if now - changed[r] > self.silence and latest[r] != ENDED]
            if lost := told or dead or silent:
                with contextlib.suppress(distributed.DistError):
                    self.store.set("lost", json.dumps(lost))
                self.end(lost)

    def suspect(self) -> None:
        """Wait until a lost process is reported, after a connection has broken; return if none is lost."""
        self.silence = SUSPECT
        time.sleep(SUSPECT + 4 * PERIOD)

    def stop(self) -> None:
        """Stop watching: this process has done its work."""
        self.stopping.set()
        try:
            self.beat(ENDED)
        except distributed.DistError:
            return  # process 0 has ended, too

    def end(self, lost: list[int]) -> None:
        """Report the ``lost`` processes and end this one, whose main thread may wait for them for ever."""
        if self.stopping.is_set():
            return
        processes = ", ".join(map(str, lost))
        hosts = ", ".join(dict.fromkeys(self.names[rank] for rank in lost))
        saved = "there is no checkpoint yet"
        if self.checkpoint is not None and self.checkpoint.exists():
            saved = f"last checkpoint: {self.checkpoint}; continue with the same command and --run.resume auto"
        elif self.checkpoint is not None and self.rank:
            saved = f"last checkpoint, on the first host: {self.checkpoint}"
        what = f"process{'es' * (len(lost) > 1)} {processes} on host {hosts}"
        here = [r for r, name in enumerate(self.names) if name == self.names[self.rank] and r not in lost]
        if self.rank == here[0]:
            print(f"error: {what} died or cannot be reached, so this run ends; {saved}", file=sys.stderr, flush=True)
        if self.rank == 0:
            time.sleep(2 * PERIOD)  # until the others know what was lost: the store ends with this process
        os._exit(1)


def is_store_reachable() -> bool:
    """Whether anything listens where the store of the process group is."""
    with contextlib.suppress(OSError):
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=PERIOD).close()
        return True
    return False


def connect_to_store() -> distributed.TCPStore:
    """A connection of its own to the store of the process group."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SILENCE))
