"""``idkd report``."""

from __future__ import annotations

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Write report.md of runs."""
    from lightning_idkd.records.report import write_report

    p = options.parser("report")
    p.add_argument("runs", nargs="+", help="Run folders, such as runs/NAME/latest.")
    for run in p.parse_args(arguments).runs:
        print(write_report(run))
    return 0
