"""Predicts how much memory a run needs at its peak, and refuses a run that does not fit."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_idkd.config import Config
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.graph import Graph
from lightning_idkd.network import block_columns
from lightning_idkd.nodes.engines import BATCHED
from lightning_idkd.nodes.layout import trained_parameters
from lightning_idkd.nodes.node import NodeModule
from lightning_idkd.records.report import format_bytes

PICTURE_LIBRARIES = 120 * 2**20  # bytes of the libraries that are imported for pictures
CACHE_BYTES = 16 * 2**20  # of activations per thread; with more nodes in a call of vmap, threads wait for memory
OBJECT = 9 * 2**10  # bytes of the Python object of a module or a parameter
TEMPORARY = 4  # matrices that the algebra of a rule holds at the same time, besides its state
ADVICE = {
    "rows and gradients": "fewer graph.nodes, or a smaller node.network",
    "state of the rule": "a gossip rule with fewer buffers, fewer graph.nodes, or a smaller node.network",
    "algebra of the rule": (
        "a rule that works on blocks of columns (all but NGC, CCL, SGP, compressed and sharpness-aware ones, and "
        "Robust unless its aggregator is CoordinateTrimmedMean or CoordinateMedian)"
    ),
    "activations": "run.engine: loop, or a smaller train.batch_size",
    "answers on the public set": "a limit of data.public, or fewer graph.nodes",
    "checkpoint": "run.devices: 1",
}
"""How a user can reduce each part."""


def choose_nodes_per_call(activations: int, rows: int, device: torch.device) -> int:
    """Number of nodes that ``vmap`` takes in one call, if each node needs ``activations`` bytes for its activations."""
    if device.type != "cpu":
        return rows
    return max(1, min(rows, torch.get_num_threads() * CACHE_BYTES // max(activations, 1)))


def predict(config: Config, node: NodeModule, store: Store, graph: Graph, activations: int,
            processes: int = 1) -> dict[str, int]:  # fmt: skip
    """Bytes of every part at the peak, in the first process: it has the most rows, and alone gathers checkpoints.

    Args:
        activations: bytes of one node's activations, see :func:`measure_activations`.
    """
    parameters, rows = sum(p.numel() for p in trained_parameters(node).values()), -(-graph.nodes // processes)
    frozen = sum(p.numel() for p in node.parameters()) - parameters
    item, rule = (8 if config.run.precision == 64 else 4), config.gossip
    matrix, edges = rows * parameters * item, -(-len(graph.mixing(0).edges) // processes)
    state = sum(rows * (width or parameters) for width in rule.widths().values())
    ages = 1 + max((fault.max_age for fault in config.faults if fault.max_age is not None), default=-1)
    state += ages * rows * parameters
    state += sum(edges * (width or parameters) for width in rule.edge_buffers.values())
    on_device = store.device.type != "cpu"
    at_once = 1 if on_device else config.run.threads or torch.get_num_threads()
    if config.run.engine in (*BATCHED, "auto"):
        at_once = max(at_once, choose_nodes_per_call(activations, rows, store.device))
    # attacks take whole rows, and several processes exchange whole rows
    lies = any(fault.attack is not None for fault in config.faults)
    in_blocks = rule.in_blocks and not lies and processes == 1
    block = block_columns(graph.nodes, store.device) if in_blocks else parameters
    algebra = rows * block + (edges * parameters if rule.edge_buffers and not rule.in_blocks else 0)
    # the product with a dense W needs the rows of all nodes in every process, and so do some attacks
    needs_all = graph.mixing(0).dense or on_device or lies
    received = (graph.nodes - rows) * block if needs_all else 0
    if "receive" in rule.sends:
        received += rows * graph.mixing(0).received[0].shape[1] * block
    exchanges = config.distillation is not None and store.public
    outputs = rows * store.public * 2 * (store.k + count_features(node)) * 4
    objects = sum(1 for _ in node.modules()) + sum(1 for _ in node.parameters())
    return {
        "program and data": store.pool.nbytes + store.test.nbytes if on_device else read_resident_memory(),
        "rows and gradients": 2 * matrix + frozen * item + rows * OBJECT * objects,
        "state of the rule": state * item,
        "algebra of the rule": (TEMPORARY * algebra + received) * item,
        "activations": at_once * activations,
        "evaluation and pictures": matrix * min(processes, 2) + (0 if on_device else PICTURE_LIBRARIES),
        "answers on the public set": outputs if exchanges else 0,
        "checkpoint": (graph.nodes * parameters * item + state * item * processes) if processes > 1 else 0,
    }


def measure_activations(node: NodeModule, store: Store, autocast: bool = False) -> int:
    """Bytes that one node needs for a training step on a batch, besides its parameters and their gradients.

    These are the tensors that it keeps from the forward to the backward pass, and three more like the largest of them
    (or like the largest output of a frozen layer). Do not use the node afterwards: a forward pass may have
    changed its norm statistics.
    """
    saved_bytes: dict[int, int] = {}
    outputs: list[int] = []

    def add_saved(t: torch.Tensor) -> torch.Tensor:
        saved_bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    def add_output(layer: torch.nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output.nbytes)

    if any(not p.requires_grad for p in node.parameters()):
        for layer in node.modules():
            layer.register_forward_hook(add_output)
    batch = tuple(t[0].clone() for t in store.batch(store.order(0, 1), 0))  # a view keeps the batches of all nodes
    cast = torch.autocast(store.device.type, torch.bfloat16, autocast, cache_enabled=False)
    with torch.random.fork_rng(), saved_tensors_hooks(add_saved, lambda t: t), cast:
        node.training_step(batch, 0)
    parameters = {p.untyped_storage().data_ptr() for p in node.parameters()}
    sizes = [nbytes for address, nbytes in saved_bytes.items() if address not in parameters]
    return sum(sizes) + 3 * max([*sizes, *outputs], default=0)


def count_features(node: NodeModule) -> int:
    """Number of features of a sample; 0 if the network offers none."""
    return node.network.head.in_features if node.has_features else 0


def read_resident_memory() -> int:
    """Bytes of this process now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_free_memory(device: torch.device) -> int | None:
    """Bytes that this process and its siblings may still take; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # cached files give way
        if limit != "max":
            limits.append(int(limit) - taken)
    except (OSError, ValueError, KeyError):
        pass  # not Linux, or no memory limit
    return min(limits, default=None)


def require_memory(parts: dict[str, int], free: int | None, nodes: int, processes: int) -> None:
    """Refuse a run that needs more than the ``free`` bytes, which its ``processes`` share.

    Args:
        parts: bytes of a process, as :func:`predict` returns them.
    """
    of_all = {part: size * (1 if part == "checkpoint" else processes) for part, size in parts.items()}
    needed = sum(of_all.values()) - of_all["program and data"]
    if free is not None and needed > free:
        largest = max(ADVICE, key=lambda part: of_all[part])
        raise UserError(
            f"graph.nodes: {nodes} nodes need about {format_bytes(needed)} of memory, "
            f"and {format_bytes(free)} are free; "
            f"{format_bytes(of_all[largest])} of it are {largest}: {ADVICE[largest]} would help"
        )
