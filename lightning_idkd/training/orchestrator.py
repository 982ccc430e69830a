"""Runs the training loop: batch, gradients, gossip step, evaluation. Distillation enters it by hooks.

Fabric provides the launch, the device and the collectives. It does not wrap the nodes, own loaders or call backward:
DDP would average the gradients, and overwrite the rows of all processes by those of process 0.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_idkd.callback import Asynchronous, Calibration, Callback, Distillation, Gossip
from lightning_idkd.clock import Clock
from lightning_idkd.config import TrainConfig
from lightning_idkd.data.store import Store
from lightning_idkd.files import to_json, write
from lightning_idkd.labels import Labels, Outputs, Selection
from lightning_idkd.network import Network, Traffic
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.records import loggers, report
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.async_step import AsyncStep
from lightning_idkd.training.calibrate import Detectors
from lightning_idkd.training.checkpoint import gather
from lightning_idkd.training.evaluation import Stopped, compute_heterogeneity, measure_accuracies
from lightning_idkd.training.gossip_step import GossipStep, overwrite
from lightning_idkd.training.hooks import Hooks
from lightning_idkd.training.progress import Progress
from lightning_idkd.training.record import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUESTION_EVERY = 0.5  # seconds after which several processes ask each other whether one was asked to stop


@dataclass
class Plan:
    """When a run stops and when it writes checkpoints."""

    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    keep: tuple[int, ...] = ()
    """Epochs whose checkpoint stays as ``epoch_N.ckpt``."""
    until: int | None = None
    """The epoch after which to stop; None: the last one."""

    def saves(self, epoch: int) -> bool:
        """Whether the end of this epoch has a checkpoint."""
        return epoch % self.checkpoint_every == 0 or epoch in self.keep


class Orchestrator:
    """One run; hooks get it as ``run`` (see :class:`~lightning_idkd.callback.Run`).

    Args:
        rule: the decentralised optimiser.
        callbacks: further callbacks; their hooks run before those of the rule, the calibration and the distillation.
        header: further keys of the summary.
    """

    # its parts
    fabric: Fabric
    stack: NodeStack
    network: Network
    store: Store
    gossip: GossipStep
    calibration: Calibration | None
    distillation: Distillation | None
    clock: Clock | None
    detectors: Detectors | None
    hooks: Hooks
    train: TrainConfig
    plan: Plan
    seed: int
    header: dict[str, Any]

    # its progress and measurements
    progress: Progress
    recorder: Recorder

    # its files, and this session
    folder: RunFolder
    loggers: list
    pictures: dict[str, Path]
    """New pictures, which go to the loggers with the next line of metrics."""
    interrupted: bool
    """Whether this process was asked to stop."""

    def __init__(self, fabric: Fabric, stack: NodeStack, network: Network, store: Store, rule: Gossip,
                 train: TrainConfig, calibration: Calibration | None = None,
                 distillation: Distillation | None = None, callbacks: list[Callback] | None = None,
                 plan: Plan | None = None, header: dict | None = None, seed: int = 0,
                 clock: Clock | None = None):  # fmt: skip
        self.fabric, self.stack, self.network, self.store = fabric, stack, network, store
        self.train, self.calibration, self.distillation = train, calibration, distillation
        self.plan, self.header, self.seed = plan or Plan(), header or {}, seed
        self.clock, network.timed = clock, clock is not None
        if isinstance(rule, Asynchronous):
            self.gossip = AsyncStep(rule, stack, network, store, clock, seed)
        else:
            self.gossip = GossipStep(rule, stack, network, seed)
        self.detectors = Detectors(calibration, stack, store, network, self.say) if calibration else None
        self.hooks = Hooks([c for c in (*(callbacks or []), rule, calibration, distillation) if c is not None])
        self.progress = Progress(steps=store.steps(), last_lr=train.lr)
        self.recorder = Recorder(stack, network, store, train, self.progress, clock)
        network.links.when = self.when
        self.loggers, self.pictures, self.interrupted = [], {}, False

    # values that hooks read
    epochs = property(lambda self: self.train.epochs)
    epoch = property(lambda self: self.progress.epoch)
    step = property(lambda self: self.progress.step)
    phase = property(lambda self: self.progress.phase)
    lines = property(lambda self: self.recorder.lines)

    def when(self, step: int) -> tuple[float, float]:
        """Finished epochs and simulated seconds at the begin of ``step``, which is the next step or the one before."""
        progress, seconds = self.progress, math.nan
        if self.clock is not None:
            seconds = self.clock.began if step < progress.step else self.clock.seconds
        if step < progress.step and progress.began is not None:  # an exchange since then may have changed the epoch
            return progress.began, seconds
        return progress.epoch + (step - progress.step + progress.epoch_step) / progress.steps, seconds

    # ------------------------------------------------------------------ the loop

    def fit(self, folder: RunFolder, loggers: list | None = None) -> dict | None:
        """Train to the end; returns the summary, or None if the run stopped earlier and left a checkpoint.

        Args:
            folder: the folder of the run's files.
            loggers: the loggers that get the metrics too; none except in the first process.
        """
        self.folder, self.loggers = folder, loggers or []
        self.start_session()
        end = min(self.epochs, self.plan.until or self.epochs)
        self.call("on_fit_start")
        while self.epoch < end:
            if self.progress.epoch_step == 0:
                self.call("on_epoch_start", epoch=self.epoch)
            if not self.train_epoch():
                self.save()
                return None
            self.progress.epoch, self.progress.epoch_step = self.epoch + 1, 0
            self.store.end_epoch()
            self.call("on_epoch_end", epoch=self.epoch)
            due = self.epoch % self.train.evaluate_every == 0 and self.epoch < self.epochs
            improved = due and self.progress.improves(self.evaluate(self.train.evaluate_samples))
            if improved or self.epoch == end or self.plan.saves(self.epoch):
                self.save(["best.ckpt"] if improved else [])
        try:
            return self.finish() if self.epoch == self.epochs else None
        except Stopped:
            # last.ckpt is from the end of training: a resumed run repeats only the final gossip and the evaluations
            return None

    def start_session(self) -> None:
        """Start the clocks of this session."""
        self.recorder.start_session()
        self._last_question, self._next_question = (self.step, time.perf_counter()), self.step

    def train_epoch(self) -> bool:
        """Train the rest of this epoch; False where it was interrupted."""
        progress, started, stopped = self.progress, time.perf_counter(), False
        order = self.store.order(progress.step - progress.epoch_step, progress.steps)
        while progress.epoch_step < progress.steps and not stopped:
            losses = self.train_step(order)
            self.call("on_step_end", step=progress.step, losses=losses)
            stopped = self.stop_requested()
        self.recorder.check_finite(self.folder.last)
        # check_finite has read the losses, so that the device has finished its work too
        progress.train_seconds += time.perf_counter() - started
        return not stopped

    def train_step(self, order: Tensor) -> Tensor:
        """Train every node on a batch from the epoch's ``order`` [rows, steps * batch]; returns the losses [rows]."""
        progress, present = self.progress, self.network.present(self.step)
        progress.last_lr = self.train.lr_at(progress.epoch + progress.epoch_step / progress.steps)
        if isinstance(self.gossip, AsyncStep):
            losses = self.gossip.advance(progress.step, progress.last_lr)
            self.recorder.add_losses(losses)
            progress.step, progress.epoch_step = progress.step + 1, progress.epoch_step + 1
            return losses
        self.gossip.welcome(progress.step)
        greetings = self.network.take_traffic()
        batch = self.store.batch(self.store.positions(order, progress.epoch_step), progress.step)
        self.gossip.begin(progress.step)
        with self.stack.keep_buffers(present):
            losses = self.stack.step(*batch[:2], progress.step, *batch[2:])
        with self.lag():
            self.gossip.update(progress.step, progress.last_lr, batch)
        self.recorder.add_losses(losses, present)
        self.recorder.add_faults()
        if present is not None:
            self.store.missed[1] += torch.from_numpy(~present)
        self.pass_time(greetings)  # from here on, faults see a later time
        progress.began = self.when(progress.step)[0]
        progress.step, progress.epoch_step = progress.step + 1, progress.epoch_step + 1
        return losses

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop; all of them must stop at the same step.

        Several processes ask each other about twice a second: the first one says after how many steps they ask again.
        """
        if self.network.world == 1:
            return self.interrupted
        if self.step < self._next_question:
            return False
        step, began = self._last_question
        self._last_question = self.step, time.perf_counter()
        pace = (self._last_question[1] - began) / max(1, self.step - step)
        mine = torch.tensor([[self.interrupted, max(1, int(QUESTION_EVERY / pace))]])
        asked = self.network.report(mine.expand(self.stack.n, -1))
        self._next_question = self.step + int(asked[0, 1])
        return bool(asked[:, 0].any())

    def save(self, keep: list[str] | None = None, name: str = "last.ckpt") -> None:
        """Write a checkpoint (process 0), and keep copies under other names and where the plan asks for one."""
        state, keep = gather(self), keep or []
        if self.epoch in self.plan.keep and self.progress.epoch_step == 0 and name == "last.ckpt":
            keep = [*keep, f"epoch_{self.epoch}.ckpt"]
        if state is not None:
            self.folder.save(state, name, keep)

    def call(self, hook: str, **payload) -> None:
        """Call a hook of every callback."""
        self.hooks.call(hook, {"run": self} | payload)
        self.pass_time()

    def lag(self) -> AbstractContextManager[None]:
        """The context in which a rule mixes: where rows may be late, the clock advances and says which are."""
        max_age = self.network.links.max_age
        if max_age is None:
            return nullcontext()
        return self.network.late(self.clock.lag(self.step, max_age, self.stack.X[0].nbytes), max_age)

    def pass_time(self, before: list[Traffic] | None = None) -> None:
        """Advance the clock, if there is one, by the messages since the last call.

        Args:
            before: messages before the nodes computed a step; None: they did not.
        """
        traffic = self.network.take_traffic()
        if before is not None and self.network.links.max_age is not None:
            return  # `lag` has advanced the clock
        if self.clock is not None and (traffic or before is not None):
            present, earlier = self.network.links.at(self.step).present, self.clock.time
            if before is not None:
                self.clock.began = self.clock.seconds
                self.clock.deliver(before, self.step, present)
                self.clock.compute(self.step, present)
            self.clock.deliver(traffic, self.step, present)
            if isinstance(self.gossip, AsyncStep):
                self.gossip.delay(self.clock.time - earlier)

    # ------------------------------------------------------------------ distillation, called by hooks

    def answers(self) -> list[Outputs]:
        """Outputs of the nodes of this process on the public set, in the order of the set."""
        return self.stack.answers(self.store.public_batches, self.store.restore_order)

    def calibrate(self, public: list[Outputs], offsets: list[Tensor] | None = None) -> list[Selection]:
        """Selections of the nodes of this process, given their outputs on the public set (see :class:`Run`)."""
        selections = self.detectors.select(public, self.step, offsets)
        self.recorder.add_selections(selections, self.calibration.score.probability)
        self.call("on_calibration_end", epoch=self.epoch, selections=selections)
        return selections

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Count the bytes that nodes send inside this context as those of an exchange."""
        bytes_before = report.sum_bytes(self.network.counts())
        yield
        self.progress.exchange_bytes += report.sum_bytes(self.network.counts()) - bytes_before

    def distil(self, labels: list[Labels]) -> None:
        """Let the nodes of this process train on ``labels`` too, from now on."""
        progress = self.progress
        progress.phase = "distil"
        if self.distillation.selective:
            sizes = self.network.report(torch.tensor([float(len(part)) for part in labels])[:, None])
            progress.ood["kept_fraction"] = self.network.honest(sizes).mean().item() / self.store.public
        elif progress.ood["kept_fraction"] is None:
            progress.ood["kept_fraction"] = 1.0
        before = compute_heterogeneity(self.network, self.store)["tv"]
        labels = self.replace_present(self.store.distilled or [part[:0] for part in labels], labels)
        self.store.distil(labels, self.step)
        after = compute_heterogeneity(self.network, self.store)["tv"]
        exchange = self.recorder.add_exchange(labels, before, after)
        if self.distillation.steps == "grow":
            sizes = torch.tensor(self.store.sizes, dtype=torch.float64)[:, None]
            progress.steps = self.store.steps(self.network.all_reduce(sizes, kind="other", true=True)[0].item())
        self.say(report.describe_exchange(exchange, progress.ood["kept_fraction"]))

    def soften(self, targets: list[Tensor], weight: float) -> None:
        """Let the nodes of this process train on soft ``targets`` of their own samples, from now on."""
        self.progress.phase = "distil"
        kept = targets if self.store.soft_targets is None else self.store.soft_targets[0]
        self.store.soften(self.replace_present(kept, targets), weight)

    def replace_present(self, kept: list, new: list) -> list:
        """What the nodes of this process have after an exchange: ``new``, or ``kept`` where a node is absent."""
        present = self.network.present(self.step)
        return new if present is None else [b if p else a for a, b, p in zip(kept, new, present, strict=True)]

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, samples: int | None, before_final_gossip: float | None = None) -> dict:
        """Measure on ``samples`` test samples (None: all), call ``on_evaluation_end``, print and log the metrics.

        Args:
            before_final_gossip: mean accuracy of the nodes before the final gossip, once it is known.
        """
        stop = self._watch if samples is None else (lambda: False)  # on all samples, many nodes take minutes
        line = self.recorder.add_line(samples, stop, before_final_gossip)
        self.call("on_evaluation_end", metrics=line)
        self.recorder.forget_losses()
        if self.fabric.is_global_zero:
            self.folder.log(line)
            seconds_left = self.recorder.seconds_left(sum(c.at_the_end for c in self.hooks.callbacks))
            print(report.format_line(line, self.epochs, seconds_left), flush=True)
            loggers.log(self.loggers, self.lines, self.pictures)
            self.pictures = {}
        return line

    def finish(self) -> dict:
        """Run the final gossip and the evaluations on the whole test set around it; returns the summary."""
        images, passes = len(self.store.test), 2 * self.stack.passes * self.store.batches
        self._evaluation = report.Countdown(f"evaluating on all {images:,} test images", passes, self.say)
        nodes = measure_accuracies(self.stack, self.network, self.store, {"test": None}, self._watch)
        before = self.network.honest(nodes["test"]).mean().item()
        self.run_final_gossip()
        self.call("on_training_end")
        self.save(name="final.ckpt")
        line = self.evaluate(None, before)
        summary = self.recorder.summarise(line)
        calibrated = self.progress.ood["threshold"] is not None
        summary["ood"]["score"] = self.calibration.score.title if calibrated else None
        summary |= {"name": self.folder.path.parent.name, "seed": self.seed} | self.header
        own_summary = to_json(summary, "summary")
        try:
            self.call("on_fit_end", summary=summary)
        except Exception:  # a callback that fails must not cost the run its result
            if self.fabric.is_global_zero:
                self.folder.json("summary.json", own_summary)
            raise
        return summary

    def run_final_gossip(self) -> None:
        """Mix after the last training step. Forks train on from ``last.ckpt``, which has the rows from before it."""
        for step in range(self.step, self.step + self.train.final_gossip):
            self.gossip.combine(step, self.progress.last_lr)
        if self.train.final_merge:
            overwrite(self.stack.X, self.network.all_reduce(self.stack.X, self.step), self.network.present(self.step))
        self.progress.phase = "final"

    def _watch(self) -> bool:
        """Print the progress of the final evaluation; returns whether to stop it."""
        self._evaluation.step()
        return self.interrupted

    def stop(self) -> None:
        """Ask the run to stop with a checkpoint: after the current step, or within a second where there are several
        processes."""
        self.interrupted = True

    def draw(self, name: str, figure: Figure) -> None:
        """Write a figure to ``plots/NAME.png`` and log it with the next line of metrics, in the first process only."""
        if self.fabric.is_global_zero:
            file = self.folder.make_folder("plots") / f"{name}.png"
            write(file, lambda part: figure.savefig(part, dpi=120, format="png"))
            self.add_pictures({name: file})

    def add_pictures(self, files: dict[str, Path]) -> None:
        """Log new pictures with the next line of metrics."""
        self.pictures |= files

    def say(self, text: str) -> None:
        """Print a line, in the first process only."""
        if self.fabric.is_global_zero:
            print(text, flush=True)
