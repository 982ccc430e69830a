"""Runs lightning-idkd and its peers on the same work, one after the other, and prints a Markdown table.

python tests/benchmarks/peers/run.py FOLDER [--only NAME ...] [--turns N] [--steps N] [--rounds N]

FOLDER gets an environment for each peer, which sees the packages of this one, torch among them, and the logs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from lightning_idkd.machine import count_cores, describe_machine

HERE = Path(__file__).parent
CORES = count_cores()
NODES = 16
MARK = "PEERS_RUN"  # environment variable by which all processes of a run are found
LONGEST = 600  # seconds of a command
TASKS = {"ring": "D-PSGD on a ring, 16 nodes", "fedavg": "FedAvg, 100 clients, 5 local epochs a round"}


@dataclass
class Case:
    """A program at work on a task."""

    task: str
    name: str
    package: str
    processes: int = 1
    threads: tuple[int, ...] = (1,)
    """Threads of a process; the fastest of several is in the table. Empty: lightning-idkd, which chooses itself."""

    @property
    def script(self) -> Path:
        return HERE / f"{self.task}_{self.name}.{'py' if self.threads else 'yaml'}"


CASES = [
    Case("ring", "idkd", "lightning-idkd", threads=()),
    Case("ring", "decent_dp", "decent-dp", processes=NODES),
    Case("ring", "gossipy", "gossipy-dfl", threads=tuple({1, CORES})),
    Case("ring", "fluke", "fluke-fl", threads=tuple({1, CORES})),
    Case("ring", "decentralizepy", "decentralizepy"),
    Case("ring", "p2pfl", "p2pfl"),
    Case("fedavg", "idkd", "lightning-idkd", threads=()),
    Case("fedavg", "flower", "flwr"),
    Case("fedavg", "blazefl", "blazefl"),
]


@dataclass
class Result:
    """What the runs of a case took; a list has a value for every turn."""

    case: Case
    python: str = ""
    version: str = ""
    threads: int | None = None
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    failure: str = ""


# ---------------------------------------------------------------------- environments


def find_python(requirements: str) -> str:
    """This Python, or a newer one where the first line of the requirements asks for it."""
    first = requirements.partition("\n")[0]
    if not first.startswith("# python >= "):
        return sys.executable
    least = tuple(int(part) for part in first.removeprefix("# python >= ").partition(";")[0].split("."))
    if sys.version_info >= least:
        return sys.executable
    for name in (os.environ.get("PEERS_PYTHON"), "python3.14", "python3.13", "python3.12"):
        if name and subprocess.run([shutil.which(name) or "false", "-V"], capture_output=True).returncode == 0:
            return name
    raise SystemExit(f"needs Python {'.'.join(map(str, least))}; set PEERS_PYTHON to its path")


def make_environment(case: Case, folder: Path) -> str:
    """The Python of a peer's environment, which is made if its requirements have changed."""
    if not case.threads:
        return sys.executable
    file, home = HERE / f"{case.name}.txt", folder / case.name
    requirements, done = file.read_text(), home / "requirements.txt"
    python = home / "bin" / "python"
    if done.exists() and done.read_text() == requirements:
        return str(python)
    base = find_python(requirements)
    subprocess.run([base, "-m", "venv", "--clear", "--without-pip", str(home)], check=True)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "-r", str(file)]
    (site,) = home.glob("lib/python*/site-packages")
    if base != sys.executable:
        install += ["--no-deps", "--ignore-installed", f"torch=={version('torch').partition('+')[0]}"]
    (site / "of_run.pth").write_text(sysconfig.get_path("purelib"))
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        raise RuntimeError(f"not installed: {find_last_line(installed.stderr)}")
    done.write_text(requirements)
    return str(python)


# ---------------------------------------------------------------------- one run


