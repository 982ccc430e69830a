"""Two hosts, here processes in folders of their own, are one run, and tell of a mistake or a death in one sentence."""

import os
import signal
import subprocess
import sys
import time

import pytest
from forked import Hosts
from interrupts import InterruptAt
from ports import free_ports
from short_runs import SHORT, checkpoint, extra, latest, lines, same

from lightning_idkd.cli import main

FAULTS = "[{class_path: MessageLoss, init_args: {p: 0.2, told: false}}]"


@pytest.fixture
def hosts(tmp_path, request):
    hosts = Hosts(tmp_path, 2, cache=getattr(request, "param", None))
    yield hosts
    hosts.end()


@pytest.fixture
def command(configs):
    return ["fit", "--config", str(configs / "ring_digits.yaml"), *SHORT, "--run.dir", "runs"]


@pytest.fixture(scope="module")
def one_process(request, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("one process")
    config = str(request.config.rootpath / "configs" / "ring_digits.yaml")
    given = [*SHORT, "--faults", FAULTS, *extra(InterruptAt, steps=[]), "--run.dir", str(folder)]
    assert main(["fit", "--config", config, *given]) == 0
    return latest(folder)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["cache"], indirect=True)
def test_two_hosts_continue_a_run_of_one_process_without_a_folder_in_common(hosts, command, one_process):
    """The first host has the run, which stopped inside an epoch after an exchange; the second one never sees a file."""
    stop = ["--faults", FAULTS, *extra(InterruptAt, steps=[80])]
    runs = hosts.folders[0] / "runs"
    assert main([*command, *stop, "--run.dir", str(runs)]) == 130
    hosts.start([*command, *stop, "--run.resume", "auto"])
    status, out, err = hosts.wait()
    assert status == [0, 0], err
    assert "continued at epoch" in out[0]
    assert (out[1], err) == ("", ["", ""])
    assert not (hosts.folders[1] / "runs").exists()
    assert same(checkpoint(one_process), checkpoint(latest(runs))) is None
    assert lines(one_process) == lines(latest(runs))


@pytest.mark.slow
def test_two_agents_of_torchrun_give_the_bits_of_one_process(hosts, command, one_process):
    """The agents agree which of them has process 0, and only its host writes a run."""
    [port] = free_ports(1)
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "lightning_idkd"]  # fmt: skip
    given = [*agent, *command, "--run.hosts", "2", "--faults", FAULTS, *extra(InterruptAt, steps=[])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(given, cwd=place, env=env, **pipes) for place in hosts.folders]
    try:
        said = [process.communicate(timeout=300) for process in agents]
    finally:
        for process in agents:
            process.terminate()  # it ends the process that it started
    assert [process.returncode for process in agents] == [0, 0], said
    assert sum("accuracy" in out for out, _ in said) == 1, said
    [run] = [latest(place / "runs") for place in hosts.folders if (place / "runs").exists()]
    assert same(checkpoint(one_process), checkpoint(run)) is None
    assert lines(one_process) == lines(run)


@pytest.mark.slow
def test_a_mistake_on_one_host_names_it_and_ends_both(hosts, command):
    hosts.start(command, own=((), ("--data.public.samples", "200")))
    status, _, err = hosts.wait()
    assert status == [2, 2]
    told = [text for text in err if text]
    assert len(told) == 1
    assert told[0].strip() == (
        "error: data.public: the public samples on host h2 are 200 images, not 300 as on host h1"
    )
    assert not (hosts.folders[0] / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("hosts", ["/dev/null/cache"], indirect=True)
def test_processes_of_one_host_warn_once_of_a_cache_that_cannot_be_written(hosts, command):
    hosts.start([*command, "--run.until", "1"], own=(("--run.hosts", "1", "--run.devices", "2"),) * 2)
    status, _, err = hosts.wait()
    assert status == [0, 0], err
    assert [text.count("decoded samples are not kept for the next run") for text in err] == [1, 0]


@pytest.mark.slow
def test_a_host_that_dies_is_named_by_the_other(hosts, command):
    hosts.start([*command, "--train.epochs", "4000", "--distillation", "null", "--train.evaluate_every", "1000"])
    first, second = hosts.processes
    end = time.monotonic() + 100
    while not list(hosts.folders[0].glob("runs/*/*/checkpoints/last.ckpt")):
        assert time.monotonic() < end, first.exitcode
        time.sleep(0.1)
    second.kill()
    killed = time.monotonic()
    status, _, err = hosts.wait()
    assert time.monotonic() - killed < 60
    assert status == [1, -signal.SIGKILL]
    assert err[0].startswith(
        "error: process 1 on host h2 died or cannot be reached, so this run ends; last checkpoint: "
    )
    assert err[0].count("\n") == 1
