"""How fast a step is, where its time goes, and what the same would cost otherwise, all measured in turns in one process."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_idkd.config import Config
from lightning_idkd.data.images import Images
from lightning_idkd.data.partition import IID, partition
from lightning_idkd.data.store import Store
from lightning_idkd.graph import Graph
from lightning_idkd.machine import describe_machine
from lightning_idkd.models import norms
from lightning_idkd.models.formulas import evonorm_s0
from lightning_idkd.network import Network
from lightning_idkd.nodes.engines import WARM_UP_CALLS
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.records import report
from lightning_idkd.training import memory
from lightning_idkd.training.build import node_maker
from lightning_idkd.training.evaluation import measure
from lightning_idkd.training.launch import keep_memory, launch
from lightning_idkd.training.orchestrator import Orchestrator
from lightning_idkd.training.record import read_peak_memory

CLASSES = 10
LEAST = 0.3  # seconds that a turn of one form takes at least, and so how many steps it has
RESNET = ("--config", "ring_cifar10")
EIGHTEEN = '{"class_path": "TorchModule", "init_args": {"path": "torchvision.models.resnet18"}}'
SUITE = {
    "digits CNN": (("--config", "ring_digits"), lambda n: 90 * n, (16, 64, 256, 1024)),
    "ResNet-20-EvoNorm": (RESNET, lambda n: 50_000, (4, 16, 64)),
    "ResNet-18": ((*RESNET, "--node.network", EIGHTEEN), lambda n: 50_000, (4,)),
}
"""Arguments, training samples of n nodes, and numbers of nodes: one with digits has what it has where 16 share the set."""
PROCESSES = 16  # most nodes of which each gets a process
QUICK = {"digits CNN": (4, 8)}


@dataclass
class Form:
    """One way to do the same step."""

    step: Callable[[], object]
    threads: int
    run: Orchestrator | None = None


def bench(config: Config, channels: int, size: int, rounds: int = 5, samples: int | None = None) -> dict:
    """Samples a second of every form of a step on random images, medians of turns with their spread, and more.

    Forms: each engine; a ``bare loop`` of forward and backward passes over models that share nothing; ``one model`` on as many
    samples; and, up to 16 nodes, a ``process per node``, the models of neighbours exchanged by gloo, with our layers and memory
    settings, or with norms as autograd makes them of their formulas and no settings. Further: what ``auto`` takes, the shares of
    a step of the fastest engine, and its peak memory in a process of its own.
    """
    case = Case(config, channels, size, samples)
    fabric, n, b, cores = case.fabric, case.graph.nodes, config.train.batch_size, os.cpu_count() or 1
    counts = sorted({1, cores}) if fabric.device.type == "cpu" else [1]
    trial = case.run("auto")
    choice = trial.stack.engines() if config.run.engine == "auto" else [config.run.engine]
    forms: dict[str, Form] = {}
    for engine in sorted({*choice, "vmap"}) if config.run.engine == "auto" else choice:
        run = case.run(engine)
        for threads in counts:
            if (engine, threads) != ("parallel", 1):
                forms[named(engine, threads)] = Form(walker(run), threads, run)
    x, y = run.store.batch(run.store.order(0, 1), 0)
    models = [case.make().to(fabric.device, memory_format=torch.channels_last) for _ in range(n)]
    for threads in counts:
        forms[named("bare loop", threads)] = Form(lambda: [descend(m, x[i], y[i]) for i, m in enumerate(models)], threads)
        forms[named("one model", threads)] = Form(lambda: descend(models[0], x.flatten(0, 1), y.flatten(0, 1)), threads)
    if fabric.device.type == "cuda":
        one = NodeStack(case.make, range(1), config.seed, fabric.device, engine="graph", autocast=config.run.autocast)
        forms["one model, graph"] = Form(lambda: one.step(x.flatten(0, 1)[None], y.flatten(0, 1)[None], 0), 1)
    seconds = in_turns(forms, rounds, fabric.device)
    if n <= PROCESSES and fabric.device.type == "cpu":
        seconds |= apart(node_process, n, config, case.graph, channels, size, rounds)
    rates = {name: sorted(n * b / s for s in found) for name, found in seconds.items()}
    best = max((name for name, form in forms.items() if form.run), key=lambda name: statistics.median(rates[name]))
    chosen = named(*trial.stack.choose(x, y, choice, counts))
    torch.set_num_threads(forms[best].threads)
    return {
        "nodes": n,
        "batch": b,
        "parameters": run.stack.parameters,
        "nodes_a_call_of_vmap": run.stack.abreast,
        "samples_per_second": {k: {"median": statistics.median(v), "least": v[0], "most": v[-1]} for k, v in rates.items()},
        "fastest": best,
        "auto": chosen,
        "shares": shares(forms[best].run),
        "peak_memory_bytes": apart(alone, 1, config, channels, size, samples, forms[best].run.stack.engine, forms[best].threads),
    }


def named(form: str, threads: int) -> str:
    return f"{form}, {threads} thread{'s' * (threads > 1)}"


class Case:
    """An experiment on random images."""

    def __init__(self, config: Config, channels: int, size: int, samples: int | None):
        self.config, self.graph = config, config.graph.build(config.seed)
        self.fabric = launch(replace(config.run, devices=1))
        self.make = node_maker(config, channels, size, CLASSES)
        n = self.graph.nodes
        self.images = random_images(max(samples or 40 * n, 2 * n * config.train.batch_size), channels, size)
        self.split = partition(IID(), self.images.labels.numpy(), n, config.seed, config.data.validation)

    def run(self, engine: str) -> Orchestrator:
        """It, with this engine."""
        config, network, device = self.config, Network(self.graph), self.fabric.device
        few = self.images[torch.arange(min(len(self.images), 10_000))]
        store = Store(self.images, few, None, self.split, network.rows, batch=config.train.batch_size,
                      augment=config.data.augment, device=device)  # fmt: skip
        kept = memory.measure_activations(self.make().to(device), store, config.run.autocast)
        abreast = memory.choose_nodes_per_call(kept, len(network.rows), device)
        stack = NodeStack(self.make, network.rows, config.seed, device, engine=engine, abreast=abreast,
                          autocast=config.run.autocast)  # fmt: skip
        return Orchestrator(self.fabric, stack, network, store, config.gossip, config.train)


def alone(rank: int, config: Config, channels: int, size: int, samples: int | None, engine: str, threads: int,
          folder: str) -> None:  # fmt: skip
    """Peak memory of some steps and an evaluation."""
    run = Case(config, channels, size, samples).run(engine)
    torch.set_num_threads(threads)
    step = walker(run)
    for _ in range(5):
        step()
    examine(run)
    tell(folder, read_peak_memory(run.stack.device))


def random_images(count: int, channels: int, size: int) -> Images:
    """Of all classes equally often."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % CLASSES, tuple(map(str, range(CLASSES))))


