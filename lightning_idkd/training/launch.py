"""Starts the processes of a run, sets threads and determinism, and lets one process print a mistake."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import time
import warnings
from datetime import timedelta

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import distributed

from lightning_idkd.config import RunConfig
from lightning_idkd.errors import UserError
from lightning_idkd.machine import count_cores

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class NodeStrategy(DDPStrategy):
    """DDP's launcher and process group without DDP: it would average the nodes' gradients and overwrite their rows."""

    def setup_module(self, module):
        return module


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
    # this logger recommends another precision
    logging.getLogger("lightning.fabric.utilities.rank_zero").setLevel(logging.WARNING)
    strategy = NodeStrategy(process_group_backend="nccl" if cuda else "gloo") if run.devices > 1 else "auto"
    fabric = make_fabric(accelerator="cuda" if cuda else "cpu", devices=run.devices, strategy=strategy)
    fabric.launch()
    keep_memory()
    torch.set_num_threads(run.threads or max(1, count_cores() // run.devices))  # until `choose_engine` decides
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    if cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return fabric


def make_fabric(**options) -> Fabric:
    """Make a Fabric without Lightning's hint that ``srun`` exists but is not used; a run need not be a job of SLURM."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `srun` command is available")
        return Fabric(**options)


def keep_memory() -> None:
    """Let the C library keep memory that is freed.

    By default it returns large blocks to the system, which hands them out again page by page; in a step of ResNet-20
    that took a fifth of the time.
    """
    with contextlib.suppress(OSError, AttributeError):  # only glibc has this function
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest value that it accepts


def is_first_to_report(mistake: str) -> bool:
    """Whether this process should print the mistake; most occur in every process, some in one."""
    if not distributed.is_initialized():
        return True
    try:
        counters = connect_to_counters()
        counters.add("mistakes", 1)
        first, end = counters.add(mistake, 1) == 1, time.monotonic() + 2
        world = distributed.get_world_size()
        while distributed.get_rank() == 0 and counters.add(mistake, 0) < world and time.monotonic() < end:
            time.sleep(0.05)  # the counters end with process 0
    except distributed.DistError:  # process 0 is gone
        return True
    return first


def other_process_failed() -> bool:
    """Whether another process has reported a mistake and ended, which breaks the connections to it."""
    try:
        return distributed.is_initialized() and connect_to_counters().add("mistakes", 0) > 0
    except distributed.DistError:
        return False


def connect_to_counters() -> distributed.TCPStore:
    """Counters that all processes of this run share, beside those of the process group."""
    return distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=5)
    )
