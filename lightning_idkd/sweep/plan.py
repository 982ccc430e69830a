"""Plans a sweep: its cells with their names and configs, and the initial trainings that cells share.

Cells that differ only in what follows the initial training share it: it is trained once, and they fork from it.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_idkd import randomness
from lightning_idkd.checkout import CALLBACKS
from lightning_idkd.config import Config
from lightning_idkd.config.resolved import RESULT, SAME, difference, look_up
from lightning_idkd.errors import UserError
from lightning_idkd.files import write
from lightning_idkd.records.run_folder import RunFolder
from lightning_idkd.schedule import epoch_of
from lightning_idkd.sweep.command_line import expand_command
from lightning_idkd.sweep.file import list_points, make_file_name, read_sweep, walk_parameters

SHARED = (*SAME, "train.batch_size", "node.loss", "callbacks", "faults")
"""The keys, besides learning rates, in which cells that share an initial training agree."""
LONGEST_NAME = 150
"""Characters of a cell's name; a longer one is cut."""


@dataclass
class Cell:
    """One combination of a sweep's parameters, or an initial training that several of them share."""

    name: str
    parameters: dict
    arguments: list[str]
    config: Config
    start: int | None
    """Epoch of the first exchange; None without distillation."""
    source: Cell | None = None
    """The initial training that the cell forks from, at epoch ``start`` or, without one, at its end."""
    keep: set[int] = field(default_factory=set)
    """Epochs whose checkpoints an initial training keeps."""
    until: int | None = None
    """Epoch at which an initial training ends; None for the other cells, which train to their end."""
    state: str = "waiting"

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.folder() / "latest")

    @property
    def log(self) -> Path:
        """The file with the output of all processes that have trained this cell."""
        return self.config.folder() / "log.txt"

    def is_done(self) -> bool:
        """Whether the newest run of this cell is complete and has the config that the sweep asks for now."""
        if self.until is None:
            complete, keys = self.folder.file("summary.json").exists(), RESULT
        else:
            complete, keys = all(self.checkpoint_file(epoch).exists() for epoch in self.keep), SHARED
        return complete and difference(self.config.resolved, self.folder.config(), keys) is None

    def build_command(self) -> list[str]:
        """The command that trains this cell, or continues it."""
        command = [sys.executable, "-m", "lightning_idkd", "fit", *self.arguments, "--run.resume", "auto"]
        if self.keep:
            command += ["--run.keep", str(sorted(self.keep))]
        if self.until is not None:
            command += ["--run.until", str(self.until)]
        if self.source is not None:
            command += ["--run.from", str(self.source.checkpoint_file(self.start))]
        return command

    def fail_with_source(self) -> str:
        """Write into the log that the initial training has failed, so that ``idkd watch`` shows why the cell does not
        begin; returns the cell's state."""
        reason = "its initial training failed"
        line = f"{reason}: {last_line(self.source.log)} ({self.source.log})" if self.source else reason
        if last_line(self.log) != line:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a") as out:
                out.write(f"error: {line}\n")
        return f"failed: {reason}"

    def learning_rates(self, epochs: float) -> list[float]:
        """The learning rates of the first ``epochs``, four an epoch."""
        train = self.config.train
        return [train.lr_at(quarter / 4) for quarter in range(math.ceil(4 * min(epochs, train.epochs)))]

    def begins_like(self, other: Cell, latest: float) -> bool:
        """Whether both train alike until the first exchange of either, or until epoch ``latest`` if neither has one."""
        epochs = min(self.start or latest, other.start or latest)
        same = difference(self.config.resolved, other.config.resolved, SHARED) is None
        return same and self.learning_rates(epochs) == other.learning_rates(epochs)

    def checkpoint_file(self, epoch: int | None) -> Path:
        """The checkpoint of an initial training after ``epoch`` epochs; None: at its end."""
        return self.folder.file(f"checkpoints/epoch_{epoch or self.until}.ckpt")


