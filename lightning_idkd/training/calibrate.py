"""The nodes' out-of-distribution detectors: scores, thresholds, the selection of public samples and its measures."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_idkd import metrics
from lightning_idkd.callback import Calibration, OodScore
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.labels import Outputs, Selection
from lightning_idkd.network import Network
from lightning_idkd.nodes.stack import NodeStack, run_network

LISTED = 20  # nodes that a remark lists; it counts the others
FEW = "fewer than {fallback} held-out samples, so that the threshold is the 5 % quantile of a node's own scores"
SAME_SCORE = "all samples have the same {score}"
KEEPS_NONE = "no public samples are kept"
KEEPS_ALL = "all public samples are kept"
REMARKS = (FEW, SAME_SCORE, KEEPS_NONE, KEEPS_ALL)
"""Remarks about a node, in the order in which they are printed."""


class Detectors:
    """The detectors of all nodes in this process.

    Args:
        say: prints a line from the first process.
    """

    def __init__(
        self, calibration: Calibration, stack: NodeStack, store: Store, network: Network, say: Callable[[str], None]
    ):
        self.calibration, self.stack, self.store, self.network, self.say = calibration, stack, store, network, say
        self.printed: set[tuple[int, str]] = set()  # remarks that were printed already, by node

    def select(self, public: list[Outputs], step: int, offsets: list[Tensor] | None = None) -> list[Selection]:
        """Select public samples for each node of this process, given its outputs on the public set.

        Args:
            public: the outputs of every node.
            step: the step of the run.
            offsets: what to add to the logits [k] of every node before they are scored; None for nothing.
        """
        remarks: list[dict[str, str]] = [{} for _ in public]
        scores = [self.score_samples(i, outputs, offsets and offsets[i]) for i, outputs in enumerate(public)]
        thresholds = [self.fix_threshold(i, *scores[i], remarks[i]) for i in range(len(public))]
        if self.calibration.pooled:
            thresholds = self.pool(thresholds, step)
        selections = []
        for i, ((own, others, noise), threshold) in enumerate(zip(scores, thresholds, strict=True)):
            selection = Selection(others >= threshold, threshold, own, others, noise)
            selection.measures = self.measure(i, selection, public[i])
            if not selection.kept.any() or selection.kept.all():
                remark = KEEPS_ALL if selection.kept.any() else KEEPS_NONE
                remarks[i][remark] = self.calibration.score.written(threshold)
            selections.append(selection)
        self.print_remarks(remarks)
        return selections

    def score_samples(self, i: int, public: Outputs, offset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of row ``i``'s held-out samples (training samples if it has none), of the public set and of noise."""

        def shift(outputs: Outputs) -> Outputs:
            return outputs if offset is None else outputs.shift(offset)

        score, store, module = self.calibration.score, self.store, self.stack.modules[i]
        node, own = self.network.rows[i], store.own[i].cpu()
        held_out = store.held_out(node)
        if score.fitted:
            training = require_finite(shift(run_network(module, store.private_batches(own))), node)
            score.fit(training, store.labels[own])
        perturbs = type(score).perturb is not OodScore.perturb
        perturb = functools.partial(score.perturb, module) if perturbs else (lambda x: x)
        outputs = [
            run_network(module, map(perturb, store.private_batches(held_out if len(held_out) else own))),
            store.restore_order(run_network(module, map(perturb, store.public_batches()))) if perturbs else public,
            run_network(module, map(perturb, store.noise_batches())),
        ]
        shifted = shift(Outputs.cat(outputs))
        scores = compute_finite_scores(score, require_finite(shifted, node), f" of node {node}")
        return scores.split([len(part) for part in outputs])

    def fix_threshold(self, i: int, own: Tensor, public: Tensor, noise: Tensor, remarks: dict[str, str]) -> float:
        """Row ``i``'s own threshold; adds to the ``remarks`` about this node."""
        calibration, node = self.calibration, self.network.rows[i]
        held_out = len(self.store.held_out(node))
        if held_out < calibration.fallback_below:
            remarks[FEW] = str(held_out)
            return metrics.quantile(own, 0.05)
        others = noise if calibration.against == "noise" else public
        if own.min() == own.max() == others.min() == others.max():
            remarks[SAME_SCORE] = ""
        threshold, name = calibration.threshold(own, others), type(calibration).__name__
        if not isinstance(threshold, (int, float)) and getattr(threshold, "shape", None) != ():
            raise UserError(f"calibration: {name}.threshold returns {type(threshold).__name__}; allowed: a number")
        if math.isnan(threshold):
            raise UserError(f"calibration: {name} gives node {node} a threshold that is not a number")
        return float(threshold)

    def pool(self, thresholds: list[float], step: int) -> list[float]:
        """The mean threshold of every node and its neighbours."""
        mine = torch.tensor(thresholds, dtype=torch.float64)
        received, mixing = self.network.share(mine[:, None], step), self.network.mixing(step)
        pooled = []
        for i, own in zip(self.network.rows, mine, strict=True):  # a liar lies to others, not to itself
            senders, _weights = mixing.terms[i]
            pooled.append(torch.stack([own[None] if j == i else received[j] for j in senders]).mean().item())
        return pooled

    def measure(self, i: int, selection: Selection, public: Outputs) -> dict[str, float]:
        """Measures of row ``i``'s selection; see :data:`~lightning_idkd.labels.MEASURES`."""
        node, kept, store = self.network.rows[i], selection.kept, self.store
        has_held_out = len(store.held_out(node)) > 0
        truth, predicted = store.truth.to(kept.device)[kept], public.logits[kept].argmax(1)
        has_private_class = truth >= 0
        node_has_class = store.counts()[i].to(truth.device) > 0

        def share(mask: Tensor) -> float:
            return mask.double().mean().item() if len(mask) else math.nan

        return {
            "auroc": metrics.auroc(selection.private, selection.public) if has_held_out else math.nan,
            "threshold": selection.threshold,
            "kept_fraction": share(kept),
            "own_kept": share(selection.private >= selection.threshold),
            "auroc_noise": metrics.auroc(selection.private, selection.noise) if has_held_out else math.nan,
            "noise_kept": share(selection.noise >= selection.threshold),
            "known_fraction": share(node_has_class[truth[has_private_class]]),
            "label_accuracy": share((predicted == truth)[has_private_class]),
            "keeps_none": float(not kept.any()),
        }

    def print_remarks(self, remarks: list[dict[str, str]]) -> None:
        """Print a line for each kind of remark, which lists the nodes; a node is listed once in a run.

        Args:
            remarks: for each node of this process, its remarks (keys from :data:`REMARKS`), each with a detail that may
                be empty.
        """
        all_remarks = self.network.collect_objects(remarks)
        if all_remarks is None:  # the first process prints them
            return
        for remark in REMARKS:
            nodes = [i for i, given in enumerate(all_remarks) if remark in given and (i, remark) not in self.printed]
            self.printed |= {(i, remark) for i in nodes}
            if not nodes:
                continue
            listed = []
            for i in nodes[:LISTED]:
                detail = all_remarks[i][remark]
                listed.append(f"{i} ({detail})" if detail else str(i))
            more = f" and {len(nodes) - LISTED} more" if len(nodes) > LISTED else ""
            calibration, plural = self.calibration, "s" if len(nodes) > 1 else ""
            text = remark.format(fallback=calibration.fallback_below, score=type(calibration.score).__name__)
            self.say(f"node{plural} {', '.join(listed)}{more}: {text}")


