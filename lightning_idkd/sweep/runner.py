"""Runs the cells of a sweep, a few at a time and each at most once, and shows what each is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_idkd.errors import UserError, require
from lightning_idkd.files import lock_folder, remove_parts
from lightning_idkd.sweep.file import SERVER, read_sweep
from lightning_idkd.sweep.plan import Cell, plan_cells, share_initial_trainings, sweep_folder

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


def run_sweep(path: Path, jobs: int, runs: str) -> bool:
    """Run a sweep file, ``jobs`` cells at a time, with folders below ``runs``; returns whether every cell is done."""
    require(jobs >= 1, "jobs", jobs, "1 or more")
    sweep, cells = read_sweep(path), plan_cells(path, runs)
    folder = sweep_folder(sweep, path, runs)
    if unused := [key for key in SERVER if key in sweep]:
        has = "has" if len(unused) == 1 else "have"
        print(f"{', '.join(unused)} {has} no effect without W&B's server: all cells run on this machine to their end")
    with lock_folder(folder, f"another process runs this sweep in '{folder}'; wait for it, or stop it"):
        for cell in cells:
            remove_parts(cell.folder.path.parent)
        # SIGTERM, by which a queue ends a job, acts as Ctrl-C; a shell lets its background jobs ignore SIGINT: set both
        before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return Runner(share_initial_trainings(cells, runs), jobs, str(sweep.get("name", path.stem))).run()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
            print(f"runs: {folder} (a table: idkd compare {folder})", flush=True)


class Runner:
    """Runs each cell in a process, ``jobs`` of them at a time."""

    def __init__(self, cells: list[Cell], jobs: int, title: str = "sweep"):
        self.cells, self.jobs, self.title = cells, jobs, title
        self.processes: set[subprocess.Popen] = set()
        self.stopping = False
        self.starting = threading.Lock()  # so that `stop` finds every process that was started before it
        self.finished = {id(cell): threading.Event() for cell in cells}

    def run(self) -> bool:
        """Run all cells; returns whether all of them are done."""
        from rich.console import Console
        from rich.live import Live

        # initial trainings go first, so that a waiting cell never takes the place that its source needs
        order = sorted(self.cells, key=lambda cell: cell.source is not None)
        console = Console()
        live = Live(self.build_table(), console=console, auto_refresh=False) if console.is_terminal else None
        with ThreadPoolExecutor(self.jobs) as pool, live or nullcontext():
            futures = [pool.submit(self.run_cell, cell) for cell in order]
            try:
                self.show_progress(futures, live)
            except KeyboardInterrupt:
                self.stop()
                print("stopping; the same command continues the sweep", flush=True)
            for future in futures:
                future.result()
            if live:
                live.update(self.build_table(), refresh=True)
        if not live:
            console.print(self.build_table())
        return all(cell.state == "done" for cell in self.cells)

    def show_progress(self, futures: list[Future], live: Live | None) -> None:
        """Show what the cells are doing until all have ended: a live table, or a line when a cell's state changes."""
        printed: dict[str, str] = {}
        while not all(future.done() for future in futures):
            time.sleep(0.3)
            if live:
                live.update(self.build_table(), refresh=True)
                continue
            for cell in self.cells:
                if cell.state not in ("waiting", printed.get(cell.name)):
                    print(f"{cell.name}: {cell.state}", flush=True)
                printed[cell.name] = cell.state

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
        log = cell.folder.path.parent / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as out:
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
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        reason = lines[-1].removeprefix("error: ") if lines else f"status {status}"
        return f"failed: {reason} ({log})"

    def build_command(self, cell: Cell) -> list[str]:
        """The command that trains a cell. Unless the cell sets its threads, jobs and devices share the cores."""
        command = [sys.executable, "-m", "lightning_idkd", "fit", *cell.arguments, "--run.resume", "auto"]
        if cell.config.run.threads is None:
            devices = cell.config.run.devices
            processes = self.jobs * (devices if isinstance(devices, int) else 1)
            command += ["--run.threads", str(max(1, (os.cpu_count() or 1) // processes))]
        if cell.keep:
            command += ["--run.keep", str(sorted(cell.keep))]
        if cell.until is not None:
            command += ["--run.until", str(cell.until)]
        if cell.source is not None:
            command += ["--run.from", str(cell.source.checkpoint_file(cell.start))]
        return command

    def stop(self) -> None:
        """Interrupt every process; each ends with a checkpoint."""
        with self.starting:
            self.stopping = True
            for process in list(self.processes):
                process.send_signal(signal.SIGINT)

    def build_table(self) -> Table:
        """A table of all cells: their states and latest accuracies."""
        from rich.markup import escape
        from rich.table import Table

        cells = [cell for cell in self.cells if cell.until is None]
        trainings = [cell for cell in self.cells if cell.until is not None]
        counts = []
        for kind, some in (("cells", cells), ("initial trainings", trainings)):
            if some:
                done = sum(cell.state == "done" for cell in some)
                counts.append(f"{done} of {len(some)} {kind} done")
        title = f"{escape(self.title)}: {', '.join(counts)}"
        table = Table("cell", "state", "epoch", "node mean", "consensus", title=title)
        for cell in self.cells:
            lines = []
            with suppress(UserError):  # damaged metrics do not end the other cells
                lines = cell.folder.metrics() if cell.folder.path.exists() and cell.state != "waiting" else []
            numbers = ["", "", ""]
            if lines:
                numbers = [str(lines[-1]["epoch"])]
                numbers += [f"{lines[-1][f'accuracy/{key}']:.1%}" for key in ("node_mean", "consensus")]
            table.add_row(escape(cell.name), escape(cell.state), *numbers)
        return table
