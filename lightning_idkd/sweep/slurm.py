"""Runs the cells of a sweep as jobs of a SLURM cluster, by submitit (``pip install lightning-idkd[slurm]``)."""

from __future__ import annotations

import getpass
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning_idkd.config.arguments import read_value
from lightning_idkd.errors import UserError, did_you_mean, explain_write_error, require
from lightning_idkd.files import write
from lightning_idkd.sweep.file import make_file_name
from lightning_idkd.sweep.plan import Cell, last_line
from lightning_idkd.sweep.progress import Progress

DEFAULTS = {"timeout_min": 720, "signal_delay_s": 120}
"""Minutes that a job may take before it is started again, and seconds before that in which it saves a checkpoint."""
REQUEUES = 1000
"""Number of times that submitit starts a job again after its time limit."""
SET_ELSEWHERE = {
    "array_parallelism": "--jobs", "nodes": "run.hosts", "tasks_per_node": "run.devices",
    "ntasks_per_node": "run.devices", "num_gpus": "gpus_per_node", "dependency": "the sweep itself",
}  # fmt: skip
"""Options of submitit that a user may not give, and what sets them."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE",
         "OUT_OF_MEMORY", "REVOKED")  # fmt: skip
"""The states of jobs that SLURM will not run any more."""
ORDINARY = ("None", "Priority", "Resources", "Dependency", "JobArrayTaskLimit", "BeginTime")
"""Reasons for which jobs wait that need no one's attention."""
INTERVAL = 5.0
"""Seconds between two looks at the queue."""
PATIENCE = 60.0
"""Seconds until the files of a job that ended well must be visible here, through a network file system."""


# ------------------------------------------------------------------ options


def check_options(given: dict[str, Any]) -> dict[str, Any]:
    """Check that this is a machine of a cluster, and turn options of SLURM into parameters of submitit's executor.

    Options have the names of submitit, or of sbatch with ``_`` or ``-`` between words.

    Raises:
        UserError: submitit or SLURM's programs are missing, or an option is unknown or has a wrong value.
    """
    try:
        from submitit import AutoExecutor, SlurmExecutor
    except ImportError as e:
        missing = "slurm needs a package that is not installed"
        raise UserError(f"--on: {missing}: pip install lightning-idkd[slurm]") from e
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise UserError(f"--on: slurm given, but there is no {program} in the PATH, as on a cluster's login node")
    shared = AutoExecutor._valid_parameters()
    known = (shared | SlurmExecutor._valid_parameters()) - SET_ELSEWHERE.keys()
    parameters: dict[str, Any] = {}
    for key, value in given.items():
        name, place = key.replace("-", "_"), f"slurm.{key}"
        require(name not in SET_ELSEWHERE, place, value, f"nothing, since {SET_ELSEWHERE.get(name)} sets it")
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{place}: submitit has no such option.{hint} Allowed: {', '.join(sorted(known))}")
        name = "timeout_min" if name == "time" else name
        value = count_minutes(place, value) if name == "timeout_min" else read_option(place, value)
        parameters[name if name in shared else f"slurm_{name}"] = value
    defaults = {name if name in shared else f"slurm_{name}": value for name, value in DEFAULTS.items()}
    parameters = defaults | parameters
    if "cpus_per_task" in parameters:  # srun does not read that option of sbatch
        parameters.setdefault("slurm_srun_args", [f"--cpus-per-task={parameters['cpus_per_task']}"])
    extra = parameters.get("slurm_additional_parameters", {})
    require(isinstance(extra, dict), "slurm.additional_parameters", extra, "a mapping from sbatch's options to values")
    parameters["slurm_additional_parameters"] = {"requeue": True} | extra
    make_executor(Path(), parameters)
    return parameters


def read_option(key: str, value: Any) -> Any:
    """The value of an option, which is a text where it was given on the command line."""
    return read_value(value, key) if isinstance(value, str) else value


