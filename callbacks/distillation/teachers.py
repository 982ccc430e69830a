"""Teachers: the parameters with which a node labels the public set, after extra gossip steps, averaged over time, or
with a refitted last layer."""

from __future__ import annotations

import math

from lightning_idkd.callback import Run, Teacher
from lightning_idkd.errors import require

from ..heads import LDA, CalibratedHead, Head
from ..heads.calibrated import Refit

TYPE_CHECKING = False  # by a name of ours: jsonargparse runs the block of typing's, which would load torch
if TYPE_CHECKING:
    from torch import Tensor


class Gossiped(Teacher):
    """Labels with the node's row after extra gossip steps, which brings it nearer to the consensus model, which knows
    all classes. Training continues from the row before these steps.

    Args:
        steps: Number of gossip steps; their bytes are counted as those of parameters.
    """

    def __init__(self, steps: int = 8):
        require(steps >= 1, "distillation.teacher.steps", steps, "1 or more")
        self.steps = steps

    def rows(self, run: Run) -> Tensor:
        import torch

        X, push_sum = run.stack.X, run.network.links.pushes
        if push_sum:  # rows of these weights do not sum to 1, so their sum is mixed too, and X is divided by it
            X = torch.cat([X, torch.ones_like(X[:, :1])], 1)
        for step in range(run.step, run.step + self.steps):
            X = run.network.mix(X, step)
        return X[:, :-1] / X[:, -1:] if push_sum else X


class MovingAverage(Teacher):
    """Labels with an exponential moving average of the node's row over the steps since the run began or was forked.

    Args:
        decay: Weight of the previous average in each step, in [0, 1).
    """

    def __init__(self, decay: float = 0.99):
        require(0 <= decay < 1, "distillation.teacher.decay", decay, "0 to below 1")
        self.decay, self.mean = decay, None

    def on_step_end(self, run: Run) -> None:
        import torch

        X = run.stack.X
        if self.mean is None:
            self.mean = X.clone()
        mean = self.mean.lerp(X, 1 - self.decay)
        present = run.network.present(run.step - 1)  # of the step that has just ended
        if present is not None:
            mean = torch.where(torch.from_numpy(present).to(X.device)[:, None], mean, self.mean)
        self.mean = mean

    def rows(self, run: Run) -> Tensor:
        return run.stack.X if self.mean is None else self.mean

    def state_dict(self, run: Run) -> dict:
        mean = None if self.mean is None else run.network.collect(self.mean)
        return {"mean": None if mean is None else mean.clone()}

    def load_state_dict(self, state: dict, run: Run) -> None:
        rows = slice(run.network.rows.start, run.network.rows.stop)
        self.mean = None if state["mean"] is None else state["mean"][rows].to(run.stack.X).clone()


class Refitted(Teacher):
    """Labels with the node's row, whose last layer is refitted to class statistics that nodes gossip
    (:class:`CalibratedHead`). Training continues with the last layer as it was. The statistics are sent at every
    exchange, and reveal class means.

    Args:
        head: How the layer follows from the statistics: LDA, NearestMean or VirtualFeatures; null for LDA.
        rounds: Rounds of gossip, 1 or more.
        noise: Standard deviation of the noise on a node's sums and second moments, as a multiple of their size for one
            sample; 0 for none. It is no proof of privacy.
    """

    shares = CalibratedHead.shares

    def __init__(self, head: Head | None = None, rounds: int = 20, noise: float = 0.0):
        require(rounds >= 1, "distillation.teacher.rounds", rounds, "1 or more")
        require(0 <= noise < math.inf, "distillation.teacher.noise", noise, "0 or more")
        self.refit = Refit(head or LDA(), rounds, noise)

    def on_check(self, run: Run) -> None:
        self.refit.check(run, "distillation.teacher: Refitted")

    def rows(self, run: Run) -> Tensor:
        with run.stack.use_parameters(run.stack.X.clone()):
            self.refit(run)
            return run.stack.X.clone()
