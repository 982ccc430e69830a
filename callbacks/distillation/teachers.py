"""Whose answers a node sends: its own, those of its row some gossip steps later, or of a slowly moving copy."""

from __future__ import annotations

from lightning_idkd.callback import Teacher
from lightning_idkd.errors import require


class Gossiped(Teacher):
    """A node's row after more gossip steps, for labelling only: nearer to the consensus model, which knows all classes.

    Args:
        steps: How many; their bytes are counted as parameters'.
    """

    def __init__(self, steps: int = 8):
        require(steps >= 1, "distillation.teacher.steps", steps, "1 or more")
        self.steps = steps

    def rows(self, run):
        import torch

        X, pushed = run.stack.X, run.network.graph.kind == "column"
        if pushed:  # rows of such weights do not sum to 1: push-sum mixes, and divides by, what they sum to
            X = torch.cat([X, torch.ones_like(X[:, :1])], 1)
        for step in range(run.step, run.step + self.steps):
            X = run.network.mix(X, step)
        return X[:, :-1] / X[:, -1:] if pushed else X


class MovingAverage(Teacher):
    """An exponential average of a node's row over the steps, from where the run began or was forked.

    Args:
        decay: Weight of the past, in [0, 1).
    """

    def __init__(self, decay: float = 0.99):
        require(0 <= decay < 1, "distillation.teacher.decay", decay, "0 to below 1")
        self.decay, self.mean = decay, None

    def on_step_end(self, run):
        if self.mean is None:
            self.mean = run.stack.X.clone()
        self.mean.lerp_(run.stack.X, 1 - self.decay)

    def rows(self, run):
        return run.stack.X if self.mean is None else self.mean

    def state_dict(self, run):
        return {"mean": None if self.mean is None else run.network.report(self.mean).clone()}

    def load_state_dict(self, state, run):
        mine = slice(run.network.rows.start, run.network.rows.stop)
        self.mean = None if state["mean"] is None else state["mean"][mine].to(run.stack.X).clone()
