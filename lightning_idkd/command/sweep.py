"""``idkd sweep``: runs a W&B sweep file without a server, on this machine or on a SLURM cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning_idkd.command import options
from lightning_idkd.errors import UserError


def main(arguments: list[str]) -> int:
    """Run all cells of a sweep file; the exit status is 0 if all of them are done, else 1."""
    from lightning_idkd.config.arguments import find_config
    from lightning_idkd.sweep.run import run_sweep

    p = options.build_parser("sweep")
    p.add_argument("file", help="Sweep file, such as configs/sweeps/ood_scores.yaml.")
    p.add_argument("--jobs", type=int, default=1, help="Number of cells that run at the same time.")
    folder = "Folder of all runs; those of a sweep lie in a folder named after it, or after its file."
    p.add_argument("--dir", type=str, default="runs", help=folder)
    place = (
        "Where the cells run. On slurm, each is a job of the cluster of this machine, by submitit (pip install "
        "lightning-idkd[slurm]). The jobs go on if this command ends; the same command follows them again, and submits "
        "what is missing."
    )
    p.add_argument("--on", type=Literal["here", "slurm"], default="here", help=place)
    how = (
        "Options of sbatch for every job, one at a time: --slurm.partition gpu --slurm.gpus-per-node 1 --slurm.time "
        "12:00:00 (the default). A job that reaches its time limit saves a checkpoint and is started again."
    )
    p.add_argument("--slurm", type=dict[str, str | int | float | bool | list | dict], default={}, help=how)
    given = p.parse_args(arguments)
    if given.slurm and given.on != "slurm":
        raise UserError(f"slurm.{next(iter(given.slurm))}: has no effect without --on slurm")
    slurm = dict(given.slurm) if given.on == "slurm" else None
    return 0 if run_sweep(Path(find_config(given.file)), given.jobs, given.dir, slurm) else 1
