"""Commands in processes of their own, forked from one that has imported torch: most of a short run's time is that."""

from __future__ import annotations

import os
import sys
from multiprocessing import get_context
from pathlib import Path

from ports import free_ports

from lightning_idkd.cli import main

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload([f"lightning_idkd.training.{module}" for module in ("build", "fit", "launch")])


def run(arguments: list[str], folder: Path, env: dict[str, str]) -> None:
    """Run a command in ``folder``, and write there what it prints: ``out`` and ``err``."""
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
    os.environ.update(env)
    os.chdir(folder)
    sys.exit(main(arguments))


class Hosts:
    """Starts one command on several hosts, as a user does by hand; each has a folder ``h1``, ``h2``, ...

    Args:
        cache: the folder of the cache, relative to that of the host; None: that of the tests.
    """

    def __init__(self, folder: Path, count: int, cache: str | None = None):
        self.folders = [folder / f"h{number + 1}" for number in range(count)]
        self.cache, self.processes = cache, []
        for place in self.folders:
            place.mkdir(parents=True)

    def start(self, arguments: list[str], own: tuple = ()) -> None:
        """Start the command; ``own`` are further arguments of every host."""
        [port] = free_ports(1)
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(self.folders))}
        self.processes = []
        for rank, place in enumerate(self.folders):
            cache = os.environ["IDKD_CACHE"] if self.cache is None else str(place / self.cache)
            env = common | {"RANK": str(rank), "SLURMD_NODENAME": place.name, "IDKD_CACHE": cache}
            given = [*arguments, "--run.hosts", str(len(self.folders)), *(own[rank] if own else ())]
            self.processes.append(FORKS.Process(target=run, args=(given, place, env)))
            self.processes[-1].start()

    def wait(self, seconds: float = 150) -> tuple[list, list[str], list[str]]:
        """The exit status of each host (negative: the signal that killed it), what each printed, and its errors."""
        for process in self.processes:
            process.join(seconds)
        said = ([(place / name).read_text() for place in self.folders] for name in ("out", "err"))
        return [process.exitcode for process in self.processes], *said

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            process.kill()
            process.join()


def fit_on_two_hosts(arguments: list[str], folder: Path) -> Path:
    """Run ``idkd fit`` on two hosts; returns the folder of the first one's runs."""
    hosts = Hosts(folder, 2)
    try:
        hosts.start(["fit", *arguments, "--run.dir", "runs"])
        status, _, err = hosts.wait(seconds=300)
    finally:
        hosts.end()
    assert status == [0, 0], err
    return hosts.folders[0] / "runs"
