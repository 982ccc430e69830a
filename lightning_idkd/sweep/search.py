"""Runs a sweep by its results, through Optuna: ``method: bayes``, and ``early_terminate`` of every method.

A trial of Optuna is a cell. Its storage, a file in the sweep's folder, remembers all of them; a trial that has neither
ended nor been pruned stays open there, and the next call goes on with it.
"""

from __future__ import annotations

import functools
import json
import math
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lightning_idkd import randomness
from lightning_idkd.errors import UserError, did_you_mean, require
from lightning_idkd.files import is_locked
from lightning_idkd.sweep.file import find_distribution, nest, quantise, walk_parameters
from lightning_idkd.sweep.plan import Cell, describe_parameters, plan_cell, sweep_folder, write_parameters
from lightning_idkd.sweep.runner import Runner, is_busy
from lightning_idkd.sweep.search_pictures import STORAGE, STUDY, explain, open_storage

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner

IDENTITY = ("method", "metric", "parameters", "command", "early_terminate")
"""The keys of a sweep file that must stay the same when a search goes on."""
ETA = 3
"""W&B's default of ``eta``."""
FIRST_FAILURES = 3
"""The search stops if so many trials fail before one ends well."""
INTERVAL = 0.3
"""Seconds between two looks at the running cells."""


def find_optuna(file: str) -> None:
    """Let Optuna print warnings alone.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as e:
        what = "method bayes and early_terminate need a package that is not installed"
        raise UserError(f"{file}: {what}: pip install lightning-idkd[search]") from e
    optuna.logging.set_verbosity(optuna.logging.WARNING)


# ------------------------------------------------------------------ parameters


def build_distribution(entry: dict) -> BaseDistribution:
    """Optuna's distribution for a parameter of ``method: bayes``. Categories are the texts of their values in JSON;
    values are rounded to multiples of q afterwards."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    kind = find_distribution(entry)
    if kind in ("constant", "categorical"):
        return CategoricalDistribution(list_texts(entry.get("values", [entry.get("value")])))
    low, high = entry["min"], entry["max"]
    if kind == "int_uniform":
        return IntDistribution(low, high)
    base = kind.removeprefix("q_")
    if base == "log_uniform":  # the bounds are exponents
        low, high = math.exp(low), math.exp(high)
    elif base == "inv_log_uniform":
        low, high = math.exp(-high), math.exp(-low)
    return FloatDistribution(low, high, log=base != "uniform")


def cover(entry: dict, values: list) -> BaseDistribution:
    """A distribution of Optuna that holds the values which a grid or random draws take from a parameter."""
    from optuna.distributions import FloatDistribution

    if "value" in entry or "values" in entry:
        return build_distribution({key: entry[key] for key in ("value", "values") if key in entry})
    return FloatDistribution(min(values), max(values))


def list_texts(values: list) -> list[str]:
    """The different values as texts in JSON."""
    return list(dict.fromkeys(json.dumps(value, sort_keys=True) for value in values))


def encode(value: Any, distribution: BaseDistribution) -> Any:
    """A parameter's value as Optuna stores it."""
    return json.dumps(value, sort_keys=True) if hasattr(distribution, "choices") else value


def decode(stored: Any, entry: dict) -> Any:
    """A parameter's value, of what Optuna has drawn for it."""
    return json.loads(stored) if isinstance(stored, str) else quantise(stored, entry)


def plan_probes(sweep: dict, path: Path, runs: str) -> list[Cell]:
    """Cells that together have every category and both bounds of every parameter, to check their configs before any
    run. Their parameters lie in ``.probes``, from where an initial training that all trials share reads them.

    Raises:
        UserError: the config of one of them is wrong.
    """
    ends, folder = {}, sweep_folder(sweep, path, runs) / ".probes"
    for keys, entry in walk_parameters(sweep["parameters"]):
        distribution = build_distribution(entry)
        stored = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
        ends[keys] = [decode(value, entry) for value in stored]
    cells = {}
    with TemporaryDirectory() as drafts:
        for i in range(max(map(len, ends.values()))):
            values = {keys: some[i % len(some)] for keys, some in ends.items()}
            name = describe_parameters({".".join(keys): values[keys] for keys in ends if len(ends[keys]) > 1})
            file = folder / f"{i}.json"
            cells[file] = plan_cell(sweep, path, runs, name or "cell", nest(values), Path(drafts) / file.name, file)
    for file, cell in cells.items():
        write_parameters(cell, file)
    return list(cells.values())


