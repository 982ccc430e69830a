"""Messages that do not arrive."""

from __future__ import annotations

import numpy as np

from lightning_idkd.callback import Fault
from lightning_idkd.errors import require
from lightning_idkd.links import Moment

from .chain import TwoStates


class MessageLoss(Fault):
    """Loses every directed message with probability ``p``, independently or in bursts (Gilbert, Bell System Technical
    Journal 1960, with certain loss in the bad state).

    Args:
        p: Probability that a message is lost, 0 to 1.
        told: Whether both ends know of a loss before they mix. If so, an undirected edge is left out of a step where
            either of its messages is lost, and the weights keep their kind, such as doubly stochastic. If not, the
            receiver puts its own row in the place of the lost one, so that only the rows of W sum to 1; in push-sum, a
            lost message takes its mass with it. With a clock, no node waits for a lost message.
        burst: Mean number of successive steps in which an edge loses its messages, 1 / (1 - ``p``) or more; null:
            losses in different steps are independent.
    """

    def __init__(self, p: float = 0.1, told: bool = True, burst: float | None = None):
        require(0 <= p <= 1, "faults.p", p, "0 to 1")
        self.p, self.told, self.chain = p, told, None
        if burst is not None:
            require(p < 1, "faults.p", p, "0 to below 1 with bursts")
            shortest = max(1.0, 1 / (1 - p))
            require(shortest <= burst < float("inf"), "faults.burst", burst, f"{shortest:g} steps or more, or null")
            self.chain = TwoStates(enter=p / ((1 - p) * burst), leave=1 / burst)

    def lost(self, moment: Moment, edges: np.ndarray) -> np.ndarray:
        sender, receiver = edges.T
        if self.chain is not None:
            return self.chain.at(moment, "loss", sender, receiver)
        return moment.uniform("loss", sender, receiver) < self.p


class LinkOutage(Fault):
    """Cuts whole links, in both directions at once, for ``steps`` steps at a time.

    Training is divided into stretches of ``steps`` steps; in each, every link is out with probability ``p``. Both ends
    know of it.

    Args:
        p: Probability that a link is out, 0 to 1.
        steps: Length of a stretch, 1 or more.
    """

    def __init__(self, p: float = 0.1, steps: int = 100):
        require(0 <= p <= 1, "faults.p", p, "0 to 1")
        require(steps >= 1, "faults.steps", steps, "1 or more")
        self.p, self.steps = p, steps

    def lost(self, moment: Moment, edges: np.ndarray) -> np.ndarray:
        return moment.uniform("outage", edges.min(1), edges.max(1), step=moment.step // self.steps) < self.p
