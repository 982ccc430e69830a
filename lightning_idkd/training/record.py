"""Records a run's losses, evaluations, selections and exchanges, and gives every metric its name.

A line of metrics is flat, with slashes (``accuracy/node_mean``); the summary has the same names nested. Measures of a
detector have the names in :data:`~lightning_idkd.labels.MEASURES`, after ``ood/``. The group ``homogeneity`` contains
what is called heterogeneity everywhere else; users' scripts rely on its name in files.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_idkd.clock import Clock
from lightning_idkd.config import TrainConfig
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.labels import MEASURES, Labels, Selection
from lightning_idkd.network import Network
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.records import report
from lightning_idkd.training.evaluation import (
    build_consensus,
    compute_heterogeneity,
    measure_accuracies,
    measure_model,
    summarise_nodes,
)
from lightning_idkd.training.progress import Progress

ONLY_IN_LINES = ("epoch", "step", "phase", "train/loss", "train/lr", "per_node")
"""Keys of a line that the summary leaves out, or has in another form."""


class Recorder:
    """Measures the nodes of a run, and stores the results, mostly in the run's ``progress``."""

    loss: Tensor
    """Sum of every node's losses since the last evaluation, float64 [rows]."""
    lines: list[dict]
    """The metrics of every evaluation."""

    def __init__(self, stack: NodeStack, network: Network, store: Store, train: TrainConfig, progress: Progress,
                 clock: Clock | None = None):  # fmt: skip
        self.stack, self.network, self.store, self.train, self.progress = stack, network, store, train, progress
        self.clock = clock
        self.loss, self.lines = torch.zeros(stack.n, dtype=torch.float64), []
        self._heterogeneity_before = compute_heterogeneity(network, store)
        self._first_bad_step = torch.full((stack.n,), -1, device=stack.device)
        self._seconds_per_sample = 0.0  # of the test set, in the last evaluation
        self.start_session()

    # ------------------------------------------------------------------ time

    def start_session(self) -> None:
        """Start the clock of this session."""
        self._clock, self._first_epoch = time.perf_counter(), self.progress.epoch

    def elapsed(self) -> float:
        """Duration of the whole run so far, over all its sessions."""
        return self.progress.seconds + time.perf_counter() - self._clock

    def seconds_left(self, at_the_end: float) -> float:
        """Seconds to the end of the run.

        They are those of the remaining epochs at this session's pace, of two evaluations on all test samples, and of
        the callbacks ``at_the_end``.
        """
        progress = self.progress
        if progress.phase == "final":
            return 0.0
        done = progress.epoch - self._first_epoch
        pace = (time.perf_counter() - self._clock) / done if done > 0 else math.nan
        evaluations = 2 * self._seconds_per_sample * len(self.store.test)
        return pace * (self.train.epochs - progress.epoch) + evaluations + at_the_end

    # ------------------------------------------------------------------ training

    def add_losses(self, losses: Tensor, present: np.ndarray | None = None) -> None:
        """Add losses [rows] of the nodes that are ``present`` (None: all) without waiting for the device, and note each
        node's first step with one that is not finite."""
        nodes = self.store.nodes
        if present is not None:
            losses = losses.where(torch.from_numpy(present).to(losses.device), 0)
            all_present, honest = self.network.links.at(self.progress.step).present, self.network.links.honest
            nodes = int(all_present.sum())
            self.progress.loss_missed += int((honest & ~all_present).sum())
        self.loss = self.loss.to(losses.device) + losses
        self.progress.loss_steps += 1
        self.progress.samples += self.store.batch_size * nodes
        bad = ~torch.isfinite(losses) & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, self.progress.step, self._first_bad_step)

    def add_faults(self) -> None:
        """Count the messages of this step that do not arrive, and the nodes that are absent."""
        links = self.network.links
        if links.faults:
            condition = links.at(self.progress.step)
            self.progress.turns += self.store.nodes
            self.progress.due += len(self.network.graph.mixing(self.progress.step).edges)
            if condition.arrived is not None:
                self.progress.lost += int((~condition.arrived).sum())
            if condition.present is not None:
                self.progress.absent += int((~condition.present).sum())

    def check_finite(self, last: Path) -> None:
        """Refuse losses and parameters of honest nodes that are not finite.

        Args:
            last: path of the last checkpoint, which the message names if the file exists.

        Raises:
            UserError: on all processes, naming the first step and node.
        """
        progress, sound = self.progress, torch.isfinite(self.stack.X).all(1) | (self._first_bad_step >= 0)
        steps = torch.where(sound, self._first_bad_step, progress.step - 1)
        first, honest = self.network.report(steps[:, None])[:, 0].tolist(), self.network.links.honest
        bad = [(s, i) for i, s in enumerate(first) if s >= 0 and honest[i]]
        if bad:
            step, node = min(bad)
            checkpoint = f"last good checkpoint: {last}" if last.exists() else "there is no checkpoint yet"
            raise UserError(
                f"the loss of node {node} or its parameters are not finite at step {step} "
                f"(train.lr is {self.train.lr}; try a smaller one); {checkpoint}"
            )

    # ------------------------------------------------------------------ selections and exchanges

    def add_selections(self, selections: list[Selection], probability: Callable[[float], float | None]) -> None:
        """Store the measures of all nodes' selections, and their means over the honest nodes that have one.

        Args:
            probability: converts a threshold to a probability; None if the score has none.
        """
        rows = [[selection.measures[k] for k in MEASURES] for selection in selections]
        values = self.network.report(torch.tensor(rows, dtype=torch.float64))
        ood: dict[str, float | None] = {}
        means = self.network.honest(values).nanmean(0).tolist()
        for j, (name, mean) in enumerate(zip(MEASURES, means, strict=True)):
            ood[name] = None if math.isnan(mean) else mean
            self.progress.per_node[name] = values[:, j].tolist()
        limit = ood["threshold"]
        ood["threshold_probability"] = None if limit is None else probability(limit)
        self.progress.ood = ood

    def add_exchange(self, labels: list[Labels], before: float, after: float) -> dict:
        """Store and return an exchange: sizes of the distilled sets, heterogeneity ``before`` and ``after`` it."""
        sizes = self.network.report(torch.tensor([[len(label)] for label in labels]))[:, 0].tolist()
        measures = {k: v for k, v in self.progress.per_node.items() if k in MEASURES}
        exchange = {"epoch": self.progress.epoch, "distilled": sizes, "homogeneity": [before, after], **measures}
        self.progress.exchanges.append(exchange)
        return exchange

    # ------------------------------------------------------------------ lines and summary

    def add_line(
        self, samples: int | None, stop: Callable[[], bool], before_final_gossip: float | None = None
    ) -> dict[str, Any]:
        """Measure the nodes and return the line of metrics.

        Args:
            samples: number of test samples; None for all.
            stop: whether to stop, asked before every batch.
            before_final_gossip: mean accuracy of the nodes before the final gossip, once it is known.

        Raises:
            Stopped: ``stop`` returned True.
        """
        progress, started = self.progress, time.perf_counter()
        line: dict[str, Any] = {"epoch": progress.epoch, "step": progress.step, "phase": progress.phase}
        if progress.loss_steps:
            means = self.network.honest(self.network.report(self.loss[:, None] / progress.loss_steps))
            due, mean = len(means) * progress.loss_steps, means.mean().item()
            taken = due - progress.loss_missed
            line["train/loss"] = mean * due / taken if progress.loss_missed and taken else mean
            line["train/lr"] = progress.last_lr
        validation = self.train.evaluate_samples
        measured, progress.per_node["accuracy"] = measure_nodes(
            self.stack, self.network, self.store, samples, validation, stop
        )
        self._seconds_per_sample = (time.perf_counter() - started) / min(samples or math.inf, len(self.store.test))
        line |= measured
        if before_final_gossip is not None:
            line["accuracy/node_mean_before_final_gossip"] = before_final_gossip
        line |= {f"communication/{k}": v for k, v in self.network.counts().items()}
        line |= {f"ood/{k}": v for k, v in progress.ood.items() if v is not None}
        heterogeneity = {"before": self._heterogeneity_before, "after": compute_heterogeneity(self.network, self.store)}
        for when, values in heterogeneity.items():
            for name, value in values.items():
                line[f"homogeneity/{when}" if name == "tv" else f"homogeneity/{name}_{when}"] = value
        if progress.lost or progress.absent:
            line["faults/lost"] = progress.lost / progress.due
            line["faults/absent"] = progress.absent / progress.turns
        line["throughput/samples_per_second"] = progress.samples / max(progress.train_seconds, 1e-9)
        line["throughput/seconds"] = self.elapsed()
        if self.clock is not None:
            line["time/simulated"] = self.clock.seconds
        line["per_node"] = dict(progress.per_node)
        self.lines.append(line)
        return line

    def forget_losses(self) -> None:
        """Start a new sum of losses."""
        self.loss, self.progress.loss_steps, self.progress.loss_missed = torch.zeros_like(self.loss), 0, 0

    def summarise(self, line: dict[str, Any]) -> dict[str, Any]:
        """Build the summary of a run whose last evaluation is ``line``."""
        progress, train = self.progress, self.train
        summary = nest(line)
        summary["ood"] = summary.get("ood", {}) | progress.ood
        summary["throughput"]["seconds"] = self.elapsed()
        summary["communication"] |= self.compute_overhead()
        return summary | {
            "nodes": self.store.nodes,
            "steps": progress.step,
            "epochs": train.epochs,
            "final_gossip": train.final_gossip,
            "final_merge": train.final_merge,
            "engine": self.stack.engine,
            "autocast": self.stack.autocast,
            "peak_memory_bytes": read_peak_memory(self.stack.device),
            "per_node": progress.per_node,
            "exchanges": progress.exchanges,
        }

    def compute_overhead(self) -> dict[str, float]:
        """Bytes that this run sends beyond those of training alone, as a share of the latter.

        At equal steps, training alone has as many steps as this run. At equal epochs, it has the steps that the same
        epochs have without distilled samples. Final gossip and merge belong to training.
        """
        progress, train, sent = self.progress, self.train, report.sum_bytes(self.network.counts())
        training = sent - progress.exchange_bytes
        if not training:
            return {}
        merge = 2 * (self.store.nodes - 1) * self.stack.X[0].nbytes if train.final_merge else 0
        steps, mixings = train.epochs * self.store.steps(), train.final_gossip
        at_equal_epochs = merge + (training - merge) * (steps + mixings) / (progress.step + mixings)
        return {"overhead_at_equal_steps": sent / training - 1, "overhead_at_equal_epochs": sent / at_equal_epochs - 1}


