"""Starts the processes of a run and sets threads and determinism; one process decides for all, and one tells of a
mistake."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import distributed

from lightning_idkd.config import RunConfig
from lightning_idkd.errors import UserError
from lightning_idkd.machine import count_cores
from lightning_idkd.training.heartbeat import MISTAKE, PERIOD, SILENCE, Heartbeat, connect_to_store, is_store_reachable
from lightning_idkd.training.launchers import choose_environment, name_host

T = TypeVar("T")
WAITING = "waiting for the processes of the other hosts, which have to reach this address: MASTER_ADDR, MASTER_PORT"

PARENT = "IDKD_PARENT"  # the variable by which a process learns which one started it
PATIENCE = timedelta(hours=3)  # of a process that waits for others; that they are alive is seen by their heartbeats
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


class NodeStrategy(DDPStrategy):
    """DDP's launcher and process group without DDP: it would average the nodes' gradients and overwrite their rows."""

    def setup_module(self, module):
        return module

    def _configure_launcher(self) -> None:
        self._launcher = Starter(self.cluster_environment, self.num_processes, self.num_nodes)


class Starter(_SubprocessScriptLauncher):
    """Fabric's launcher of processes on one host, without its observer.

    The observer kills this process when another one ends; the heartbeat reports that first. Until heartbeats begin, a
    thread ends a process that would wait for one that is gone: its parent, a child, or torchrun, which holds the store
    in which processes find each other.
    """

    def launch(self, function, *args, **kwargs):
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        parent = os.environ.pop(PARENT, None)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]
        self.together = threading.Event()
        threading.Thread(target=self._watch_start, args=[parent], daemon=True).start()
        return function(*args, **kwargs)

    def _watch_start(self, parent: str | None) -> None:
        by_torchrun, failures = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True", 0
        while not self.together.wait(PERIOD):
            failures = failures + 1 if by_torchrun and not is_store_reachable() else 0
            if failures * PERIOD >= SILENCE:
                print("error: torchrun, which started this process, cannot be reached", file=sys.stderr, flush=True)
                os._exit(1)
            ended = [p.returncode for p in self.procs if p.poll() is not None]
            if ended and set(ended) == {MISTAKE}:  # which has been reported
                os._exit(MISTAKE)
            if ended:
                print("error: a process that this one started died, so this run ends", file=sys.stderr, flush=True)
            if ended or (parent is not None and os.getppid() != int(parent)):
                os._exit(1)


_heartbeat: Heartbeat | None = None


def find_heartbeat() -> Heartbeat | None:
    """The heartbeat of this process; None if the run has no other process."""
    return _heartbeat


def launch(run: RunConfig) -> Fabric:
    """Start the processes (each runs this command again); set threads and determinism."""
    cuda = run.accelerator == "cuda" or (run.accelerator == "auto" and torch.cuda.is_available())
    if run.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("run.accelerator: cuda given, but torch sees no CUDA device here; allowed: cpu, auto")
    if run.engine == "graph" and not cuda:
        raise UserError(
            "run.engine: graph given, which records what a CUDA device does; "
            "allowed on a CPU: auto, loop, parallel, vmap, compile"
        )
    for logger in ("lightning.fabric", "lightning.pytorch"):  # they recommend another precision, and count processes
        logging.getLogger(logger).setLevel(logging.WARNING)
    several = run.hosts * run.devices > 1
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    strategy = NodeStrategy(process_group_backend=backend, timeout=PATIENCE) if several else "auto"
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=run.devices, num_nodes=run.hosts, strategy=strategy,
                    plugins=[choose_environment(run)])  # fmt: skip
    waiting = threading.Timer(20, print, [WAITING], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    if run.hosts > 1:
        waiting.start()
    fabric.launch()
    waiting.cancel()
    if several:
        watch(fabric)
        strategy.launcher.together.set()
    if fabric.local_rank:  # the processes of a host share a cache, and the first of them warns of it
        logging.getLogger("lightning_idkd.data.cache").setLevel(logging.ERROR)
    keep_memory(whole_rows=several)
    torch.set_num_threads(run.threads or max(1, count_cores() // run.devices))  # until `choose_engine` decides
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return fabric


def watch(fabric: Fabric) -> None:
    """Start the heartbeat of this process, which ends it when another one dies."""
    global _heartbeat
    names = gather_from_all(name_host())
    rank, started = fabric.global_rank, getattr(fabric.strategy.launcher, "procs", [])
    _heartbeat = Heartbeat(rank, names, lambda: {child: p.poll() for child, p in enumerate(started, rank + 1)})
    distributed.barrier()
    _heartbeat.start()


def end_together() -> None:
    """Wait until all processes have done their work, and stop watching over them."""
    if _heartbeat is not None:
        distributed.barrier()
        _heartbeat.stop()


def gather_from_all(content: T) -> list[T]:
    """The ``content`` of every process, by rank, in all processes."""
    contents: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(contents, content)
    return contents


def decide(fabric: Fabric, find: Callable[[], T]) -> T:
    """What the first process finds, in all processes.

    Raises:
        UserError: a mistake that the first process found, in all processes.
    """
    found = None
    if fabric.is_global_zero:
        try:
            found = find(), None
        except UserError as e:
            found = None, str(e)
    value, mistake = fabric.broadcast(found)
    if mistake is not None:
        raise UserError(mistake)
    return value


def agree(fabric: Fabric, work: Callable[[], T]) -> T:
    """The result of ``work``, which every process does for itself, once all have done it.

    Raises:
        UserError: a mistake that any process found, in all processes; if only some hosts found it, the first of them
            is named.
    """
    if fabric.world_size == 1:
        return work()
    value, mistake = None, None
    try:
        value = work()
    except UserError as e:
        mistake = str(e)
    found = gather_from_all((name_host(), mistake))
    mistakes = {host: text for host, text in reversed(found) if text is not None}
    if mistakes:
        host = list(mistakes)[-1]
        everywhere = len(mistakes) == len({host for host, _ in found})
        raise UserError(mistakes[host] if everywhere else f"on host {host}: {mistakes[host]}")
    return value


def keep_memory(whole_rows: bool = False) -> None:
    """Let the C library keep memory that is freed.

    By default it returns large blocks to the system, which hands them out again page by page; in a step of ResNet-20
    that took a fifth of the time. Blocks of 32 MiB or more stay with the program only if a rule is called on
    ``whole_rows``, as in several processes, where its algebra took six times as long.
    """
    with contextlib.suppress(OSError, AttributeError):  # only glibc has this function
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest value that it accepts
        if whole_rows:
            libc.mallopt(M_MMAP_MAX, 0)


def is_first_to_report(mistake: str) -> bool:
    """Whether this process should print the mistake; most occur in every process, some in one."""
    if not distributed.is_initialized():
        return True
    try:
        counters = connect_to_store()
        counters.add("mistakes", 1)
        first, end = counters.add(mistake, 1) == 1, time.monotonic() + 2
        world = distributed.get_world_size()
        while distributed.get_rank() == 0 and counters.add(mistake, 0) < world and time.monotonic() < end:
            time.sleep(0.05)  # the counters end with process 0
    except distributed.DistError:  # process 0 is gone
        return True
    return first


def other_process_failed() -> bool:
    """Whether another process has reported a mistake and ended, which breaks the connections to it.

    If a process died without a word, the heartbeat reports it and ends this process, too.
    """
    try:
        failed = distributed.is_initialized() and connect_to_store().add("mistakes", 0) > 0
    except distributed.DistError:
        failed = False
    if not failed and _heartbeat is not None:
        _heartbeat.suspect()
    return failed
