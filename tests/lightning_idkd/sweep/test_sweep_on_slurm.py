"""Sweeps on SLURM: what is submitted, which jobs are followed, what the table says; and a whole sweep on a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from short_runs import lines
from slurm import Cluster, find_obstacle
from submitit import AutoExecutor

from lightning_idkd.cli import main
from lightning_idkd.sweep import plan, slurm
from lightning_idkd.sweep.job import Training

METHODS = {"values": [{"class_path": name, "init_args": {"start": 2}} for name in ("VanillaKD", "IDKD")]}
SBATCH = """#!/bin/sh
number=$(($(ls "$0".script* 2>/dev/null | wc -l) + 1))
cp "$1" "$0.script$number"
env > "$0.env$number"
echo "Submitted batch job $number"
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Stands for SLURM: sbatch keeps the scripts, and squeue prints a file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", '#!/bin/sh\ncat "$0.answer"\n'), ("srun", "#!/bin/sh\n")):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "squeue.answer").write_text("")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "INTERVAL", 0.01)
    monkeypatch.setattr(slurm, "PATIENCE", 0.0)
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Runs the command, with all folders in ``tmp_path``."""
    return lambda path, *options: main(["sweep", str(path), "--dir", str(tmp_path / "runs"), "--on", "slurm", *options])


def flags(script: Path) -> dict[str, str]:
    """The options of sbatch in a script."""
    words = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def runner(path, tmp_path, parameters=None):
    cells = plan.plan_cells(path, str(tmp_path / "runs"))
    cells = plan.share_initial_trainings(cells, str(tmp_path / "runs"))
    return slurm.SlurmRunner(cells, 3, "some", tmp_path / "runs" / "some", parameters or {})


class TestSubmission:
    def test_cells_are_an_array_that_waits_for_the_initial_training(self, file, programs, sweep, capsys):
        assert sweep(file({"distillation": METHODS}), "--jobs", "2") == 1
        first, cells = flags(programs / "sbatch.script1"), flags(programs / "sbatch.script2")
        assert "array" not in first
        assert "dependency" not in first
        assert cells["array"] == "0-1%2"
        assert cells["dependency"] == "afterany:1"
        assert cells["time"] == "720"
        assert "requeue" in cells
        said = capsys.readouterr().out
        assert "job 1 has written nothing" in said
        assert "the same command continues the sweep" in said

    def test_options_of_sbatch_reach_it(self, file, programs, sweep):
        options = ["--slurm.partition", "gpu", "--slurm.gpus-per-node", "2", "--slurm.time", "1-00:30:00",
                   "--slurm.cpus_per_task", "3"]  # fmt: skip
        sweep(file({"seed": {"values": [0, 1]}}), *options)
        given = flags(programs / "sbatch.script1")
        assert (given["partition"], given["gpus-per-node"], given["time"]) == ("gpu", "2", str(24 * 60 + 30))
        assert given["array"] == "0-1%1"
        assert "srun --unbuffered" in (script := (programs / "sbatch.script1").read_text())
        assert "--cpus-per-task=3" in script.split("srun ")[1]

    def test_a_job_has_a_task_for_every_process_of_a_run(self, file, programs, sweep):
        sweep(file({"run.hosts": {"value": 2}, "run.devices": {"value": 2}}))
        given = flags(programs / "sbatch.script1")
        assert (given["nodes"], given["ntasks-per-node"]) == ("2", "2")

    def test_a_job_does_not_inherit_the_job_that_submits_it(self, file, programs, sweep, monkeypatch):
        for key, value in {"SLURM_JOB_ID": "5", "SLURM_MEM_PER_NODE": "100", "SLURM_CONF": "/etc/a"}.items():
            monkeypatch.setenv(key, value)
        sweep(file({"seed": {"value": 0}}))
        inherited = (programs / "sbatch.env1").read_text()
        assert "SLURM_CONF=/etc/a" in inherited
        assert "SLURM_JOB_ID" not in inherited
        assert "SLURM_MEM_PER_NODE" not in inherited
        assert os.environ["SLURM_JOB_ID"] == "5"

    def test_done_cells_are_skipped_and_jobs_in_the_queue_followed(self, file, programs, tmp_path, monkeypatch):
        """Of four cells one is done, one runs, one was lost and one is new. The initial training runs."""
        path = file({"data.public.samples": {"values": [100, 200]}, "distillation": METHODS})
        over = runner(path, tmp_path)
        done, runs, lost, new, training = over.cells
        for cell, job in ((runs, "7_1"), (lost, "7_2"), (training, "9")):
            slurm.job_file(cell).parent.mkdir(parents=True, exist_ok=True)
            slurm.job_file(cell).write_text(job)
        (programs / "squeue.answer").write_text("7_1|RUNNING|None\n7_2|NODE_FAIL|None\n9|RUNNING|None\n")
        monkeypatch.setattr(plan.Cell, "is_done", lambda cell: cell is done)
        monkeypatch.setattr(slurm.SlurmRunner, "follow", lambda *_: None)
        assert not over.run()
        assert [p.name for p in programs.glob("sbatch.script*")] == ["sbatch.script1"]
        assert flags(programs / "sbatch.script1")["dependency"] == "afterany:9"
        assert [over.ids[cell.name] for cell in (runs, lost, new)] == ["7_1", "1_0", "1_1"]
        assert slurm.job_file(lost).read_text() == "1_0\n"
        assert done.state == "done"

    def test_ctrl_c_leaves_the_jobs(self, file, programs, sweep, monkeypatch, capsys):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(slurm.SlurmRunner, "follow", interrupt)
        assert sweep(file({"distillation": METHODS})) == 1
        said = capsys.readouterr().out
        assert "the jobs go on; the same command follows them again, and scancel 1 2 ends them" in said


class TestStates:
    @pytest.fixture
    def over(self, file, tmp_path):
        over = runner(file({"distillation": METHODS}), tmp_path)
        over.ids = {cell.name: f"7_{i}" for i, cell in enumerate(over.cells)}
        return over

    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            (("PENDING", "Priority"), "pending"),
            (("PENDING", "PartitionTimeLimit"), "pending (PartitionTimeLimit)"),
            (("RUNNING", "None"), "running"),
            (("COMPLETING", "None"), "running"),
            (("NODE_FAIL", "None"), "lost: node_fail (job 7_2)"),
            (("TIMEOUT", "TimeLimit"), "lost: timeout (job 7_2)"),
            (("OUT_OF_MEMORY", "None"), "lost: out_of_memory (job 7_2)"),
        ],
    )
    def test_are_those_of_the_jobs(self, over, entry, expected):
        over.queue = {"7_2": entry}
        assert over.find_state(over.cells[-1]) == expected

    def test_a_failed_training_says_why(self, over):
        training, job = over.cells[-1], {"7_2": ("FAILED", "NonZeroExitCode")}
        training.log.parent.mkdir(parents=True)
        training.log.write_text("step 1\nerror: train.lr: too large\n")
        over.queue = job
        assert over.find_state(training) == f"failed: train.lr: too large ({training.log})"

    def test_a_job_that_fails_before_the_training_says_why(self, over):
        over.queue = {"7_2": ("FAILED", "NonZeroExitCode")}
        over.folder.mkdir(parents=True)
        text = "No module named lightning_idkd\nsrun: error: h1: task 0: Exited with exit code 1\n"
        (over.folder / "7_2_0_log.err").write_text(text)
        assert "No module named lightning_idkd" in over.find_state(over.cells[-1])

    def test_cells_of_a_failed_initial_training_say_so(self, over):
        over.queue = {f"7_{i}": ("FAILED", "NonZeroExitCode") for i in range(3)}
        for cell in over.cells:
            cell.state = "running"
        assert over.update()
        assert over.cells[0].state == "failed: its initial training failed"

    def test_files_of_a_completed_job_may_come_late(self, over, monkeypatch):
        """SLURM forgets jobs, so a job that it does not know counts as completed."""
        training = over.cells[-1]
        training.state = "running"
        assert over.find_state(training) == "running"
        monkeypatch.setattr(plan.Cell, "is_done", lambda cell: True)
        assert over.find_state(training) == "done"
        monkeypatch.setattr(plan.Cell, "is_done", lambda cell: False)
        monkeypatch.setattr(slurm, "PATIENCE", 0.0)
        assert over.find_state(training).startswith("failed")

    def test_slurm_may_be_away_for_a_while(self, over, programs):
        (programs / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        over.queue = {f"7_{i}": ("RUNNING", "None") for i in range(3)}
        assert not over.update()
        assert {cell.state for cell in over.cells} == {"running"}


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("12:00:00", 720), ("0:01:01", 2), ("2-12", 3600), ("1-01:30", 1530),
     ("1-00:00:00", 1440)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text, minutes):
    assert slurm.count_minutes("slurm.time", text) == minutes


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--slurm.partitoin", "gpu"], ["slurm.partitoin", "'partition'"]),
            (["--slurm.gpus-per-node", "two"], ["gpus_per_node", "two"]),
            (["--slurm.time", "long"], ["slurm.time: long", "12:00:00"]),
            (["--slurm.nodes", "2"], ["slurm.nodes", "run.hosts"]),
            (["--slurm.additional_parameters", "3"], ["slurm.additional_parameters", "a mapping"]),
        ],
    )
    def test_of_options(self, file, programs, sweep, tmp_path, capsys, options, words):
        assert sweep(file({"seed": {"value": 0}}), *options) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        for word in words:
            assert word in said
        assert not (tmp_path / "runs").exists()

    def test_options_without_a_cluster(self, file, capsys):
        assert main(["sweep", str(file({"seed": {"value": 0}})), "--slurm.partition", "gpu"]) == 2
        assert "slurm.partition: has no effect without --on slurm" in capsys.readouterr().err

    def test_submitit_is_missing(self, file, programs, sweep, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "submitit", None)
        assert sweep(file({"seed": {"value": 0}})) == 2
        assert "pip install lightning-idkd[slurm]" in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()

    def test_no_slurm_on_this_machine(self, file, sweep, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert sweep(file({"seed": {"value": 0}})) == 2
        assert "there is no sbatch in the PATH" in capsys.readouterr().err

    @pytest.mark.parametrize("program", ["sbatch", "squeue"])
    def test_slurm_refuses(self, file, programs, sweep, capsys, program):
        (programs / program).write_text("#!/bin/sh\necho 'error: invalid partition specified: gpu' >&2\nexit 1\n")
        assert sweep(file({"seed": {"value": 0}})) == 2
        assert "error: invalid partition specified: gpu" in capsys.readouterr().err
        assert not list(programs.glob("sbatch.script*"))

    def test_cells_of_different_shapes(self, file, programs, sweep, capsys):
        assert sweep(file({"run.devices": {"values": [1, 2]}})) == 2
        assert "run.hosts and run.devices: [(1, 1), (1, 2)] given" in capsys.readouterr().err
        assert not list(programs.glob("sbatch.script*"))


class TestTraining:
    def test_continues_after_the_time_limit(self, tmp_path):
        """SLURM's signal goes to the job and to the training, which ignores it and gets another one from the job."""
        code = (
            "import os, pathlib, signal, sys, time\n"
            "signal.signal(signal.SIGUSR1, lambda *_: print('saved') or sys.exit(130))\n"
            "file = pathlib.Path('started')\n"
            "if file.exists():\n    print('continued')\n    sys.exit()\n"
            "file.touch()\n"
            "for process in (os.getpid(), os.getppid()):\n    os.kill(process, signal.SIGUSR2)\n"
            "time.sleep(60)\n"
        )
        executor = AutoExecutor(folder=tmp_path / "jobs", cluster="local")
        command = ["env", "--chdir", str(tmp_path), sys.executable, "-c", code]
        assert executor.submit(Training(command, tmp_path / "log.txt")).result() is None
        assert (tmp_path / "log.txt").read_text() == "saved\ncontinued\n"

    def test_is_not_repeated_if_the_signal_finds_it_finished(self, tmp_path):
        code = "import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit()); print(flush=True)"
        training = Training([], tmp_path / "log.txt")
        training.process = subprocess.Popen([sys.executable, "-c", f"{code}; signal.pause()"], stdout=subprocess.PIPE)
        with training.process as process:
            process.stdout.readline()
            assert training.checkpoint() is None
        assert process.returncode == 0
        assert training.checkpoint() is None

    def test_raises_if_it_fails(self, tmp_path):
        with pytest.raises(RuntimeError, match="status 1"):
            Training(["false"], tmp_path / "log.txt")()


