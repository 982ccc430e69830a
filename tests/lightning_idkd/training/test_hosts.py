"""Two hosts, here processes in folders of their own, are one run, and tell of a mistake or a death in one sentence."""

import os
import signal
import subprocess
import sys
import time

import pytest
from interrupts import InterruptAt
from ports import free_ports
from short_runs import SHORT, checkpoint, extra, latest, lines, same

from lightning_idkd.cli import main

FAULTS = "[{class_path: MessageLoss, init_args: {p: 0.2, told: false}}]"


class Hosts:
    """Starts a command on two hosts, each with a folder and a cache of its own."""

    def __init__(self, folder, config):
        self.folders = [folder / "h1", folder / "h2"]
        self.config, self.processes = config, []
        for place in self.folders:
            place.mkdir()

    def start(self, *arguments, own=((), ()), torchrun=False):
        """Start it, by hand or by an agent of torchrun on every host; ``own`` are arguments of each host."""
        [port] = map(str, free_ports(1))
        common = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        if torchrun:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
            agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
            program = [*agent, "-m", "lightning_idkd"]
        else:
            program = [sys.executable, "-m", "lightning_idkd"]
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        self.processes = []
        for rank, place in enumerate(self.folders):
            env = os.environ | common | {"SLURMD_NODENAME": f"h{rank + 1}", "IDKD_CACHE": str(place)}
            if not torchrun:
                env["RANK"] = str(rank)
            command = [*program, "fit", "--config", str(self.config), *SHORT,
                       "--run.dir", "runs", "--run.hosts", "2", *arguments, *own[rank]]  # fmt: skip
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, cwd=place, env=env, **pipes))

    def wait(self):
        """The exit status of each, what each printed, and its errors."""
        said = [process.communicate(timeout=150) for process in self.processes]
        return [p.returncode for p in self.processes], [out for out, _ in said], [err for _, err in said]


@pytest.fixture
def hosts(tmp_path, configs):
    hosts = Hosts(tmp_path, configs / "ring_digits.yaml")
    yield hosts
    for process in hosts.processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM if "torch.distributed.run" in process.args else signal.SIGKILL)


@pytest.fixture(scope="module")
def one_process(request, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one process")
    config = str(request.config.rootpath / "configs" / "ring_digits.yaml")
    given = [*SHORT, "--faults", FAULTS, *extra(InterruptAt, steps=[]), "--run.dir", str(folder)]
    assert main(["fit", "--config", config, *given]) == 0
    return latest(folder)


@pytest.mark.slow
def test_two_hosts_continue_a_run_of_one_process_without_a_folder_in_common(hosts, configs, one_process):
    """The first host has the run, which stopped inside an epoch after an exchange; the second one never sees a file."""
    stop = ["--faults", FAULTS, *extra(InterruptAt, steps=[80])]
    runs = hosts.folders[0] / "runs"
    assert main(["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT, *stop, "--run.dir", str(runs)]) == 130
    hosts.start("--run.resume", "auto", *stop)
    status, out, err = hosts.wait()
    assert status == [0, 0], err
    assert "continued at epoch" in out[0]
    assert (out[1], err) == ("", ["", ""])
    assert not (hosts.folders[1] / "runs").exists()
    assert same(checkpoint(one_process), checkpoint(latest(runs))) is None
    assert lines(one_process) == lines(latest(runs))


@pytest.mark.slow
def test_two_agents_of_torchrun_give_the_bits_of_one_process(hosts, one_process):
    """The agents agree which of them has process 0, and only its host writes a run."""
    hosts.start("--faults", FAULTS, *extra(InterruptAt, steps=[]), torchrun=True)
    status, out, err = hosts.wait()
    assert status == [0, 0], err
    assert sum("accuracy" in text for text in out) == 1, out
    [run] = [latest(place / "runs") for place in hosts.folders if (place / "runs").exists()]
    assert same(checkpoint(one_process), checkpoint(run)) is None
    assert lines(one_process) == lines(run)


@pytest.mark.slow
def test_a_mistake_on_one_host_names_it_and_ends_both(hosts):
    hosts.start(own=((), ("--data.public.samples", "200")))
    status, _, err = hosts.wait()
    assert status == [2, 2]
    told = [text for text in err if text]
    assert len(told) == 1
    assert told[0].strip() == (
        "error: data.public: the public samples on host h2 are 200 images, not 300 as on host h1"
    )
    assert not (hosts.folders[0] / "runs").exists()


@pytest.mark.slow
def test_a_host_that_dies_is_named_by_the_other(hosts):
    hosts.start("--train.epochs", "4000", "--distillation", "null", "--train.evaluate_every", "1000")
    first, second = hosts.processes
    end = time.monotonic() + 100
    while not list(hosts.folders[0].glob("runs/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < end, first.poll()
        time.sleep(0.1)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    status, _, err = hosts.wait()
    assert time.monotonic() - killed < 60
    assert status == [1, -signal.SIGKILL]
    assert err[0].startswith(
        "error: process 1 on host h2 died or cannot be reached, so this run ends; last checkpoint: "
    )
    assert err[0].count("\n") == 1
