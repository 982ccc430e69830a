"""Every node's detector at work: scores of own, public and noise samples, thresholds, what is kept, and how good that is."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_idkd import metrics
from lightning_idkd.callback import OodScore
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs, Selection
from lightning_idkd.nodes.stack import run_network

if TYPE_CHECKING:
    from lightning_idkd.callback import Run

LISTED = 20  # nodes that a remark names; of more it says how many
FEW = "fewer than {fallback} held-out samples, so that the threshold is the 5 % quantile of a node's own scores"
REMARKS = (FEW, "all samples have the same {score}", "no public samples are kept", "all public samples are kept")
"""What may be remarked of a node, in the order in which it is printed."""


def calibrate(run: Run, public: list[Outputs]) -> list[Selection]:
    """Every node's selection from its outputs on the public set."""
    calibration, remarks = run.calibration, [{} for _ in public]
    scored = [scores(run, i, outputs) for i, outputs in enumerate(public)]
    limits = [threshold(run, i, *found, remarks[i]) for i, found in enumerate(scored)]
    thresholds = torch.tensor(limits, dtype=torch.float64)
    if calibration.pooled:
        told, mixing = run.network.share(thresholds[:, None], run.step), run.network.graph.mixing(run.step)
        near = [torch.stack([told[j] for j in mixing.terms[i][0]]) for i in run.network.rows]
        thresholds = torch.stack([values.mean() for values in near])
    selections = [
        Selection(others >= limit, limit, own, others, noise)
        for (own, others, noise), limit in zip(scored, thresholds.tolist(), strict=True)
    ]
    for i, (selection, outputs) in enumerate(zip(selections, public, strict=True)):
        selection.measures = measures(run, i, selection, outputs)
        if not selection.kept.any() or selection.kept.all():
            remarks[i][REMARKS[3 if selection.kept.any() else 2]] = calibration.score.written(selection.threshold)
    print_remarks(run, remarks)
    return selections


def rehearse(run: Run) -> None:
    """Let the score look at a batch by the untrained node of fewest samples, to be told before training what it cannot do."""
    score, store = run.calibration.score, run.store
    own, module = min(zip(store.own, run.stack.modules, strict=True), key=lambda of: len(of[0]))
    with torch.random.fork_rng(devices=[store.device] if store.device.type == "cuda" else []):
        if score.fitted:
            score.fit(run_network(module, store.private_batches(own.cpu())), store.labels[own.cpu()])
        batch = next(iter(store.public_batches()))[:64]
        fitting(score, run_network(module, map(functools.partial(score.perturb, module), [batch])))


def scores(run: Run, i: int, public: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of row ``i``'s held-out samples (of its training samples where it has none), of the public set and of noise."""
    score, store, module = run.calibration.score, run.store, run.stack.modules[i]
    node, own = run.network.rows[i], store.own[i].cpu()
    held_out = store.held_out(node)
    if score.fitted:
        score.fit(sound(run_network(module, store.private_batches(own)), node), store.labels[own])
    perturbed = type(score).perturb is not OodScore.perturb
    change = functools.partial(score.perturb, module) if perturbed else (lambda x: x)
    judged = [
        run_network(module, map(change, store.private_batches(held_out if len(held_out) else own))),
        store.unshuffled(run_network(module, map(change, store.public_batches()))) if perturbed else public,
        run_network(module, map(change, store.noise_batches())),
    ]
    return judge(score, sound(Outputs.cat(judged), node), f" of node {node}").split([len(outputs) for outputs in judged])


def sound(outputs: Outputs, node: int) -> Outputs:
    """``outputs``, refused where logits are not finite: neither a score nor a label comes of them."""
    bad = int((~outputs.logits.isfinite().all(1)).sum())
    if bad:
        raise UserError(f"calibration: the logits of node {node} are not finite for {bad} of {len(outputs)} samples")
    return outputs


def judge(score: OodScore, outputs: Outputs, whose: str = "") -> Tensor:
    """``score`` of ``outputs``, float32 [N], refused where it is not that."""
    found = fitting(score, outputs)
    if not found.isfinite().all():
        bad = int((~found.isfinite()).sum())
        raise UserError(f"calibration.score: {type(score).__name__} is not finite for {bad} of {len(found)} samples{whose}")
    return found.float()


def fitting(score: OodScore, outputs: Outputs) -> Tensor:
    """``score`` of ``outputs``, refused where it is no tensor with a number for each."""
    found, n = score(outputs), len(outputs)
    if not isinstance(found, Tensor) or found.shape != (n,):
        given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"calibration.score: {type(score).__name__} returns {given} for {n} samples; a score has shape [{n}]")
    return found


def threshold(run: Run, i: int, own: Tensor, public: Tensor, noise: Tensor, remarks: dict[str, str]) -> float:
    """Row ``i``'s own threshold; adds to the ``remarks`` of this node."""
    calibration, node = run.calibration, run.network.rows[i]
    held_out = len(run.store.held_out(node))
    if held_out < calibration.fallback_below:
        remarks[FEW] = str(held_out)
        return metrics.quantile(own, 0.05)
    others = noise if calibration.against == "noise" else public
    if own.min() == own.max() == others.min() == others.max():
        remarks[REMARKS[1]] = ""
    found = calibration.threshold(own, others)
    if not isinstance(found, (int, float)) and getattr(found, "shape", None) != ():
        raise UserError(f"calibration: {type(calibration).__name__}.threshold returns {type(found).__name__}; allowed: a number")
    if math.isnan(found):
        raise UserError(f"calibration: {type(calibration).__name__} gives node {node} a threshold that is no number")
    return float(found)


def measures(run: Run, i: int, selection: Selection, public: Outputs) -> dict[str, float]:
    """How good row ``i``'s selection is; see :data:`MEASURES`."""
    node, kept, store = run.network.rows[i], selection.kept, run.store
    held_out = len(store.held_out(node)) > 0
    truth, answer = store.truth.to(kept.device)[kept], public.logits[kept].argmax(1)
    known = truth >= 0
    holds = store.counts()[i].to(truth.device) > 0

    def share(of: Tensor) -> float:
        return of.double().mean().item() if len(of) else math.nan

    return {
        "auroc": metrics.auroc(selection.private, selection.public) if held_out else math.nan,
        "threshold": selection.threshold,
        "kept_fraction": share(kept),
        "own_kept": share(selection.private >= selection.threshold),
        "auroc_noise": metrics.auroc(selection.private, selection.noise) if held_out else math.nan,
        "noise_kept": share(selection.noise >= selection.threshold),
        "known_fraction": share(holds[truth[known]]),
        "label_accuracy": share((answer == truth)[known]),
        "keeps_none": float(not kept.any()),
    }


def print_remarks(run: Run, remarks: list[dict[str, str]]) -> None:
    """Print what was remarked of the nodes, one line a remark that lists them, of every node once a run.

    Args:
        remarks: of every row here its remarks (of :data:`REMARKS`), each with a detail, which may be empty.
    """
    of_all = run.network.report_objects(remarks)
    for remark in REMARKS:
        nodes = [i for i, found in enumerate(of_all) if remark in found and (i, remark) not in run.told]
        run.told |= {(i, remark) for i in nodes}
        if nodes:
            each = ", ".join(f"{i} ({of_all[i][remark]})" if of_all[i][remark] else str(i) for i in nodes[:LISTED])
            more = f" and {len(nodes) - LISTED} more" if len(nodes) > LISTED else ""
            what = remark.format(fallback=run.calibration.fallback_below, score=type(run.calibration.score).__name__)
            run.say(f"node{'s' * (len(nodes) > 1)} {each}{more}: {what}")
