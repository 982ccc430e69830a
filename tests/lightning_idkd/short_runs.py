"""Short runs of ring_digits, and what they leave."""

from __future__ import annotations

import json
import sys

import torch

from lightning_idkd.config.parse import configure
from lightning_idkd.training.build import build_parts
from lightning_idkd.training.fit import build_run
from lightning_idkd.training.launch import launch
from lightning_idkd.training.resume import Start

SHORT = [
    "--logger",
    "null",
    "--graph.nodes",
    "4",
    "--train.epochs",
    "6",
    "--train.evaluate_every",
    "2",
    "--distillation.start",
    "3",
    "--distillation.every",
    "2",
    "--data.public.samples",
    "300",
    "--run.engine",
    "loop",
    "--run.threads",
    "1",
    "--run.pictures",
    "false",
]


def command_of(config) -> list[str]:
    """What runs a config in a process of its own."""
    return [sys.executable, "-m", "lightning_idkd", "fit", "--config", str(config)]


def extra(callback: type, **arguments) -> list[str]:
    """The option that adds a test's own callback."""
    return ["--callbacks", f"[{{class_path: {callback.__module__}.{callback.__name__}, init_args: {arguments}}}]"]


def latest(runs, name="ring_digits"):
    return runs / name / "latest"


def checkpoint(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def same(a, b, path=""):
    """The first place where two checkpoints differ, times apart."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        keys = [k for k in a if k not in ("seconds", "train_seconds", "devices")]
        return next((d for k in keys if (d := same(a[k], b[k], f"{path}.{k}"))), None)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        return next((d for i, (x, y) in enumerate(zip(a, b, strict=True)) if (d := same(x, y, f"{path}[{i}]"))), None)
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or (a != a and b != b)
    return None if equal else f"{path}: {a} != {b}"


def lines(run):
    """Metrics without times."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("throughput")} for line in read]


def run_of(configs, *arguments):
    """A short run of ring_digits before its first step."""
    return build(configure(["--config", str(configs / "ring_digits.yaml"), *SHORT, *arguments]))


def train(run, steps):
    """Train the first ``steps`` steps of an epoch; returns the order of the epoch."""
    order = run.store.order(0, run.progress.steps)
    for _ in range(steps):
        run.train_step(order)
    return order


def build(config):
    """The run of a config, before its first step."""
    fabric = launch(config.run)
    return build_run(config, fabric, build_parts(config, fabric), Start(config))
