"""Saves a run to a checkpoint, gathered from all processes, and restores it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_idkd.callback import Calibration, Distillation, Fault
from lightning_idkd.clock import Clock
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.files import describe_type, is_number
from lightning_idkd.labels import Labels
from lightning_idkd.models import cpu_norms
from lightning_idkd.network import Network
from lightning_idkd.nodes.engines import BATCHED
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.training.async_step import AsyncStep
from lightning_idkd.training.gossip_step import GossipStep
from lightning_idkd.training.hooks import Hooks
from lightning_idkd.training.progress import Progress
from lightning_idkd.training.record import Recorder
from lightning_idkd.training.resume import ROWS


class Parts(Protocol):
    """The parts of a run that a checkpoint holds."""

    stack: NodeStack
    network: Network
    store: Store
    gossip: GossipStep
    distillation: Distillation | None
    clock: Clock | None
    hooks: Hooks
    progress: Progress
    recorder: Recorder
    header: dict


def gather(run: Parts) -> dict | None:
    """Gather everything that a resumed run needs in the first process; None in the others."""
    network, store, stack, gossip = run.network, run.store, run.stack, run.gossip
    distilled = soft_targets = None
    if store.distilled is not None:
        distilled = []
        for labels in (labels.to("cpu") for labels in store.distilled):
            weights = () if labels.weights is None else (labels.weights,)
            distilled.append((labels.index, labels.probabilities, *weights))
        distilled = network.collect_objects(distilled)
    if store.soft_targets is not None:
        targets, weight = store.soft_targets
        soft_targets = network.collect_objects([soft.cpu() for soft in targets]), weight
    callbacks = []
    for callback in run.hooks.callbacks:
        name = type(callback).__name__
        callbacks.append((name, to_storable(callback.state_dict(), f"callbacks: {name}: state_dict()")))
    state = run.progress.state() | {
        "version": 1,
        "layout": stack.describe(),
        "images": store.describe(),
        "edges": torch.from_numpy(network.graph.mixing(0).edges),
        "device": stack.device.type,
        "engine": stack.engine,
        "threads": torch.get_num_threads(),
        "autocast": stack.autocast,
        "abreast": stack.nodes_per_call if stack.engine in BATCHED else None,
        "norms": cpu_norms.name_backend(stack.device),
        "devices": network.world,
        "from": run.header.get("from"),
        "X": network.collect(stack.X),
        "frozen": stack.frozen,
        "buffers": {k: network.collect(b) for k, b in stack.buffers.items()},
        "rule": {k: network.collect(b) for k, b in gossip.buffers.items()},
        "rule_edges": {k: network.collect_edges(v) for k, v in gossip.edge_buffers.items()},
        "distilled": distilled,
        "answers": soft_targets,
        "teacher": None if run.distillation is None else run.distillation.teacher.state_dict(run),
        "generation": (store.generation, store.generation_start),
        "missed": network.collect(store.missed.T.contiguous()),
        "counts": network.counts(),
        "loss": network.collect(run.recorder.loss[:, None]),
        "seconds": run.recorder.elapsed(),
        "callbacks": callbacks,
        **({"events": gossip.state_dict()} if isinstance(gossip, AsyncStep) else {}),
        **({"late": network.late_rows(), "arrivals": torch.from_numpy(run.clock.arrivals)} if network.history else {}),
        **({} if run.clock is None else {"time": torch.from_numpy(run.clock.time), "step_began": run.clock.began}),
    }
    return state if network.rank == 0 else None


def to_storable(value: Any, what: str) -> Any:
    """Convert a callback's state to values that a checkpoint can hold; ``what`` names the state in messages.

    Raises:
        UserError: the state has a value that a checkpoint, which is read without running code, cannot hold.
    """
    if isinstance(value, dict):
        return {key: to_storable(v, f"{what}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_storable(v, f"{what}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, str)) or type(value) is float:
        return value
    if is_number(value):
        return value.item()
    raise UserError(
        f"{what} is {describe_type(value)}; allowed: tensors, numbers, text, true, false, null, "
        "and lists and dicts of these"
    )


def share_rows(state: dict | None, network: Network) -> dict:
    """The checkpoint with the rows of this process only; the first process, which alone has all rows, sends them.

    Args:
        state: all of the checkpoint in the first process; in the others, without the parts that have rows.
    """
    if network.world == 1:
        return state
    if network.rank:
        return state | network.transport.exchange_objects({}, [0])[0]
    for q in network.transport.others:  # one after the other, so that one copy of rows is held at a time
        network.transport.exchange_objects({q: take_rows(state, network, network.blocks[q])}, [])
    return state | take_rows(state, network, network.rows)


def take_rows(state: dict, network: Network, rows: range) -> dict:
    """The parts of a checkpoint that have rows, with those of some nodes only; copies, which are sent whole."""
    mine = slice(rows.start, rows.stop)
    edges = torch.from_numpy(network.graph.mixing(0).edges)
    start_here = (edges[:, 0] >= rows.start) & (edges[:, 0] < rows.stop)
    take = lambda T: T[mine].clone()  # noqa: E731
    taken = {"X": take(state["X"]), "loss": take(state["loss"])}
    taken |= {part: {k: take(T) for k, T in state[part].items()} for part in ("buffers", "rule")}
    taken["rule_edges"] = {k: T[start_here] for k, T in state["rule_edges"].items()}
    if "missed" in state:
        taken["missed"] = take(state["missed"])
    if state["distilled"] is not None:
        taken["distilled"] = state["distilled"][mine]
    if state["answers"] is not None:
        taken["answers"] = state["answers"][0][mine], state["answers"][1]
    return {part: taken.get(part) for part in ROWS if part in state}


def restore(run: Parts, state: dict, lines: list[dict], distillation: bool = True, fork: bool = False) -> None:
    """Continue from ``state``.

    Args:
        state: a checkpoint with the rows of this process.
        lines: metrics of the run that wrote the checkpoint.
        distillation: whether training continues with the distilled labels of the checkpoint.
        fork: whether this is another run than the one that wrote the checkpoint.

    Raises:
        UserError: the checkpoint is of another network or graph.
    """
    network, stack, progress, recorder = run.network, run.stack, run.progress, run.recorder
    edges = torch.from_numpy(network.graph.mixing(0).edges)
    if not torch.equal(state.get("edges", edges), edges):
        raise UserError("graph.topology: the checkpoint is of a graph with other edges: a file has changed")
    stack.restore(state)
    for k, matrix in run.gossip.buffers.items():
        matrix.copy_(state["rule"][k])
    for k, matrix in run.gossip.edge_buffers.items():
        matrix.copy_(state["rule_edges"][k])
    progress.restore(state, distillation, fork)
    network.restore(state["counts"])
    if isinstance(run.gossip, AsyncStep):
        run.gossip.load_state_dict(state["events"])
    if network.links.max_age is not None and "late" in state:
        network.restore_late_rows(state["late"], stack.device)
        run.clock.arrivals = state["arrivals"].numpy()
    if run.clock is not None:
        run.clock.time, run.clock.began = state["time"].numpy(), state["step_began"]
    recorder.loss = state["loss"][:, 0].to(stack.device)
    recorder.lines = [line for line in lines if line["step"] <= progress.step and line["phase"] != "final"]
    if distillation:
        restore_labels(run, state)
    if "missed" in state:
        run.store.missed = state["missed"].T.contiguous()
    if not fork:
        run.header["from"] = state["from"]
    saved = list(state["callbacks"])
    for callback in run.hooks.callbacks:
        match = next((s for s in saved if s[0] == type(callback).__name__), None)
        other = fork and isinstance(callback, Fault)  # a fork may have other faults
        if match is not None and not other and (distillation or not isinstance(callback, (Calibration, Distillation))):
            saved.remove(match)
            callback.load_state_dict(match[1])


def restore_labels(run: Parts, state: dict) -> None:
    """Put the distilled labels of a checkpoint into the store, and the teacher's state into the teacher."""
    labels, soft_targets = state["distilled"], state["answers"]
    run.store.restore(
        None if labels is None else [Labels(*parts).to(run.stack.device) for parts in labels],
        soft_targets,
        *state["generation"],
    )
    if run.distillation is not None:
        run.distillation.teacher.load_state_dict(state["teacher"], run)
