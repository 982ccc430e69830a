"""A callback whose run waits to be stopped."""

from __future__ import annotations

import time
from pathlib import Path

from lightning_idkd.callback import Callback


class Waits(Callback):
    """Before the second epoch of a run with one of these seeds, waits until the run is stopped, once."""

    def __init__(self, folder: str, seeds: list[int]):
        self.folder, self.seeds = Path(folder), seeds

    def on_epoch_start(self, run, epoch):
        marker = self.folder / f"{run.seed} {type(run.distillation).__name__}"
        if epoch == 1 and run.seed in self.seeds and not marker.exists():
            marker.touch()
            end = time.monotonic() + 120
            while not run.interrupted and time.monotonic() < end:
                time.sleep(0.05)