def wait_until(condition, seconds=150):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.skipif(find_obstacle(), reason=str(find_obstacle()))
def test_a_sweep_that_loses_jobs_ends_like_the_runs_of_one_machine(file, sweep, tmp_path, monkeypatch):
    """One job is killed and one gets the signal of the time limit; then Ctrl-C, and the same command again."""
    samples, runs = {"values": [100, 200]}, tmp_path / "runs"
    path = file({"data.public.samples": samples, "distillation": METHODS, "run.threads": {"value": 1}})
    command = ["sweep", str(path), "--dir", str(runs), "--on", "slurm", "--jobs", "2"]
    killed, signalled, *others = (cell.log.parent for cell in plan.plan_cells(path, str(runs)))
    (tmp_path / "slurm").mkdir()
    with Cluster(tmp_path / "slurm") as cluster:
        process = subprocess.Popen([sys.executable, "-m", "lightning_idkd", *command], env=cluster.env,
                                   stdout=subprocess.PIPE, text=True)  # fmt: skip

        def state(job):
            return cluster.call("squeue", "--noheader", "--states=all", "--format=%T", "--jobs", job)

        wait_until((killed / "log.txt").exists)
        cluster.call("scancel", "--signal", "KILL", "2_0")
        wait_until((signalled / "log.txt").exists)
        # while a job starts, scancel delivers the signal and goes on trying to
        cluster.call("timeout", "1", "scancel", "--signal", "USR2", "2_1", check=False)
        wait_until(lambda: state("2_0") == "CANCELLED" and state("2_1") == "PENDING")
        cluster.call("scontrol", "update", "JobId=2_1", "StartTime=now")  # SLURM would wait for two minutes
        process.send_signal(signal.SIGINT)
        assert "the jobs go on" in process.communicate(timeout=60)[0]
        for key in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(key, cluster.env[key])
        monkeypatch.setattr(slurm, "INTERVAL", 0.5)
        assert sweep(path, "--jobs", "2") == 0
    jobs = [(cell / "slurm_job.txt").read_text().strip() for cell in (killed, signalled, *others)]
    assert jobs[0] != "2_0"
    assert jobs[1:] == ["2_1", "2_2", "2_3"]
    for cell in plan.plan_cells(path, str(tmp_path / "alone")):
        assert main(["fit", *cell.arguments]) == 0
        assert lines(cell.folder.path) == lines(runs / "some" / cell.name / "latest")
