"""Markov chains of two states, good and bad, as pure functions of the step."""

from __future__ import annotations

from itertools import count

import numpy as np

from lightning_idkd.links import Moment

BLOCK = 64  # steps that are drawn at once on the way back


class TwoStates:
    """Independent stationary chains, which enter the bad state with one probability and leave it with another.

    A number u in [0, 1) is drawn for every chain and step. With u < ``enter`` a chain is bad after it, whatever it was
    before; with u >= 1 - ``leave`` it is good; between these it stays as it is. Its state is therefore that of the last
    draw that decided (coupling from the past; Propp and Wilson, 1996), and needs no memory.

    Args:
        enter, leave: probabilities per step; their sum is 1 at most.
    """

    def __init__(self, enter: float, leave: float):
        self.enter, self.leave = enter, leave

    def at(self, moment: Moment, purpose: str, *counters: np.ndarray) -> np.ndarray:
        """Whether the chains are bad in this step, bool in the shape of the counters."""
        if self.enter + self.leave == 0:
            return np.zeros(np.broadcast(*counters).shape, bool)
        bad, open_ = np.zeros(len(counters[0]), bool), np.arange(len(counters[0]))
        for block in count():
            steps = moment.step - BLOCK * block - np.arange(BLOCK)[:, None]
            u = moment.uniform(purpose, *(c[open_] for c in counters), step=steps)  # [BLOCK, chains], latest first
            decides = (u < self.enter) | (u >= 1 - self.leave)
            decided, last = decides.any(0), decides.argmax(0)
            bad[open_[decided]] = u[last, np.arange(len(open_))][decided] < self.enter
            open_ = open_[~decided]
            if not len(open_):
                return bad
        raise AssertionError  # the loop ends by itself