def last_line(log: Path) -> str:
    """The last line of a log, which says why a process has failed; empty if there is none.

    Lines of SLURM's programs do not count: they only say that the process has ended.
    """
    lines = log.read_text().splitlines() if log.exists() else []
    lines = [line for line in lines if line.strip() and not line.startswith(("srun: ", "slurmstepd"))]
    return lines[-1].removeprefix("error: ") if lines else ""


# ------------------------------------------------------------------ cells


def plan_cells(path: Path, runs: str) -> list[Cell]:
    """Plan every cell of a sweep file and write its parameters into its folder, ``cell.json``.

    Configs are parsed as for W&B's agents, all of them before anything is written.

    Raises:
        UserError: the file or the config of a cell is wrong, or the folder ``runs`` cannot be written.
    """
    sweep = read_sweep(path)
    points = list_points(sweep)
    cells = []
    with TemporaryDirectory() as drafts:
        for name, point in zip(name_cells(sweep, points), points, strict=True):
            cells.append(plan_cell(sweep, path, runs, name, point, Path(drafts) / f"{len(cells)}.json"))
    for cell in cells:
        write_parameters(cell)
    return cells


def write_parameters(cell: Cell, file: Path | None = None) -> None:
    """Write the parameters of a cell into a file; None: ``cell.json`` in its folder.

    Raises:
        UserError: the file cannot be written.
    """
    file = file or cell.folder.path.parent / "cell.json"
    make_folder(file.parent)
    text = json.dumps(cell.parameters, indent=1) + "\n"
    write(file, lambda part: part.write_text(text), "--dir")


def make_folder(folder: Path) -> None:
    """Make a folder of a sweep unless it exists.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--dir: cannot write to '{folder}' ({e.strerror})") from e


def plan_cell(
    sweep: dict, path: Path, runs: str, name: str, point: dict, draft: Path, file: Path | None = None
) -> Cell:
    """Plan one cell.

    Args:
        draft: takes the place of ``file``, which is not written yet.
        file: the file that its parameters will have; None: ``cell.json`` in its folder.
    """
    from lightning_idkd.config.parse import configure

    draft.write_text(json.dumps(point))
    folder = sweep_folder(sweep, path, runs)
    file = file or folder / name / "cell.json"
    command = sweep["command"][sweep["command"].index("fit") + 1 :]
    # a config comes first, so that the other parameters change it
    parameters = dict(sorted(point.items(), key=lambda item: item[0] != "config"))
    place = ["--run.dir", str(folder), "--run.name", name]
    try:
        config = configure(expand_command(command, parameters, draft) + place)
        config.check()
    except UserError as e:
        raise UserError(f"{path.name}, cell {name}: {e}") from e
    start = config.distillation and epoch_of(config.distillation.start, config.train.epochs, "distillation.start")
    return Cell(name, point, expand_command(command, parameters, file) + place, config, start)


def sweep_folder(sweep: dict, path: Path, runs: str) -> Path:
    """The folder of a sweep's cells: below ``runs``, named after the sweep, or after its file if it has no name."""
    return Path(runs) / make_file_name(sweep.get("name", path.stem)).strip("._")


# ------------------------------------------------------------------ their names


def name_cells(sweep: dict, points: list[dict]) -> list[str]:
    """The folder names of all cells, each of them different.

    A name is the ``run.name`` that a parameter or the command gives, followed by the parameters that vary if several
    cells have that name. Without a ``run.name`` it is the parameters that vary.
    """
    paths = [path for path, _ in walk_parameters(sweep["parameters"])]
    flat = [{".".join(path): functools.reduce(dict.__getitem__, path, point) for path in paths} for point in points]
    varied = []
    for key in flat[0]:
        values = {json.dumps(parameters[key], sort_keys=True) for parameters in flat}
        if key != "run.name" and len(values) > 1:
            varied.append(key)
    words: list[str] = []
    for part in sweep["command"]:
        words += str(part).split("=", 1)
    of_command = next((value for option, value in itertools.pairwise(words) if option == "--run.name"), None)
    given = [parameters.get("run.name", of_command) for parameters in flat]
    names: list[str] = []
    for run_name, parameters in zip(given, flat, strict=True):
        description = describe_parameters({key: parameters[key] for key in varied})
        if run_name is None:
            names.append(description or "cell")
        elif given.count(run_name) > 1 and description:
            names.append(f"{run_name},{description}")
        else:
            names.append(str(run_name) or "cell")
    return number_repeated(names)


