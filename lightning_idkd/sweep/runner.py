"""W&B sweep files without a server: the same cells, started here, a few at a time, each at most once.

Cells that differ only in what follows the initial training share it: it is trained once, and they fork from it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_idkd import randomness
from lightning_idkd.checkout import CALLBACKS
from lightning_idkd.config import Config
from lightning_idkd.config.resolved import RESULT, SAME, at, difference
from lightning_idkd.errors import UserError, require
from lightning_idkd.files import lock_folder, write
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.schedule import epoch_of
from lightning_idkd.sweep.file import SERVER, combinations, expand, leaves, read, word

SHARED = (*SAME, "train.batch_size", "callbacks")  # what cells with one initial training have in common, besides learning rates
LONGEST = 150  # characters of a cell's name


@dataclass
class Cell:
    """One combination of parameters."""

    name: str
    parameters: dict
    arguments: list[str]
    config: Config
    start: int | None
    """Epoch of the first exchange; None without distillation."""
    source: Cell | None = None
    """Whose checkpoint of that epoch, or last one, it starts from."""
    keep: set[int] = field(default_factory=set)
    until: int | None = None
    state: str = "waiting"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.folder() / "latest")

    def done(self) -> bool:
        """Whether the newest run of this cell has come to its end, with the config that the sweep asks for now."""
        if self.until is not None:
            return all(self.checkpoint(e).exists() for e in self.keep) and self._same()
        return self.folder.file("summary.json").exists() and self._same()

    def _same(self) -> bool:
        keys = RESULT if self.until is None else SHARED
        return difference(self.config.resolved, self.folder.config(), keys) is None

    def rates(self, epochs: float) -> list[float]:
        """Learning rates of the first ``epochs``, four an epoch."""
        train = self.config.train
        return [train.lr_at(quarter / 4) for quarter in range(math.ceil(4 * min(epochs, train.epochs)))]

    def begins_like(self, other: Cell, latest: float) -> bool:
        """Whether the two do the same until the first exchange of either; without one, until epoch ``latest``."""
        epochs = min(self.start or latest, other.start or latest)
        same = difference(self.config.resolved, other.config.resolved, SHARED) is None
        return same and self.rates(epochs) == other.rates(epochs)

    def checkpoint(self, epoch: int | None) -> Path:
        """That after so many epochs; None: the last one."""
        return self.folder.file(f"checkpoints/epoch_{epoch or self.until}.ckpt")


def called(parameters: dict) -> str:
    """A folder name for a cell, such as seed=0,alpha=0.05,distillation=IDKD-start24-priorNone."""

    def part(value: object) -> str:
        if isinstance(value, dict):
            given = value.get("init_args", {} if "class_path" in value else value) or {}
            parts = [str(value.get("class_path", "")).split(".")[-1], *(f"{k}{part(v)}" for k, v in given.items())]
            return "-".join(filter(None, parts))
        if isinstance(value, list):
            return "+".join(map(part, value)) or "none"
        return word(str(value).split("/")[-1])

    keys = list(parameters)
    short = {k: k.rsplit(".", 1)[-1] for k in keys}
    short = {k: s if list(short.values()).count(s) == 1 else k for k, s in short.items()}
    name = ",".join(f"{short[k]}={part(v)}" for k, v in parameters.items())
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}~{digest(parameters)}"


def digest(value: object) -> str:
    """Eight letters that stand for ``value``."""
    text = json.dumps(value, sort_keys=True).replace(f"{CALLBACKS}.", "callbacks.")  # as older sweeps have named their folders
    return f"{randomness.derive_seed(0, text) % 16**8:08x}"


def folder(sweep: dict, path: Path, runs: str) -> Path:
    """The folder of a sweep's cells: its name, else the file's, below ``runs``."""
    return Path(runs) / word(sweep.get("name", path.stem)).strip("._")


def cells(path: Path, runs: str) -> list[Cell]:
    """Every cell of a sweep file, parsed as the agent would have it; mistakes are told before anything is written."""
    from lightning_idkd.config.parse import configure

    sweep = read(path)
    points, found = combinations(sweep), []
    with TemporaryDirectory() as drafts:
        for name, point in zip(names(sweep, points), points, strict=True):
            file, draft = folder(sweep, path, runs) / name / "cell.json", Path(drafts) / f"{len(found)}.json"
            draft.write_text(json.dumps(point))
            ordered = dict(sorted(point.items(), key=lambda item: item[0] != "config"))  # the others lie over a config
            place = ["--run.dir", str(file.parent.parent), "--run.name", name]
            arguments, tried = (
                expand(sweep["command"][sweep["command"].index("fit") + 1 :], ordered, parameters) + place
                for parameters in (file, draft)
            )
            try:
                config = configure(tried)
                config.check()
            except UserError as e:
                raise UserError(f"{path.name}, cell {name}: {e}") from e
            start = config.distillation and epoch_of(config.distillation.start, config.train.epochs, "distillation.start")
            found.append(Cell(name, point, arguments, config, start))
    try:
        for cell in found:
            file = cell.folder.path.parent / "cell.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, lambda part, cell=cell: part.write_text(json.dumps(cell.parameters, indent=1) + "\n"))
    except OSError as e:
        raise UserError(f"--dir: cannot write to '{runs}' ({e.strerror})") from e
    return found


def names(sweep: dict, points: list[dict]) -> list[str]:
    """The cells' folder names: the run.name that a parameter or the command gives, and what varies, where that is needed to tell
    cells apart."""
    paths = [path for path, _ in leaves(sweep["parameters"])]
    flat = [{".".join(path): functools.reduce(lambda value, k: value[k], path, point) for path in paths} for point in points]
    varied = [k for k in flat[0] if k != "run.name" and len({json.dumps(values[k], sort_keys=True) for values in flat}) > 1]
    words = [w for part in sweep["command"] for w in str(part).split("=", 1)]
    given = next((value for option, value in itertools.pairwise(words) if option == "--run.name"), None)
    asked, found = [values.get("run.name", given) for values in flat], []
    for name, values in zip(asked, flat, strict=True):
        described = called({k: values[k] for k in varied})
        whole = str(name) if name is not None else described
        if name is not None and asked.count(name) > 1 and described:
            whole += f",{described}"
        found.append(whole or "cell")
    return [f"{name},{i}" if (i := found[: at + 1].count(name)) > 1 else name for at, name in enumerate(found)]


def share(found: list[Cell], runs: str) -> list[Cell]:
    """Let cells with one initial training fork from a run made for that, which other sweeps share too; returns all runs."""
    groups: list[list[Cell]] = []
    latest = max((c.start for c in found if c.start), default=math.inf)
    for cell in found:
        group = next((g for g in groups if all(cell.begins_like(other, latest) for other in g)), None)
        if group is None:
            groups.append([cell])
        else:
            group.append(cell)
    made = []
    for group in groups:
        if not any(c.start for c in group):
            continue
        base = initial(group, runs)
        if len(group) > 1 or base.done():
            made.append(base)
            for cell in group:
                cell.source = base
    return [*found, *made]


def initial(group: list[Cell], runs: str) -> Cell:
    """A run of the initial training alone, up to the last start, in runs/initial/."""
    from lightning_idkd.config.parse import configure

    starts = {c.start for c in group if c.start}
    first = max(group, key=lambda c: c.start or 0)
    name = digest([{k: at(first.config.resolved, k) for k in SHARED}, first.rates(max(starts))])
    arguments = [*first.arguments, "--distillation", "null", "--calibration", "null", "--data.public", "null", "--run.dir",
                 str(Path(runs) / "initial"), "--run.name", name]  # fmt: skip
    return Cell(f"initial training {name}", {}, arguments, configure(arguments), None, keep=starts, until=max(starts))


class Runner:
    """Runs cells in processes of their own, ``jobs`` at a time."""

    def __init__(self, runs: list[Cell], jobs: int, title: str = "sweep"):
        self.runs, self.jobs, self.title = runs, jobs, title
        self.processes: set[subprocess.Popen] = set()
        self.stopping = False
        self.starting = threading.Lock()  # so that `stop` finds every process that was begun before it
        self.finished = {id(cell): threading.Event() for cell in runs}

    def start(self, cell: Cell) -> None:
        """Run one cell to its end, after the one that it starts from."""
        try:
            if cell.source is not None:
                self.finished[id(cell.source)].wait()
            if self.stopping:
                cell.state = "stopped"
            elif cell.done():
                cell.state = "done"
            elif cell.source is not None and not cell.source.checkpoint(cell.start).exists():
                cell.state = "failed: its initial training did"
            else:
                cell.state = self._process(cell)
        except (OSError, UserError) as e:
            cell.state = f"failed: {e}"
        finally:
            self.finished[id(cell)].set()

    def _process(self, cell: Cell) -> str:
        devices = cell.config.run.devices
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * (devices if isinstance(devices, int) else 1)))
        command = [sys.executable, "-m", "lightning_idkd", "fit", *cell.arguments, "--run.resume", "auto"]
        command += ["--run.threads", str(threads)] * (cell.config.run.threads is None)
        command += ["--run.keep", str(sorted(cell.keep))] * bool(cell.keep)
        command += ["--run.until", str(cell.until)] * (cell.until is not None)
        if cell.source is not None:
            command += ["--run.from", str(cell.source.checkpoint(cell.start))]
        log = cell.folder.path.parent / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as out:
            with self.starting:
                if self.stopping:
                    return "stopped"
                cell.state = "running"
                # in a session of its own: Ctrl-C comes from `stop` alone, since a second one would cost it its checkpoint
                process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
                self.processes.add(process)
            status = process.wait()
            self.processes.discard(process)
        if status == 0 and cell.done():
            return "done"
        if self.stopping or status == 130:
            return "stopped"
        said = [line for line in log.read_text().splitlines() if line.strip()]
        return f"failed: {said[-1].removeprefix('error: ') if said else f'status {status}'} ({log})"

    def stop(self) -> None:
        """Let every process end with a checkpoint."""
        with self.starting:
            self.stopping = True
            for process in list(self.processes):
                process.send_signal(signal.SIGINT)

    def run(self) -> bool:
        """Run all; returns whether all came to their end."""
        from rich.console import Console
        from rich.live import Live

        # those that others wait for go first, so that a waiting cell never holds a place that its source needs
        order = sorted(self.runs, key=lambda c: c.source is not None)
        console = Console()
        live = Live(self.table(), console=console, auto_refresh=False) if console.is_terminal else nullcontext()
        with ThreadPoolExecutor(self.jobs) as pool, live:
            futures = [pool.submit(self.start, cell) for cell in order]
            told: dict[str, str] = {}
            try:
                while not all(f.done() for f in futures):
                    time.sleep(0.3)
                    if console.is_terminal:
                        live.update(self.table(), refresh=True)
                    else:
                        for cell in self.runs:
                            if told.get(cell.name) != cell.state and cell.state != "waiting":
                                print(f"{cell.name}: {cell.state}", flush=True)
                            told[cell.name] = cell.state
            except KeyboardInterrupt:
                self.stop()
                print("stopping; the same command goes on", flush=True)
            for f in futures:
                f.result()
            if console.is_terminal:
                live.update(self.table(), refresh=True)
        if not console.is_terminal:
            console.print(self.table())
        return all(cell.state == "done" for cell in self.runs)

    def table(self):
        """What every cell is doing."""
        from rich.markup import escape
        from rich.table import Table

        parts = ((True, "cells"), (False, "initial trainings"))
        counts = [(kind, [c.state == "done" for c in self.runs if (c.until is None) == whole]) for whole, kind in parts]
        title = ", ".join(f"{sum(done)} of {len(done)} {kind} done" for kind, done in counts if done)
        table = Table("cell", "state", "epoch", "node mean", "consensus", title=f"{escape(self.title)}: {title}")
        for cell in self.runs:
            lines = cell.folder.metrics() if cell.folder.path.exists() and cell.state != "waiting" else []
            last = lines[-1] if lines else None
            shown = (
                [str(last["epoch"]), *(f"{last[f'accuracy/{k}']:.1%}" for k in ("node_mean", "consensus"))]
                if last
                else ["", "", ""]
            )
            table.add_row(escape(cell.name), escape(cell.state), *shown)
        return table


def run(path: Path, jobs: int, runs: str) -> bool:
    """Run a sweep file here; returns whether every cell came to its end."""
    require(jobs >= 1, "jobs", jobs, "1 or more")
    sweep, found = read(path), cells(path, runs)
    place = folder(sweep, path, runs)
    if unused := [key for key in SERVER if key in sweep]:
        print(f"without a server {', '.join(unused)} do{'es' * (len(unused) == 1)} nothing: all cells run here to their end")
    with lock_folder(place, f"another process runs this sweep in '{place}'; wait for it, or stop it"):
        # a queue's end comes as Ctrl-C, which a shell lets its background jobs ignore
        before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return Runner(share(found, runs), jobs, str(sweep.get("name", path.stem))).run()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
            print(f"runs: {place} (a table: idkd compare {place})", flush=True)
