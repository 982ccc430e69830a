"""What of a run a checkpoint holds, gathered from all processes, and the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_idkd.callback import Calibration, Distillation
from lightning_idkd.errors import UserError
from lightning_idkd.files import describe_type, is_number
from lightning_idkd.labels import Labels
from lightning_idkd.models import cpu_norms
from lightning_idkd.nodes.engines import BATCHED

if TYPE_CHECKING:
    from lightning_idkd.callback import Run


def gather(run: Run) -> dict:
    """Everything a resumed run needs, gathered from all processes."""
    network, store = run.network, run.store
    per_edge = {k: torch.cat(network.report_objects(_by_sender(run, v))) for k, v in run.edge_buffers.items()}
    distilled = answers = None
    if store.distilled is not None:
        distilled = network.report_objects([(label.index.cpu(), label.probabilities.cpu()) for label in store.distilled])
    if store.answers is not None:
        answers = network.report_objects([a.cpu() for a in store.answers[0]]), store.answers[1]
    return {
        "version": 1,
        "layout": run.stack.describe(),
        "images": store.describe(),
        "edges": torch.from_numpy(network.graph.mixing(0).edges),
        "device": run.stack.device.type,
        "engine": run.stack.engine,
        "threads": torch.get_num_threads(),
        "abreast": run.stack.abreast if run.stack.engine in BATCHED else None,
        "norms": cpu_norms.name_backend(run.stack.device),
        "devices": network.world,
        "epoch": run.epoch,
        "step": run.step,
        "epoch_step": run.epoch_step,
        "phase": run.phase,
        "steps": run.steps,
        "exchange_bytes": run.exchange_bytes,
        "exchanges": run.exchanges,
        "from": run.header.get("from"),
        "best": run.best,
        "last_lr": run.last_lr,
        "X": network.report(run.stack.X),
        "frozen": run.stack.frozen,
        "buffers": {k: network.report(b) for k, b in run.stack.buffers.items()},
        "rule": {k: network.report(b) for k, b in run.buffers.items()},
        "rule_edges": per_edge,
        "distilled": distilled,
        "answers": answers,
        "teacher": None if run.distillation is None else run.distillation.teacher.state_dict(run),
        "generation": (store.generation, store.generation_start),
        "counts": network.counts(),
        "ood": run.ood,
        "per_node": run.per_node,
        "loss": network.report(run.loss[:, None]),
        "loss_steps": run.loss_steps,
        "samples": run.samples,
        "seconds": run.elapsed(),
        "train_seconds": run.train_seconds,
        "callbacks": [
            (name := type(c).__name__, storable(c.state_dict(), f"callbacks: {name}: state_dict()")) for c in run.callbacks
        ],
    }


def storable(value: Any, what: str) -> Any:
    """A callback's state as a checkpoint can hold it; ``what`` says which value it is, in words.

    Raises:
        UserError: it holds something that a checkpoint, which is read without running code, cannot hold.
    """
    if isinstance(value, dict):
        return {key: storable(v, f"{what}[{key!r}]") for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        items = [storable(v, f"{what}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, str)) or type(value) is float:
        return value
    if is_number(value):
        return value.item()
    raise UserError(
        f"{what} is {describe_type(value)}; allowed: tensors, numbers, text, true, false, null, and lists and dicts of these"
    )


def restore(run: Run, state: dict, lines: list[dict], distillation: bool = True, fork: bool = False) -> None:
    """Continue from ``state``; without ``distillation`` nodes train on their own samples again.

    Raises:
        UserError: the checkpoint is of another network or graph.
    """
    network, stack = run.network, run.stack
    edges = torch.from_numpy(network.graph.mixing(0).edges)
    if not torch.equal(state.get("edges", edges), edges):
        raise UserError("graph.topology: the checkpoint is of a graph with other edges: a file has changed")
    mine = slice(network.rows.start, network.rows.stop)
    stack.restore(state, mine)
    for k, matrix in run.buffers.items():
        matrix.copy_(state["rule"][k][mine])
    here = [int(e[0]) in network.rows for e in network.graph.mixing(0).edges]
    for k, matrix in run.edge_buffers.items():
        matrix.copy_(state["rule_edges"][k][here])
    run.epoch, run.step, run.epoch_step = state["epoch"], state["step"], state["epoch_step"]
    network.restore(state["counts"])
    run.loss, run.loss_steps = state["loss"][mine, 0].to(stack.device), state["loss_steps"]
    run.samples, run.train_seconds, run.last_lr = state["samples"], state["train_seconds"], state["last_lr"]
    run.lines = [line for line in lines if line["step"] <= run.step and line["phase"] != "final"]
    if distillation:
        run.phase, run.ood, run.per_node = state["phase"], state["ood"], state["per_node"]
        run.steps, run.exchange_bytes, run.exchanges = state["steps"], state["exchange_bytes"], state["exchanges"]
        labels, answers = state["distilled"], state["answers"]
        run.store.restore(
            None if labels is None else [Labels(i, p).to(stack.device) for i, p in labels[mine]],
            None if answers is None else (answers[0][mine], answers[1]),
            *state["generation"],
        )
        if run.distillation is not None:
            run.distillation.teacher.load_state_dict(state["teacher"], run)
    if not fork:
        run.best, run.seconds, run.header["from"] = state["best"], state["seconds"], state["from"]
    saved = list(state["callbacks"])
    for callback in run.callbacks:
        found = next((s for s in saved if s[0] == type(callback).__name__), None)
        if found is not None and (distillation or not isinstance(callback, (Calibration, Distillation))):
            saved.remove(found)
            callback.load_state_dict(found[1])


def _by_sender(run: Run, T: Tensor) -> list[Tensor]:
    senders = torch.as_tensor(run.network.edges(0)[:, 0] if len(T) else [])
    return [T[senders == node].cpu() for node in run.network.rows]
