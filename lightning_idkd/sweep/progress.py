"""Shows what the cells of a sweep are doing: a live table in a terminal, elsewhere a line for every change of state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from lightning_idkd.records.report import format_duration
from lightning_idkd.records.status import read_status
from lightning_idkd.sweep.plan import Cell

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


class Progress:
    """The cells of a sweep, and a table of them."""

    def __init__(self, cells: list[Cell], title: str = "sweep"):
        self.cells, self.title = cells, title

    @contextmanager
    def show_table(self) -> Iterator[Live | None]:
        """Show the table meanwhile if this is a terminal, else at the end."""
        from rich.console import Console
        from rich.live import Live

        console = Console()
        live = Live(self.build_table(), console=console, auto_refresh=False) if console.is_terminal else None
        with live or nullcontext():
            yield live
            if live:
                live.update(self.build_table(), refresh=True)
        if not live:
            console.print(self.build_table())
            return
        for cell in self.cells:  # the table breaks long paths, here they can be copied
            if cell.state.startswith("failed"):
                print(f"{cell.name}: {cell.state}")

    def follow(self, live: Live | None, is_over: Callable[[], bool], interval: float) -> None:
        """Show the states of the cells every ``interval`` seconds until ``is_over``."""
        printed: dict[str, str] = {}
        over = False
        while not over:
            over = is_over()
            if live:
                live.update(self.build_table(), refresh=True)
            for cell in self.cells:
                if not live and cell.state not in ("waiting", printed.get(cell.name)):
                    print(f"{cell.name}: {cell.state}", flush=True)
                printed[cell.name] = cell.state
            if not over:
                time.sleep(interval)

    def are_done(self) -> bool:
        """Whether all cells are done."""
        return all(cell.state == "done" for cell in self.cells)

    def build_table(self) -> Table:
        """A table of all cells: their states, epochs, latest accuracies and time left."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=f"{escape(self.title)}: {escape(', '.join(self.count_cells()))}")
        for heading in ("cell", "state"):
            table.add_column(heading, overflow="fold")
        for heading in ("epoch", "node mean", "consensus", "left"):
            table.add_column(heading, justify="right")
        for cell in self.cells:
            numbers = [""] * 4
            if cell.state != "waiting" and cell.folder.path.exists():
                status = read_status(cell.folder.path, epochs=cell.until or cell.config.train.epochs)
                accuracies = [status.line.get(f"accuracy/{key}") for key in ("node_mean", "consensus")]
                numbers = [status.progress, *("" if share is None else f"{share:.1%}" for share in accuracies)]
                numbers += [format_duration(status.seconds_left) if cell.state.startswith("running") else ""]
            table.add_row(escape(cell.name), escape(cell.state), *numbers)
        return table

    def count_cells(self) -> list[str]:
        """How many cells and initial trainings are done, in words."""
        counts = []
        for kind, trains_until_the_end in (("cells", True), ("initial trainings", False)):
            states = [cell.state for cell in self.cells if (cell.until is None) == trains_until_the_end]
            if states:
                counts.append(f"{states.count('done')} of {len(states)} {kind} done")
        return counts
