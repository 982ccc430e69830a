"""Chooses the engine, the number of threads and ``autocast``: those of the config or checkpoint, or the fastest in a
short trial.

A machine runs one trial for each shape of networks and batches, and stores the result in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable

import torch
from lightning.fabric import Fabric

from lightning_idkd.config import Config
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.files import write
from lightning_idkd.machine import cache_folder, count_cores, describe_machine
from lightning_idkd.models import cpu_norms
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.records import report
from lightning_idkd.training.resume import Start

FILE = "engines.json"
EDITION = 3  # increased when the engines change, so that older timings are ignored


def choose_engine(config: Config, start: Start, fabric: Fabric, store: Store, stack: NodeStack,
                  say: Callable[[str], None]) -> tuple[str, int]:  # fmt: skip
    """Set the stack's engine and ``autocast`` and torch's threads, and return engine and threads; all processes choose
    the same.

    A resumed run keeps its engine and threads, whatever the config says. A fork keeps those of its source, unless the
    config names an engine or a number of threads. If the number of processes or the kind of device differs from that of
    the checkpoint, both are chosen again. ``autocast`` enters the result, so both keep it in any case.
    """
    asked, saved = config.run, start.state
    on_cpu = fabric.device.type == "cpu"
    engines = stack.engines() if asked.engine == "auto" else [asked.engine]
    share = max(1, count_cores() // asked.devices)
    threads = [asked.threads] if asked.threads else sorted({1, share}) if on_cpu else [1]
    casts = [False, True] if asked.autocast == "auto" else [asked.autocast]
    if saved and "autocast" in saved:
        casts = [saved["autocast"]]
    norms = cpu_norms.name_backend(fabric.device)
    same_machine = saved and (saved["devices"], saved.get("device", "cpu")) == (fabric.world_size, fabric.device.type)
    if same_machine and (not start.fork or (asked.engine == "auto" and asked.threads is None)):
        choice = saved["engine"], saved["threads"], casts[0]
        stack.nodes_per_call = saved.get("abreast") or stack.nodes_per_call
        if (saved_norms := saved.get("norms", norms)) != norms:
            say(report.format_field("note", f"norms by {saved_norms} so far, by {norms} from here: last bits differ"))
    elif len(engines) * len(threads) * len(casts) == 1:
        choice = engines[0], threads[0], casts[0]
    else:
        choice = try_engines(config, fabric, store, stack, engines, threads, casts, say)
    stack.engine, count, stack.autocast = choice
    torch.set_num_threads(count)
    if on_cpu and (count := asked.devices * count) > count_cores():
        text = f"{count} threads of all processes on {count_cores()} cores wait for each other"
        say(report.format_field("note", text))
    return choice[:2]


def try_engines(config: Config, fabric: Fabric, store: Store, stack: NodeStack, engines: list[str], threads: list[int],
                casts: list[bool], say: Callable[[str], None]) -> tuple[str, int, bool]:  # fmt: skip
    """The fastest engine, number of threads and ``autocast`` for a step, from an earlier trial on this machine or a new
    one."""
    x, y, *more = store.batch(store.order(0, 1), 0)
    shape = [*x.shape], str(x.dtype), store.nodes, fabric.world_size, fabric.device.type, engines, threads
    key = digest(config.resolved["node"], *shape, casts, cpu_norms.name_backend(fabric.device))
    choice = fabric.broadcast(read_timings().get(key))
    if choice is None:
        both = "; with and without autocast" if len(casts) > 1 else ""
        text = f"engines {', '.join(engines)}; threads {', '.join(map(str, threads))}{both}"
        say(report.format_field("timing", text))
        choice = fabric.broadcast(stack.choose(x, y, engines, threads, *more, casts=casts))
        if fabric.is_global_zero:
            remember(key, choice)
    return choice


def read_timings() -> dict[str, list]:
    """The engine and threads of every stored trial, by its digest."""
    try:
        return json.loads((cache_folder() / FILE).read_text())
    except (OSError, ValueError):
        return {}


def digest(*shape: object) -> str:
    """A digest of the shape of a trial, and of this machine."""
    return hashlib.sha256(json.dumps([describe_machine(), EDITION, *shape]).encode()).hexdigest()[:20]


def remember(key: str, choice: tuple[str, int, bool]) -> None:
    """Store a choice in the cache; if the cache cannot be written, the next run times the engines again."""
    with contextlib.suppress(OSError, UserError):
        cache_folder().mkdir(parents=True, exist_ok=True)
        timings = read_timings() | {key: list(choice)}
        write(cache_folder() / FILE, lambda part: part.write_text(json.dumps(timings, indent=1) + "\n"))
