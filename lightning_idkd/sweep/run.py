"""Runs a sweep file: plans its cells and hands them to what runs them here, by results, or on a cluster."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning_idkd.errors import require
from lightning_idkd.files import lock_folder, remove_parts
from lightning_idkd.sweep.file import SERVER, is_search, read_sweep
from lightning_idkd.sweep.plan import make_folder, plan_cells, share_initial_trainings, sweep_folder
from lightning_idkd.sweep.runner import Runner
from lightning_idkd.sweep.search_pictures import write_search_pictures


def run_sweep(path: Path, jobs: int, runs: str, slurm: dict[str, Any] | None = None) -> bool:
    """Run a sweep file, ``jobs`` cells at a time, with folders below ``runs``; returns whether every cell is done.

    Args:
        slurm: options of SLURM, where the cells then run as jobs; None: they run on this machine.
    """
    require(jobs >= 1, "jobs", jobs, "1 or more")
    sweep = read_sweep(path)
    searches = is_search(sweep)
    if slurm is not None:
        require(not searches, "--on", "slurm", "here, for method bayes and for early_terminate")
        from lightning_idkd.sweep import slurm as cluster

        slurm = cluster.check_options(slurm)
    if searches:
        from lightning_idkd.sweep import search

        search.find_optuna(path.name)
    folder, title = sweep_folder(sweep, path, runs), str(sweep.get("name", path.stem))
    cells = search.plan_probes(sweep, path, runs) if sweep["method"] == "bayes" else plan_cells(path, runs)
    make_folder(folder)
    print_notes(sweep)
    with lock_folder(folder, f"another process runs this sweep in '{folder}'; wait for it, or stop it"):
        for cell in cells:
            remove_parts(cell.folder.path.parent)
        # SIGTERM, by which a queue ends a job, acts as Ctrl-C; a shell lets its background jobs ignore SIGINT: set both
        before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            cells = share_initial_trainings(cells, runs)
            if searches:
                try:
                    return search.Search(sweep, path, runs, cells, jobs, title).run()
                finally:
                    for picture in write_search_pictures(folder):
                        print(f"drawn: {picture}", flush=True)
            if slurm is not None:
                return cluster.SlurmRunner(cells, jobs, title, folder, slurm).run()
            return Runner(cells, jobs, title).run()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
            print(f"runs: {folder} (a table: idkd compare {folder})", flush=True)


def print_notes(sweep: dict) -> None:
    """Print which keys have no effect, and that a search by test accuracy flatters its best trial."""
    searches, unused = is_search(sweep), [key for key in SERVER if key in sweep]
    if searches:
        unused += [f"metric.{key}" for key in sweep["metric"] if key not in ("name", "goal")]
    if unused:
        has, rest = "has" if len(unused) == 1 else "have", "" if searches else ": all cells run to their end"
        print(f"{', '.join(unused)} {has} no effect without W&B's server{rest}")
    if searches and sweep["metric"]["name"].startswith("accuracy/"):
        what = f"metric.name: {sweep['metric']['name']} is measured on test samples"
        print(f"{what}, so that the best of many trials looks better than it is; validation/node_mean is not")
