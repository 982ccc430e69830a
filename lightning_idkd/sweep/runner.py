"""Runs the cells of a sweep on this machine, a few at a time and each at most once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning_idkd.errors import UserError, require
from lightning_idkd.files import lock_folder, remove_parts
from lightning_idkd.sweep.file import SERVER, read_sweep
from lightning_idkd.sweep.plan import Cell, last_line, plan_cells, share_initial_trainings, sweep_folder
from lightning_idkd.sweep.progress import Progress


def run_sweep(path: Path, jobs: int, runs: str, slurm: dict[str, Any] | None = None) -> bool:
    """Run a sweep file, ``jobs`` cells at a time, with folders below ``runs``; returns whether every cell is done.

    Args:
        slurm: options of SLURM, where the cells then run as jobs; None: they run on this machine.
    """
    require(jobs >= 1, "jobs", jobs, "1 or more")
    if slurm is not None:
        from lightning_idkd.sweep import slurm as cluster

        slurm = cluster.check_options(slurm)
    sweep, cells = read_sweep(path), plan_cells(path, runs)
    folder, title = sweep_folder(sweep, path, runs), str(sweep.get("name", path.stem))
    if unused := [key for key in SERVER if key in sweep]:
        has = "has" if len(unused) == 1 else "have"
        print(f"{', '.join(unused)} {has} no effect without W&B's server: all cells run to their end")
    with lock_folder(folder, f"another process runs this sweep in '{folder}'; wait for it, or stop it"):
        for cell in cells:
            remove_parts(cell.folder.path.parent)
        # SIGTERM, by which a queue ends a job, acts as Ctrl-C; a shell lets its background jobs ignore SIGINT: set both
        before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            cells = share_initial_trainings(cells, runs)
            if slurm is not None:
                return cluster.SlurmRunner(cells, jobs, title, folder, slurm).run()
            return Runner(cells, jobs, title).run()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
            print(f"runs: {folder} (a table: idkd compare {folder})", flush=True)


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
            if self.stopping:
                cell.state = "stopped"
            elif cell.is_done():
                cell.state = "done"
            elif cell.source is not None and not cell.source.checkpoint_file(cell.start).exists():
                cell.state = "failed: its initial training failed"
            else:
                cell.state = self.run_process(cell)
        except (OSError, UserError) as e:
            cell.state = f"failed: {e}"
        finally:
            self.finished[id(cell)].set()

    def run_process(self, cell: Cell) -> str:
        """Train a cell in a new process, whose output goes to ``log.txt``; returns the cell's state after it."""
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with open(cell.log, "a") as out:
            with self.starting:
                if self.stopping:
                    return "stopped"
                cell.state = "running"
                # in a new session, so that only `stop` interrupts it: a second Ctrl-C would cost it its checkpoint
                process = subprocess.Popen(
                    self.build_command(cell), stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
                )
                self.processes.add(process)
            status = process.wait()
            self.processes.discard(process)
        if status == 0 and cell.is_done():
            return "done"
        if self.stopping or status == 130:
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
            for process in list(self.processes):
                process.send_signal(signal.SIGINT)
