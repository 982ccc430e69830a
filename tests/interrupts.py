"""A callback that stops a run, for the tests of both packages."""

from __future__ import annotations

from lightning_idkd import Callback


class InterruptAt(Callback):
    """Asks to stop after these steps, as Ctrl-C does."""

    def __init__(self, steps: list[int]):
        self.steps = steps

    def on_step_end(self, run, step):
        if step in self.steps:
            run.stop()
