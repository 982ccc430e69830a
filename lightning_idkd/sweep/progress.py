"""Shows what the cells of a sweep are doing: a live table in a terminal, elsewhere a line for every change of state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from lightning_idkd.errors import UserError
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
        """A table of all cells: their states and latest accuracies."""
        from rich.markup import escape
        from rich.table import Table

        cells = [cell for cell in self.cells if cell.until is None]
        trainings = [cell for cell in self.cells if cell.until is not None]
        counts = []
        for kind, some in (("cells", cells), ("initial trainings", trainings)):
            if some:
                done = sum(cell.state == "done" for cell in some)
                counts.append(f"{done} of {len(some)} {kind} done")
        title = f"{escape(self.title)}: {', '.join(counts)}"
        table = Table("cell", "state", "epoch", "node mean", "consensus", title=title)
        for cell in self.cells:
            lines = []
            with suppress(UserError):  # damaged metrics do not end the other cells
                lines = cell.folder.metrics() if cell.folder.path.exists() and cell.state != "waiting" else []
            numbers = ["", "", ""]
            if lines:
                numbers = [str(lines[-1]["epoch"])]
                numbers += [f"{lines[-1][f'accuracy/{key}']:.1%}" for key in ("node_mean", "consensus")]
            table.add_row(escape(cell.name), escape(cell.state), *numbers)
        return table
