"""``idkd compare``."""

from __future__ import annotations

from typing import Literal

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Tabulate finished runs."""
    from lightning_idkd.analysis.compare import METRICS, show

    p = options.parser("compare")
    p.add_argument("runs", nargs="+", help="Run folders, or folders with runs below them.")
    p.add_argument("--metrics", nargs="+", default=list(METRICS), help="Keys of summary.json, with slashes.")
    p.add_argument("--baseline", type=str | None, default=None, help="Method to take differences to, as the table names it.")
    p.add_argument("--format", type=Literal["table", "markdown", "csv", "latex"], default="table",
                   help="How to print it: table (aligned text), markdown, csv or latex.")  # fmt: skip
    p.add_argument("--plot", type=str | None, default=None, help="Also draw it into this image file.")
    given = p.parse_args(arguments)
    show(given.runs, given.metrics, given.baseline, given.format, given.plot)
    return 0
