"""How much memory a run will need at its peak, told before it starts, and refused where there is not so much."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_idkd.config import Config
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph
from lightning_idkd.nodes.engines import BATCHED
from lightning_idkd.nodes.layout import trained_parameters
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.records.report import format_bytes
from lightning_idkd.training.gossip_step import block_columns

LATER = 120 * 2**20  # bytes of what is imported for pictures
CACHE = 16 * 2**20  # bytes of activations for every thread beyond which more nodes in a call of vmap only wait for memory
OBJECT = 9 * 2**10  # bytes of a module or a parameter as Python has it
TEMPORARY = 4  # matrices that the algebra of a rule holds at once besides its state
KNOBS = {
    "rows and gradients": "fewer graph.nodes, or a smaller node.network",
    "state of the rule": "a gossip rule with fewer buffers, fewer graph.nodes, or a smaller node.network",
    "algebra of the rule": "a rule that works on blocks of columns (all but NGC, CCL, SGP, compressed and sharpness-aware ones)",
    "activations": "run.engine: loop, or a smaller train.batch_size",
    "answers on the public set": "a limit of data.public, or fewer graph.nodes",
    "checkpoint": "run.devices: 1",
}


def abreast(kept: int, rows: int, device: torch.device) -> int:
    """How many nodes with so many bytes of activations ``vmap`` shall take at once."""
    return rows if device.type != "cpu" else max(1, min(rows, torch.get_num_threads() * CACHE // max(kept, 1)))


def predict(config: Config, node: NodeModule, store: Store, graph: Graph, kept: int, processes: int = 1) -> dict[str, int]:
    """Bytes of every part at the peak, in the process with most rows; ``kept`` are those of a node's activations."""
    parameters, rows = sum(p.numel() for p in trained_parameters(node).values()), -(-graph.nodes // processes)
    frozen = sum(p.numel() for p in node.parameters()) - parameters
    item, rule = (8 if config.run.precision == 64 else 4), config.gossip
    matrix, width = rows * parameters * item, lambda w: w or parameters
    edges = -(-len(graph.mixing(0).edges) // processes)
    state = sum(rows * width(w) for w in rule.widths().values()) + sum(edges * width(w) for w in rule.edge_buffers.values())
    on_device = store.device.type != "cpu"
    at_once = 1 if on_device else config.run.threads or torch.get_num_threads()
    if config.run.engine in (*BATCHED, "auto"):
        at_once = max(at_once, abreast(kept, rows, store.device))
    full = graph.nodes if graph.mixing(0).dense or on_device else rows  # a product with the whole W has all rows in every process
    whole = full * parameters + (edges * parameters if rule.edge_buffers else 0)
    exchange = config.distillation is not None and store.public
    return {
        "program and data": store.pool.nbytes + store.test.nbytes if on_device else resident(),
        "rows and gradients": 2 * matrix + frozen * item + rows * OBJECT * sum(1 for _ in (*node.modules(), *node.parameters())),
        "state of the rule": state * item,
        "algebra of the rule": TEMPORARY * (full * block_columns(graph.nodes, store.device) if rule.in_blocks else whole) * item,
        "activations": at_once * kept,
        "evaluation and pictures": matrix + (0 if on_device else LATER),
        "answers on the public set": rows * store.public * 2 * (store.k + features(node)) * 4 if exchange else 0,
        "checkpoint": (graph.nodes * parameters * item + state * item * processes) if processes > 1 else 0,
    }  # fmt: skip


def activations(node: NodeModule, store: Store, autocast: bool = False) -> int:
    """Bytes that one node keeps from the forward to the backward pass on a batch, and of their gradients the largest, or of what
    frozen layers pass on the largest; it is spent on a trial."""
    kept: dict[int, int] = {}
    passed: list[int] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def see(layer: torch.nn.Module, inputs: tuple, output: object) -> None:
        passed.extend(t.nbytes for t in [output] if isinstance(t, torch.Tensor))

    if any(not p.requires_grad for p in node.parameters()):
        for layer in node.modules():
            layer.register_forward_hook(see)
    x = torch.zeros(store.batch_size, store.channels, store.size, store.size, dtype=next(node.parameters()).dtype)
    x = x.to(store.device, memory_format=torch.channels_last)
    cast = torch.autocast(store.device.type, torch.bfloat16, autocast, cache_enabled=False)
    with torch.random.fork_rng(), saved_tensors_hooks(note, lambda t: t), cast:
        node.training_step((x, torch.full((len(x), store.k), 1 / store.k, dtype=x.dtype, device=x.device)), 0)
    own = {p.untyped_storage().data_ptr() for p in node.parameters()}
    sizes = [nbytes for place, nbytes in kept.items() if place not in own]
    return sum(sizes) + 3 * max([*sizes, *passed], default=0)


def features(node: NodeModule) -> int:
    """How many a sample has."""
    return node.network.head.in_features if node.has_features else 0


def resident() -> int:
    """Bytes of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free(device: torch.device) -> int | None:
    """Bytes that may still be taken, by this process and those beside it; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # a cache of files gives way
        found += [] if most == "max" else [int(most) - taken]
    except (OSError, ValueError, KeyError):
        pass
    return min(found, default=None)


def check(parts: dict[str, int], there: int | None, nodes: int, processes: int) -> None:
    """Refuse a run that would need more than ``there`` is, which so many ``processes`` share."""
    more = processes * (sum(parts.values()) - parts["program and data"])
    if there is not None and more > there:
        name = max(KNOBS, key=lambda part: parts[part])
        raise UserError(
            f"graph.nodes: {nodes} nodes need about {format_bytes(more)} of memory, and {format_bytes(there)} are free; "
            f"{format_bytes(processes * parts[name])} of it are {name}: {KNOBS[name]} would help"
        )
