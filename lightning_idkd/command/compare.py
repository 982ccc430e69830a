"""``idkd compare``: tabulates finished runs, and draws them."""

from __future__ import annotations

from typing import Literal

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Print a table of finished runs, and draw it or their curves where ``--plot`` or ``--curves`` asks for it."""
    from lightning_idkd.analysis.compare import show
    from lightning_idkd.analysis.table import METRICS

    p = options.build_parser("compare")
    p.add_argument("runs", nargs="+", help="Run folders, or folders with runs below them.")
    p.add_argument("--metrics", nargs="+", default=list(METRICS), help="Keys of summary.json, with slashes.")
    baseline = "Method that the others are compared to, by its name in the table."
    p.add_argument("--baseline", type=str | None, default=None, help=baseline)
    p.add_argument("--format", type=Literal["table", "markdown", "csv", "latex"], default="table",
                   help="Format of the table: table (aligned text), markdown, csv or latex.")  # fmt: skip
    p.add_argument("--plot", type=str | None, default=None, help="Image file to draw the table into.")
    reach = "An accuracy, as a fraction: adds epochs, bytes and simulated seconds to the first evaluation that has it."
    p.add_argument("--target", type=float | None, default=None, help=f"{reach} Runs that never do are counted.")
    curves = "File (.pdf, .svg or .png) to draw curves into: a line for every method, a panel for every setting."
    p.add_argument("--curves", type=str | None, default=None, help=curves)
    over = "Axis of the curves (default: epoch); time is simulated."
    p.add_argument("--x", type=Literal["epoch", "step", "bytes", "time"] | None, default=None, help=over)
    metric = "node_mean, worst, consensus, consensus_distance, heterogeneity, or a key of metrics.jsonl"
    p.add_argument("--y", type=str | None, default=None,
                   help=f"What the curves show: {metric} (default: the first of --metrics).")  # fmt: skip
    p.add_argument("--band", type=Literal["minmax", "sd"] | None, default=None,
                   help="Band around the mean over seeds: minmax (default), or sd (standard deviation).")  # fmt: skip
    width = "Width of the curves in inches (default: 3.25, a column; with several settings 6.75, a page)."
    p.add_argument("--width", type=float | None, default=None, help=width)
    limits = "Lower and upper limit of the curves' y axis, in its unit (accuracies in %)."
    p.add_argument("--limits", type=float, nargs=2, default=None, metavar=("LOW", "HIGH"), help=limits)
    p.add_argument("--scale", type=Literal["linear", "log"] | None, default=None,
                   help="Scale of the curves' y axis: linear (default) or log.")  # fmt: skip
    given = p.parse_args(arguments)
    drawn = ("plot", "target", "curves", "x", "y", "band", "width", "limits", "scale")
    drawing = {key: given[key] for key in drawn}
    show(given.runs, given.metrics, given.baseline, given.format, **drawing)
    return 0
