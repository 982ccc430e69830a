"""How fast a step is, beside the least it could cost: a bare loop over separately stored models."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F

from lightning_idkd.config import Config
from lightning_idkd.data.partition import IID, partition
from lightning_idkd.data.source import Images
from lightning_idkd.data.store import Store
from lightning_idkd.fit import node_maker
from lightning_idkd.launch import launch
from lightning_idkd.network import Network
from lightning_idkd.orchestrator import Orchestrator
from lightning_idkd.stack import NodeStack


def bench(config: Config, size: int, channels: int, rounds: int = 5) -> dict[str, float]:
    """Median samples a second of a whole step under each engine and of the bare loop, taken in turns on random images.

    The bare loop runs forward and backward only, on models that share nothing, in channels-last layout.
    """
    graph = config.graph.build(config.seed)
    fabric = launch(replace(config.run, devices=1))  # one process: another would run the same on the same cores
    n, b, k = graph.nodes, config.train.batch_size, 10
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (max(40 * n, 2 * n * b), channels, size, size), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.arange(len(pixels)) % k, tuple(map(str, range(k))))
    split = partition(IID(), images.labels.numpy(), n, config.seed, 0.0)
    make = node_maker(config, channels, size, k)
    runs, steps, orders = {}, {}, {}
    for engine in ("loop", "vmap") if config.run.engine == "auto" else (config.run.engine,):
        network = Network(graph)
        store = Store(images, images, None, split, network.rows, batch=b, augment=config.data.augment, device=fabric.device)
        stack = NodeStack(make, network.rows, config.seed, fabric.device, engine=engine)
        runs[engine] = Orchestrator(fabric, stack, network, store, config.gossip, config.train)

    def whole(run: Orchestrator) -> None:
        run.epoch_step %= run.steps
        if run.epoch_step == 0:
            orders[run] = run.store.order(run.step, run.steps)
        run.train_step(orders[run])

    models = [make().to(fabric.device, memory_format=torch.channels_last) for _ in range(n)]
    x, y = next(iter(runs.values())).store.batch(next(iter(runs.values())).store.order(0, 1), 0)

    def bare() -> None:
        for i, model in enumerate(models):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x[i]), y[i]).backward()

    steps["bare loop"] = bare
    steps |= {engine: lambda run=run: whole(run) for engine, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):  # the first one warms up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if fabric.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: n * b / statistics.median(s) for name, s in seconds.items()}
