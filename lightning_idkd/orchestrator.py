"""The training loop, top to bottom: batch, gradients, gossip update, evaluation; phases come in by hooks.

Fabric gives launch, device, loggers and hook calls. It does not wrap the nodes, own loaders or call backward: under DDP
gradients would be averaged and the rows overwritten by those of process 0.
"""

from __future__ import annotations

import functools
import math
import resource
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_idkd import loggers, report
from lightning_idkd.callback import Calibration, Callback, Context, Distillation, Gossip, Selection
from lightning_idkd.config import TrainConfig
from lightning_idkd.data.store import Store
from lightning_idkd.errors import UserError
from lightning_idkd.evaluation import accuracies, homogeneity, measure
from lightning_idkd.network import Labels, Network
from lightning_idkd.node import Outputs
from lightning_idkd.run_folder import RunFolder
from lightning_idkd.stack import NodeStack, run_network

BLOCK = 16384  # columns of a rule's matrices that are treated at once: 16 rows of them fit a core's cache


class Orchestrator:
    """One run; its ``folder`` must be set before :meth:`fit`.

    ``self`` is what hooks get as ``run``; :meth:`state` is all of it that a resumed run needs.
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
        self.checkpoint_every, self.keep, self.seed, self.header = checkpoint_every, keep or [], seed, header or {}
        # extras come first: their on_epoch_start precedes the exchange that distillation makes in its own
        self.callbacks = [c for c in (*(callbacks or []), rule, calibration, distillation) if c is not None]
        fabric._callbacks = self.callbacks  # they need the run's parts, which exist only after launch
        self.epochs, self.until = train.epochs, until or train.epochs
        self.epoch = self.step = self.epoch_step = 0
        self.steps = store.steps()  # an epoch
        self.phase = "train"
        self.best = -1.0  # validation accuracy of the best consensus model
        self.buffers = {k: torch.zeros_like(stack.X) for k in rule.buffers}
        edges = len(network.edges(0))
        self.edge_buffers = {k: stack.X.new_zeros(edges, width or stack.parameters) for k, width in rule.edge_buffers.items()}
        self.samples, self.seconds, self.train_seconds, self.last_lr = 0, 0.0, 0.0, train.lr
        self.loss, self.loss_steps = torch.zeros(stack.n, dtype=torch.float64), 0
        self.first_bad = torch.full((stack.n,), -1, device=stack.device)
        self.ood: dict[str, float | None] = {"auroc": None, "threshold": None, "kept_fraction": None}
        self.per_node: dict[str, list] = {}  # the last measured accuracy, threshold, ... of every node
        self.before = homogeneity(network, store)
        self.lines: list[dict] = []
        self.loggers: list = []
        self.pictures: dict[str, Path] = {}  # new ones, for the next line of metrics
        self.interrupted = False
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
        return self.finish() if self.epoch == self.epochs else None

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
        x, y = self.store.batch(order[:, self.epoch_step * b : (self.epoch_step + 1) * b], self.step)
        losses = self.stack.step(x, y, self.step)
        self.update(self.lr(), x, y)
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

    def update(self, lr: float, x: Tensor, y: Tensor) -> None:
        """One application of the rule, in place, on blocks of columns where it allows that."""
        self.last_lr = lr
        stack, width = self.stack, self.stack.parameters
        narrow = any(self.rule.edge_buffers.values())  # all columns share it, so it may move once a step only
        size = BLOCK if self.rule.columnwise and not narrow else width
        for start in range(0, width, size):
            columns, first = slice(start, start + size), start == 0
            X, G = stack.X[:, columns], stack.G[:, columns]
            held = {k: v[:, columns] if v.shape[1] == width else v for k, v in (self.buffers | self.edge_buffers).items()}
            state = SimpleNamespace(**held)
            X.copy_(self.rule.update(X, G, state, self.context(self.step, lr, first, x, y)))
            for name, matrix in held.items():
                if getattr(state, name) is not matrix:
                    matrix.copy_(getattr(state, name))

    def context(self, step: int, lr: float, first: bool = True, x: Tensor | None = None, y: Tensor | None = None) -> Context:
        edges = self.network.edges(step)
        return Context(
            step,
            lr,
            mix=functools.partial(self.network.mix, step=step, messages=first),
            mean=functools.partial(self.network.all_reduce, messages=first),
            swap=functools.partial(self.network.swap, step=step, messages=first),
            edges=edges - [[self.network.rows.start, 0]] if len(edges) else edges,
            gradient=functools.partial(self.gradient, x=x, y=y),
        )

    def gradient(self, X: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Gradients [rows, P] at other parameters, for rules that look at whole rows."""
        if self.rule.columnwise:
            raise UserError(f"gossip: {type(self.rule).__name__} asks for another gradient, so it must set columnwise = False")
        return self.stack.gradient(X, x=x, y=y, step=self.step)

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

    def call(self, hook: str, **payload) -> None:
        """Call a hook of every callback."""
        self.fabric.call(hook, run=self, **payload)

    # ------------------------------------------------------------------ distillation

    def predict_public(self, i: int) -> Outputs:
        """Outputs of row ``i`` on the public set, in the set's own order."""
        outputs = run_network(self.stack.modules[i], self.store.public_batches())
        back = torch.argsort(self.store.public_order()).to(outputs.logits.device)
        return Outputs(outputs.logits[back], None if outputs.features is None else outputs.features[back])

    def calibrate(self, public: list[Outputs]) -> list[Selection]:
        """Every node's selection from its outputs on the public set."""
        selections, say = [], functools.partial(self.say, anywhere=True)
        for i, node in enumerate(self.network.rows):
            held_out, own = self.store.held_out(node), self.store.own[i].cpu()
            module, batches = self.stack.modules[i], self.store.private_batches
            if self.calibration.score.fitted:
                self.calibration.score.fit(run_network(module, batches(own)), self.store.labels[own])
            private = run_network(module, batches(held_out if len(held_out) else own))
            selections.append(self.calibration.select(private, public[i], len(held_out), say, node))
        values = torch.tensor([[s.auroc, s.threshold, s.kept.double().mean()] for s in selections], dtype=torch.float64)
        values = self.network.report(values)
        self.ood = dict(zip(self.ood, values.nanmean(0).tolist(), strict=True))
        self.per_node |= {k: values[:, j].tolist() for j, k in enumerate(self.ood)}
        self.call("on_calibration_end", epoch=self.epoch, selections=selections)
        return selections

    def distil(self, labels: list[Labels]) -> None:
        """From now on the nodes here train on ``labels`` too."""
        self.phase = "distil"
        if self.ood["kept_fraction"] is None:
            self.ood["kept_fraction"] = 1.0
        self.store.distil(labels, self.step)
        if self.distillation.steps == "grow":
            sizes = torch.tensor(self.store.sizes, dtype=torch.float64)[:, None]
            self.steps = self.store.steps(self.network.all_reduce(sizes, kind="other")[0].item())
        self.say(
            f"exchange before epoch {self.epoch + 1}: kept {self.ood['kept_fraction']:.1%} of the public set, "
            f"homogeneity {self.before:.3f} -> {homogeneity(self.network, self.store):.3f}"
        )

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, samples: int | None, **extra) -> dict:
        """Measure on so many test ``samples`` (None: all), call ``on_evaluation_end``, print and log."""
        line = {"epoch": self.epoch, "step": self.step, "phase": self.phase}
        if self.loss_steps:
            line["train/loss"] = self.network.report(self.loss[:, None] / self.loss_steps).mean().item()
            line["train/lr"] = self.last_lr
        found, self.per_node["accuracy"] = measure(self.stack, self.network, self.store, samples, self.train.evaluate_samples)
        line |= found | extra
        line |= {f"communication/{k}": v for k, v in self.network.counts().items()}
        line |= {f"ood/{k}": v for k, v in self.ood.items() if v is not None}
        line |= {"homogeneity/before": self.before, "homogeneity/after": homogeneity(self.network, self.store)}
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
            loggers.log(self.loggers, line, self.pictures)
            self.pictures = {}
        return line

    def finish(self) -> dict:
        """Final gossip, the whole test set, summary and pictures."""
        before = accuracies(self.stack, self.network, self.store, "test", None).mean().item()
        self.final_gossip()
        self.save(name="final.ckpt")
        line = self.evaluate(None, **{"accuracy/node_mean_before_final_gossip": before})
        summary: dict = {
            "name": self.folder.path.parent.name,
            "seed": self.seed,
            "nodes": self.store.nodes,
            "steps": self.step,
            "epochs": self.epochs,
            "final_gossip": self.train.final_gossip,
            "engine": self.stack.engine,
        }
        for key, value in line.items():
            area, _, name = key.partition("/")
            if area in ("accuracy", "validation", "communication", "homogeneity", "throughput"):
                summary.setdefault(area, {})[name] = value
        summary |= {
            "consensus_distance": line["consensus_distance"],
            "ood": dict(self.ood),
            "peak_memory_bytes": self.peak_memory(),
        }
        summary["throughput"]["seconds"] = self.elapsed()
        summary["per_node"] = self.per_node
        summary |= self.header
        self.call("on_fit_end", summary=summary)
        return summary

    def final_gossip(self) -> None:
        """The mixing steps after the last training step. ``last.ckpt`` holds the rows before them, so that forks may go on."""
        for step in range(self.step, self.step + self.train.final_gossip):
            self.stack.X.copy_(self.rule.combine(self.stack.X, self.context(step, self.last_lr)))
        self.phase = "final"

    def left(self) -> float:
        """Seconds that the remaining epochs will take if they take as long as those of this session."""
        done = self.epoch - self._first
        return (time.perf_counter() - self._clock) * (self.epochs - self.epoch) / done if done > 0 else math.nan

    def elapsed(self) -> float:
        """Seconds of the whole run so far, over all its sessions."""
        return self.seconds + time.perf_counter() - self._clock

    def peak_memory(self) -> int:
        """Peak memory of this process in bytes; of the device on CUDA."""
        if self.stack.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.stack.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def say(self, text: str, anywhere: bool = False) -> None:
        """Print from the first process, or from the one that knows."""
        if anywhere or self.fabric.is_global_zero:
            print(text, flush=True)

    # ------------------------------------------------------------------ state

    def state(self) -> dict:
        """Everything a resumed run needs, gathered from all processes."""
        report_ = self.network.report
        per_edge = {k: torch.cat(self.network.report_objects(self._by_sender(v))) for k, v in self.edge_buffers.items()}
        distilled = None
        if self.store.distilled is not None:
            mine = [(label.index.cpu(), label.probabilities.cpu()) for label in self.store.distilled]
            distilled = self.network.report_objects(mine)
        return {
            "version": 1,
            "layout": self.stack.describe(),
            "images": self.store.describe(),
            "engine": self.stack.engine,
            "threads": torch.get_num_threads(),
            "devices": self.network.world,
            "epoch": self.epoch,
            "step": self.step,
            "epoch_step": self.epoch_step,
            "phase": self.phase,
            "steps": self.steps,
            "from": self.header.get("from"),
            "best": self.best,
            "last_lr": self.last_lr,
            "X": report_(self.stack.X),
            "buffers": {k: report_(b) for k, b in self.stack.buffers.items()},
            "rule": {k: report_(b) for k, b in self.buffers.items()},
            "rule_edges": per_edge,
            "distilled": distilled,
            "generation": (self.store.generation, self.store.generation_start),
            "counts": self.network.counts(),
            "ood": self.ood,
            "per_node": self.per_node,
            "loss": report_(self.loss[:, None]),
            "loss_steps": self.loss_steps,
            "samples": self.samples,
            "seconds": self.elapsed(),
            "train_seconds": self.train_seconds,
            "callbacks": [c.state_dict() for c in self.callbacks],
        }

    def _by_sender(self, T: Tensor) -> list[Tensor]:
        senders = torch.as_tensor(self.network.edges(0)[:, 0] if len(T) else [])
        return [T[senders == node].cpu() for node in self.network.rows]

    def save(self, keep: list[str] | None = None, name: str = "last.ckpt") -> None:
        """Write a checkpoint (process 0), and keep copies under other names and where ``run.keep`` asks for one."""
        state = self.state()
        if self.epoch in self.keep and self.epoch_step == 0 and name == "last.ckpt":
            keep = [*(keep or []), f"epoch_{self.epoch}.ckpt"]
        if self.fabric.is_global_zero:
            self.folder.save(state, name, keep or [])

    def load(self, state: dict, lines: list[dict], distillation: bool = True, callbacks: bool = True) -> None:
        """Continue from ``state``; without ``distillation`` nodes train on their own samples again."""
        if state["layout"] != self.stack.describe():
            raise UserError("the checkpoint holds another network: its parameters have other names or shapes")
        mine = slice(self.network.rows.start, self.network.rows.stop)
        self.stack.X.copy_(state["X"][mine])
        for held, saved in ((self.stack.buffers, state["buffers"]), (self.buffers, state["rule"])):
            for k, matrix in held.items():
                matrix.copy_(saved[k][mine])
        here = [int(e[0]) in self.network.rows for e in self.network.graph.mixing(0).edges]
        for k, matrix in self.edge_buffers.items():
            matrix.copy_(state["rule_edges"][k][here])
        self.epoch, self.step, self.epoch_step = state["epoch"], state["step"], state["epoch_step"]
        self.network.restore(state["counts"])
        self.loss, self.loss_steps = state["loss"][mine, 0].to(self.stack.device), state["loss_steps"]
        self.samples, self.train_seconds, self.last_lr = state["samples"], state["train_seconds"], state["last_lr"]
        self.lines = [line for line in lines if line["step"] <= self.step and line["phase"] != "final"]
        if distillation:
            self.phase, self.ood, self.per_node = state["phase"], state["ood"], state["per_node"]
            self.steps = state["steps"]
            if state["distilled"] is not None:
                self.store.distil([Labels(i, p).to(self.stack.device) for i, p in state["distilled"][mine]], self.step)
                self.store.generation, self.store.generation_start = state["generation"]
        if callbacks:
            self.best, self.seconds, self.header["from"] = state["best"], state["seconds"], state["from"]
            for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
                callback.load_state_dict(saved)
