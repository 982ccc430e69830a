"""Decentralised data-parallel training on a ring with decent-dp: one process a node, gloo, pairs that alternate."""

import time

import torch
import torch.distributed as dist
from decent_dp.ddp import DecentralizedDataParallel
from task import BATCH, LR, NODES, STEPS, accuracy, network, report, share
from torch.utils.data import DataLoader, TensorDataset

dist.init_process_group("gloo")
rank = dist.get_rank()
batches = DataLoader(TensorDataset(*share(rank, NODES)), BATCH, shuffle=True, drop_last=True)
model = DecentralizedDataParallel(
    network(), lambda named: torch.optim.SGD([parameter for _, parameter in named], LR), topology="ring"
)
step = 0
while step < STEPS:
    for images, labels in batches:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        step += 1
        # --- measuring
        if step == STEPS // 10:  # the first step creates buffers
            dist.barrier()
            started = time.perf_counter()
        # ---
        if step == STEPS:
            break
# --- measuring
dist.barrier()
seconds = time.perf_counter() - started
accuracies = [None] * NODES
dist.all_gather_object(accuracies, accuracy(model._model))
if rank == 0:
    report((STEPS - STEPS // 10) * BATCH * NODES, seconds, accuracies)
dist.barrier()
# ---
dist.destroy_process_group()
