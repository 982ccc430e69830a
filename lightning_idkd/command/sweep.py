"""``idkd sweep``."""

from __future__ import annotations

from pathlib import Path

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Run all cells of a sweep file here."""
    from lightning_idkd.config.arguments import find_config
    from lightning_idkd.sweep.runner import run_sweep

    p = options.parser("sweep")
    p.add_argument("file", help="Sweep file, such as configs/sweeps/ood_scores.yaml.")
    p.add_argument("--jobs", type=int, default=1, help="Cells at the same time.")
    p.add_argument("--dir", type=str, default="runs", help="Folder of all runs; a sweep's lie below its name, else its file's.")
    given = p.parse_args(arguments)
    return 0 if run_sweep(Path(find_config(given.file)), given.jobs, given.dir) else 1