# ------------------------------------------------------------------ Optuna


def build_pruner(given: dict | None, evaluations: int, file: str) -> BasePruner:
    """Optuna's pruner for ``early_terminate``.

    W&B checks runs after ``min_iter``, ``min_iter * eta``, ... evaluations, or after ``max_iter`` / ``eta``, ...,
    ``max_iter`` / ``eta ** s``. These are the pruner's smallest resource and its reduction factor; its largest resource
    is ``max_iter``, or the number of ``evaluations`` of the longest run.
    """
    from optuna.pruners import HyperbandPruner, NopPruner

    if given is None:
        return NopPruner()
    eta = given.get("eta") or ETA
    if given.get("max_iter") is not None:
        least, most = max(1, given["max_iter"] // eta ** given["s"]), given["max_iter"]
    else:
        least, most = given["min_iter"], evaluations
        allowed = f"1 to {evaluations}, the evaluations of a run (train.epochs / train.evaluate_every)"
        require(least <= most, f"{file}: early_terminate.min_iter", least, allowed)
    return HyperbandPruner(min_resource=least, max_resource=most, reduction_factor=eta)


def open_study(folder: Path, sweep: dict, pruner: BasePruner) -> Study:
    """Open the study of a sweep, or begin it.

    Raises:
        UserError: the file cannot be read or written, or it belongs to another sweep file.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    file, anew = folder / STORAGE, "remove that file to begin anew; runs that are done are not repeated"
    identity = json.loads(json.dumps({key: sweep.get(key) for key in IDENTITY}, default=str))
    try:
        storage = open_storage(file, "rwc")
        study = optuna.create_study(
            storage=storage, study_name=STUDY, direction=sweep["metric"]["goal"], pruner=pruner, load_if_exists=True
        )
        before = study.user_attrs.get("sweep")
        if before is None and not study.get_trials(deepcopy=False):
            study.set_user_attr("sweep", identity)
            before = identity
    except (RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError) as e:
        raise UserError(f"'{file}' cannot be used as the storage of this search ({explain(e)}); {anew}") from e
    if before != identity:
        differs = next((key for key in IDENTITY if (before or {}).get(key) != identity[key]), "")
        if differs == "parameters":
            keys = sorted(before[differs].keys() | identity[differs].keys())
            names = [key for key in keys if before[differs].get(key) != identity[differs].get(key)]
            differs = f"parameters: {', '.join(names)}" if names else "the order of parameters"
        raise UserError(
            f"'{file}' is the search of another sweep file (other {differs}); give this sweep another name, or {anew}"
        )
    return study


@dataclass
class Work:
    """A cell that is to run or runs."""

    cell: Cell
    trial: Trial | None = None
    """None for an initial training."""
    process: subprocess.Popen | None = None
    """None before it is started, and where another sweep has started it."""
    reported: int = 0
    """The number of evaluations that Optuna knows."""
    size: int = 0
    """Bytes of ``metrics.jsonl`` that were looked at."""
    pruned: bool = False


class Search(Runner):
    """Runs the trials of a search, ``jobs`` of them at a time, after the initial trainings that they share.

    Everything happens in one thread: to parse the config of a trial changes the working folder for a moment.

    Args:
        cells: the cells of a grid or of random draws, or the probes of ``method: bayes``, and the initial trainings.
    """

    def __init__(self, sweep: dict, path: Path, runs: str, cells: list[Cell], jobs: int, title: str):
        planned = [cell for cell in cells if cell.until is None]
        trainings = [cell for cell in cells if cell.until is not None]
        self.sweep, self.path, self.runs, self.metric = sweep, path, runs, sweep["metric"]["name"]
        self.maximises, self.entries = sweep["metric"]["goal"] == "maximize", dict(walk_parameters(sweep["parameters"]))
        evaluations = max(map(count_evaluations, planned))
        if sweep["method"] == "bayes":
            self.listed, self.probes, self.cap = [], planned, sweep["run_cap"]
            distributions = [build_distribution(entry) for entry in self.entries.values()]
            # probes are not run, so that an initial training pays only where all trials share it
            trainings = trainings if len({id(probe.source) for probe in planned}) == 1 else []
        else:
            self.listed, self.probes, self.cap = planned, [], len(planned)
            distributions = []
            for keys, entry in self.entries.items():
                distributions.append(cover(entry, [look_up(cell, keys) for cell in planned]))
        super().__init__([*self.listed, *trainings], jobs, title)
        self.distributions = dict(zip(map(".".join, self.entries), distributions, strict=True))
        pruner = build_pruner(sweep.get("early_terminate"), evaluations, path.name)
        self.folder = sweep_folder(sweep, path, runs)
        self.study = open_study(self.folder, sweep, pruner)
        self.trainings, self.active = [Work(cell) for cell in trainings], []
        self.open = self.find_open_trials()
        self.failures, self.succeeded, self.explained, self.interrupted = 0, False, False, False

    # ------------------------------------------------------------------ the loop

    def run(self) -> bool:
        """Run all trials; returns whether each of them is done or pruned.

        Raises:
            UserError: the storage cannot be written.
        """
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        # an exception in the middle of a transaction would harm the storage; the first signal only sets a flag
        before = {s: signal.signal(s, self.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with self.show_table() as live:
                self.follow(live, self.advance, INTERVAL)
        except (OptunaError, SQLAlchemyError) as e:
            self.stop()
            what = f"'{self.folder / STORAGE}' cannot be written ({explain(e)})"
            raise UserError(f"{what}; the same command continues the sweep") from e
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.are_done()

    def interrupt(self, _number: int, _frame: object) -> None:
        """Ask the search to stop; a second signal ends it at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def advance(self) -> bool:
        """Look at the running cells and start further ones; returns whether the search is over."""
        if self.interrupted and not self.stopping:
            self.stop()
            print("stopping; the same command continues the sweep", flush=True)
        for work in list(self.active):
            if work.process is None:
                if self.stopping or not is_busy(work.cell):
                    self.active.remove(work)
                    self.begin(work)
            elif (status := work.process.poll()) is None:
                self.observe(work)
            else:
                self.active.remove(work)
                self.processes.discard(work.process)
                state = self.judge(work.cell, status)
                self.settle(work, "pruned" if work.pruned and state == "stopped" else state)
        while not self.stopping and len(self.active) < self.jobs:
            work = self.next_work()
            if work is None:
                return not self.active
            self.begin(work)
        return not self.active

    def next_work(self) -> Work | None:
        """The next initial training or trial; None if there is none now."""
        from optuna.trial import TrialState

        if self.trainings:
            return self.trainings.pop(0)
        if any(work.trial is None for work in self.active):
            return None
        while (trial := self.open.pop(0) if self.open else self.ask()) is not None:
            try:
                return Work(self.plan(trial), trial, reported=max(self.read_values(trial), default=0))
            except UserError as e:
                print(f"refused: {e}", flush=True)
                self.study.tell(trial.number, state=TrialState.FAIL)
        return None

    def begin(self, work: Work) -> None:
        """Start a cell, unless its result is known or another process trains it."""
        cell = work.cell
        try:
            repeated = None if work.trial is None else self.find_repeated(work.trial)
            if repeated is not None:
                self.study.tell(work.trial.number, repeated.value)
                cell.state = f"repeats {name_trial(repeated.number)}"
            elif work.trial is not None and work.trial.user_attrs.get("pruned"):
                self.settle(work, "pruned")
            elif self.stopping:
                cell.state = "stopped"
            elif is_busy(cell):
                cell.state, work.process = "running, started by another sweep", None
                self.active.append(work)
            elif cell.is_done():
                self.settle(work, "done")
            elif cell.source is not None and not cell.source.checkpoint_file(cell.start).exists():
                self.settle(work, cell.fail_with_source())
            else:
                if self.probes and work.trial is not None:
                    write_parameters(cell)
                work.process = self.start_process(cell)
                self.active.append(work)
        except (OSError, UserError) as e:
            self.settle(work, f"failed: {e}")

    def settle(self, work: Work, state: str) -> None:
        """Give a cell its last state, and Optuna the result of its trial."""
        from optuna.trial import TrialState

        cell, trial = work.cell, work.trial
        if trial is not None and state == "done":
            try:
                values = self.report(work, prune=False)
            except UserError as e:
                values, state = [], f"failed: {e}"
            if values and math.isfinite(values[-1]):
                self.study.tell(trial.number, values[-1])
                self.succeeded = True
            elif state == "done":
                state = f"failed: it ends without a value of '{self.metric}' ({cell.folder.path}/metrics.jsonl)"
        elif trial is not None and state == "pruned":
            self.study.tell(trial.number, state=TrialState.PRUNED)
            with open(cell.log, "a") as log:
                log.write(f"pruned after {work.reported} evaluations; the run keeps its checkpoint\n")
        cell.state = state
        if trial is not None and state.startswith("failed"):
            # the trial stays open, so that the next call tries it again, and counts as bad until then
            self.failures += 1
            if not self.succeeded and self.failures == FIRST_FAILURES and not self.stopping:
                print(
                    f"the first {FIRST_FAILURES} trials failed, so the search stops; the same command tries again",
                    flush=True,
                )
                self.stop()

    # ------------------------------------------------------------------ trials

    def find_open_trials(self) -> list[Trial]:
        """The trials that an earlier call has left open, in their order."""
        from optuna.trial import Trial, TrialState

        found = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self.is_whole(trial):
                found.append(Trial(self.study, trial._trial_id))
            else:  # it was killed while Optuna drew its parameters
                self.study.tell(trial.number, state=TrialState.FAIL)
        return found

    def is_whole(self, trial: Any) -> bool:
        """Whether a trial has all its parameters."""
        return self.distributions.keys() <= trial.params.keys()

    def ask(self) -> Trial | None:
        """A new trial; None after the last."""
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        every = self.study.get_trials(deepcopy=False)
        trials = [trial for trial in every if self.is_whole(trial)]
        if len(trials) >= self.cap:
            return None
        if self.listed and not any(trial.state == TrialState.WAITING for trial in every):
            taken = {trial.user_attrs["cell"] for trial in trials}
            index = next(i for i in range(self.cap) if i not in taken)
            values = [look_up(self.listed[index], keys) for keys in self.entries]
            stored = map(encode, values, self.distributions.values())
            self.study.enqueue_trial(dict(zip(self.distributions, stored, strict=True)), {"cell": index})
        # a seed of its own for every trial, so that a search which was stopped draws what it would have drawn
        self.study.sampler = TPESampler(seed=randomness.derive_seed(0, f"trial {len(trials)}") % 2**32)
        return self.study.ask(self.distributions)

    def plan(self, trial: Trial) -> Cell:
        """The cell of a trial.

        Raises:
            UserError: its config is wrong.
        """
        if self.listed:
            return self.listed[trial.user_attrs["cell"]]
        values = {keys: decode(trial.params[".".join(keys)], entry) for keys, entry in self.entries.items()}
        varied = {}
        for keys, value in values.items():
            if not self.distributions[key := ".".join(keys)].single():
                varied[key] = float(f"{value:.4g}") if isinstance(value, float) else value
        name = ",".join(filter(None, [name_trial(trial.number), describe_parameters(varied)]))
        with TemporaryDirectory() as drafts:
            cell = plan_cell(self.sweep, self.path, self.runs, name, nest(values), Path(drafts) / "cell.json")
        source = next((cell for cell in self.cells if cell.until is not None), None)
        latest = max((probe.start for probe in self.probes if probe.start), default=math.inf)
        alike = source is not None and all(cell.begins_like(probe, latest) for probe in self.probes)
        if alike and (cell.start or source.until) in source.keep:
            cell.source = source
        self.cells.append(cell)
        return cell

    def find_repeated(self, trial: Trial) -> Any:
        """A trial that has ended and has the same parameters, hence the same result; None if there is none."""
        from optuna.trial import TrialState

        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return next((other for other in done if other.params == trial.params), None)

    # ------------------------------------------------------------------ their evaluations

    def observe(self, work: Work) -> None:
        """Report new evaluations of a running cell, and stop it if the pruner says so."""
        if work.trial is None or work.pruned or not is_locked(work.cell.folder.path):
            return  # a folder that nobody works on is of an earlier run
        file = work.cell.folder.file("metrics.jsonl")
        size = file.stat().st_size if file.exists() else 0
        if size == work.size:
            return
        work.size = size
        try:
            self.report(work)
        except UserError:  # damaged metrics stop no other cell; the run itself will complain
            return
        if work.pruned:
            work.trial.set_user_attr("pruned", True)
            work.process.send_signal(signal.SIGINT)

    def report(self, work: Work, prune: bool = True) -> list[float]:
        """Report the evaluations of a cell that Optuna does not know yet; returns all values. Their numbers, from 1,
        are W&B's iterations.

        Args:
            prune: whether to ask the pruner, before the last evaluation of a run.
        """
        lines = work.cell.folder.metrics()
        values = [line[self.metric] for line in lines if self.metric in line]
        values = [math.nan if value is None else float(value) for value in values]
        if lines and not values and not self.explained:
            self.explained = True
            hint = did_you_mean(self.metric, lines[-1])
            print(f"metric.name: the evaluations so far do not have '{self.metric}'.{hint}", flush=True)
        for number, value in enumerate(values[work.reported :], work.reported + 1):
            work.trial.report(value, number)
            work.reported = number
            if prune and number < count_evaluations(work.cell) and work.trial.should_prune():
                work.pruned = True
                break
        return values

    def read_values(self, trial: Trial) -> dict[int, float]:
        """The evaluations of a trial that Optuna knows, by number."""
        return self.study.get_trials(deepcopy=False)[trial.number].intermediate_values

    # ------------------------------------------------------------------ the table

    def are_done(self) -> bool:
        """Whether every trial is done or pruned."""
        from optuna.trial import TrialState

        trials = [trial for trial in self.study.get_trials(deepcopy=False) if self.is_whole(trial)]
        return len(trials) == self.cap and all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials)

    def count_cells(self) -> list[str]:
        """How many trials are done and pruned, and the best."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        counts = [f"{len(done)} of {self.cap} trials done"]
        if pruned := sum(trial.state == TrialState.PRUNED for trial in trials):
            counts.append(f"{pruned} pruned")
        if done:
            best = (max if self.maximises else min)(done, key=lambda trial: trial.value)
            counts.append(f"best {self.metric} {best.value:.4g} in {name_trial(best.number)}")
        return counts


def name_trial(number: int) -> str:
    """How the names of a trial's cell and folder begin."""
    return f"trial={number:03d}"


def look_up(cell: Cell, keys: tuple[str, ...]) -> Any:
    """The value of a parameter, by its path, in a cell."""
    return functools.reduce(dict.__getitem__, keys, cell.parameters)


def count_evaluations(cell: Cell) -> int:
    """The number of lines in ``metrics.jsonl`` of a cell that is done."""
    return math.ceil(cell.config.train.epochs / cell.config.train.evaluate_every)
