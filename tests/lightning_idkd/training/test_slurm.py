"""On a SLURM of two hosts, a job that is asked to make room goes on by itself, with the bits of one process."""

import sys
import time
from pathlib import Path

import pytest
from short_runs import SHORT, checkpoint, latest, lines, same
from slurm import Cluster, find_obstacle

from lightning_idkd.cli import main

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(find_obstacle(), reason=str(find_obstacle()))]
LONG = ["--train.epochs", "60", "--train.evaluate_every", "20", "--distillation.start", "30"]


@pytest.fixture
def cluster(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    with Cluster(folder) as cluster:
        cluster.env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        cluster.env["PATH"] = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
        yield cluster


def test_a_job_that_is_signalled_saves_is_requeued_and_ends_like_one_process(cluster, configs, tmp_path):
    config, runs, out = str(configs / "ring_digits.yaml"), tmp_path / "runs", tmp_path / "job.out"
    command = ["--config", config, *SHORT, *LONG, "--run.dir", str(runs)]
    job = cluster.call("sbatch", "--parsable", "--nodes", "2", "--output", str(out), str(configs / "slurm.sbatch"),
                       *command, cwd=tmp_path)  # fmt: skip

    def wait_until(condition):
        end = time.monotonic() + 150
        while not condition():
            assert time.monotonic() < end, out.read_text() if out.exists() else "no output"
            time.sleep(0.3)

    state = lambda: cluster.call("squeue", "-h", "-o", "%T", "-j", job, check=False)  # noqa: E731
    wait_until(lambda: list(runs.glob("*/*/checkpoints/last.ckpt")))
    cluster.call("scancel", "-s", "USR1", job)
    signalled = time.monotonic()
    wait_until(lambda: state() == "PENDING")
    assert time.monotonic() - signalled < 30
    assert "stopping, with a checkpoint" in out.read_text()
    assert not (latest(runs) / "summary.json").exists()
    # SLURM would wait for two minutes; at once, a host may still refuse the job's credential as revoked
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    wait_until(lambda: (latest(runs) / "summary.json").exists() and state() == "")

    assert main(["fit", "--config", config, *SHORT, *LONG, "--run.dir", str(tmp_path / "one")]) == 0
    assert same(checkpoint(latest(tmp_path / "one")), checkpoint(latest(runs))) is None
    assert lines(latest(tmp_path / "one")) == lines(latest(runs))
