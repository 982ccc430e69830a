"""Times a step of an experiment, its parts, and other ways to do the same work, all in turns in one process."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_idkd.config import Config
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.partition import IID, partition
from lightning_idkd.data.samples import Samples
from lightning_idkd.data.store import Store
from lightning_idkd.graph import Graph
from lightning_idkd.links import Links
from lightning_idkd.machine import describe_machine
from lightning_idkd.models import norms
from lightning_idkd.models.formulas import evonorm_s0
from lightning_idkd.network import Network
from lightning_idkd.nodes.engines import WARM_UP_CALLS
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.records import report
from lightning_idkd.training import memory
from lightning_idkd.training.build import node_maker
from lightning_idkd.training.launch import keep_memory, launch
from lightning_idkd.training.orchestrator import Orchestrator
from lightning_idkd.training.record import measure_nodes, read_peak_memory

CLASSES = 10
SHORTEST_TURN = 0.3
"""Seconds that a turn of one form takes at least; its number of steps follows from them."""
RESNET = ("--config", "ring_cifar10")
RESNET18 = '{"class_path": "TorchModule", "init_args": {"path": "torchvision.models.resnet18"}}'
SUITE = {
    "digits CNN": (("--config", "ring_digits"), lambda n: 90 * n, (16, 64, 256, 1024)),
    "ResNet-20-EvoNorm": ((*RESNET, "--run.autocast", "auto"), lambda n: 50_000, (4, 16, 64)),
    "ResNet-18": ((*RESNET, "--node.network", RESNET18), lambda n: 50_000, (4,)),
}
"""Per case: arguments, number of training samples as a function of the number of nodes n, and the numbers of nodes.
A node with digits has as many samples as each of 16 nodes that share the whole set."""
QUICK = {"digits CNN": (4, 8)}
"""The cases and numbers of nodes of ``idkd bench --quick``."""
MOST_PROCESSES = 16
"""The form with a process per node is timed up to this number of nodes."""


@dataclass
class Form:
    """One way to do a step's work."""

    step: Callable[[], object]
    threads: int
    run: Orchestrator | None = None


def bench(config: Config, inputs: Inputs, rounds: int = 5, samples: int | None = None) -> dict:
    """Measure the speed of every form of a step on samples of noise, the shares of its parts and its peak memory.

    Speed is in samples a second: median, least and most over the rounds. The forms are each engine; where the config
    has faults, each engine without them; a ``bare loop`` of forward and backward passes over models that share
    nothing; ``one model`` on the same number of samples; and, up to 16 nodes, a ``process per node``, where neighbours
    exchange their models by gloo: once with our layers and memory settings, and once with autograd's norms and default
    settings. The result also names the form that ``run.engine auto`` chooses. The shares are those of the fastest
    engine, and its peak memory (bytes) is measured in a new process.
    """
    case = Case(config, inputs, samples)
    fabric, n, b, cores = case.fabric, case.graph.nodes, config.train.batch_size, os.cpu_count() or 1
    counts = sorted({1, cores}) if fabric.device.type == "cpu" else [1]
    trial = case.build_run("auto")
    choice = trial.stack.engines() if config.run.engine == "auto" else [config.run.engine]
    casts = [False, True] if config.run.autocast == "auto" else [config.run.autocast]
    forms: dict[str, Form] = {}
    for engine in sorted({*choice, "vmap"}) if config.run.engine == "auto" else choice:
        runs = [case.build_run(engine, cast) for cast in casts]
        faultless = case.build_run(engine, casts[-1], faults=False) if config.faults else None
        for threads in counts:
            if (engine, threads) != ("parallel", 1):
                for run in runs:
                    name = name_form(engine, threads, run.stack.autocast)
                    forms[name] = Form(build_step(run), threads, run)
                if faultless:
                    forms[name_form(f"{engine} without faults", threads)] = Form(build_step(faultless), threads)
    x, y, *more = run.store.batch(run.store.order(0, 1), 0)
    models = [case.make().to(fabric.device, memory_format=torch.channels_last) for _ in range(n)]

    def loop() -> None:
        for i, model in enumerate(models):
            compute_gradient(model, x[i], y[i])

    for threads in counts:
        forms[name_form("bare loop", threads)] = Form(loop, threads)
        one_model = lambda: compute_gradient(models[0], x.flatten(0, 1), y.flatten(0, 1))  # noqa: E731
        forms[name_form("one model", threads)] = Form(one_model, threads)
    if fabric.device.type == "cuda":
        one = NodeStack(case.make, range(1), config.seed, fabric.device, engine="graph", autocast=casts[-1])
        forms["one model, graph"] = Form(lambda: one.step(x.flatten(0, 1)[None], y.flatten(0, 1)[None], 0), 1)
    seconds = time_forms(forms, rounds, fabric.device)
    if n <= MOST_PROCESSES and fabric.device.type == "cpu":
        seconds |= run_in_processes(time_node_process, n, config, case.graph, inputs, rounds)
    rates = {name: sorted(n * b / s for s in times) for name, times in seconds.items()}
    engines = [name for name, form in forms.items() if form.run]
    fastest = max(engines, key=lambda name: statistics.median(rates[name]))
    form = forms[fastest]
    chosen = name_form(*trial.stack.choose(x, y, choice, counts, *more, casts=casts))
    torch.set_num_threads(form.threads)
    return {
        "nodes": n,
        "batch": b,
        "parameters": run.stack.parameters,
        "nodes_a_call_of_vmap": run.stack.nodes_per_call,
        "samples_per_second": {
            name: {"median": statistics.median(r), "least": r[0], "most": r[-1]} for name, r in rates.items()
        },
        "fastest": fastest,
        "auto": chosen,
        "shares": measure_shares(form.run),
        "peak_memory_bytes": run_in_processes(
            measure_peak_memory,
            1,
            config,
            inputs,
            samples,
            form.run.stack.engine,
            form.threads,
            form.run.stack.autocast,
        ),
    }


