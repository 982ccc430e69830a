"""Markov chains of two states, good and bad, as pure functions of the step."""

from __future__ import annotations

import numpy as np

from lightning_idkd.errors import UserError
from lightning_idkd.links import Moment

LEAST = 1e-6  # smallest probability that numbers of 24 bits resolve well
FIRST, MOST = 64, 2**21  # steps that are looked back on first, and most numbers that are drawn at once


class TwoStates:
    """Independent stationary chains, which enter the bad state with one probability and leave it with another.

    A number u in [0, 1) is drawn for every chain and step. With u < ``enter``, the chain is bad after the step,
    whatever it was before; with u >= 1 - ``leave``, it is good; otherwise it stays as it is. The last draw that decides
    gives its state, which therefore needs no memory (coupling from the past; Propp and Wilson, 1996).

    Args:
        enter, leave: probabilities per step; their sum is 1 at most.

    Raises:
        UserError: one of them is above 0, but too small for the draws.
    """

    def __init__(self, enter: float, leave: float):
        for probability in (enter, leave):
            if 0 < probability < LEAST:
                raise UserError(f"faults: a change with probability {probability:.2g} a step is given; allowed: 0, or "
                                f"{LEAST:g} or more")  # fmt: skip
        self.enter, self.leave = enter, leave
        self._last: tuple[int, tuple, np.ndarray] | None = None

    def at(self, moment: Moment, purpose: str, *counters: np.ndarray) -> np.ndarray:
        """Whether the chains are bad in this step, bool [m], for counters [m]."""
        if self.enter == 0:
            return np.zeros(len(counters[0]), bool)
        which = moment.seed, moment.fault, purpose, *(c.tobytes() for c in counters)
        if self._last is not None and self._last[:2] == (moment.step - 1, which):  # no need to look back
            u = moment.uniform(purpose, *counters)
            bad = (u < self.enter) | (self._last[2] & (u < 1 - self.leave))
        else:
            bad = self._look_back(moment, purpose, *counters)
        self._last = moment.step, which, bad
        return bad

    def _look_back(self, moment: Moment, purpose: str, *counters: np.ndarray) -> np.ndarray:
        """The state after the last draw that decides, which is sought in longer and longer stretches."""
        bad, undecided = np.zeros(len(counters[0]), bool), np.arange(len(counters[0]))
        latest, length = moment.step, FIRST
        while len(undecided):
            steps = latest - np.arange(length)[:, None]
            u = moment.uniform(purpose, *(c[undecided] for c in counters), step=steps)  # [length, chains], latest first
            decides = (u < self.enter) | (u >= 1 - self.leave)
            decided, last = decides.any(0), decides.argmax(0)
            bad[undecided[decided]] = u[last, np.arange(len(undecided))][decided] < self.enter
            undecided, latest = undecided[~decided], latest - length
            length = min(2 * length, max(FIRST, MOST // max(len(undecided), 1)))
        return bad
