"""Processes and devices."""

from __future__ import annotations

import os

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from lightning_idkd.config import RunConfig
from lightning_idkd.errors import UserError


class NodeStrategy(DDPStrategy):
    """DDP's launcher and process group without DDP: it would average the nodes' gradients and overwrite their rows."""

    def setup_module(self, module):
        return module


def launch(run: RunConfig) -> Fabric:
    """Start the processes (each runs this command again); set threads and determinism."""
    cuda = run.accelerator == "cuda" or (run.accelerator == "auto" and torch.cuda.is_available())
    if run.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("run.accelerator: cuda given, but torch sees no CUDA device here; allowed: cpu, auto")
    strategy = NodeStrategy(process_group_backend="nccl" if cuda else "gloo") if run.devices > 1 else "auto"
    fabric = Fabric(accelerator="cuda" if cuda else "cpu", devices=run.devices, strategy=strategy)
    fabric.launch()
    torch.set_num_threads(run.threads or max(1, (os.cpu_count() or 1) // run.devices))  # until `fit.execution` decides
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return fabric