def descend(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


def walker(run: Orchestrator) -> Callable[[], None]:
    """Whole steps of a run, one a call."""
    order: list[Tensor] = []

    def step() -> None:
        progress = run.progress
        progress.epoch_step %= progress.steps
        if progress.epoch_step == 0 or not order:
            order[:] = [run.store.order(progress.step - progress.epoch_step, progress.steps)]
        run.train_step(order[0])

    return step


def in_turns(forms: dict[str, Form], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of every form in every round; a turn has so many steps that it can be measured."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        torch.set_num_threads(form.threads)
        for _ in range(1 + WARM_UP_CALLS * (device.type == "cuda")):  # warms up
            form.step()
    steps = dict.fromkeys(forms, 1)
    for turn in range(rounds + 1):
        for name, form in forms.items():
            torch.set_num_threads(form.threads)
            start = time.perf_counter()
            for _ in range(steps[name]):
                form.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = (time.perf_counter() - start) / steps[name]
            if turn:
                seconds[name].append(took)
            else:
                steps[name] = max(1, round(LEAST / took))
    return seconds


def shares(run: Orchestrator, steps: int = 5) -> dict[str, float]:
    """Share of the time of a run that its parts take, evaluations on the way among them as often as the config has them."""
    spent = dict.fromkeys(("network", "rule", "mixing", "data"), 0.0)
    step = walker(run)
    start = time.perf_counter()
    wait = torch.cuda.synchronize if run.stack.device.type == "cuda" else lambda: None
    with (timed(run.stack, "step", spent, "network", wait), timed(run.store, "batch", spent, "data", wait),
          timed(run.gossip, "update", spent, "rule", wait), timed(run.network, "mix", spent, "mixing", wait)):  # fmt: skip
        for _ in range(steps):
            step()
    wait()
    whole = time.perf_counter() - start
    spent["rule"] -= spent["mixing"]
    start = time.perf_counter()
    examine(run)
    wait()
    spent["evaluation"] = (time.perf_counter() - start) * steps / (run.train.evaluate_every * run.progress.steps)
    whole += spent["evaluation"]
    return {name: s / whole for name, s in spent.items()} | {"else": 1 - sum(spent.values()) / whole}


def examine(run: Orchestrator) -> None:
    """An evaluation such as there are on the way."""
    measure(run.stack, run.network, run.store, run.train.evaluate_samples, run.train.evaluate_samples, lambda: False)


@contextmanager
def timed(owner: object, name: str, spent: dict[str, float], part: str, wait: Callable[[], None]):
    """Inside, the time of calls of a method, ``wait`` for the device included, is added to ``spent[part]``."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        wait()
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            wait()
            spent[part] += time.perf_counter() - start

    setattr(owner, name, call)
    yield
    delattr(owner, name)


# ---------------------------------------------------------------------- a process per node


def apart(work: Callable, count: int, *arguments):
    """What ``work`` tells in the first of so many processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (*arguments, folder), nprocs=count)
        return json.loads((Path(folder) / "told.json").read_text())


def tell(folder: str, found: object) -> None:
    (Path(folder) / "told.json").write_text(json.dumps(found))


def node_process(rank: int, config: Config, graph: Graph, channels: int, size: int, rounds: int, folder: str) -> None:
    """Seconds a step where every node is a process with one thread, as in most codes of the field: SGD with momentum, then its
    parameters to its neighbours by gloo, and their average; the processes being warm."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=graph.nodes)
    make = node_maker(config, channels, size, CLASSES)
    images = random_images(config.train.batch_size, channels, size)
    x, y = images.pixels.float().div_(255).contiguous(memory_format=torch.channels_last), images.labels
    (senders, weights), edges = graph.mixing(0).terms[rank], graph.mixing(0).edges
    receivers = edges[edges[:, 0] == rank, 1].tolist()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        descend(model, x, y)
        optimizer.step()
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        got = {j: torch.empty_like(flat) for j in senders if j != rank}
        requests = [dist.isend(flat, j) for j in receivers] + [dist.irecv(T, j) for j, T in got.items()]
        for request in requests:
            request.wait()
        mixed = sum(w * (flat if j == rank else got[j]) for j, w in zip(senders, weights, strict=True))
        for p, part in zip(model.parameters(), mixed.split([p.numel() for p in model.parameters()]), strict=True):
            p.data.copy_(part.view_as(p))

    def measure() -> list[float]:
        model, found = make().to(memory_format=torch.channels_last), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        for _ in range(rounds + 1):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(3):
                step(model, optimizer)
            dist.barrier()
            found.append((time.perf_counter() - start) / 3)
        return found[1:]  # the first one warms up

    plain = lambda m, _, x, v, gamma, beta, *, eps: evonorm_s0(x, v, gamma, beta, m.groups, eps)  # noqa: E731
    with patch.object(norms, "FEW", math.inf), patch.object(norms.EvoNormS0, "_run", plain):
        found = {"process per node, plain norms": measure()}
    keep_memory()
    found["process per node"] = measure()
    if rank == 0:
        tell(folder, found)
    dist.destroy_process_group()


# ---------------------------------------------------------------------- several cases, and tables


def suite(quick: bool = False) -> dict:
    """Every case in a process of its own, so that its peak memory is its own."""
    found: dict = {"machine": describe_machine(), "cases": {}}
    for name, (arguments, samples, nodes) in SUITE.items():
        for n in QUICK.get(name, ()) if quick else nodes:
            print(f"{name}, {n} nodes", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "case.json"
                command = [sys.executable, "-m", "lightning_idkd", "bench", *arguments, "--graph.nodes", str(n), "--samples",
                           str(samples(n)), "--out", str(out), *(["--rounds", "1"] if quick else [])]  # fmt: skip
                subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                [case] = json.loads(out.read_text())["cases"].values()
            found["cases"][f"{name}, n = {n}"] = case
    return found


def tables(found: dict) -> str:
    """In Markdown: a table of rates for every case, and one of shares and memory for all."""
    processor, cores, instructions, version, device = found["machine"]
    lines = [f"{device or processor}, {cores} cores, {instructions}, torch {version}, {time.strftime('%Y-%m-%d')}", ""]
    for name, case in found["cases"].items():
        rates = case["samples_per_second"]
        bare = max(rate["median"] for form, rate in rates.items() if form.startswith("bare loop"))
        count = case["nodes_a_call_of_vmap"]
        abreast = f"vmap takes {count} node{'s' * (count > 1)} a call"
        lines += [f"**{name}**, batch {case['batch']}, {case['parameters']:,} parameters; {abreast}", "",
                  "| form of the step | samples/s | least to most | of the bare loop |", "| --- | --- | --- | --- |"]  # fmt: skip
        for form, rate in sorted(rates.items(), key=lambda item: -item[1]["median"]):
            spread = f"{rate['least']:,.0f} to {rate['most']:,.0f}"
            lines.append(f"| {form} | {rate['median']:,.0f} | {spread} | {rate['median'] / bare:.2f} |")
        lines.append("")
    parts = list(next(iter(found["cases"].values()))["shares"])
    lines += [f"| case | fastest | auto takes | {' | '.join(parts)} | peak memory |", f"|{' --- |' * (len(parts) + 4)}"]
    for name, case in found["cases"].items():
        shown = " | ".join(f"{case['shares'][part]:.1%}" for part in parts)
        lines.append(
            f"| {name} | {case['fastest']} | {case['auto']} | {shown} | {report.format_bytes(case['peak_memory_bytes'])} |"
        )
    return "\n".join(lines) + "\n"