class Memory(threading.Thread):
    """Samples the memory of all processes with a mark and of their children: the sum of proportional set sizes."""

    def __init__(self, mark: str):
        super().__init__(daemon=True)
        self.mark, self.peak, self.ours, self.ended = f"{MARK}={mark}".encode(), 0, set(), threading.Event()

    def find(self) -> set[int]:
        alive = set()
        for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
            with contextlib.suppress(OSError):
                pid, parent = int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if pid in self.ours or parent in self.ours or self.mark in (folder / "environ").read_bytes():
                    self.ours.add(pid)
                    alive.add(pid)
        self.ours = alive
        return alive

    def run(self) -> None:
        while not self.ended.is_set():
            started, total = time.perf_counter(), 0
            for pid in self.find():
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in fields if line.startswith("Pss:"))
            self.peak = max(self.peak, 1024 * total)
            self.ended.wait(max(0.5, 20 * (time.perf_counter() - started)))  # takes at most 5 % of a core

    def end(self) -> int:
        """Stop, and end processes that are left."""
        self.ended.set()
        self.join()
        for pid in self.find():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.peak


def run_once(result: Result, options: argparse.Namespace) -> tuple[dict, float, int]:
    """The line that a script prints, seconds of the whole command, and peak memory in bytes.

    Raises:
        RuntimeError: the command failed; the text is the end of its output.
    """
    case, threads = result.case, result.threads
    logs, work = options.folder / "logs", options.folder / "work" / case.name
    logs.mkdir(exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    mark = uuid.uuid4().hex
    paths = [str(HERE), *([os.environ["PYTHONPATH"]] if not case.threads and "PYTHONPATH" in os.environ else [])]
    environment = os.environ | {
        MARK: mark,
        "IDKD_CACHE": str(options.folder / "cache"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PEERS_STEPS": str(options.steps),
        "PEERS_ROUNDS": str(options.rounds),
    }
    environment.pop("OMP_NUM_THREADS", None)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if not case.threads:
        epochs = options.steps // 6 if case.task == "ring" else 5 * options.rounds
        arguments = ["-m", "lightning_idkd", "fit", "--config", str(case.script), "--run.dir", str(work)]
        arguments += ["--train.epochs", str(epochs), "--seed", str(len(result.rates))]
    elif case.processes > 1:
        arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
        arguments += [str(case.script)]
    else:
        arguments = [str(case.script)]
    memory, started = Memory(mark), time.perf_counter()
    log = logs / f"{case.task}_{case.name}.txt"
    with log.open("w") as output:
        process = subprocess.Popen([result.python, *arguments], cwd=work, env=environment, stdout=output, stderr=output)
        memory.start()
        try:
            process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
        seconds = time.perf_counter() - started
        peak = memory.end()
    text = log.read_text(errors="replace")
    if not case.threads and process.returncode == 0:
        return read_metrics(work), seconds, peak
    lines = [line[line.index('{"samples"') :] for line in text.splitlines() if '{"samples"' in line]
    if not lines:
        raise RuntimeError(f"{find_last_line(text)} (after {seconds:.0f} s; {log})")
    return json.loads(lines[-1]), seconds, peak


def find_last_line(text: str) -> str:
    return (text.strip() or "no output").splitlines()[-1]


def read_metrics(folder: Path) -> dict:
    """What the scripts of peers print, from a run of lightning-idkd: the steps after its first evaluation."""
    (file,) = folder.glob("*/*-s*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    samples = [16 * len(line["per_node"]["accuracy"]) * line["step"] for line in lines]
    seconds = [count / line["throughput/samples_per_second"] for count, line in zip(samples, lines, strict=True)]
    accuracy = lines[-1]["accuracy/node_mean"]
    return {"samples": samples[-1] - samples[0], "seconds": seconds[-1] - seconds[0], "accuracy": accuracy}


def measure(cases: list[Case], options: argparse.Namespace) -> list[Result]:
    """All cases in every turn, with each of their numbers of threads."""
    shutil.rmtree(options.folder / "cache", ignore_errors=True)  # engines may have been timed beside other work
    short = argparse.Namespace(**vars(options) | {"steps": 36, "rounds": 2})
    results = [Result(case, threads=threads) for case in cases for threads in case.threads or (None,)]
    for result in results:
        try:
            result.python = make_environment(result.case, options.folder)
            result.version = find_version(result)
            if result.threads is None:  # lightning-idkd times its engines once a machine
                run_once(result, short)
        except (SystemExit, subprocess.CalledProcessError, RuntimeError) as e:
            result.failure = str(e)
            print(f"{result.case.script.name}: {e}", file=sys.stderr, flush=True)
    for _ in range(options.turns):
        for result in results:
            if result.failure:
                continue
            try:
                line, seconds, peak = run_once(result, options)
            except RuntimeError as e:
                result.failure = str(e)
                print(f"{result.case.script.name}: {e}", file=sys.stderr, flush=True)
                continue
            result.rates.append(line["samples"] / line["seconds"])
            result.seconds.append(seconds)
            result.memory.append(peak)
            result.accuracies.append(line["accuracy"])
            rate = f"{result.rates[-1]:,.0f} samples/s, {seconds:.0f} s in all"
            print(f"{result.case.script.name}, {result.threads or 'own'} threads: {rate}", file=sys.stderr, flush=True)
    return results


def keep_fastest(results: list[Result]) -> list[Result]:
    """The fastest of a program's numbers of threads, and of those that failed the first."""
    best: dict[tuple[str, str], Result] = {}
    for result in results:
        key, rate = (result.case.task, result.case.name), statistics.median(result.rates or [0])
        if key not in best or rate > statistics.median(best[key].rates or [0]):
            best[key] = result
    return list(best.values())


def find_version(result: Result) -> str:
    code = f"from importlib.metadata import version; print(version({result.case.package!r}))"
    return subprocess.run([result.python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


# ---------------------------------------------------------------------- the table


def count_lines(text: str) -> int:
    """Lines that a user writes: not empty, no comment, no part of the measurement and no first docstring."""
    if text.startswith('"""'):
        text = text[text.index('"""', 3) + 3 :]
    count, measuring = 0, False
    for line in map(str.strip, text.splitlines()):
        if line.startswith("# ---"):
            measuring = line == "# --- measuring"
        elif line and not line.startswith("#") and not measuring:
            count += 1
    return count


def format_table(results: list[Result]) -> str:
    """The rows of a task, the fastest first; ratios are those of lightning-idkd to the others."""
    head = ["program", "samples/s", "least to most", "ours over theirs", "whole command", "theirs over ours"]
    head += ["peak memory", "lines", "accuracy"]
    rows = [head, ["---"] * len(head)]
    done = [result for result in results if result.rates]
    own = next((result for result in done if result.case.name == "idkd"), None)
    median = statistics.median
    for result in sorted(done, key=lambda result: -median(result.rates)):
        rate, seconds = median(result.rates), median(result.seconds)
        ratios = [f"{median(own.rates) / rate:.1f}", f"{seconds / median(own.seconds):.1f}"] if own else ["", ""]
        threads = f", {result.threads} threads" if result.threads and result.threads > 1 else ""
        rows.append(
            [
                f"{result.case.package} {result.version}{threads}",
                f"{rate:,.0f}",
                f"{min(result.rates):,.0f} to {max(result.rates):,.0f}",
                ratios[0],
                f"{seconds:.0f} s",
                ratios[1],
                f"{median(result.memory) / 2**30:.2f} GiB",
                str(count_lines(result.case.script.read_text())),
                f"{100 * median(result.accuracies):.1f} %",
            ]
        )
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    failures = [f"{result.case.package}: {result.failure}" for result in results if result.failure]
    return "\n\n".join([text, *failures])


def describe() -> str:
    processor, _cores, instructions, torch_version, _device = describe_machine()
    software = f"Python {platform.python_version()}, torch {torch_version}"
    return f"{processor}, {CORES} cores, {instructions}, {software}, {datetime.now(timezone.utc):%Y-%m-%d}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=lambda path: Path(path).absolute(), help="of environments and logs")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=sorted({case.name for case in CASES}))
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="of a node on the ring")
    parser.add_argument("--rounds", type=int, default=10, help="of FedAvg")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    results = keep_fastest(measure([case for case in CASES if case.name in options.only], options))
    tables = [describe()]
    for task, title in TASKS.items():
        if chosen := [result for result in results if result.case.task == task]:
            tables += [f"**{title}**", format_table(chosen)]
    text = "\n\n".join(tables)
    (options.folder / "table.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