def try_score(score: OodScore, stack: NodeStack, store: Store) -> None:
    """Run the score once before training, on the node with the fewest samples: a score that cannot work fails early."""
    own, module = min(zip(store.own, stack.modules, strict=True), key=lambda pair: len(pair[0]))
    with torch.random.fork_rng(devices=[store.device] if store.device.type == "cuda" else []):
        if score.fitted:
            score.fit(run_network(module, store.private_batches(own.cpu())), store.labels[own.cpu()])
        batch = next(iter(store.public_batches()))[:64]
        compute_scores(score, run_network(module, map(functools.partial(score.perturb, module), [batch])))


def require_finite(outputs: Outputs, node: int) -> Outputs:
    """Return ``outputs``, or refuse them if logits are not finite, since these give neither a score nor a label."""
    bad = int((~outputs.logits.isfinite().all(1)).sum())
    if bad:
        raise UserError(f"calibration: the logits of node {node} are not finite for {bad} of {len(outputs)} samples")
    return outputs


def compute_finite_scores(score: OodScore, outputs: Outputs, whose: str = "") -> Tensor:
    """``score`` of ``outputs``, float32 [N]; refused if one is not finite."""
    scores = compute_scores(score, outputs)
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise UserError(
            f"calibration.score: {type(score).__name__} is not finite for {bad} of {len(scores)} samples{whose}"
        )
    return scores.float()


def compute_scores(score: OodScore, outputs: Outputs) -> Tensor:
    """``score`` of ``outputs`` [N]; refused if it is not a tensor with one number for each sample."""
    scores, n = score(outputs), len(outputs)
    if not isinstance(scores, Tensor) or scores.shape != (n,):
        given = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise UserError(
            f"calibration.score: {type(score).__name__} returns {given} for {n} samples; a score has shape [{n}]"
        )
    return scores
