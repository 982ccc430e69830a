"""``idkd compare``: tabulates finished runs."""

from __future__ import annotations

from typing import Literal

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Print a table of finished runs, and draw it if ``--plot`` asks for it."""
    from lightning_idkd.analysis.compare import METRICS, show

    p = options.build_parser("compare")
    p.add_argument("runs", nargs="+", help="Run folders, or folders with runs below them.")
    p.add_argument("--metrics", nargs="+", default=list(METRICS), help="Keys of summary.json, with slashes.")
    baseline = "Method that the others are compared to, by its name in the table."
    p.add_argument("--baseline", type=str | None, default=None, help=baseline)
    p.add_argument("--format", type=Literal["table", "markdown", "csv", "latex"], default="table",
                   help="Format of the table: table (aligned text), markdown, csv or latex.")  # fmt: skip
    p.add_argument("--plot", type=str | None, default=None, help="Image file to draw the table into.")
    over = "Draw the first metric over this axis, a curve for every row, in place of the table; time is simulated."
    p.add_argument("--x", type=Literal["epoch", "bytes", "time"] | None, default=None, help=over)
    reach = "An accuracy, as a fraction: adds epochs, bytes and simulated seconds to the first evaluation that has it."
    p.add_argument("--target", type=float | None, default=None, help=f"{reach} A run that never does is left out.")
    given = p.parse_args(arguments)
    show(given.runs, given.metrics, given.baseline, given.format, given.plot, given.x, given.target)
    return 0