def name_form(form: str, threads: int, autocast: bool = False) -> str:
    """The name of a form with its number of threads, and whether it runs in bfloat16."""
    return f"{form}{' bfloat16' if autocast else ''}, {threads} thread{'' if threads == 1 else 's'}"


class Case:
    """An experiment on samples of noise."""

    def __init__(self, config: Config, inputs: Inputs, samples: int | None):
        self.config, self.graph = config, config.graph.build(config.seed)
        self.fabric = launch(replace(config.run, devices=1))
        self.make = node_maker(config, inputs, CLASSES)
        n = self.graph.nodes
        self.samples = make_samples(max(samples or 40 * n, 2 * n * config.train.batch_size), inputs)
        self.split = partition(IID(), self.samples.labels.numpy(), n, config.seed, config.data.validation)

    def build_run(self, engine: str, autocast: bool = False, faults: bool = True) -> Orchestrator:
        """Build the run of this experiment with one engine, with or without autocast and the faults of its config."""
        config, device = self.config, self.fabric.device
        links = Links(self.graph, config.faults if faults else [], config.seed, config.gossip.takes)
        network = Network(self.graph, links=links)
        test = self.samples[torch.arange(min(len(self.samples) // 4, 10_000))]  # as large a part as in the digits
        store = Store(self.samples, test, None, self.split, network.rows, batch=config.train.batch_size,
                      augment=config.data.augment, device=device)  # fmt: skip
        activations = memory.measure_activations(self.make().to(device), store, autocast)
        nodes_per_call = memory.choose_nodes_per_call(activations, len(network.rows), device)
        stack = NodeStack(self.make, network.rows, config.seed, device, engine=engine, nodes_per_call=nodes_per_call,
                          autocast=autocast)  # fmt: skip
        clock = None if config.clock is None else config.clock.build(self.graph, config.seed)
        return Orchestrator(self.fabric, stack, network, store, config.gossip, config.train, callbacks=[*links.faults],
                            clock=clock)  # fmt: skip


def make_samples(count: int, inputs: Inputs) -> Samples:
    """``count`` samples of noise, with all classes equally often; few of them differ, which no speed depends on."""
    index = torch.arange(count)
    values = inputs.draw_noise(256)[index % 256]
    return Samples(values, index % CLASSES, tuple(map(str, range(CLASSES))), inputs=inputs)


def compute_gradient(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Run a forward and a backward pass."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()


def build_step(run: Orchestrator) -> Callable[[], None]:
    """A function that does the next whole step of ``run`` at each call, epoch after epoch."""
    order: list[Tensor] = []

    def step() -> None:
        progress = run.progress
        progress.epoch_step %= progress.steps
        if progress.epoch_step == 0 or not order:
            order[:] = [run.store.order(progress.step - progress.epoch_step, progress.steps)]
        run.train_step(order[0])

    return step


def evaluate(run: Orchestrator) -> None:
    """Run an evaluation as it happens during training."""
    samples = run.train.evaluate_samples
    measure_nodes(run.stack, run.network, run.store, samples, samples, lambda: False)


# ---------------------------------------------------------------------- measurements


def time_forms(forms: dict[str, Form], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds a step of every form in every round; each has one turn a round, of :data:`SHORTEST_TURN` or more."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    warm_up = 1 + (WARM_UP_CALLS if device.type == "cuda" else 0)
    for form in forms.values():
        torch.set_num_threads(form.threads)
        for _ in range(warm_up):
            form.step()
    steps = dict.fromkeys(forms, 1)
    for turn in range(rounds + 1):  # turn 0 measures how many steps the others need
        for name, form in forms.items():
            torch.set_num_threads(form.threads)
            start = time.perf_counter()
            for _ in range(steps[name]):
                form.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            per_step = (time.perf_counter() - start) / steps[name]
            if turn:
                seconds[name].append(per_step)
            else:
                steps[name] = max(1, round(SHORTEST_TURN / per_step))
    return seconds


def measure_shares(run: Orchestrator, steps: int = 5) -> dict[str, float]:
    """The share of a run's time that each part takes, with evaluations as often as the config asks for."""
    spent = dict.fromkeys(("network", "rule", "mixing", "data"), 0.0)
    step = build_step(run)
    wait = torch.cuda.synchronize if run.stack.device.type == "cuda" else lambda: None
    start = time.perf_counter()
    with (time_calls(run.stack, "step", spent, "network", wait), time_calls(run.store, "batch", spent, "data", wait),
          time_calls(run.gossip, "update", spent, "rule", wait),
          time_calls(run.network, "mix", spent, "mixing", wait)):  # fmt: skip
        for _ in range(steps):
            step()
    wait()
    whole = time.perf_counter() - start
    spent["rule"] -= spent["mixing"]
    start = time.perf_counter()
    evaluate(run)
    wait()
    spent["evaluation"] = (time.perf_counter() - start) * steps / (run.train.evaluate_every * run.progress.steps)
    whole += spent["evaluation"]
    return {name: s / whole for name, s in spent.items()} | {"else": 1 - sum(spent.values()) / whole}


@contextmanager
def time_calls(
    owner: object, method: str, spent: dict[str, float], part: str, wait: Callable[[], None]
) -> Iterator[None]:
    """Within the block, add the seconds of every call of ``owner.method`` to ``spent[part]``.

    ``wait`` returns when the device has done all its work.
    """
    original = getattr(owner, method)

    def call(*args, **kwargs):
        wait()
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            wait()
            spent[part] += time.perf_counter() - start

    setattr(owner, method, call)
    try:
        yield
    finally:
        delattr(owner, method)  # the class's own method shows again


@contextmanager
def replace_attributes(owner: object, **values: object) -> Iterator[None]:
    """Within the block, ``owner`` has other values of some attributes."""
    originals = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


# ---------------------------------------------------------------------- new processes


def run_in_processes(work: Callable[..., None], count: int, *arguments: object) -> Any:
    """Run ``work(rank, *arguments, folder)`` in ``count`` new processes; returns what :func:`write_result` got."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (*arguments, folder), nprocs=count)
        return json.loads((Path(folder) / "result.json").read_text())


def write_result(folder: str, result: object) -> None:
    """Write the result that :func:`run_in_processes` returns."""
    (Path(folder) / "result.json").write_text(json.dumps(result))


def measure_peak_memory(rank: int, config: Config, inputs: Inputs, samples: int | None, engine: str, threads: int,
                        autocast: bool, folder: str) -> None:  # fmt: skip
    """Write the peak memory, in bytes, of five steps and an evaluation."""
    run = Case(config, inputs, samples).build_run(engine, autocast)
    torch.set_num_threads(threads)
    step = build_step(run)
    for _ in range(5):
        step()
    evaluate(run)
    write_result(folder, read_peak_memory(run.stack.device))


def time_node_process(rank: int, config: Config, graph: Graph, inputs: Inputs, rounds: int, folder: str) -> None:
    """Write the seconds a step where every node is a process with one thread, as in most codes of the field.

    In a step a node does SGD with momentum, sends its parameters to its neighbours by gloo, and averages what it
    receives.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=graph.nodes)
    make = node_maker(config, inputs, CLASSES)
    samples = make_samples(config.train.batch_size, inputs)
    index = torch.arange(len(samples))
    inputs = inputs.measure(samples.values, index, "cpu", torch.float32)
    x, y = inputs.scale(inputs.arrange(samples.values)), samples.labels
    (senders, weights), edges = graph.mixing(0).terms[rank], graph.mixing(0).edges
    receivers = edges[edges[:, 0] == rank, 1].tolist()

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        compute_gradient(model, x, y)
        optimizer.step()
        flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        received = {j: torch.empty_like(flat) for j in senders if j != rank}
        requests = [dist.isend(flat, j) for j in receivers] + [dist.irecv(T, j) for j, T in received.items()]
        for request in requests:
            request.wait()
        mixed = sum(w * (flat if j == rank else received[j]) for j, w in zip(senders, weights, strict=True))
        for p, part in zip(model.parameters(), mixed.split([p.numel() for p in model.parameters()]), strict=True):
            p.data.copy_(part.view_as(p))

    def time_steps() -> list[float]:
        model, seconds = make().to(memory_format=torch.channels_last), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        for _ in range(rounds + 1):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(3):
                step(model, optimizer)
            dist.barrier()
            seconds.append((time.perf_counter() - start) / 3)
        return seconds[1:]  # the first round warms up

    plain = lambda m, _, x, v, gamma, beta, *, eps: evonorm_s0(x, v, gamma, beta, m.groups, eps)  # noqa: E731
    with replace_attributes(norms, SMALL=math.inf), replace_attributes(norms.EvoNormS0, _run=plain):
        seconds = {"process per node, plain norms": time_steps()}
    keep_memory()
    seconds["process per node"] = time_steps()
    if rank == 0:
        write_result(folder, seconds)
    dist.destroy_process_group()


# ---------------------------------------------------------------------- several cases, and tables


def run_suite(quick: bool = False) -> dict:
    """Measure every case of the suite in a new process, so that its peak memory is its own."""
    cases = {}
    for name, (arguments, samples, nodes) in SUITE.items():
        for n in QUICK.get(name, ()) if quick else nodes:
            print(f"{name}, {n} nodes", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "case.json"
                command = [sys.executable, "-m", "lightning_idkd", "bench", *arguments,
                           "--graph.nodes", str(n), "--samples", str(samples(n)),
                           "--out", str(out), *(["--rounds", "1"] if quick else [])]  # fmt: skip
                subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
                [case] = json.loads(out.read_text())["cases"].values()
            cases[f"{name}, n = {n}"] = case
    return {"machine": describe_machine(), "cases": cases}


def format_tables(results: dict) -> str:
    """Format results as Markdown: a table of rates for every case, and one of shares and peak memory for all cases."""
    processor, cores, instructions, version, device = results["machine"]
    lines = [f"{device or processor}, {cores} cores, {instructions}, torch {version}, {time.strftime('%Y-%m-%d')}", ""]
    for name, case in results["cases"].items():
        lines += [*format_rates(name, case), ""]
    parts = list(next(iter(results["cases"].values()))["shares"])
    lines += [f"| case | fastest | auto takes | {' | '.join(parts)} | peak memory |", f"|{' --- |' * (len(parts) + 4)}"]
    for name, case in results["cases"].items():
        shares = " | ".join(f"{case['shares'][part]:.1%}" for part in parts)
        memory_size = report.format_bytes(case["peak_memory_bytes"])
        lines.append(f"| {name} | {case['fastest']} | {case['auto']} | {shares} | {memory_size} |")
    return "\n".join(lines) + "\n"


def format_rates(name: str, case: dict) -> list[str]:
    """The lines of the table of rates of one case, the fastest form first."""
    rates = case["samples_per_second"]
    bare = max(rate["median"] for form, rate in rates.items() if form.startswith("bare loop"))
    count = case["nodes_a_call_of_vmap"]
    at_once = f"vmap takes {count} node{'' if count == 1 else 's'} a call"
    lines = [f"**{name}**, batch {case['batch']}, {case['parameters']:,} parameters; {at_once}", "",
             "| form of the step | samples/s | least to most | of the bare loop |",
             "| --- | --- | --- | --- |"]  # fmt: skip
    for form, rate in sorted(rates.items(), key=lambda item: -item[1]["median"]):
        spread = f"{rate['least']:,.0f} to {rate['most']:,.0f}"
        lines.append(f"| {form} | {rate['median']:,.0f} | {spread} | {rate['median'] / bare:.2f} |")
    return lines
