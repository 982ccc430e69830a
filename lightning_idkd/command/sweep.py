"""``idkd sweep``: runs a W&B sweep file on this machine, without a server."""

from __future__ import annotations

from pathlib import Path

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Run all cells of a sweep file; the exit status is 0 if all of them are done, else 1."""
    from lightning_idkd.config.arguments import find_config
    from lightning_idkd.sweep.runner import run_sweep

    p = options.build_parser("sweep")
    p.add_argument("file", help="Sweep file, such as configs/sweeps/ood_scores.yaml.")
    p.add_argument("--jobs", type=int, default=1, help="Number of cells that run at the same time.")
    folder = "Folder of all runs; those of a sweep lie in a folder named after it, or after its file."
    p.add_argument("--dir", type=str, default="runs", help=folder)
    given = p.parse_args(arguments)
    return 0 if run_sweep(Path(find_config(given.file)), given.jobs, given.dir) else 1
