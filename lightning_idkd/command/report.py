"""``idkd report``: writes the reports of runs and of folders of runs."""

from __future__ import annotations

from pathlib import Path

from lightning_idkd import checkout
from lightning_idkd.command import options


def main(arguments: list[str]) -> int:
    """Write ``report.md`` and ``report.html`` into every folder given."""
    p = options.build_parser("report")
    runs = "Run folders, such as runs/NAME/latest, or folders with runs below them, such as that of a sweep."
    p.add_argument("runs", nargs="+", help=runs)
    baseline = (
        "Of a folder of runs: the method that the others are compared to, by its name in the table of idkd compare."
    )
    p.add_argument("--baseline", type=str | None, default=None, help=baseline)
    quick = "Leave out the confusion matrix, for which the consensus model is evaluated on the test set."
    p.add_argument("--quick", action="store_true", help=quick)
    trust = "Let the run's config name classes that are not part of this project, such as your own. Their code runs,"
    p.add_argument("--trust", action="store_true", help=f"{trust} so do not trust a run folder of a stranger.")
    given = p.parse_args(arguments)
    from lightning_idkd.analysis.report import write_report
    from lightning_idkd.sweep import search_pictures

    if given.trust:
        checkout.add_working_folder()
    for run in given.runs:
        if Path(run, search_pictures.STORAGE).exists():  # the search may have gone on since it drew them
            search_pictures.write_search_pictures(run)
        for file in write_report(run, given.quick, given.trust, given.baseline):
            print(file)
    return 0
