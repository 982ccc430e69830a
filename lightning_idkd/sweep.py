"""W&B sweep files without a server: the same cells, started here, a few at a time, each at most once.

Cells that differ only in what follows the initial training share it: it is trained once, and they fork from it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
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

import yaml

from lightning_idkd import config_file, randomness
from lightning_idkd.config import Config
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.given import SHIPPED
from lightning_idkd.run_folder import RESULT, SAME, RunFolder, at, difference, locked, write
from lightning_idkd.schedule import epoch_of

KEYS = ("program", "method", "name", "description", "project", "entity", "metric", "parameters", "command", "run_cap")
ENTRIES = ("value", "values", "min", "max", "distribution")
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
        return [train.lr * train.schedule.factor(e / 4, train.epochs) for e in range(math.ceil(4 * min(epochs, train.epochs)))]

    def begins_like(self, other: Cell, latest: float) -> bool:
        """Whether the two do the same until the first exchange of either; without one, until epoch ``latest``."""
        epochs = min(self.start or latest, other.start or latest)
        same = difference(self.config.resolved, other.config.resolved, SHARED) is None
        return same and self.rates(epochs) == other.rates(epochs)

    def checkpoint(self, epoch: int | None) -> Path:
        """That after so many epochs; None: the last one."""
        return self.folder.file(f"checkpoints/epoch_{epoch or self.until}.ckpt")


def read(path: Path) -> dict:
    """A sweep file, with its keys checked."""
    try:
        sweep = config_file.read(path.read_text(encoding="utf-8"), yaml.SafeLoader)  # W&B's agents read YAML 1.1
    except FileNotFoundError as e:
        known = [f"{at}/{file.stem}{end}" for file in (SHIPPED / "sweeps").glob("*.yaml")
                 for at, end in (("configs/sweeps", ".yaml"), ("sweeps", ""))]  # fmt: skip
        raise UserError(f"there is no sweep file {path}.{did_you_mean(str(path), known)}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is no sweep file ({getattr(e, 'strerror', None) or 'not a text'})") from e
    except UserError as e:
        raise UserError(f"{path}, {e}") from e
    except yaml.YAMLError as e:
        raise UserError(f"{path} is no YAML: {' '.join(str(e).split())[:150]}") from e
    if not isinstance(sweep, dict):
        raise UserError(f"{path} holds no keys; a sweep file has {', '.join(KEYS)}")
    for key in sweep:
        require(key in KEYS, f"{path.name}: key", f"'{key}'", f"{', '.join(KEYS)}.{did_you_mean(str(key), KEYS)}")
    for key in ("method", "parameters", "command"):
        if key not in sweep:
            raise UserError(f"{path.name}: the key '{key}' is missing")
    method, cap = sweep["method"], sweep.get("run_cap")
    require(method in ("grid", "random"), f"{path.name}: method", method, "grid, random (bayes needs W&B's server)")
    require(cap is None or (type(cap) is int and cap >= 1), f"{path.name}: run_cap", cap, "a number of cells, 1 or more")
    require(isinstance(sweep["command"], list), f"{path.name}: command", sweep["command"], "a list of words")
    require(isinstance(sweep["parameters"], dict), f"{path.name}: parameters", sweep["parameters"], "keys with their values")
    for key, entry in sweep["parameters"].items():
        if not isinstance(entry, dict) or not entry:
            raise UserError(f"{path.name}: parameters.{key} has no values; allowed: {', '.join(ENTRIES)}")
        for k in entry:
            known = f"{', '.join(ENTRIES)}.{did_you_mean(str(k), ENTRIES)}"
            require(k in ENTRIES, f"{path.name}: parameters.{key}: key", f"'{k}'", known)
        ways = [way for way in ("value", "values", "min") if way in entry]
        require(len(ways) < 2, f"{path.name}: parameters.{key}", " and ".join(ways), "one of value, values, or min and max")
        values = entry.get("values", [0])
        require(isinstance(values, list) and values, f"{path.name}: parameters.{key}.values", values, "a list of one or more")
        for k in ("min", "max"):
            number = entry.get(k, 0)
            hint = " (YAML wants 1.0e-3, not 1e-3)" if isinstance(number, str) else ""
            require(type(number) in (int, float), f"{path.name}: parameters.{key}.{k}", repr(number), f"a number{hint}")
    return sweep


def combinations(sweep: dict) -> list[dict]:
    """All cells of a grid, in the order of the file, or ``run_cap`` draws, the same every time."""
    entries = {k: [e["value"]] if "value" in e else e.get("values") for k, e in sweep["parameters"].items()}
    if sweep["method"] == "grid":
        for key, values in entries.items():
            if values is None:
                raise UserError(f"parameters.{key}: a grid needs values")
        return [dict(zip(entries, point, strict=True)) for point in itertools.product(*entries.values())]
    if "run_cap" not in sweep:
        raise UserError("run_cap is missing: how many random cells?")
    rng = random.Random(0)
    return [
        {k: rng.choice(values) if values else draw(k, sweep["parameters"][k], rng) for k, values in entries.items()}
        for _ in range(sweep["run_cap"])
    ]


def draw(key: str, entry: dict, rng: random.Random) -> float:
    """A number from the distribution of a parameter with min and max."""
    if "min" not in entry or "max" not in entry:
        raise UserError(f"parameters.{key}: give value, values, or min and max")
    low, high = entry["min"], entry["max"]
    require(low <= high, f"parameters.{key}.min", low, f"at most max, {high}")
    kind = entry.get("distribution", "int_uniform" if isinstance(low, int) and isinstance(high, int) else "uniform")
    if kind == "int_uniform":
        return rng.randint(low, high)
    if kind == "uniform":
        return rng.uniform(low, high)
    if kind == "log_uniform_values":
        require(low > 0, f"parameters.{key}.min", low, "above 0 for log_uniform_values")
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    raise UserError(f"parameters.{key}.distribution: {kind} given; allowed: int_uniform, uniform, log_uniform_values")


def called(parameters: dict) -> str:
    """A folder name for a cell, such as seed=0,alpha=0.05,distillation=IDKD-start24-priorNone."""

    def word(value: object) -> str:
        if isinstance(value, dict):
            given = value.get("init_args", {} if "class_path" in value else value) or {}
            parts = [str(value.get("class_path", "")).split(".")[-1], *(f"{k}{word(v)}" for k, v in given.items())]
            return "-".join(filter(None, parts))
        if isinstance(value, list):
            return "+".join(map(word, value)) or "none"
        return "".join(c if c.isalnum() or c in ".-+" else "_" for c in str(value).split("/")[-1])

    keys = list(parameters)
    short = {k: k.rsplit(".", 1)[-1] for k in keys}
    short = {k: s if list(short.values()).count(s) == 1 else k for k, s in short.items()}
    name = ",".join(f"{short[k]}={word(v)}" for k, v in parameters.items())
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}~{digest(parameters)}"


def digest(value: object) -> str:
    """Eight letters that stand for ``value``."""
    return f"{randomness.seed_of(0, json.dumps(value, sort_keys=True)) % 16**8:08x}"


def cells(path: Path, runs: str) -> list[Cell]:
    """Every cell of a sweep file, parsed as the agent would have it; mistakes are told before anything is written."""
    from lightning_idkd.cli import configure

    sweep = read(path)
    command = [str(part) for part in sweep["command"]]
    if "fit" not in command or not {"${args}", "${args_json_file}"} & set(command):
        raise UserError(
            f"{path.name}: command must hold fit and ${{args_json_file}} or ${{args}}, as in the sweeps that come with this"
        )
    points, found, names = combinations(sweep), [], []
    varied = [k for k in sweep["parameters"] if len({json.dumps(p[k], sort_keys=True) for p in points}) > 1]
    with TemporaryDirectory() as drafts:
        for point in points:
            name = called({k: point[k] for k in varied}) or "cell"
            names.append(name)
            name += f",{names.count(name)}" * (names.count(name) > 1)
            file, draft = Path(runs) / path.stem / name / "cell.json", Path(drafts) / f"{len(found)}.json"
            draft.write_text(json.dumps(point))
            place = ["--run.dir", str(file.parent.parent), "--run.name", name]
            words = command[command.index("fit") + 1 :]
            arguments, tried = (
                [w for word in words for w in expanded(word, point, parameters)] + place for parameters in (file, draft)
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


def expanded(word: str, parameters: dict, file: Path) -> list[str]:
    """A word of the command as an agent of W&B has it: a cell's parameters as options, a config first, or in a file."""
    if word == "${args}":
        ordered = sorted(parameters.items(), key=lambda item: item[0] != "config")
        return [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in ordered]
    return [str(file) if word == "${args_json_file}" else word]


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
    from lightning_idkd.cli import configure

    starts = {c.start for c in group if c.start}
    first = max(group, key=lambda c: c.start or 0)
    name = digest([{k: at(first.config.resolved, k) for k in SHARED}, first.rates(max(starts))])
    arguments = [*first.arguments, "--distillation", "null", "--calibration", "null", "--data.public", "null", "--run.dir",
                 str(Path(runs) / "initial"), "--run.name", name]  # fmt: skip
    return Cell(f"initial training {name}", {}, arguments, configure(arguments), None, keep=starts, until=max(starts))


class Runner:
    """Runs cells in processes of their own, ``jobs`` at a time."""

    def __init__(self, runs: list[Cell], jobs: int):
        self.runs, self.jobs = runs, jobs
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

        count = sum(c.state == "done" for c in self.runs)
        table = Table("cell", "state", "epoch", "node mean", "consensus", title=f"{count} of {len(self.runs)} done")
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
    found, folder = cells(path, runs), Path(runs) / path.stem
    with locked(folder, f"another process runs this sweep in '{folder}'; wait for it, or stop it"):
        # a queue's end comes as Ctrl-C, which a shell lets its background jobs ignore
        before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return Runner(share(found, runs), jobs).run()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
