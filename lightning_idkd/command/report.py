"""``idkd report``: writes a report of a run."""

from __future__ import annotations

from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Write ``report.md`` into the folder of every run given."""
    from lightning_idkd.records.report import write_report

    p = options.build_parser("report")
    p.add_argument("runs", nargs="+", help="Run folders, such as runs/NAME/latest.")
    for run in p.parse_args(arguments).runs:
        print(write_report(run))
    return 0
