"""Nodes that are absent for a while."""

from __future__ import annotations

import csv
import itertools
import math
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lightning_idkd.callback import Fault, Run
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.graph import Graph
from lightning_idkd.links import Moment

from .chain import TwoStates


class Presence(Fault, ABC):
    """Base of faults that take nodes out.

    Args:
        forget: What a node has when it returns. False: its row and buffers from before. True: the mean of its
            neighbours' rows, which they send it, and new buffers.
    """

    def __init__(self, forget: bool = False):
        self.forget = forget
        self.breaks = ("static", "everyone", *(["sums"] if forget else []))

    @abstractmethod
    def absent(self, moment: Moment) -> np.ndarray: ...


class Churn(Presence):
    """Lets every node leave and return at random. At the start, nodes are absent as often as later. Steps in which all
    nodes are absent, by chance, pass without training.

    Args:
        leave: Probability that a present node is absent in the next step.
        rejoin: Probability that an absent node is present in the next step; 1 - ``leave`` at most.
        forget: Whether a node returns with the mean of its neighbours' rows and new buffers, instead of its own row and
            buffers. It keeps its norm statistics.
    """

    def __init__(self, leave: float = 0.001, rejoin: float = 0.01, forget: bool = False):
        super().__init__(forget)
        require(0 <= leave < 1, "faults.leave", leave, "0 to below 1")
        require(0 < rejoin <= 1 - leave, "faults.rejoin", rejoin, f"above 0 to 1 - leave, {1 - leave:g}")
        self.chain = TwoStates(enter=leave, leave=rejoin)

    def absent(self, moment: Moment) -> np.ndarray:
        return self.chain.at(moment, "churn", np.arange(moment.nodes))


class Absence(NamedTuple):
    """A row of a trace."""

    node: int
    start: float
    end: float
    line: int


class Trace(Presence):
    """Takes nodes out as a CSV file says. Its columns are node, from (the time at which the node leaves) and to (the
    time at which it is back).

    Args:
        file: The CSV file, with a header.
        unit: Unit of its times: epochs, or seconds of simulated time, which need a clock.
        forget: Whether a node returns with the mean of its neighbours' rows and new buffers, instead of its own row and
            buffers. It keeps its norm statistics.
    """

    def __init__(self, file: str, unit: Literal["epochs", "seconds"] = "epochs", forget: bool = False):
        super().__init__(forget)
        if unit not in ("epochs", "seconds"):
            hint = did_you_mean(unit, ("epochs", "seconds"))
            raise UserError(f"faults.unit: '{unit}' given; allowed: epochs, seconds.{hint}")
        self.file, self.unit, self.needs_clock = file, unit, unit == "seconds"

    @cached_property
    def absences(self) -> list[Absence]:
        """The rows of the file."""
        return read_trace(self.file)

    def state_dict(self) -> dict:
        return {"absences": [list(absence[:3]) for absence in self.absences]}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise UserError(f"faults.file: '{self.file}' has changed since this run began")

    def check(self, graph: Graph) -> None:
        for absence in self.absences:
            place = f"faults.file: '{self.file}', line {absence.line}"
            if absence.node >= graph.nodes:
                raise UserError(f"{place}: node {absence.node} given; allowed: 0 to {graph.nodes - 1}")
        require_someone([self], graph.nodes)

    def on_check(self, run: Run) -> None:
        faults = run.network.links.faults
        traces = [fault for fault in faults if isinstance(fault, Trace) and fault.unit == self.unit]
        require_someone(traces, run.network.graph.nodes)

    def absent(self, moment: Moment) -> np.ndarray:
        now, away = moment.epoch if self.unit == "epochs" else moment.seconds, np.zeros(moment.nodes, bool)
        away[[absence.node for absence in self.absences if absence.start <= now < absence.end]] = True
        return away


def require_someone(traces: list[Trace], nodes: int) -> None:
    """Raise a UserError if traces of one unit have all nodes absent at once."""
    absences = [absence for trace in traces for absence in trace.absences]
    for time in sorted({absence.start for absence in absences}):  # the number of absent nodes grows at these times only
        if len({a.node for a in absences if a.start <= time < a.end}) == nodes:
            files = " and ".join(f"'{trace.file}'" for trace in traces)
            have = "has" if len(traces) == 1 else "together have"
            raise UserError(f"faults.file: {files} {have} all {nodes} nodes absent at {time:g} {traces[0].unit}")


def read_trace(file: str) -> list[Absence]:
    """The rows of a trace, by node and start.

    Raises:
        UserError: the file cannot be read, or a row is not a node and two times that follow each other, or the rows of
            a node overlap.
    """
    try:
        with Path(file).open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            reader.fieldnames = columns = [name.strip() for name in reader.fieldnames or []]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"faults.file: '{file}' cannot be read ({getattr(e, 'strerror', None) or e})") from e
    if missing := [name for name in ("node", "from", "to") if name not in columns]:
        given = ", ".join(columns) or "nothing"
        raise UserError(f"faults.file: '{file}' has no column {missing[0]}; it begins with {given}")
    absences = []
    for line, row in enumerate(rows, 2):
        place = f"faults.file: '{file}', line {line}"
        try:
            node, start, end = int(row["node"]), float(row["from"]), float(row["to"])
        except (TypeError, ValueError):
            given = ", ".join(str(row[name]) for name in ("node", "from", "to"))
            raise UserError(f"{place}: {given} given; allowed: the number of a node and two times") from None
        require(node >= 0, f"{place}: node", node, "0 or more")
        require(0 <= start < math.inf, f"{place}: from", row["from"], "0 or more")
        require(start < end, f"{place}: to", row["to"], f"a time after from, {start:g}")
        absences.append(Absence(node, start, end, line))
    if not absences:
        raise UserError(f"faults.file: '{file}' has no row, so no node is ever absent")
    absences.sort()
    for before, after in itertools.pairwise(absences):
        if before.node == after.node and after.start < before.end:
            lines = f"lines {before.line} and {after.line}"
            raise UserError(f"faults.file: '{file}', {lines}: node {after.node} leaves at {after.start:g} before it is "
                            f"back at {before.end:g}")  # fmt: skip
    return absences
