"""Times steps of several processes beside one process with as many threads, and measures memory.

python tests/benchmarks/processes.py speed [ROUNDS]
python tests/benchmarks/processes.py memory [NODES]
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context

from lightning_idkd.analysis.benchmark import Case, build_step
from lightning_idkd.command.topology import expect_inputs
from lightning_idkd.config.parse import configure
from lightning_idkd.data.store import Store
from lightning_idkd.links import Links
from lightning_idkd.machine import describe_machine
from lightning_idkd.network import Network
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.training import memory
from lightning_idkd.training.checkpoint import gather
from lightning_idkd.training.launch import keep_memory
from lightning_idkd.training.orchestrator import Orchestrator
from lightning_idkd.training.record import measure_nodes, read_peak_memory

RESNET = ("--config", "configs/ring_cifar10.yaml", "--data.image_size", "16")
CASES = {
    "ring_digits": ("--config", "configs/ring_digits.yaml"),
    "ResNet-8, 16x16": (
        "--config",
        "configs/ring_cifar10.yaml",
        "--node.network.depth",
        "8",
        "--data.image_size",
        "16",
    ),
    "ResNet-20, 16x16": ("--config", "configs/ring_cifar10.yaml", "--data.image_size", "16"),
}
SECONDS = 1.0  # of a turn, about


def build_run(case: Case, rank: int, world: int, engine: str) -> Orchestrator:
    """The run of process ``rank``, on samples of noise."""
    config, device = case.config, case.fabric.device
    network = Network(case.graph, rank, world, Links(case.graph))
    store = Store(case.samples, case.samples, None, case.split, network.rows, batch=config.train.batch_size,
                  augment=config.data.augment, device=device)  # fmt: skip
    activations = memory.measure_activations(case.make(), store)
    per_call = memory.choose_nodes_per_call(activations, len(network.rows), device)
    stack = NodeStack(case.make, network.rows, config.seed, device, engine=engine, nodes_per_call=per_call)
    return Orchestrator(case.fabric, stack, network, store, config.gossip, config.train)


def make_case(*arguments: str) -> Case:
    """A case without distillation, on samples of noise."""
    config = configure([*arguments, "--logger", "null", "--distillation", "null", "--run.engine", "loop"])
    return Case(config, expect_inputs(config), None)


def join(rank: int, world: int, folder: str) -> None:
    keep_memory(whole_rows=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)


def start(work: Callable[..., None], world: int, *arguments: object) -> list:
    """Start ``work(rank, world, folder, *arguments)`` in new processes."""
    folder = tempfile.mkdtemp()
    context = get_context("spawn")
    processes = [context.Process(target=work, args=(rank, world, folder, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


# ---------------------------------------------------------------------- speed


def time_step(step: Callable[[], None], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def take_turns(rank: int, world: int, folder: str, arguments: tuple, engines: tuple, steps: int, rounds: int, turn,
               seconds) -> None:  # fmt: skip
    """Time each engine in every round, between two waits for the process that starts these."""
    join(rank, world, folder)
    case = make_case(*arguments)
    torch.set_num_threads(1)
    run_steps = {engine: build_step(build_run(case, rank, world, engine)) for engine in engines}
    for _ in range(rounds + 1):
        for engine, step in run_steps.items():
            turn.wait()
            took = time_step(step, steps)
            turn.wait()
            if rank == 0:
                seconds.put((engine, took))


def measure_speed(rounds: int) -> None:
    """Print samples a second of one process with two threads and of two with one thread each, in turns."""
    print("| case | form | samples/s | least to most | of the best single process |\n| --- | --- | --- | --- | --- |")
    for name, arguments in CASES.items():
        case, context = make_case(*arguments), get_context("spawn")
        one = {engine: build_step(build_run(case, 0, 1, engine)) for engine in ("parallel", "vmap")}
        torch.set_num_threads(2)
        one["vmap"]()
        steps = max(1, round(SECONDS / time_step(one["vmap"], 2)))
        engines, turn, seconds = ("loop", "vmap"), context.Barrier(3), context.Queue()
        processes = start(take_turns, 2, arguments, engines, steps, rounds, turn, seconds)
        taken: dict[str, list[float]] = {}
        for turns in range(rounds + 1):
            for engine, step in one.items():
                took = time_step(step, steps)
                if turns:  # the first round warms up
                    taken.setdefault(f"one process, {engine}", []).append(took)
            for _ in engines:
                turn.wait()
                turn.wait()
                engine, took = seconds.get()
                if turns:
                    taken.setdefault(f"two processes, {engine}", []).append(took)
        for process in processes:
            process.join()
        samples = case.graph.nodes * case.config.train.batch_size
        best = min(statistics.median(times) for form, times in taken.items() if form.startswith("one"))
        for form, times in taken.items():
            median = statistics.median(times)
            spread = f"{samples / max(times):,.0f} to {samples / min(times):,.0f}"
            print(f"| {name} | {form} | {samples / median:,.0f} | {spread} | {best / median:.2f} |", flush=True)


# ---------------------------------------------------------------------- memory


def forget_peak() -> None:
    """Return free memory to the system, and let the peak of this process begin at what it uses now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory_of(rank: int, world: int, folder: str, nodes: int) -> None:
    """Print this process's peak memory in each part of a run, above what it uses before it has nodes."""
    join(rank, world, folder)
    case = make_case(*CASES["ring_digits"], "--graph.nodes", str(nodes), "--node.network.width", "64")
    torch.set_num_threads(1)
    forget_peak()
    before = read_peak_memory(case.fabric.device)
    run = build_run(case, rank, world, "loop")
    step, device = build_step(run), run.stack.device
    for part in ("two steps", "an evaluation", "a checkpoint"):
        forget_peak()
        dist.barrier()
        if part == "two steps":
            step()
            step()
        elif part == "an evaluation":
            measure_nodes(run.stack, run.network, run.store, 64, 64, lambda: False)
        elif part == "a checkpoint":
            gather(run)
        peak = read_peak_memory(device)
        for process in range(world):  # one line after the other
            dist.barrier()
            if process == rank:
                sizes = (size // 2**20 for size in (run.stack.X.nbytes, peak - before, peak))
                print(f"| {part} | {rank} |", " | ".join(map(str, sizes)), "|", flush=True)
    if rank == 0:
        predicted = memory.predict(case.config, case.make(), run.store, case.graph, 0, world)
        for part in ("state of the rule", "algebra of the rule", "evaluation and pictures", "checkpoint"):
            print(f"predicted, {part}: {predicted[part] // 2**20} MiB")


def measure_memory(nodes: int) -> None:
    print("| part | process | its rows, MiB | peak above the start, MiB | peak, MiB |\n| --- | --- | --- | --- | --- |")
    for process in start(measure_memory_of, 4, nodes):
        process.join()


if __name__ == "__main__":
    print(*describe_machine(), sep=", ")
    what, *more = sys.argv[1:]
    {"speed": lambda: measure_speed(int((*more, 7)[0])), "memory": lambda: measure_memory(int((*more, 256)[0]))}[what]()
