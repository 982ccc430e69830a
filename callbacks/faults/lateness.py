"""Messages that are late."""

from __future__ import annotations

from lightning_idkd.callback import Fault
from lightning_idkd.errors import UserError, require
from lightning_idkd.graph import Graph


class Stragglers(Fault):
    """Lets a node mix with the last rows that have arrived, instead of waiting for those of the same step (stale
    synchronous parallel; Ho et al., NeurIPS 2013).

    A clock says when messages arrive. A node waits only if a neighbour's row would be more than ``max_age`` steps old;
    its own row is always new. Without this fault, nodes wait for all messages of a step.

    Args:
        max_age: Largest number of steps by which a row may be late, 1 or more.
    """

    breaks = ("static", "sums")
    needs_clock = True

    def __init__(self, max_age: int = 3):
        require(max_age >= 1, "faults.max_age", max_age, "1 or more (without this fault, nodes wait)")
        self.max_age = max_age

    def check(self, graph: Graph) -> None:
        if graph.period != 1:
            raise UserError(f"faults: Stragglers takes static graphs, but graph.topology {graph.name} changes")
