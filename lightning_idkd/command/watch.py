"""``idkd watch``: shows how the runs and sweep cells below folders are doing."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_idkd.command import options
from lightning_idkd.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_idkd.records.status import Status

INTERVAL = 1.0
"""Seconds between two looks at the files."""
WIDTH = 10_000
"""Columns of a table that does not go to a terminal: enough for whole names and notes."""
COLUMNS = {"state": 8, "epoch": 7, "node mean": 9, "consensus": 9, "worst": 6, "left": 7}
"""The columns between name and note, and their widths."""
GAP = 2
"""Spaces between two columns."""
NOTED = 40
"""Columns that names and notes need together; without them, notes are left out."""
WORD = re.compile(r"[\w.]+|[^\w.]+")
"""A word of a name, or what stands between two words."""
INITIALS = 4
"""Letters of a folder in the name of a run that does not fit."""
ELLIPSIS = "…"
FRAME = 6
"""Lines of a table besides its rows, and of the prompt below it."""


def main(arguments: list[str]) -> int:
    """Show a table of all runs until Ctrl-C; once if asked to, or if the output is not a terminal."""
    p = options.build_parser("watch")
    p.add_argument("folders", nargs="*", default=["runs"], help="Run folders, or folders with runs or sweeps below.")
    p.add_argument("--once", action="store_true", help="Print the table once and end, as without a terminal.")
    given = p.parse_args(arguments)
    folders = [Path(text) for text in given.folders]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"'{folder}' is not a folder; give run folders, or folders with runs below, such as runs")

    from rich.console import Console
    from rich.live import Live

    console = Console()
    if given.once or not console.is_terminal:
        width = console.width if console.is_terminal else WIDTH
        console = Console(width=width)
        with console.capture() as capture:
            console.print(build_table(read(folders), width))
        print("\n".join(line.rstrip() for line in capture.get().splitlines()))
        return 0
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(build_table(read(folders), console.width, console.height - FRAME), refresh=True)
                time.sleep(INTERVAL)
        except KeyboardInterrupt:
            return 0


def read(folders: list[Path]) -> list[tuple[str, Status]]:
    """Name and status of every run, those that need attention first."""
    from lightning_idkd.records.status import STATES, find_runs, read_status

    statuses = []
    for root in folders:
        top = root.resolve()
        found = list(find_runs(top))
        of_name = Counter(place for place, _ in found)
        for place, run in found:
            name = place.name if place in (top, top.parent) else str(place.relative_to(top))
            name = f"{name}/{run.name}" if of_name[place] > 1 else name
            statuses.append((name, read_status(run or place / "latest", place / "log.txt")))
    return sorted(statuses, key=lambda item: STATES.index(item[1].state))


def build_table(statuses: list[tuple[str, Status]], width: int, rows: int | None = None) -> Table:
    """A table of runs, in ``width`` columns of text; at most ``rows`` of them, with a line that counts the others."""
    from rich.markup import escape
    from rich.table import Table

    from lightning_idkd.records.report import format_duration
    from lightning_idkd.records.status import STATES

    states = [status.state for _, status in statuses]
    counts = ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)
    table = Table(title=counts or "no runs yet", title_justify="left", box=None, padding=(0, GAP, 0, 0))
    free = max(1, width - sum(COLUMNS.values()) - GAP * (len(COLUMNS) + 2))
    noted = free >= NOTED and any(status.note for _, status in statuses)
    widest = free * 3 // 5 if noted else free
    table.add_column("run", no_wrap=True, max_width=widest)
    for heading, needed in COLUMNS.items():
        table.add_column(heading, no_wrap=True, min_width=needed, justify="left" if heading == "state" else "right")
    if noted:
        table.add_column("note", no_wrap=True, max_width=free - free * 3 // 5)
    shown = statuses if rows is None or len(statuses) <= rows else statuses[: max(rows - 1, 1)]
    names = shorten_names([drop_controls(name) for name, _ in statuses], widest)
    for name, (_, status) in zip(names, shown, strict=False):
        progress = "" if status.state == "waiting" else status.progress
        left = format_duration(status.seconds_left) if status.state == "running" else ""
        values = (status.line.get(f"accuracy/{key}") for key in ("node_mean", "consensus", "node_min"))
        accuracies = [f"{value:.1%}" if isinstance(value, (int, float)) else "" for value in values]
        note = [escape(drop_controls(status.note))] if noted else []
        table.add_row(escape(name), status.state, progress, *accuracies, left, *note)
    if len(shown) < len(statuses):
        table.add_row(f"and {len(statuses) - len(shown)} more")
    return table


def shorten_names(names: list[str], width: int) -> list[str]:
    """Shorten the names longer than ``width`` so that they stay apart: words that all such names of a folder share
    become an ellipsis, folders are cut to their first letters, and what is left is cut at its end."""
    long = [name.rpartition("/") for name in names if len(name) > width]
    folders = {folder for folder, _, _ in long}
    shortened = []
    for name in names:
        if len(name) > width:
            folder, _, cell = name.rpartition("/")
            begin = drop_shared_words(folder, folders)[:INITIALS] if len(folders) > 1 else ""
            cell = drop_shared_words(cell, {other for place, _, other in long if place == folder})
            name = f"{begin}{ELLIPSIS}{cell.removeprefix(ELLIPSIS)}"
            name = name if len(name) <= width else name[: width - 1] + ELLIPSIS
        shortened.append(name)
    return shortened


def drop_shared_words(name: str, names: set[str]) -> str:
    """A name with an ellipsis for each row of words that stand in all the ``names`` too, unless it is the only one."""
    if len(names) == 1:
        return name
    words = WORD.findall(name)
    shared = set.intersection(*(set(WORD.findall(other)) for other in names))
    return re.sub(f"{ELLIPSIS}+", ELLIPSIS, "".join(ELLIPSIS if word in shared else word for word in words))


def drop_controls(text: str) -> str:
    """Replace the characters by which a log or a name of a folder would command the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