def number_repeated(names: list[str]) -> list[str]:
    """The names, with a number behind each that stands there a second time."""
    numbered = []
    for i, name in enumerate(names):
        count = names[: i + 1].count(name)
        numbered.append(name if count == 1 else f"{name},{count}")
    return numbered


def describe_parameters(parameters: dict) -> str:
    """Parameters as a folder's name, such as seed=0,alpha=0.05,distillation=IDKD-start24-priorNone.

    A key is shortened to its last part unless two keys end alike.
    """
    last = [key.rsplit(".", 1)[-1] for key in parameters]
    parts = []
    for (key, value), short in zip(parameters.items(), last, strict=True):
        parts.append(f"{short if last.count(short) == 1 else key}={describe_value(value)}")
    name = ",".join(parts)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}~{digest(parameters)}"


def describe_value(value: object) -> str:
    """A value as part of a folder's name: a class by its name and arguments, a path by its last part."""
    if isinstance(value, dict):
        arguments = value.get("init_args", {} if "class_path" in value else value) or {}
        parts = [str(value.get("class_path", "")).split(".")[-1]]
        parts += [f"{key}{describe_value(argument)}" for key, argument in arguments.items()]
        return "-".join(filter(None, parts))
    if isinstance(value, list):
        return "+".join(map(describe_value, value)) or "none"
    return make_file_name(str(value).split("/")[-1])


def digest(value: object) -> str:
    """Eight hexadecimal digits that identify ``value``."""
    text = json.dumps(value, sort_keys=True)
    text = text.replace(f"{CALLBACKS}.", "callbacks.")  # so that the folders of older sweeps are found
    return f"{randomness.derive_seed(0, text) % 16**8:08x}"


# ------------------------------------------------------------------ shared initial trainings


def share_initial_trainings(cells: list[Cell], runs: str) -> list[Cell]:
    """Let cells that begin alike fork from one initial training; returns the cells, then the initial trainings.

    An initial training is planned for two or more such cells. A single cell forks only from one that another sweep has
    trained already, and one that says itself where it starts (``run.from``) shares none.
    """
    sharing = [cell for cell in cells if not cell.config.run.from_]
    latest = max((cell.start for cell in sharing if cell.start), default=math.inf)
    groups: list[list[Cell]] = []
    for cell in sharing:
        group = next((g for g in groups if all(cell.begins_like(other, latest) for other in g)), None)
        if group is None:
            groups.append([cell])
        else:
            group.append(cell)
    trainings = []
    for group in groups:
        if not any(cell.start for cell in group):
            continue
        training = plan_initial_training(group, runs)
        if len(group) > 1 or training.is_done():
            trainings.append(training)
            for cell in group:
                cell.source = training
    return [*cells, *trainings]


def plan_initial_training(group: list[Cell], runs: str) -> Cell:
    """Plan the run below ``runs/initial`` that trains without distillation until the latest ``start`` of the group."""
    from lightning_idkd.config.parse import configure

    starts = {cell.start for cell in group if cell.start}
    last = max(group, key=lambda cell: cell.start or 0)
    shared = {key: look_up(last.config.resolved, key) for key in SHARED}
    name = digest([shared, last.learning_rates(max(starts))])
    arguments = [*last.arguments, "--distillation", "null", "--calibration", "null", "--data.public", "null",
                 "--run.dir", str(Path(runs) / "initial"), "--run.name", name]  # fmt: skip
    config = configure(arguments)
    return Cell(f"initial training {name}", {}, arguments, config, None, keep=starts, until=max(starts))
