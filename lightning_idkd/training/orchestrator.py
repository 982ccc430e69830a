"""The training loop, top to bottom: batch, gradients, gossip update, evaluation; phases come in by hooks.

Fabric gives launch, device and loggers. It does not wrap the nodes, own loaders or call backward: under DDP
gradients would be averaged and the rows overwritten by those of process 0.
"""

from __future__ import annotations

import functools
import inspect
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_idkd import randomness
from lightning_idkd.callback import Calibration, Callback, Context, Distillation, Gossip
from lightning_idkd.config import TrainConfig
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError, require_shape
from lightning_idkd.files import to_json
from lightning_idkd.labels import MEASURES, Labels, Outputs, Selection
from lightning_idkd.network import Network
from lightning_idkd.nodes.stack import NodeStack
from lightning_idkd.records import loggers, report
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.training.calibrate import calibrate
from lightning_idkd.training.checkpoint import gather
from lightning_idkd.training.evaluation import Stopped, accuracies, heterogeneity, measure

BLOCK = 2**20  # values of a rule's matrix that are treated at once, so that what it makes of them on the way stays in the caches


def block(nodes: int, device: torch.device) -> int:
    """Columns of that, whichever process has how many of the rows; of many nodes some more, up to what is no new memory each
    time (32 MiB). A CUDA device has a cache of that size and calls that cost more."""
    if device.type != "cpu":
        return 64 * BLOCK // nodes
    return max(BLOCK // nodes, min(8192, 8 * BLOCK // nodes))


def added(values: dict, before: dict, what: str) -> None:
    """Turn what a callback added to ``values`` into plain numbers and texts, and refuse changes of what was there ``before``;
    ``what`` says in words which values."""
    if wrong := [key for key in values if not isinstance(key, str)]:
        raise UserError(f"{what} has the key {wrong[0]!r}, of type {type(wrong[0]).__name__}; allowed: text")
    values.update(to_json(values, what))
    if changed := [key for key in before if key not in values or values[key] != before[key]]:
        raise UserError(f"{what}[{changed[0]!r}] is changed or removed; allowed: new keys")


class Orchestrator:
    """One run; its ``folder`` must be set before :meth:`fit`.

    ``self`` is what hooks get as ``run``; :mod:`~lightning_idkd.training.checkpoint` gathers all of it that a resumed run needs.
    """

    folder: RunFolder

    def __init__(
        self,
        fabric: Fabric,
        stack: NodeStack,
        network: Network,
        store: Store,
        rule: Gossip,
        train: TrainConfig,
        calibration: Calibration | None = None,
        distillation: Distillation | None = None,
        callbacks: list[Callback] | None = None,
        checkpoint_every: int = 1,
        keep: list[int] | None = None,
        until: int | None = None,
        seed: int = 0,
        header: dict | None = None,
    ):
        self.fabric, self.stack, self.network, self.store = fabric, stack, network, store
        self.rule, self.train, self.calibration, self.distillation = rule, train, calibration, distillation
        if rule.needs_features and not stack.modules[0].has_features:
            raise UserError(f"gossip: {type(rule).__name__} needs features(x) [B, F], which this network does not offer")
        self.checkpoint_every, self.keep, self.seed, self.header = checkpoint_every, keep or [], seed, header or {}
        # extras come first: their on_epoch_start precedes the exchange that distillation makes in its own
        self.callbacks = [c for c in (*(callbacks or []), rule, calibration, distillation) if c is not None]
        self.epochs, self.until = train.epochs, until or train.epochs
        self.epoch = self.step = self.epoch_step = 0
        self.steps = store.steps()  # an epoch
        self.phase = "train"
        self.best = -1.0  # validation accuracy of the best consensus model
        self.buffers = {k: stack.X.new_zeros(stack.n, width or stack.parameters) for k, width in rule.widths().items()}
        edges = len(network.edges(0))
        self.edge_buffers = {k: stack.X.new_zeros(edges, width or stack.parameters) for k, width in rule.edge_buffers.items()}
        self.samples, self.seconds, self.train_seconds, self.last_lr = 0, 0.0, 0.0, train.lr
        self.loss, self.loss_steps = torch.zeros(stack.n, dtype=torch.float64), 0
        self.first_bad = torch.full((stack.n,), -1, device=stack.device)
        self.ood: dict[str, float | None] = dict.fromkeys((*MEASURES, "threshold_probability"))
        self.told: set[tuple[int, str]] = set()  # remarks that were printed, by node
        self.exchange_bytes = 0
        self.exchanges: list[dict] = []  # of each: sizes of the distilled sets, heterogeneity before and after, measures per node
        self.per_node: dict[str, list] = {}  # the last measured accuracy, threshold, ... of every node
        self.before = heterogeneity(network, store)
        self.lines: list[dict] = []
        self.loggers: list = []
        self.pictures: dict[str, Path] = {}  # new ones, for the next line of metrics
        self.interrupted = False
        self.evaluating = 0.0  # seconds that a test image took in the last evaluation
        self._methods: dict[str, list[tuple[Callable, list[str]]]] = {}
        self._clock, self._first = time.perf_counter(), 0  # when this session began, and with which epoch

    # ------------------------------------------------------------------ the loop

    def fit(self) -> dict | None:
        """Train to the end; returns the summary, or None where it stopped before (a checkpoint is left)."""
        self._clock, self._first = time.perf_counter(), self.epoch
        self.call("on_fit_start")
        while self.epoch < min(self.epochs, self.until):
            if self.epoch_step == 0:
                self.call("on_epoch_start", epoch=self.epoch)
            if not self.train_epoch():
                self.save()
                return None
            self.epoch, self.epoch_step = self.epoch + 1, 0
            self.call("on_epoch_end", epoch=self.epoch)
            last, due = self.epoch in (self.epochs, self.until), self.epoch % self.train.evaluate_every == 0
            improved = due and self.epoch < self.epochs and self.improved(self.evaluate(self.train.evaluate_samples))
            if improved or last or self.epoch % self.checkpoint_every == 0 or self.epoch in self.keep:
                self.save(["best.ckpt"] * improved)
        try:
            return self.finish() if self.epoch == self.epochs else None
        except Stopped:  # last.ckpt is that of the end of training, from which only the final evaluation is made again
            return None

    def train_epoch(self) -> bool:
        """The rest of this epoch; False where it was interrupted."""
        started, stopped = time.perf_counter(), False
        order = self.store.order(self.step - self.epoch_step, self.steps)
        while self.epoch_step < self.steps and not stopped:
            losses = self.train_step(order)
            self.call("on_step_end", step=self.step, losses=losses)
            stopped = self.stop_asked()
        self.finite()
        self.train_seconds += time.perf_counter() - started  # here the device is done too: `finite` looked at its results
        return not stopped

    def train_step(self, order: Tensor) -> Tensor:
        """One batch at every node, from the epoch's ``order`` [rows, steps * batch]; returns the losses [rows]."""
        b = self.store.batch_size
        batch = self.store.batch(order[:, self.epoch_step * b : (self.epoch_step + 1) * b], self.step)
        losses = self.stack.step(*batch[:2], self.step, *batch[2:])
        self.update(self.lr(), batch)
        self.note(losses)
        self.step, self.epoch_step = self.step + 1, self.epoch_step + 1
        return losses

    def improved(self, line: dict) -> bool:
        """Whether this evaluation has the best consensus model so far, on validation samples."""
        score = line.get("validation/consensus", -1.0)
        if score <= self.best:
            return False
        self.best = score
        return True

    def update(self, lr: float, batch: tuple[Tensor, ...]) -> None:
        """One application of the rule, in place, on blocks of columns where it allows that."""
        self.last_lr = lr
        width = self.stack.parameters
        size = block(self.network.graph.nodes, self.stack.X.device) if self.rule.in_blocks else width
        for start in range(0, width, size):
            if start in (0, size):  # further blocks are no messages of their own
                ctx = self.context(self.step, lr, start == 0, batch)
            columns = slice(start, start + size)
            G = self.stack.G[:, columns]
            self.move(columns, lambda X, state, G=G, ctx=ctx: self.rule.update(X, G, state, ctx))

    def move(self, columns: slice, step: Callable[[Tensor, SimpleNamespace], Tensor]) -> None:
        """Replace these columns of the rows by ``step`` of them and of the buffers, and keep what that assigns to buffers."""
        width, X = self.stack.parameters, self.stack.X[:, columns]
        held = {k: v[:, columns] if v.shape[1] == width else v for k, v in (self.buffers | self.edge_buffers).items()}
        state = SimpleNamespace(**held)
        rule = f"gossip: {type(self.rule).__name__}"
        X.copy_(require_shape(step(X, state), X.shape, f"{rule}.update returns"))
        for name, matrix in held.items():
            if getattr(state, name) is not matrix:
                matrix.copy_(require_shape(getattr(state, name), matrix.shape, f"{rule} sets its buffer {name} to"))

    def context(self, step: int, lr: float, first: bool = True, batch: tuple[Tensor, ...] = ()) -> Context:
        edges = self.network.edges(step)
        return Context(
            step,
            lr,
            mix=functools.partial(self.network.mix, step=step, messages=first),
            mean=functools.partial(self.network.all_reduce, messages=first),
            swap=functools.partial(self.network.swap, step=step, messages=first),
            edges=edges - [[self.network.rows.start, 0]] if len(edges) else edges,
            weights=self.network.graph.mixing(step).W[tuple(edges.T)],
            gradient=functools.partial(self.gradient, batch=batch),
            targets=batch[1] if batch else None,
            features=functools.partial(self.features, batch=batch),
            pull_back=functools.partial(self.pull_back, batch=batch),
            uniform=functools.partial(self.uniform, step=step),
        )

    def uniform(self, purpose: str, columns: int, step: int) -> Tensor:
        """Random numbers in [0, 1) [rows, columns], the same for a node whichever process holds it."""
        self.whole_rows("draws random numbers")
        nodes, device = torch.tensor(self.network.rows)[:, None], self.stack.X.device
        index = torch.arange(columns, device=device)
        return randomness.uniform(self.seed, purpose, nodes.to(device), step, index, device=device)

    def gradient(self, X: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        """Gradients [rows, P] at other parameters, for rules that look at whole rows."""
        self.whole_rows("asks for another gradient")
        return self.stack.gradient(X, *batch[:2], self.step, *batch[2:])

    def features(self, X: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        """Features [rows, B, F] of the batch at other parameters, for rules that look at whole rows."""
        self.whole_rows("asks for features")
        return self.stack.features(X, batch[0], self.step)

    def pull_back(self, X: Tensor, V: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        """Gradients [rows, P] of a loss whose derivative by these features is ``V`` [rows, B, F]."""
        return self.stack.pull_back(X, V, batch[0], self.step)

    def whole_rows(self, does: str) -> None:
        """Refuse a rule that ``does`` what only those may that are not called on blocks of columns."""
        if self.rule.columnwise:
            raise UserError(f"gossip: {type(self.rule).__name__} {does}, so it must set columnwise = False")

    def lr(self) -> float:
        """The learning rate of this step."""
        return self.train.lr * self.train.schedule.factor(self.epoch + self.epoch_step / self.steps, self.epochs)

    def note(self, losses: Tensor) -> None:
        """Add up losses without waiting for the device, and remember where one stopped being a number."""
        self.loss = self.loss.to(losses.device) + losses
        self.loss_steps += 1
        self.samples += self.store.batch_size * self.store.nodes
        bad = ~torch.isfinite(losses) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, self.step, self.first_bad)

    def finite(self) -> None:
        """Stop where a loss or a parameter is not finite; the last checkpoint was written before."""
        sound = torch.isfinite(self.stack.X).all(1) | (self.first_bad >= 0)
        bad = self.network.report(torch.where(sound, self.first_bad, self.step - 1)[:, None])[:, 0].tolist()
        if max(bad) >= 0:
            step, node = min((s, i) for i, s in enumerate(bad) if s >= 0)
            kept = f"last good checkpoint: {self.folder.last}" if self.folder.last.exists() else "there is no checkpoint yet"
            raise UserError(
                f"the loss of node {node} or its parameters are not finite at step {step} (train.lr is {self.train.lr}; try a "
                f"smaller one); {kept}"
            )

    def stop_asked(self) -> bool:
        """Whether any process was interrupted; all of them must stop at the same step."""
        if self.network.world == 1:
            return self.interrupted
        return bool(self.network.report(torch.full((self.stack.n, 1), float(self.interrupted))).any())

    def save(self, keep: list[str] | None = None, name: str = "last.ckpt") -> None:
        """Write a checkpoint (process 0), and keep copies under other names and where ``run.keep`` asks for one."""
        state = gather(self)
        if self.epoch in self.keep and self.epoch_step == 0 and name == "last.ckpt":
            keep = [*(keep or []), f"epoch_{self.epoch}.ckpt"]
        if self.fabric.is_global_zero:
            self.folder.save(state, name, keep or [])

    def overhead(self) -> dict[str, float]:
        """Bytes beyond those of training alone, as a share of these: over as many steps, and over as many epochs."""
        once = self.train.final_merge * 2 * (self.store.nodes - 1) * self.stack.X[0].nbytes
        training, more = self.sent() - self.exchange_bytes, self.train.final_gossip
        plain = once + (training - once) * (self.epochs * self.store.steps() + more) / (self.step + more)
        bases = {"steps": training, "epochs": plain} if training else {}
        return {f"overhead_at_equal_{k}": self.sent() / base - 1 for k, base in bases.items()}

    def call(self, hook: str, **payload) -> None:
        """Call a hook of every callback with those of the payload's parts that it names. To ``metrics`` and ``summary`` it may
        add."""
        payload["run"] = self
        for method, names in self.methods(hook):
            given = {name: payload[name] for name in names}
            before = {name: to_json(given[name], name) for name in names if name in ("metrics", "summary")}
            method(**given)
            for name, values in before.items():
                added(payload[name], values, f"callbacks: {type(method.__self__).__name__}: {name}")

    def methods(self, hook: str) -> list[tuple[Callable, list[str]]]:
        """What the callbacks do at ``hook``, each with the names of its arguments."""
        if hook not in self._methods:
            found = [getattr(callback, hook) for callback in self.callbacks if hasattr(callback, hook)]
            self._methods[hook] = [(method, list(inspect.signature(method).parameters)) for method in found]
        return self._methods[hook]

    # ------------------------------------------------------------------ distillation

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Inside, what is sent belongs to an exchange."""
        before = self.sent()
        yield
        self.exchange_bytes += self.sent() - before

    def sent(self) -> int:
        """Bytes so far."""
        return sum(v for k, v in self.network.counts().items() if k.endswith("_bytes"))

    def answers(self) -> list[Outputs]:
        """Outputs of every row on the public set, in the set's own order."""
        return self.stack.answers(self.store.public_batches, self.store.unshuffled)

    def calibrate(self, public: list[Outputs]) -> list[Selection]:
        """Every node's selection from its outputs on the public set."""
        selections = calibrate(self, public)
        values = torch.tensor([[s.measures[k] for k in MEASURES] for s in selections], dtype=torch.float64)
        values = self.network.report(values)
        self.ood = {k: None if math.isnan(v) else v for k, v in zip(MEASURES, values.nanmean(0).tolist(), strict=True)}
        limit = self.ood["threshold"]
        self.ood["threshold_probability"] = None if limit is None else self.calibration.score.probability(limit)
        self.per_node |= {k: values[:, j].tolist() for j, k in enumerate(MEASURES)}
        self.call("on_calibration_end", epoch=self.epoch, selections=selections)
        return selections

    def distil(self, labels: list[Labels]) -> None:
        """From now on the nodes here train on ``labels`` too."""
        self.phase = "distil"
        if self.ood["kept_fraction"] is None:
            self.ood["kept_fraction"] = 1.0
        before = heterogeneity(self.network, self.store)["tv"]
        self.store.distil(labels, self.step)
        after = heterogeneity(self.network, self.store)["tv"]
        sizes = self.network.report(torch.tensor([[len(found)] for found in labels]))[:, 0].tolist()
        if self.distillation.steps == "grow":
            ours = torch.tensor(self.store.sizes, dtype=torch.float64)[:, None]
            self.steps = self.store.steps(self.network.all_reduce(ours, kind="other")[0].item())
        measured = {k: v for k, v in self.per_node.items() if k in MEASURES}
        self.exchanges.append({"epoch": self.epoch, "distilled": sizes, "homogeneity": [before, after], **measured})
        self.say(
            f"exchange before epoch {self.epoch + 1}: kept {self.ood['kept_fraction']:.1%} of the public set, "
            f"{sum(sizes) / len(sizes):,.0f} distilled samples a node, heterogeneity {before:.3f} -> {after:.3f}"
        )
        if empty := [str(node) for node, size in enumerate(sizes) if not size]:
            self.say(f"no distilled samples for {len(empty)} nodes: {', '.join(empty)}")

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, samples: int | None, **extra) -> dict:
        """Measure on so many test ``samples`` (None: all), call ``on_evaluation_end``, print and log."""
        line = {"epoch": self.epoch, "step": self.step, "phase": self.phase}
        if self.loss_steps:
            line["train/loss"] = self.network.report(self.loss[:, None] / self.loss_steps).mean().item()
            line["train/lr"] = self.last_lr
        stop = self.watch if samples is None else (lambda: False)  # all samples of many nodes take minutes
        started = time.perf_counter()
        found, self.per_node["accuracy"] = measure(
            self.stack, self.network, self.store, samples, self.train.evaluate_samples, stop
        )
        self.evaluating = (time.perf_counter() - started) / min(samples or math.inf, len(self.store.test))
        line |= found | extra
        line |= {f"communication/{k}": v for k, v in self.network.counts().items()}
        line |= {f"ood/{k}": v for k, v in self.ood.items() if v is not None}
        for when, found in (("before", self.before), ("after", heterogeneity(self.network, self.store))):
            line |= {f"homogeneity/{when}" if k == "tv" else f"homogeneity/{k}_{when}": v for k, v in found.items()}
        line |= {
            "throughput/samples_per_second": self.samples / max(self.train_seconds, 1e-9),
            "throughput/seconds": self.elapsed(),
        }
        line["per_node"] = dict(self.per_node)
        self.lines.append(line)
        self.call("on_evaluation_end", metrics=line)
        self.loss, self.loss_steps = torch.zeros_like(self.loss), 0
        if self.fabric.is_global_zero:
            self.folder.log(self.lines)
            print(report.line(line, self.epochs, self.left()), flush=True)
            loggers.log(self.loggers, self.lines, self.pictures)
            self.pictures = {}
        return line

    def finish(self) -> dict:
        """Final gossip, the whole test set, summary and pictures."""
        images = len(self.store.test)
        steps = 2 * self.stack.passes * self.store.batches
        self.progress = report.Progress(f"evaluating on all {images:,} test images", steps, self.say)
        before = accuracies(self.stack, self.network, self.store, "test", None, self.watch).mean().item()
        self.final_gossip()
        self.save(name="final.ckpt")
        line = self.evaluate(None, **{"accuracy/node_mean_before_final_gossip": before})
        summary: dict = {}
        for key, value in line.items():
            area, _, name = key.partition("/")
            if name and key not in ("train/loss", "train/lr"):
                below = summary.setdefault(area, {})
                summary |= {key: value} if not isinstance(below, dict) else {area: below | {name: value}}
            elif not name and key not in ("epoch", "step", "phase"):
                summary.setdefault(key, value)  # such as a callback's, which comes last and hides none of ours
        calibrated = self.ood["threshold"] is not None
        summary |= {
            "name": self.folder.path.parent.name,
            "seed": self.seed,
            "nodes": self.store.nodes,
            "steps": self.step,
            "epochs": self.epochs,
            "final_gossip": self.train.final_gossip,
            "final_merge": self.train.final_merge,
            "engine": self.stack.engine,
            "ood": summary.get("ood", {}) | self.ood | {"score": self.calibration.score.title if calibrated else None},
            "peak_memory_bytes": self.peak_memory(),
        }
        summary["throughput"]["seconds"] = self.elapsed()
        summary["communication"] |= self.overhead()
        summary["per_node"], summary["exchanges"] = self.per_node, self.exchanges
        summary |= self.header
        ours = to_json(summary, "summary")
        try:
            self.call("on_fit_end", summary=summary)
        except Exception:  # of a callback, which shall not cost the run its result
            if self.fabric.is_global_zero:
                self.folder.json("summary.json", ours)
            raise
        return summary

    def final_gossip(self) -> None:
        """Mixings and exact mean after the last training step. ``last.ckpt`` holds the rows before, so that forks may go on."""
        for step in range(self.step, self.step + self.train.final_gossip):
            self.move(slice(None), functools.partial(self.rule.combine, ctx=self.context(step, self.last_lr)))
        if self.train.final_merge:
            self.stack.X.copy_(self.network.all_reduce(self.stack.X))
        self.phase = "final"

    def watch(self) -> bool:
        """Say how far the final evaluation is; returns whether it shall stop."""
        self.progress.step()
        return self.interrupted

    def left(self) -> float:
        """Seconds to the end of the run: of the remaining epochs and their evaluations if they take as long as those of this
        session, of the evaluation on all test images before and after the final gossip, and of what callbacks do then."""
        if self.phase == "final":
            return 0.0
        done = self.epoch - self._first
        epochs = (time.perf_counter() - self._clock) * (self.epochs - self.epoch) / done if done > 0 else math.nan
        return epochs + 2 * self.evaluating * len(self.store.test) + sum(c.at_the_end for c in self.callbacks)

    def elapsed(self) -> float:
        """Seconds of the whole run so far, over all its sessions."""
        return self.seconds + time.perf_counter() - self._clock

    def peak_memory(self) -> int:
        """Peak memory of this process in bytes; of the device on CUDA."""
        if self.stack.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.stack.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def say(self, text: str) -> None:
        """Print from the first process."""
        if self.fabric.is_global_zero:
            print(text, flush=True)
