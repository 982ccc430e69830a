"""Runs the cells of a sweep on this machine, a few at a time and each at most once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from lightning_idkd.errors import UserError
from lightning_idkd.files import is_locked, lock_folder
from lightning_idkd.sweep.plan import Cell, last_line
from lightning_idkd.sweep.progress import Progress

INTERRUPTED = 130
"""Exit status of ``idkd fit`` after a signal."""
EARLIER_INTERVAL = 0.5
"""Seconds between two looks at a run that another sweep has started."""


class Runner(Progress):
    """Runs each cell in a process, ``jobs`` of them at a time."""

    def __init__(self, cells: list[Cell], jobs: int, title: str = "sweep"):
        super().__init__(cells, title)
        self.jobs = jobs
        self.processes: set[subprocess.Popen] = set()
        self.stopping = False
        self.starting = threading.Lock()  # so that `stop` finds every process that was started before it
        self.finished = {id(cell): threading.Event() for cell in cells}

    def run(self) -> bool:
        """Run all cells; returns whether all of them are done."""
        # initial trainings go first, so that a waiting cell never takes the place that its source needs
        order = sorted(self.cells, key=lambda cell: cell.source is not None)
        with ThreadPoolExecutor(self.jobs) as pool, self.show_table() as live:
            futures = [pool.submit(self.run_cell, cell) for cell in order]
            try:
                self.follow(live, lambda: all(future.done() for future in futures), 0.3)
            except KeyboardInterrupt:
                self.stop()
                print("stopping; the same command continues the sweep", flush=True)
            for future in futures:
                future.result()
        return self.are_done()

    def run_cell(self, cell: Cell) -> None:
        """Run one cell to its end, after the initial training that it forks from."""
        try:
            if cell.source is not None:
                self.finished[id(cell.source)].wait()
            while is_busy(cell) and not self.stopping:
                cell.state = "running, started by another sweep"  # or by this one, if it was killed then
                time.sleep(EARLIER_INTERVAL)
            if self.stopping:
                cell.state = "stopped"
            elif cell.is_done():
                cell.state = "done"
            elif cell.source is not None and not cell.source.checkpoint_file(cell.start).exists():
                cell.state = cell.fail_with_source()
            else:
                cell.state = self.run_process(cell)
        except (OSError, UserError) as e:
            cell.state = f"failed: {e}"
        finally:
            self.finished[id(cell)].set()

    def run_process(self, cell: Cell) -> str:
        """Train a cell in a new process; returns the cell's state after it."""
        process = self.start_process(cell)
        return "stopped" if process is None else self.judge(cell, process.wait())

    def start_process(self, cell: Cell) -> subprocess.Popen | None:
        """Start the process that trains a cell, whose output goes to ``log.txt``; None if the sweep is stopping."""
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        busy = lock_folder(cell.log.parent, f"another sweep trains '{cell.log.parent}'", warn=False)
        with open(cell.log, "a") as out, busy as lock, self.starting:
            if self.stopping:
                return None
            cell.state = "running"
            # in a new session, so that only `stop` interrupts it: a second Ctrl-C would cost it its checkpoint; with
            # the lock, so that no sweep trains the cell a second time if this one is killed
            process = subprocess.Popen(self.build_command(cell), stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                                       start_new_session=True, pass_fds=[lock.fileno()])  # fmt: skip
            self.processes.add(process)
            return process

    def judge(self, cell: Cell, status: int) -> str:
        """The state of a cell whose process has ended with a ``status``."""
        if status == 0 and cell.is_done():
            return "done"
        if self.stopping or status == INTERRUPTED:
            return "stopped"
        return f"failed: {last_line(cell.log) or f'status {status}'} ({cell.log})"

    def build_command(self, cell: Cell) -> list[str]:
        """The command that trains a cell. Unless the cell sets its threads, jobs and devices share the cores."""
        command = cell.build_command()
        if cell.config.run.threads is None:
            processes = self.jobs * cell.config.run.devices
            command += ["--run.threads", str(max(1, (os.cpu_count() or 1) // processes))]
        return command

    def stop(self) -> None:
        """Interrupt every process; each ends with a checkpoint."""
        with self.starting:
            self.stopping = True
            for process in self.processes:
                process.send_signal(signal.SIGINT)  # does nothing to one that has ended


def is_busy(cell: Cell) -> bool:
    """Whether a process trains a cell: it holds the lock of the cell's folder, or of the run if no sweep started it."""
    return is_locked(cell.log.parent) or is_locked(cell.folder.path)