def measure_nodes(stack: NodeStack, network: Network, store: Store, samples: int | None, validation: int,
                  stop: Callable[[], bool]) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """The metrics of the honest nodes as they are, the mean accuracy of liars, and every node's test accuracy.

    Args:
        samples: number of test samples; None for all.
        validation: number of validation samples.
        stop: whether to stop, asked before every batch.

    Raises:
        Stopped: in all processes, if ``stop`` returned True in one of them.
    """
    mean = network.report_mean(stack.X, honest=True)
    splits = {"test": samples}
    if any(len(held_out) for held_out in store.split.validation):
        splits["validation"] = validation
    accuracies = measure_accuracies(stack, network, store, splits, stop)
    consensus = measure_model(build_consensus(stack, network, mean), store, splits)
    nodes = accuracies["test"]
    measured: dict[str, float] = {f"accuracy/{k}": v for k, v in summarise_nodes(network.honest(nodes)).items()}
    measured["accuracy/consensus"] = consensus["test"]
    if "validation" in splits:
        measured["validation/node_mean"] = network.honest(accuracies["validation"]).mean().item()
        measured["validation/consensus"] = consensus["validation"]
    measured["consensus_distance"] = network.report_distance(stack.X, mean, honest=True)
    if network.links.liars:
        lying = torch.from_numpy(~network.links.honest)
        measured |= {"faults/liars": int(lying.sum()), "faults/liars_mean": nodes[lying].mean().item()}
    return measured, nodes.tolist()


def nest(line: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a line, nested by the parts of their names."""
    summary: dict[str, Any] = {}
    for key, value in line.items():
        group, _, name = key.partition("/")
        if key in ONLY_IN_LINES:
            continue
        if not name:
            summary.setdefault(key, value)  # a callback's metric does not replace one of these
        elif isinstance(summary.setdefault(group, {}), dict):
            summary[group][name] = value
        else:
            summary[key] = value
    return summary


def read_peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of this process, or of a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, IndexError, ValueError):  # getrusage may give the peak of the starting process
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