def count_minutes(key: str, text: Any) -> int:
    """The minutes of a time limit in a form that sbatch takes, such as 90, 12:00:00 or 2-12."""
    allowed = "minutes, hours:minutes:seconds, days-hours or days-hours:minutes:seconds, as in 12:00:00"
    right = isinstance(text, str) and re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text)
    require(bool(right), key, text, allowed)
    days, _, clock = text.rpartition("-")
    fields = [int(field) for field in clock.split(":")]
    if not days and len(fields) < 3:  # minutes, or minutes:seconds
        fields.insert(0, 0)
    hours, minutes, seconds = (*fields, 0, 0)[:3]
    total = int(days or 0) * 24 * 60 + hours * 60 + minutes + math.ceil(seconds / 60)
    require(total > 0, key, text, allowed)
    return total


def make_executor(folder: Path, parameters: dict[str, Any]) -> Any:
    """submitit's executor, which writes its files into ``folder``.

    Raises:
        UserError: submitit refuses a parameter.
    """
    from submitit import AutoExecutor

    executor = AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=REQUEUES)
    try:
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, TypeError, ValueError) as e:
        raise UserError(f"slurm: {' '.join(str(e).split())[:200]}") from e
    return executor


# ------------------------------------------------------------------ jobs


class SlurmRunner(Progress):
    """Runs each cell in a job, which goes on when this process ends.

    The initial trainings are an array of jobs, and the other cells a second one that begins when those have ended. A
    file in a cell's folder holds the id of its job, so that a later call follows that job instead of a new one.
    """

    def __init__(self, cells: list[Cell], jobs: int, title: str, folder: Path, parameters: dict[str, Any]):
        super().__init__(cells, title)
        self.folder = folder / ".slurm"
        shapes = {(cell.config.run.hosts, cell.config.run.devices) for cell in cells}
        require(len(shapes) == 1, "run.hosts and run.devices", sorted(shapes), "the same in all cells on SLURM")
        ((hosts, devices),) = shapes
        self.parameters = {"name": f"idkd-{make_file_name(title)}"} | parameters
        self.parameters |= {"nodes": hosts, "tasks_per_node": devices, "slurm_array_parallelism": jobs}
        self.queue: dict[str, tuple[str, str]] = {}
        self.asked = -math.inf
        self.ids: dict[str, str] = {}
        self.first_seen_ended: dict[str, float] = {}

    def run(self) -> bool:
        """Submit what is neither done nor in the queue, and follow all jobs; returns whether all cells are done."""
        self.queue = ask_queue()
        waiting = [cell for cell in self.cells if not self.is_settled(cell)]
        try:
            with hold_signals():
                self.submit([cell for cell in waiting if cell.until is not None], [])
                sources = [cell.name for cell in self.cells if cell.until is not None and cell.name in self.ids]
                self.submit([cell for cell in waiting if cell.until is None], [self.ids[name] for name in sources])
            with self.show_table() as live:
                self.follow(live, self.update, INTERVAL)
        except KeyboardInterrupt:
            ids = " ".join(sorted({id.partition("_")[0] for id in self.ids.values()}, key=int))
            print(f"the jobs go on; the same command follows them again, and scancel {ids} ends them", flush=True)
            return False
        if not self.are_done():
            print("the same command continues the sweep", flush=True)
        return self.are_done()

    def is_settled(self, cell: Cell) -> bool:
        """Whether a cell needs no new job: it is done, or its job is in the queue."""
        record = job_file(cell)
        job = record.read_text().strip() if record.exists() else ""
        if is_live(self.queue.get(job)):
            self.ids[cell.name] = job
            return True
        if cell.is_done():
            cell.state = "done"
        return cell.state == "done"

    def submit(self, cells: list[Cell], after: list[str]) -> None:
        """Submit cells as one array, which begins when the jobs ``after`` have ended."""
        from lightning_idkd.sweep.job import Training

        if not cells:
            return
        dependency = {"slurm_dependency": f"afterany:{':'.join(after)}"} if after else {}
        executor = make_executor(self.folder, self.parameters | dependency)
        try:
            for cell in cells:
                cell.log.parent.mkdir(parents=True, exist_ok=True)
            with outside_of_jobs():
                jobs = executor.submit_array([Training(cell.build_command(), cell.log) for cell in cells])
        except OSError as e:
            raise UserError(f"--dir: cannot write to '{self.folder}' ({explain_write_error(e, self.folder)})") from e
        except RuntimeError as e:  # of submitit, with what sbatch said
            said = [line for line in str(e).splitlines() if line.strip()] or ["sbatch failed"]
            raise UserError(said[0]) from e
        for cell, job in zip(cells, jobs, strict=True):
            write(job_file(cell), lambda part, job=job: part.write_text(f"{job.job_id}\n"), "--dir")
            self.ids[cell.name], cell.state = job.job_id, "pending"

    def update(self) -> bool:
        """Update the states of all cells; returns whether all have ended."""
        if time.monotonic() >= self.asked + INTERVAL:
            with suppress(UserError):  # SLURM may be away for a while, which does not harm its jobs
                self.queue, self.asked = ask_queue(), time.monotonic()
        over = True
        # a cell is judged after the initial training that it forks from
        for cell in sorted(self.cells, key=lambda cell: cell.until is None):
            if cell.state in ("waiting", "pending", "running") or cell.state.startswith("pending "):
                cell.state = self.find_state(cell)
                over &= cell.state == "done" or cell.state.startswith(("failed", "lost"))
        return over

    def find_state(self, cell: Cell) -> str:
        """The state of a cell that had not ended before."""
        job = self.ids[cell.name]
        entry = self.queue.get(job)
        if is_live(entry):
            self.first_seen_ended.pop(cell.name, None)
            state, reason = entry
            if state != "PENDING":
                return "running"
            return "pending" if reason in ORDINARY else f"pending ({reason})"
        if cell.is_done():
            return "done"
        state = entry[0] if entry else "COMPLETED"  # SLURM forgets what has ended minutes ago
        since = self.first_seen_ended.setdefault(cell.name, time.monotonic())
        if state == "COMPLETED" and time.monotonic() < since + PATIENCE:
            return cell.state
        if cell.source is not None and cell.source.state != "done":
            return cell.fail_with_source()
        if state not in ("COMPLETED", "FAILED"):
            return f"lost: {state.lower()} (job {job})"
        for log in (cell.log, self.folder / f"{job}_0_log.err"):
            if reason := last_line(log):
                return f"failed: {reason} ({log})"
        return f"failed: job {job} has written nothing to '{self.folder}'; do its hosts have this folder?"


def job_file(cell: Cell) -> Path:
    """The file that holds the id of a cell's last job."""
    return cell.log.with_name("slurm_job.txt")


def is_live(entry: tuple[str, str] | None) -> bool:
    """Whether a job is in SLURM's queue and has not ended."""
    return entry is not None and entry[0] not in ENDED


def ask_queue() -> dict[str, tuple[str, str]]:
    """Per id of this user's jobs, those that ended minutes ago included: the state, and the reason for which it waits.

    Raises:
        UserError: SLURM does not answer.
    """
    command = ["squeue", "--user", getpass.getuser(), "--array", "--noheader", "--states=all", "--format=%i|%T|%r"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()
        raise UserError(f"--on: squeue does not answer ({said[0] if said else 'no message'})") from e
    jobs = {}
    for line in answer.splitlines():
        job, state, reason = line.split("|", 2)
        jobs[job] = state, reason
    return jobs


@contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hide the variables of the job that this process may run in, which its new jobs would inherit."""
    from submitit.helpers import clean_env

    place = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    with clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
        os.environ.update(place)
        yield


@contextmanager
def hold_signals() -> Iterator[None]:
    """Let signals wait until what was submitted is recorded, so that no job is forgotten."""
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
